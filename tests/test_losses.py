"""KD and DTKD as functions of logits: figures, properties, edges."""

import numpy as np
import pytest
import reference
import torch
from torch.nn import functional as F

from mdistiller.distillers import distiller_dict
from mdistiller.distillers.DTKD import dtkd_loss
from mdistiller.distillers.KD import kd_loss
from mdistiller.distillers.losses import LOGIT_LIMIT, bounded, ce_loss, kl_divergence, warmup
from mdistiller.distillers.rules import MIN_TEMPERATURE, max_logit
from mdistiller.engine.cfg import CFG

GOLDEN = reference.golden()
CASES = sorted(
    {tuple(key.split("/")[1:4]) for key in GOLDEN if key.startswith("losses/") and key.endswith("/loss")}
)  # fmt: skip
IMPLEMENTED = [case for case in CASES if case[1] in distiller_dict]


def method(name):
    nothing = torch.nn.Identity()
    return distiller_dict[name](nothing, nothing, CFG)


@reference.needs_reference
@pytest.mark.parametrize(("case", "name", "epoch"), IMPLEMENTED)
def test_golden_losses_and_gradients(case, name, epoch):
    student, teacher, target = (
        torch.from_numpy(GOLDEN[f"losses/{case}/{part}"]) for part in ("student", "teacher", "target")
    )
    student.requires_grad_()
    loss = sum(method(name).losses(student, teacher, target, epoch=int(epoch)).values())
    loss.backward()
    key = f"losses/{case}/{name}/{epoch}"
    assert loss.item() == pytest.approx(float(GOLDEN[f"{key}/loss"]), rel=1e-4)
    np.testing.assert_allclose(student.grad, GOLDEN[f"{key}/grad"], rtol=1e-3, atol=1e-6)


def logits(seed=0, batch=6, classes=10, scale=4.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    values = scale * torch.randn(batch, classes, generator=generator, dtype=dtype)
    values[:, 0] = values[:, 0].abs() + 0.1  # both maxima positive: the rule is defined
    return values


def published_dtkd(v, u, tau):
    """The formula as it stands in the paper, for logits on which it is sound."""
    max_v, max_u = v.max(1, keepdim=True).values, u.max(1, keepdim=True).values
    t_v, t_u = 2 * tau * max_v / (max_u + max_v), 2 * tau * max_u / (max_u + max_v)
    kl = F.kl_div(F.log_softmax(v / t_v, 1), F.softmax(u / t_u, 1), reduction="none").sum(1, keepdim=True)
    return (kl * t_v * t_u).mean()


def test_dtkd_is_the_published_formula_and_its_gradient_flows_through_the_temperatures():
    v, u = logits(0).requires_grad_(), logits(1).requires_grad_()
    ours, theirs = dtkd_loss(v, u, 4.0), published_dtkd(v, u, 4.0)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, (v, u)), torch.autograd.grad(theirs, (v, u)), strict=True):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradcheck(lambda a, b: dtkd_loss(a, b, 4.0), (v, u))


def test_dtkd_equals_the_published_numbers_for_a_fresh_mobilenet_beside_a_strong_teacher():
    v, u = logits(0, scale=0.005), logits(1, scale=4.0)
    v[:, 0] = 0.02
    v, u = v.float().requires_grad_(), u.float()
    ours, theirs = dtkd_loss(v, u, 4.0), published_dtkd(v, u, 4.0)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, v)[0] for loss in (ours, theirs)))


def test_max_logit_rule():
    v, u = logits(0), logits(1)
    t = max_logit(v, u, 4.0)
    assert t.student.shape == t.teacher.shape == t.factor.shape == t.sound.shape == (6, 1)
    torch.testing.assert_close(t.student + t.teacher, torch.full_like(t.student, 8.0))
    torch.testing.assert_close(t.factor, t.student * t.teacher)
    ratio = v.max(1, keepdim=True).values / u.max(1, keepdim=True).values
    torch.testing.assert_close(t.student / t.teacher, ratio)
    torch.testing.assert_close(max_logit(7 * v, 7 * u, 4.0).student, t.student)  # blind to a common scale
    same = max_logit(v, v, 4.0)
    assert torch.equal(same.student, torch.full_like(same.student, 4.0))
    assert t.sound.all()


@pytest.mark.parametrize(("max_v", "max_u"), [(-1.0, 2.0), (2.0, -1.0), (-1.0, -1.0), (0.0, 2.0), (-2.0, 2.0)])
def test_undefined_samples_fall_back_to_the_reference_temperature(max_v, max_u):
    v, u = (x - x.max(1, keepdim=True).values + m for x, m in ((logits(0), max_v), (logits(1), max_u)))
    t = max_logit(v, u, 4.0)
    assert not t.sound.any()
    assert torch.equal(t.student, torch.full_like(t.student, 4.0))
    assert torch.equal(t.teacher, torch.full_like(t.teacher, 4.0))
    torch.testing.assert_close(dtkd_loss(v, u, 4.0), kd_loss(v, u, 4.0))


