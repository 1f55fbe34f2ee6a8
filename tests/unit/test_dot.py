"""SOLVER.TRAINER dot: two momenta in one step, SGD at DELTA 0, resumable, refused where it does not apply."""

import copy

import pytest
import torch
from methods import build
from torch import nn

from mdistiller import config
from mdistiller.dataset import Batch
from mdistiller.engine.solver import DOT, set_lr, sgd
from mdistiller.engine.step import Meter, Step
from mdistiller.errors import ConfigError, UserError

CPU = torch.device("cpu")


class TwoLosses(nn.Module):
    """A linear student with a task and a distillation loss; `own` is reached by the second alone."""

    teacher = None
    task_losses = ("ce", "loss_ce")

    def __init__(self, names=("loss_ce", "loss_kd")):
        super().__init__()
        self.linear = nn.Linear(4, 3).double()
        self.own = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.unused = nn.Parameter(torch.ones(3))
        self.names = names

    def forward(self, image, target, **kwargs):
        logits = self.linear(image)
        losses = nn.functional.cross_entropy(logits, target), (logits * self.own).square().mean()
        return logits, dict(zip(self.names, losses, strict=False))


def batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [Batch(image, torch.tensor([0, 1, 2, 0, 1]), torch.arange(5)) for image in images]


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: list[Batch]) -> nn.Module:
    step = Step(model, optimizer, CPU)
    set_lr(optimizer, 0.1)
    for batch in steps:
        step(batch, 1, Meter())
    return model


@pytest.mark.parametrize("delta", [0.0, 0.075])
def test_each_gradient_keeps_its_momentum(delta):
    """At 0 it is SGD; a parameter without a gradient stays as it is."""
    model = TwoLosses()
    want, plain = copy.deepcopy(model), copy.deepcopy(model)
    run(model, DOT(model.parameters(), 0.9, 0.01, delta), batches(5))
    run(plain, sgd(plain.parameters(), 0.9, 0.01), batches(5))
    parameters = [want.linear.weight, want.linear.bias, want.own]
    v_task = [torch.zeros_like(p) for p in parameters]
    v_kd = [torch.zeros_like(p) for p in parameters]
    for batch in batches(5):
        _, losses = want(batch.image, batch.target)
        g_task = torch.autograd.grad(losses["loss_ce"], parameters, retain_graph=True, materialize_grads=True)
        g_kd = torch.autograd.grad(losses["loss_kd"], parameters, materialize_grads=True)
        with torch.no_grad():
            for i, p in enumerate(parameters):
                v_task[i] = (0.9 - delta) * v_task[i] + g_task[i] + 0.01 * p
                v_kd[i] = (0.9 + delta) * v_kd[i] + g_kd[i]
                p -= 0.1 * (v_task[i] + v_kd[i])
    for other in (want, *([plain] if delta == 0 else [])):  # a step takes its losses to float32
        torch.testing.assert_close(dict(model.state_dict()), dict(other.state_dict()), rtol=1e-6, atol=1e-7)
    assert torch.equal(model.unused, torch.ones(3))


def test_losses_of_one_kind_are_refused_by_name():
    for names in (("ce",), ("loss_kd",), ("loss_a", "loss_b"), ("loss_ce", "ce")):
        model = TwoLosses(names)
        with pytest.raises(UserError, match=f"TwoLosses gives {', '.join(names)}; set SOLVER.TRAINER base"):
            run(model, DOT(model.parameters(), 0.9, 0.0, 0.075), batches(1))
    model = build("NONE")
    batch = Batch(torch.zeros(2, 3, 32, 32), torch.tensor([0, 1]), torch.arange(2))
    with pytest.raises(UserError, match="NONE gives ce"):
        run(model, DOT(model.get_learnable_parameters(), 0.9, 0.0, 0.075), [batch])


def test_momenta_stay_in_range():
    for momentum, delta, legal in ((0.9, 0.075, True), (0.9, 0.1, False), (0.05, 0.075, False), (0.9, -1.0, False)):
        opts = ["DISTILLER.TYPE", "KD", "SOLVER.MOMENTUM", momentum, "SOLVER.DOT.DELTA", delta]
        config.load(None, opts)  # without dot, DELTA means nothing
        for trainer in ("dot", "crd_dot"):
            if legal:
                assert config.load(None, [*opts, "SOLVER.TRAINER", trainer]).SOLVER.DOT.DELTA
            else:
                with pytest.raises(ConfigError, match="SOLVER.DOT.DELTA"):
                    config.load(None, [*opts, "SOLVER.TRAINER", trainer])
