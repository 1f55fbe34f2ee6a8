"""A step: what it leaves out where it is bad, in which form it runs; the rate and its schedule; scores."""

import math
import shutil

import pytest
import torch
from helpers import CPU, make_trainer, train_steps
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mdistiller import config
from mdistiller.dataset import Batch
from mdistiller.distillers import distiller_dict
from mdistiller.engine.evaluator import scores_of
from mdistiller.engine.solver import DOT, Schedule, load_state, set_lr, state_of, zero_momenta
from mdistiller.engine.step import Step
from mdistiller.engine.stepmode import compiled_form
from mdistiller.models import build_model


def test_the_rate_falls_after_each_stages_epoch():
    schedule = Schedule(0.05, (150, 180, 210), 0.1)
    rates = {1: 0.05, 150: 0.05, 151: 0.005, 180: 0.005, 181: 5e-4, 211: 5e-5}
    assert {epoch: schedule.at(epoch) for epoch in rates} == pytest.approx(rates)


def test_scores():
    torch.manual_seed(0)
    table, target = torch.randn(30, 10), torch.arange(30) % 10
    batches = [(table[i : i + 8], target[i : i + 8], None) for i in range(0, 30, 8)]
    scores = scores_of(lambda image: image, batches)
    top5 = table.topk(5, 1).indices
    assert scores.top1 == pytest.approx(100 * (table.argmax(1) == target).double().mean().item())
    assert scores.top5 == pytest.approx(100 * (top5 == target[:, None]).any(1).double().mean().item())
    assert scores.loss == pytest.approx(F.cross_entropy(table, target).item(), rel=1e-5)
    assert scores_of(lambda image: image[:, :2], [(table, target % 2, None)]).top5 is None


@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_the_decision_on_the_device_is_the_same(policy):
    """What CUDA does, with the fused kernel of the CPU: a bad step changes nothing, nor does a later one under stop."""
    weights = []
    for fused in (False, True):
        torch.manual_seed(0)
        student = build_model("resnet8", 10)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=fused)
        if fused:
            zero_momenta(optimizer)
        step = Step(distiller_dict["NONE"](student).train(), optimizer, CPU, "none", policy)
        assert step.lazy == fused
        for number in range(4):
            image = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(number))
            image[0] *= math.nan if number in (0, 2) else 1
            step(Batch(image, torch.arange(4), torch.arange(4)), 1)
        assert step.bad_step() == (-1 if policy == "skip" else 0)
        assert step.meter.read()["skipped"] == (2 if policy == "skip" else 4)
        weights.append(student.state_dict())
    torch.testing.assert_close(*[{k: v.float() for k, v in w.items() if "fc" in k} for w in weights])


def test_dot_leaves_a_step_out_on_the_device():
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    optimizer = DOT(layer.parameters(), 0.9, 1e-3, 0.05)
    set_lr(optimizer, 0.1)
    states = []
    for number, bad in enumerate((False, True, False)):
        layer(torch.full((4, 3), math.nan if bad else 1.0 + number)).sum().backward()
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
    weights = []
    for lr in (0.0, torch.zeros(())):
        torch.manual_seed(0)
        layer, fused = nn.Linear(3, 2), isinstance(lr, torch.Tensor)
        optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=0.9, fused=fused)
        for rate in (0.5, 0.25):
            set_lr(optimizer, rate)
            layer(torch.ones(4, 3)).sum().backward()
            optimizer.step()
            state = state_of(optimizer)
            assert state["param_groups"][0]["lr"] == rate
            load_state(optimizer, state)
        assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor) == fused
        weights.append(layer.weight.detach())
    torch.testing.assert_close(*weights)


# Compiled steps


def test_a_compiler_that_fails_leaves_the_step():
    def broken(**given):
        raise RuntimeError("no C++ compiler")

    compiled, plain = make_trainer("DTKD", samples=16), make_trainer("DTKD", samples=16)
    compiled.step.forward = broken
    losses, lines = train_steps(compiled, 2)
    assert losses == train_steps(plain, 2)[0]
    assert lines == ["steps run as they are, not compiled: no C++ compiler"]


def test_steps_are_compiled_from_the_epoch_that_says_so():
    made, seen = make_trainer("KD", samples=16), []
    made.step.compiled_from = 2
    made.step.forward = lambda **given: seen.append(float(given["epoch"])) or made.distiller(**given)
    train_steps(made, 3)
    assert seen == [2.0, 3.0]


def test_auto_compiles_long_runs_of_logit_methods_on_a_cpu(monkeypatch):
    def chosen(method="DTKD", step="auto", steps=10**6, device=CPU):
        cfg = config.load(None, ["SOLVER.STEP", step, "DISTILLER.TYPE", method])
        form, why = compiled_form(cfg, make_trainer(method, ahead=False).distiller, device, steps)
        return form is not None, why

    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert chosen() == chosen("NONE") == chosen("FITNET", "compile") == (True, "")
    assert chosen(steps=1000) == chosen("FITNET") == chosen(step="eager") == (False, "")
    assert chosen(device=torch.device("cuda")) == (False, ""), "a graph there"
    vgg = distiller_dict["NONE"](build_model("vgg8", 10))
    assert compiled_form(config.load(), vgg, CPU, 10**6) == (None, "")
    assert "memory_v1" in chosen("CRD", "compile")[1] and not chosen("CRD", "compile")[0]
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert chosen() == (False, "") and chosen(step="compile") == (True, "")


class Counting(TorchDispatchMode):
    """Counts the operations that reach the device; a view of a tensor is none."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("method", "most"), [("NONE", 297), ("KD", 424), ("DTKD", 522)])
def test_a_step_has_few_operations(method, most, fused_kernels):
    """A small network's step is as fast on CUDA as its chain of kernels is short; 5 % more than there are now."""
    made = make_trainer(method, samples=16)
    train_steps(made, 1)
    with Counting() as seen:
        train_steps(made, 1)
    assert seen.count <= most