@pytest.mark.parametrize("loss", [kd_loss, dtkd_loss])
def test_properties(loss):
    v, u = logits(0), logits(1)
    assert loss(v, v, 4.0).abs() < 1e-12
    assert loss(v, u, 4.0) > 0
    order = torch.randperm(6)
    torch.testing.assert_close(loss(v[order], u[order], 4.0), loss(v, u, 4.0))
    if loss is kd_loss:  # max_logit is not blind to a constant
        torch.testing.assert_close(loss(v + 3, u - 5, 4.0), loss(v, u, 4.0))
        assert torch.autograd.gradcheck(lambda a: kd_loss(a, u, 4.0), v.requires_grad_())


def corner(name):
    v, u = logits(0, dtype=torch.float32), logits(1, dtype=torch.float32)
    big = torch.finfo(torch.float32).max
    two = torch.tensor([[3.0, -1.0], [-2.0, -1.0]])
    return {
        "huge teacher": (v, 1e4 * u),
        "gigantic teacher": (v, 1e30 * u),
        "largest floats": (torch.where(v > 0, big, -big), torch.where(u > 0, big, -big)),
        "one hot teacher": (v, F.one_hot(u.argmax(1), 10) * 1e6),
        "zero student": (torch.zeros_like(v), u),
        "zero both": (torch.zeros_like(v), torch.zeros_like(u)),
        "negative maxima": (v - 100, u - 100),
        "cancelling maxima": (v - v.amax(1, keepdim=True) + 3, u - u.amax(1, keepdim=True) - 3),
        "tiny student": (1e-30 * v, u),
        "denormal student": (torch.full_like(v, 1e-45), u),
        "small maximum, deep rest": (torch.where(v > 3, 1e-9, -1e20), u),
        "ties": (torch.ones_like(v), torch.ones_like(u)),
        "two classes": (two, -two),
        "batch of one": (v[:1], u[:1]),
        "bf16": (v.bfloat16(), (1e3 * u).bfloat16()),
        "fp16": (v.half(), u.half()),
    }[name]


CORNERS = [
    "huge teacher", "gigantic teacher", "largest floats", "one hot teacher", "zero student", "zero both",
    "negative maxima", "cancelling maxima", "tiny student", "denormal student", "small maximum, deep rest", "ties",
    "two classes", "batch of one", "bf16", "fp16",
]  # fmt: skip


@pytest.mark.parametrize("name", CORNERS)
@pytest.mark.parametrize("type_", ["KD", "DTKD"])
@pytest.mark.parametrize("swap", [False, True])
def test_every_finite_input_gives_finite_loss_and_gradients(name, type_, swap):
    v, u = corner(name)
    v, u = (u, v) if swap else (v, u)
    v, u = v.clone().requires_grad_(), u.clone().requires_grad_()
    target = torch.arange(len(v)) % v.shape[1]
    losses = method(type_).losses(v, u, target, epoch=20)
    for value in losses.values():
        assert value.dtype == torch.float32
        assert value.isfinite()
        assert value >= -1e-6
    sum(losses.values()).backward()
    assert v.grad.isfinite().all()
    assert u.grad.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_hidden(bad):
    v, u = logits(0).float(), logits(1).float()
    v[2, 3] = bad
    for loss in (kd_loss(v, u, 4.0), dtkd_loss(v, u, 4.0), ce_loss(v, torch.zeros(6, dtype=torch.long))):
        assert not loss.isfinite()


def test_bounded_leaves_ordinary_logits_alone():
    v = logits(0).float()
    assert torch.equal(bounded(v), v)
    assert bounded(v.bfloat16()).dtype == torch.float32
    assert bounded(1e30 * v).abs().max() <= LOGIT_LIMIT * 1.001


def test_the_floor_lies_below_a_ten_thousandth_of_tau():
    assert MIN_TEMPERATURE <= 1e-4
    t = max_logit(torch.tensor([[1e-9, -1.0]]), torch.tensor([[12.0, 0.0]]), 4.0)
    assert t.student.item() == pytest.approx(4 * MIN_TEMPERATURE)


def test_kl_takes_numbers_and_columns():
    v, u = logits(0), logits(1)
    column = torch.full((6, 1), 3.0, dtype=torch.float64)
    torch.testing.assert_close(kl_divergence(v, u, 3.0, 3.0), kl_divergence(v, u, column, column))
    p, q = (torch.softmax(x / 3, 1) for x in (u, v))
    torch.testing.assert_close(kl_divergence(v, u, 3.0, 3.0), (p * (p.log() - q.log())).sum(1))


@pytest.mark.parametrize(("epoch", "length", "weight"), [(1, 20, 0.05), (20, 20, 1.0), (21, 20, 1.0), (1, 0, 1.0)])
def test_warmup(epoch, length, weight):
    assert warmup(epoch, length) == weight
