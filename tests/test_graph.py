"""Captured steps: a graph replays what the step does. With a stand-in for CUDA's graphs, and on a GPU with them."""

import copy
import math
import os
import random
import shutil
import warnings
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import GPU, agree, cases, on, outcome, run
from torch import nn

from mdistiller import config
from mdistiller.bank.inference import Inference
from mdistiller.bank.teacher import TeacherLogits
from mdistiller.dataset import Batches
from mdistiller.distillers import LogitDistiller, distiller_dict
from mdistiller.distillers.CTKD import curriculum
from mdistiller.distillers.KD import KD
from mdistiller.distillers.losses import warmup
from mdistiller.engine import graph, trainer
from mdistiller.engine.build import build_model, prepare_parts
from mdistiller.engine.graph import WARM_UP, GraphStep
from mdistiller.engine.solver import DOT, MultiStep, load_state, set_lr, sgd, state_of
from mdistiller.engine.step import Step
from mdistiller.engine.stepmode import compiled_form
from mdistiller.engine.trainer import Trainer

config.load()
METHODS = sorted(name for name, cls in distiller_dict.items() if cls.__module__.startswith("mdistiller."))
CPU = torch.device("cpu")
DRAWING = ("CRD", "MLKD")  # on the device, which is the host in these tests


def gpu(test):
    return GPU[0](GPU[1](test))


class Recording:
    """Stands in for a CUDA graph: recording does nothing, a replay does the work on what was recorded."""

    made = 0

    def __init__(self, work, beside=None):
        Recording.made += 1
        self.replay = work


def make(
    method,
    device=CPU,
    as_graph=False,
    seed=0,
    amp="none",
    dot=False,
    samples=40,
    plugin=None,
    given=None,
    policy="stop",
):
    """A Trainer of resnet14 -> resnet8 on random images; batches of 16, the last one of 8."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (samples, 32, 32, 3), dtype=torch.uint8, generator=generator)
    data = Batches(images, torch.arange(samples) % 10, (0.5,) * 3, (0.25,) * 3, 16, device, "crop_flip", seed)
    torch.manual_seed(seed)
    student, teacher = build_model("resnet8", 10), build_model("resnet14", 10)
    cfg = config.CFG.clone()
    cfg.CRD.NCE.K, cfg.CRD.FEAT.DIM = 8, 8
    extra = {"num_data": samples} if method == "CRD" else {}
    cls = plugin or distiller_dict[method]
    distiller = cls(student) if method == "NONE" else cls(student, teacher, cfg, **extra)
    distiller = prepare_parts(distiller, device).train()
    parameters = distiller.get_learnable_parameters()
    optimizer = DOT(parameters, 0.9, 5e-4, 0.075) if dot else sgd(parameters, 0.9, 5e-4)
    step = Step(distiller, optimizer, device, amp, policy)
    logits = None
    if given if given is not None else isinstance(distiller, LogitDistiller):
        logits = TeacherLogits(data, Inference(teacher, device, amp))
    made = Trainer(distiller, step, MultiStep(0.02, (2,)), data, data, 9, None, temperature="samples", teacher=logits)
    if as_graph:
        made.work = GraphStep(made.compute, distiller, device, True, *([Recording] if device == CPU else []))
    return made


def train(made, epochs):
    """The loss after every step, and the student's weights at the end."""
    losses = []
    for epoch in range(1, epochs + 1):
        made._start_epoch()
        set_lr(made.step.optimizer, made.schedule.at(epoch))
        made.step.temperatures = made.buffer
        for plan, logits in made.plans(epoch):
            before = made.meter.read().get("loss", 0.0), made.meter.images
            made.work(plan, logits, epoch)
            made.step.count(plan.shape[1], made.meter)
            means = made.meter.read()
            before = 0.0 if math.isnan(before[0]) else before[0] * before[1]
            losses.append((means["loss"] * made.meter.images - before) / plan.shape[1])
    return losses, made.distiller.student.state_dict()


