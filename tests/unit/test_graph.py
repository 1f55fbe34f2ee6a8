"""Captured steps: a graph replays what the step does. With a stand-in for CUDA's graphs, and on a GPU with them."""

import random
import warnings
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import CPU, DRAWING, GPU, METHODS, cases, make_trainer, train_steps

from mdistiller.device import side_stream
from mdistiller.distillers.KD import KD
from mdistiller.engine import graph
from mdistiller.engine.graph import WARM_UP
from mdistiller.engine.solver import set_lr


def gpu(test):
    return GPU[0](GPU[1](test))


class Recording:
    """Stands in for a CUDA graph: recording does nothing, a replay does the work on what was recorded."""

    made = 0

    def __init__(self, work, beside=None):
        Recording.made += 1
        self.replay = work


def make(method, device=CPU, as_graph=True, samples=24, **given):
    """A trainer whose steps are graphs; its batches have 16 and 8 images."""
    capture = {"capture": Recording if device == CPU else graph.CudaGraph} if as_graph else {}
    return make_trainer(method, None, device, samples=samples, **capture, **given)


def both(method, epochs, **given):
    """The trainers that have trained with graphs and eagerly, their losses, and what the former said."""
    graphed, eager = make(method, **given), make(method, as_graph=False, **given)
    (losses, lines), (expected, _) = train_steps(graphed, epochs), train_steps(eager, epochs)
    return graphed, eager, losses, expected, " ".join(lines)


@pytest.mark.parametrize("method", ["NONE", "DTKD", "CTKD", "VID", "OFD"])
def test_replaying_is_stepping(method):
    """Everything that a step reads or writes lies where a graph finds it: the same weights and record, bit for bit but
    for the epoch's rounding, over epochs, batches of two sizes, a falling rate and a rising weight.
    """
    Recording.made = 0
    replayed, eager, losses, expected, _ = both(method, 4)
    assert Recording.made == 2, "one graph for each batch size"
    assert losses == pytest.approx(expected, rel=1e-4)
    for key, value in eager.distiller.state_dict().items():
        torch.testing.assert_close(replayed.distiller.state_dict()[key], value, rtol=1e-4, atol=1e-5, msg=key)
    if method == "DTKD":
        values = replayed.buffer.values, eager.buffer.values
        torch.testing.assert_close(*values, rtol=1e-4, atol=1e-4, equal_nan=True)


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
    results = []
    for as_graph in (True, False):
        made = make("KD", as_graph=as_graph, plugin=plugin, samples=16)
        for seed in (np.random.seed, random.seed, torch.manual_seed):
            seed(0)
        results.append(train_steps(made, WARM_UP + 1))
    (graphed, lines), (eager, _) = results
    assert len(lines) == 1 and reason in lines[0]
    assert graphed == pytest.approx(eager, rel=1e-4)


def test_a_capture_that_fails_leaves_the_step():
    def fails(work, beside):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    graphed, eager = make_trainer("DKD", samples=16, capture=fails), make("DKD", as_graph=False, samples=16)
    (losses, lines), (expected, _) = train_steps(graphed, 4), train_steps(eager, 4)
    assert "not permitted when stream is capturing" in lines[0]
    assert losses == pytest.approx(expected, rel=1e-5)


def test_a_mistake_of_the_method_is_not_hidden():
    class Wrong(KD):
        def losses(self, *args, **kwargs):
            raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        train_steps(make("KD", plugin=Wrong), 1)


def test_a_step_that_fails_in_a_graphs_way_leaves_no_trace():
    graphed, eager, *_ = both("KD", 1, plugin=NeedsANumber)
    for key, value in eager.distiller.student.state_dict().items():
        assert torch.equal(value, graphed.distiller.student.state_dict()[key]), key


def test_generators_that_moved_are_noticed():
    before = graph.host_generators()
    assert before == graph.host_generators()
    for draw in (np.random.rand, random.random, lambda: torch.rand(1)):
        draw()
        assert graph.host_generators() != before
        before = graph.host_generators()