@pytest.mark.parametrize("method", [name for name in METHODS if name not in DRAWING])
def test_replaying_is_stepping(method):
    """Everything that a step reads or writes lies where a graph finds it: the same weights, bit for bit but for the
    epoch's rounding, over epochs, batches of two sizes, a falling rate and a rising weight.
    """
    Recording.made = 0
    eager, replayed = (train(make(method, as_graph=as_graph), 4) for as_graph in (False, True))
    assert Recording.made == 2, "one graph for each batch size"
    assert eager[0] == pytest.approx(replayed[0], rel=1e-4)
    for key, value in eager[1].items():
        torch.testing.assert_close(replayed[1][key], value, rtol=1e-4, atol=1e-5, msg=key)


def test_the_record_is_gathered_by_replays():
    eager, replayed = make("DTKD"), make("DTKD", as_graph=True)
    for made in (eager, replayed):
        train(made, 4)
    assert torch.equal(eager.buffer.values.isnan(), replayed.buffer.values.isnan())
    torch.testing.assert_close(eager.buffer.values, replayed.buffer.values, rtol=1e-4, atol=1e-4, equal_nan=True)


class Draws(KD):
    def losses(self, logits_student, logits_teacher, target, **kwargs):
        losses = super().losses(logits_student, logits_teacher, target, **kwargs)
        return {name: value * self.draw() for name, value in losses.items()}


class Counts(KD):
    calls = 0

    def losses(self, *args, **kwargs):
        self.calls = self.calls + 1
        return super().losses(*args, **kwargs)


class Replaces(KD):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("running", torch.zeros(()))

    def losses(self, logits_student, *args, **kwargs):
        self.running = 0.9 * self.running + 0.1 * logits_student.detach().mean()
        return super().losses(logits_student, *args, **kwargs)


class CountsInAList(KD):
    def losses(self, *args, **kwargs):
        self.seen = getattr(self, "seen", {"steps": [0]})
        self.seen["steps"][0] += 1
        return super().losses(*args, **kwargs)


class Holds(KD):
    """State in an object of its own: made by `make`, changed by `step`, which gives a factor."""

    def __init__(self, *args):
        super().__init__(*args)
        self.helper = self.make()

    def losses(self, *args, **kwargs):
        factor = self.step(self.helper)
        return {name: value * factor for name, value in super().losses(*args, **kwargs).items()}


class NeedsANumber(KD):
    def losses(self, *args, epoch, **kwargs):
        if not isinstance(epoch, int):
            raise TypeError("an epoch is a number")
        return super().losses(*args, epoch=epoch, **kwargs)


def drawing(draw):
    return type("Drawing", (Draws,), {"draw": staticmethod(draw)})


def holding(make, step):
    return type("Holding", (Holds,), {"make": staticmethod(make), "step": staticmethod(step)})


def counted(helper):
    helper.n += 1
    return helper.n


def appended(helper):
    helper.append(1)
    return len(helper)


def added(helper):
    helper.add(len(helper))
    return len(helper)


def raised(helper):
    helper["meter"].values[0] += 1
    return float(helper["meter"].values[0])