def test_torchs_own_remark_about_waits_is_no_wait():
    """What it says once, when the mode that finds waits is switched on."""

    class Remarks(KD):
        def losses(self, *args, **kwargs):
            warnings.warn(self.text, stacklevel=1)
            return super().losses(*args, **kwargs)

    Remarks.text = (
        "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"
    )
    assert not train_steps(make("KD", plugin=Remarks, samples=16), WARM_UP)[1]
    Remarks.text = "called a synchronizing CUDA operation"
    assert "waits for the device" in train_steps(make("KD", plugin=Remarks, samples=16), WARM_UP)[1][0]


class Bad(KD):
    """Not finite in the fifth epoch."""

    def losses(self, *args, epoch, **kwargs):
        factor = torch.where(torch.as_tensor(epoch) == 5, torch.inf, 1.0)
        return {name: value * factor for name, value in super().losses(*args, epoch=epoch, **kwargs).items()}


@pytest.mark.parametrize(("policy", "device"), cases(["skip"], ("skip",)))
def test_replayed_steps_are_left_out_where_they_are_bad(policy, device):
    device = torch.device(device)
    made = make("KD", device, plugin=Bad, policy=policy)
    with side_stream(device):
        assert not train_steps(made, 4)[1]
        before = {key: value.clone() for key, value in made.distiller.student.state_dict().items()}
        made.state.start_epoch()
        for plan, logits in made.feed.plans(5, 0, lambda: None):
            made.run_step(plan, logits, 5)
    assert made.step.meter.read()["skipped"] == 2
    for key, value in made.distiller.student.state_dict().items():
        assert torch.equal(value, before[key]), key


# On a GPU


@gpu
@pytest.mark.parametrize(
    ("method", "amp"), [(name, amp) for name in METHODS for amp in ("none", "bf16")] + [("dot", "")]
)
def test_fifty_steps_of_a_graph_are_fifty_steps(method, amp):
    """The losses, within rounding; methods that draw on the device are compared by their first steps' scale alone."""
    device, results = torch.device("cuda"), []
    given = {"amp": amp} if amp else {"dot": True}
    for as_graph in (False, True):
        with side_stream(device):
            made = make(method if amp else "KD", device, as_graph, samples=40, **given)
            losses, lines = train_steps(made, 17)
        assert not lines or method == "KDSVD", lines
        results.append(losses)
    tolerance = 0.1 if amp == "bf16" or method in DRAWING else 2e-2
    assert results[0] == pytest.approx(results[1], rel=tolerance)


@gpu
def test_a_wait_for_the_device_is_found():
    class Waits(KD):
        def losses(self, logits_student, *args, **kwargs):
            losses = super().losses(logits_student, *args, **kwargs)
            return {name: value * (1 + 0 * float(logits_student.sum())) for name, value in losses.items()}

    device = torch.device("cuda")
    with side_stream(device):
        assert "waits for the device" in train_steps(make("KD", device, plugin=Waits), 3)[1][0]


@gpu
def test_students_on_streams_of_their_own_are_those_alone():
    device, alone = torch.device("cuda"), []
    for seed in (0, 1, 2):
        with side_stream(device):
            alone.append(train_steps(make("DTKD", device, seed=seed), 5)[0])
    together = [(make("DTKD", device, seed=seed), side_stream(device)) for seed in (0, 1, 2)]
    losses = [[] for _ in together]
    for epoch in range(1, 6):
        turns = [made.feed.plans(epoch, 0, lambda: None) for made, _ in together]
        for _ in range(2):
            for (made, stream), plans, seen in zip(together, turns, losses, strict=True):
                with stream:
                    set_lr(made.step.optimizer, made.schedule.at(epoch))
                    made.step.meter.reset()
                    made.run_step(*next(plans), epoch)
                    seen.append(made.step.meter.read()["loss"])
    for single, many in zip(alone, losses, strict=True):
        assert single == pytest.approx(many, rel=2e-2)