REFUSED = {
    "object": (holding(lambda: SimpleNamespace(n=0), counted), "replaces helper.n"),
    "object in a dict": (holding(lambda: {"meter": SimpleNamespace(values=np.zeros(2))}, raised), "meter'].values"),
    "deque": (holding(deque, appended), "replaces helper's length"),
    "set": (holding(set, added), "replaces helper's length"),
    "own python": (holding(lambda: random.Random(0), lambda rng: rng.random()), "replaces helper's state"),
    "own numpy": (holding(lambda: np.random.default_rng(0), lambda rng: rng.random()), "replaces helper's state"),
    "own torch": (
        holding(lambda: torch.Generator().manual_seed(0), lambda rng: torch.rand((), generator=rng)),
        "replaces helper's state",
    ),
    "numpy": (drawing(lambda: np.random.rand()), "random numbers on the host"),
    "python": (drawing(lambda: random.random()), "random numbers on the host"),
    "torch": (drawing(lambda: torch.rand(())), "random numbers on the host"),
    "counter": (Counts, "replaces calls"),
    "container": (CountsInAList, "replaces seen['steps'][0]"),
    "buffer": (Replaces, "replaces running"),
    "number": (NeedsANumber, "an epoch is a number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_graph_would_not_repeat_is_found_and_stepped(case):
    plugin, reason = REFUSED[case]
    made = make("KD", as_graph=True, plugin=plugin)
    seeded = np.random.seed, random.seed, torch.manual_seed
    for seed in seeded:
        seed(0)
    graphed = train(made, 3)
    assert reason in made.work.refusal
    for seed in seeded:
        seed(0)
    eager = train(make("KD", plugin=plugin), 3)
    if case != "torch":  # building the models draws as well
        assert eager[0] == pytest.approx(graphed[0], rel=1e-4)


def test_a_capture_that_fails_leaves_the_step(monkeypatch):
    def fails(work, beside):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    made = make("DKD")
    made.work = GraphStep(made.compute, made.distiller, CPU, True, fails)
    graphed, eager = train(made, 3), train(make("DKD"), 3)
    assert "not permitted when stream is capturing" in made.work.refusal
    assert eager[0] == pytest.approx(graphed[0], rel=1e-5)


def test_a_mistake_of_the_method_is_not_hidden():
    class Wrong(KD):
        def losses(self, *args, **kwargs):
            raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        train(make("KD", as_graph=True, plugin=Wrong), 1)


def test_the_run_says_once_why_its_steps_are_no_graph(small, tmp_path, monkeypatch):
    class Fails:
        def __init__(self, work, beside):
            raise RuntimeError("no graphs here")

    monkeypatch.setattr(trainer, "GraphStep", lambda *given: GraphStep(*given, Fails))
    monkeypatch.setattr("mdistiller.engine.builder.uses_graph", lambda cfg, device: True)
    folder = run([*small, "DISTILLER.TYPE", "KD"], tmp_path)
    assert (folder / "worklog.txt").read_text().count("not as a graph: no graphs here") == 1


@pytest.mark.parametrize(("bank", "alone"), [("off", True), ("full", True), ("lazy", False), ("auto", False)])
def test_a_step_is_not_alone_beside_the_teachers_own_graph(small, tmp_path, monkeypatch, bank, alone):
    """On CUDA graphs that run at the same time would read each other's place in the generator."""
    made = []
    monkeypatch.setattr(trainer, "GraphStep", type("Kept", (GraphStep,), {}))
    monkeypatch.setattr(trainer.GraphStep, "__init__", lambda self, *given: GraphStep.__init__(self, *given, Recording))
    monkeypatch.setattr(trainer.GraphStep, "_watch", lambda self, *given: made.append(self.alone) or "seen")
    monkeypatch.setattr("mdistiller.engine.builder.uses_graph", lambda cfg, device: True)
    run([*small, "DISTILLER.TYPE", "KD", "TEACHER_BANK", bank], tmp_path, TEACHER_BANK_FOLDER=tmp_path / "banks")
    assert made == [alone]


def test_emulated_bfloat16_is_said(small, tmp_path, monkeypatch):
    words = [*small, "DISTILLER.TYPE", "NONE", "SOLVER.EPOCHS", "1"]
    said = {}
    for present in (True, False):
        monkeypatch.setattr("mdistiller.engine.builder.has_bf16", lambda device, present=present: present)
        for amp in ("none", "bf16"):
            folder = run([*words, "SOLVER.AMP", amp], tmp_path / f"{present}{amp}")
            said[present, amp] = "SOLVER.AMP none would be several times faster" in (folder / "worklog.txt").read_text()
    assert said == {(True, "none"): False, (True, "bf16"): False, (False, "none"): False, (False, "bf16"): True}


def test_steps_before_a_graph_are_as_many_as_libraries_need():
    made = make("NONE", as_graph=True)
    Recording.made = 0
    train(made, 2)  # of two batches of 16 and one of 8
    assert Recording.made == 1
    assert made.work.calls == {16: 4, 8: 2}
    assert WARM_UP == 3


@pytest.mark.parametrize("length", [0, 1, 20])
def test_epoch_weights_take_tensors(length):
    for epoch in (1, 7, 20, 300):
        assert float(warmup(torch.tensor(float(epoch)), length)) == pytest.approx(warmup(epoch, length))
        assert float(curriculum(torch.tensor(float(epoch)), length, 1.0)) == pytest.approx(
            curriculum(epoch, length, 1.0), abs=1e-6
        )


def test_dot_leaves_a_step_out_on_the_device():
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    optimizer = DOT(layer.parameters(), 0.9, 1e-3, 0.05)
    set_lr(optimizer, 0.1)
    states = []
    for number, bad in enumerate((False, True, False)):
        layer(torch.full((4, 3), float("nan") if bad else 1.0 + number)).sum().backward()
        gradients = [p.grad * 0.3 for p in layer.parameters()]
        optimizer.found_inf = torch.tensor(float(bad))
        optimizer.step(gradients)
        optimizer.zero_grad()
        states.append([p.detach().clone() for p in layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(states[0], states[1], strict=True))
    assert all(p.isfinite().all() for p in states[2])
    assert not torch.equal(states[1][0], states[2][0])


def test_a_rate_that_is_a_tensor_is_kept_and_stored_as_a_number():
    """As on CUDA: fused kernels with the rate in a tensor."""
    weights = {}
    for kind in ("number", "tensor"):
        torch.manual_seed(0)
        layer = nn.Linear(3, 2)
        lr = torch.zeros(()) if kind == "tensor" else 0.0
        optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=0.9, fused=kind == "tensor")
        for rate in (0.5, 0.25):
            set_lr(optimizer, rate)
            layer(torch.ones(4, 3)).sum().backward()
            optimizer.step()
            state = state_of(optimizer)
            assert state["param_groups"][0]["lr"] == rate
            load_state(optimizer, state)
        assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor) == (kind == "tensor")
        weights[kind] = layer.weight.detach()
    torch.testing.assert_close(weights["number"], weights["tensor"])


def test_torchs_own_remark_about_waits_is_no_wait():
    """What it says once, when the mode that finds waits is switched on."""

    class Remarks(KD):
        text = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"

        def losses(self, *args, **kwargs):
            warnings.warn(self.text, stacklevel=1)
            return super().losses(*args, **kwargs)

    made = make("KD", as_graph=True, plugin=Remarks)
    train(made, 2)
    assert not made.work.refusal
    Remarks.text = "called a synchronizing CUDA operation"
    made = make("KD", as_graph=True, plugin=Remarks)
    train(made, 2)
    assert "waits for the device" in made.work.refusal


def test_a_step_that_fails_in_a_graphs_way_leaves_no_trace():
    graphed, eager = make("KD", as_graph=True, plugin=NeedsANumber), make("KD", plugin=NeedsANumber)
    for made in (graphed, eager):
        train(made, 1)
    for key, value in eager.distiller.student.state_dict().items():
        assert torch.equal(value, graphed.distiller.student.state_dict()[key]), key


def test_generators_that_moved_are_noticed():
    before = graph.host_generators()
    assert before == graph.host_generators()
    for draw in (np.random.rand, random.random, lambda: torch.rand(1)):
        draw()
        assert graph.host_generators() != before
        before = graph.host_generators()


def test_a_compiler_that_fails_leaves_the_step():
    def broken(**kwargs):
        raise RuntimeError("no C++ compiler")

    compiled, plain = make("DTKD"), make("DTKD")
    compiled.step.forward = broken
    assert train(compiled, 2)[0] == train(plain, 2)[0]
    assert compiled.step.refusal == "no C++ compiler"


COMPILED = METHODS if os.environ.get("COMPILE_ALL") else ["DTKD"]  # each takes a quarter of a minute or more


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("method", COMPILED)
def test_a_compiled_step_has_the_gradients_of_an_eager_one(method):
    """The same draws, the same loss, the same gradients; in float64, where no rounding turns a ReLU. CRD is not
    compiled: its memories change on the way.
    """
    cfg = config.load(None, ["SOLVER.STEP", "compile", "DISTILLER.TYPE", method])
    made = make(method, samples=16)
    compiled, why = compiled_form(cfg, made.distiller, CPU, 1)
    if compiled is None:
        assert method in ("CRD", "OFD") and "which a compiled backward pass would read too late" in why
        return
    plan, logits = next(made.plans(1))
    batch, results = made.train_batches.batch(plan), []
    exact = method != "MLKD"  # whose strong views are float32
    if exact:
        batch = batch._replace(image=batch.image.double())
        made.distiller.double()
    state = copy.deepcopy(made.distiller.state_dict())
    for forward in (made.distiller, compiled):
        made.distiller.load_state_dict(state)
        made.distiller.zero_grad()
        torch.manual_seed(3)
        given = {} if logits is None else {"logits_teacher": logits}
        _, losses = forward(**batch._asdict(), epoch=torch.full((), 3.0), **given)
        sum(losses.values()).backward()
        results.append((losses, [p.grad.clone() for p in made.step.parameters if p.grad is not None]))
    (eager, expected), (fast, gradients) = results
    for name, value in eager.items():
        torch.testing.assert_close(fast[name], value, rtol=1e-5, atol=1e-6, msg=name)
    nothing = 1e-6 * max(float(other.norm()) for other in expected)  # of a bias before a BatchNorm, but for rounding
    apart = [
        float((own - other).norm() / (other.norm() + nothing)) for own, other in zip(gradients, expected, strict=True)
    ]
    assert max(apart) < (1e-5 if exact else 2e-2), apart


def test_auto_compiles_long_runs_of_logit_methods_on_a_cpu(monkeypatch):
    def chosen(method="DTKD", step="auto", steps=10**6, device=CPU):
        cfg = config.load(None, ["SOLVER.STEP", step, "DISTILLER.TYPE", method])
        form, why = compiled_form(cfg, make(method).distiller, device, steps)
        return form is not None, why

    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert chosen() == chosen("NONE") == chosen("FITNET", "compile") == (True, "")
    assert chosen(steps=1000) == chosen("FITNET") == chosen(step="eager") == (False, "")
    assert chosen(device=torch.device("cuda")) == (False, ""), "a graph there"
    vgg = distiller_dict["NONE"](build_model("vgg8", 10))
    assert compiled_form(config.load(), vgg, CPU, 10**6) == (None, "")
    assert "memory_v1" in chosen("CRD", "compile")[1] and not chosen("CRD", "compile")[0]
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert chosen() == (False, "") and chosen(step="compile") == (True, "")


class Bad(KD):
    """Not finite in the third epoch."""

    def losses(self, *args, epoch, **kwargs):
        factor = torch.where(torch.as_tensor(epoch) == 3, torch.inf, 1.0)
        return {name: value * factor for name, value in super().losses(*args, epoch=epoch, **kwargs).items()}


@pytest.mark.parametrize(("name", "device"), cases(["skip"], ("skip",)))
def test_replayed_steps_are_left_out_where_they_are_bad(name, device):
    device = torch.device(device)
    made = make("KD", device, True, plugin=Bad, policy=name)
    with trainer.side_stream(device):
        train(made, 2)
        before = {key: value.clone() for key, value in made.distiller.student.state_dict().items()}
        made._start_epoch()
        for plan, logits in made.plans(3):
            made.work(plan, logits, 3)
    assert not made.work.refusal
    assert made.meter.read()["skipped"] == 3
    for key, value in made.distiller.student.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_steps_are_compiled_from_the_epoch_that_says_so():
    made, seen = make("KD"), []
    made.step.compiled_from = 2
    made.step.forward = lambda **given: seen.append(float(given["epoch"])) or made.distiller(**given)
    train(made, 3)
    assert seen == [2.0] * 3 + [3.0] * 3


# On a GPU


@gpu
@pytest.mark.parametrize("step", ["graph", "compile"])
def test_a_run_on_cuda_is_the_eager_one(small, tmp_path, step):
    opts = [*on("cuda", small), "DISTILLER.TYPE", "DTKD"]
    eager, other = (run(opts, tmp_path / name, SOLVER__STEP=name) for name in ("eager", step))
    assert "steps run" not in (other / "worklog.txt").read_text()
    assert agree(outcome(eager), outcome(other), "cuda")


@gpu
@pytest.mark.parametrize("amp", ["none", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_fifty_steps_of_a_graph_are_fifty_steps(method, amp):
    """The losses, within rounding; methods that draw on the device are compared by their first steps' scale alone."""
    device = torch.device("cuda")
    results = []
    for as_graph in (False, True):
        made = make(method, device, as_graph, amp=amp)
        with trainer.side_stream(device):
            results.append(train(made, 17))
        assert not as_graph or method == "KDSVD" or not made.work.refusal, made.work.refusal
    tolerance = 0.1 if amp == "bf16" or method in DRAWING else 2e-2
    assert results[0][0] == pytest.approx(results[1][0], rel=tolerance)


@gpu
def test_dot_is_captured():
    device = torch.device("cuda")
    results = []
    for as_graph in (False, True):
        made = make("KD", device, as_graph, dot=True)
        with trainer.side_stream(device):
            results.append(train(made, 17)[0])
        assert not as_graph or not made.work.refusal, made.work.refusal
    assert results[0] == pytest.approx(results[1], rel=2e-2)


@gpu
def test_a_wait_for_the_device_is_found():
    class Waits(KD):
        def losses(self, logits_student, *args, **kwargs):
            losses = super().losses(logits_student, *args, **kwargs)
            return {name: value * (1 + 0 * float(logits_student.sum())) for name, value in losses.items()}

    device = torch.device("cuda")
    made = make("KD", device, True, plugin=Waits)
    with trainer.side_stream(device):
        train(made, 2)
    assert "waits for the device" in made.work.refusal


@gpu
def test_students_on_streams_of_their_own_are_those_alone():
    device = torch.device("cuda")
    alone, together = [], [make("DTKD", device, True, seed=seed) for seed in (0, 1, 2)]
    for seed in (0, 1, 2):
        with trainer.side_stream(device):
            alone.append(train(make("DTKD", device, True, seed=seed), 4)[0])
    streams = [trainer.side_stream(device) for _ in together]
    losses = [[] for _ in together]
    for epoch in range(1, 5):
        turns = []
        for made, stream in zip(together, streams, strict=True):
            with stream:
                made._start_epoch()
                set_lr(made.step.optimizer, made.schedule.at(epoch))
                turns.append((made, stream, made.plans(epoch)))
        for _ in range(3):
            for made, stream, plans in turns:
                with stream:
                    plan, logits = next(plans)
                    made.work(plan, logits, epoch)
                    made.step.count(plan.shape[1], made.meter)
        for number, (made, stream, _) in enumerate(turns):
            with stream:
                losses[number].append(made.meter.read()["loss"])
    for single, many in zip(alone, losses, strict=True):
        means = [np.average(single[3 * e : 3 * e + 3], weights=[16, 16, 8]) for e in range(4)]
        assert means == pytest.approx(many, rel=2e-2)
