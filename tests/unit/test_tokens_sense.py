"""What has to hold of losses on the tokens of a language model, where rows are long and carry arbitrary constants."""

import functools
import math

import pytest
import torch

import mdistiller.losses as L
from mdistiller.config import load
from mdistiller.distillers import distiller_dict
from mdistiller.distillers._divergences import DIVERGENCES

TAU, N, K = 1.5, 12, 40
SHIFT_BLIND = {rule.__name__: rule for rule in (L.fixed, L.centred, L.centred_sharpness, L.std, L.norm, L.adakd)}
SHIFTED = {rule.__name__: rule for rule in (L.max_logit, L.erratum, L.sharpness)}
RULES = SHIFT_BLIND | SHIFTED
ROWWISE = ("NONE", "KD", "DKD", "DTKD", "NORMKD", "TTM", "WTTM", "CTKD", "RLD")


def rows(seed, n=N, classes=K, scale=2.0, dtype=torch.float64):
    """Logits (n, K) as a language model's: a bulk, and one entry that is raised above it."""
    generator = torch.Generator().manual_seed(seed)
    values = scale * torch.randn(n, classes, generator=generator, dtype=dtype)
    raised = torch.randint(classes, (n, 1), generator=generator)
    return values.scatter_add(1, raised, 6 * torch.rand(n, 1, generator=generator, dtype=dtype) + 2)


V, U = rows(0, scale=1.2), rows(1)


def loss(name, v=V, u=U, tau=TAU):
    return L.softened_kl(v, u, RULES[name](v, u, tau))


def gradient(name, v=V, u=U):
    v = v.clone().requires_grad_()
    return torch.autograd.grad(loss(name, v, u), v)[0]


def losses(method, v, u, target):
    cfg = load(None, ["DISTILLER.TYPE", method])
    parts = torch.nn.Identity(), torch.nn.Identity() if method != "NONE" else None
    made = distiller_dict[method](*parts, cfg)
    if method == "NONE":
        return L.ce_loss(v, target)
    return sum(made.losses(v, u, target, epoch=3).values())


@pytest.mark.parametrize("name", RULES)
def test_equal_logits_cost_nothing_at_equal_temperatures(name):
    t = RULES[name](U, U.clone(), TAU)
    assert torch.equal(t.student, t.teacher)
    if name not in ("std", "norm"):
        torch.testing.assert_close(t.student, torch.full_like(t.student, TAU), rtol=1e-15, atol=0)
    if name == "centred_sharpness":
        assert t.student.eq(TAU).all(), "exactly tau"
    assert loss(name, U, U.clone()).abs() < 1e-12
    assert gradient(name, U, U.clone()).abs().max() < 1e-12


@pytest.mark.parametrize("name", RULES)
def test_a_constant_on_every_logit_of_a_row_changes_nothing_but_under_rules_that_see_it(name):
    shift = torch.linspace(-8, 3, N).double()[:, None]
    same = all(
        torch.allclose(loss(name, *pair), loss(name), rtol=1e-6) for pair in ((V + shift, U), (V, U - 30), (V - 500, U))
    )
    assert same is (name in SHIFT_BLIND)


@pytest.mark.parametrize("name", SHIFT_BLIND)
def test_the_gradient_of_rules_blind_to_a_shift_sums_to_zero_over_the_vocabulary(name):
    for dtype, most in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        found = gradient(name, V.to(dtype), U.to(dtype))
        assert (found.sum(1).abs() <= most * found.abs().sum(1)).all()


@pytest.mark.parametrize("name", ["max_logit", "centred", "centred_sharpness", "std", "norm"])
def test_two_sided_rules_see_no_difference_in_scale(name):
    for c in (0.05, 0.7, 4.0):
        t = RULES[name](c * U, U, TAU)
        torch.testing.assert_close(t.student, c * t.teacher)
        assert loss(name, c * U, U).abs() < 1e-12


@pytest.mark.parametrize("name", RULES)
def test_the_order_of_the_vocabulary_does_not_matter(name):
    order = torch.randperm(K, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loss(name, V[:, order], U[:, order]), loss(name))


@pytest.mark.parametrize("padding", [-math.inf, -1e4, 0.0])
def test_padding_columns_do_not_count_once_they_are_cut_off(padding):
    def padded(x):
        return torch.cat([x, torch.full((N, 7), padding, dtype=x.dtype)], 1)

    for name in RULES:
        v = padded(V).requires_grad_()
        value = loss(name, v[:, :K], padded(U)[:, :K])
        torch.testing.assert_close(value, loss(name))
        (found,) = torch.autograd.grad(value, v)
        assert found[:, K:].eq(0).all()
        torch.testing.assert_close(found[:, :K], gradient(name))
        whole = loss(name, padded(V), padded(U))
        if padding == -math.inf:
            assert not whole.isfinite(), "what is not finite is not hidden"
        elif name in ("centred", "centred_sharpness", "std", "norm") or (padding == 0 and name == "fixed"):
            assert not torch.allclose(whole, loss(name), rtol=1e-3), name
        elif padding < 0 and name in ("fixed", "max_logit", "adakd"):
            torch.testing.assert_close(whole, loss(name))


@pytest.mark.parametrize("name", RULES)
def test_the_temperatures_of_a_token_do_not_depend_on_other_tokens(name):
    few = slice(8, 12)
    whole, part = RULES[name](V, U, TAU), RULES[name](V[few], U[few], TAU)
    same = all(torch.allclose(a[few].double(), b.double(), rtol=1e-12) for a, b in zip(whole, part, strict=True))
    assert same is (name != "adakd"), "adakd compares tokens, by design"


@pytest.mark.parametrize("method", [name for name in ROWWISE if name != "CTKD"])
def test_masked_tokens_have_no_effect_and_none_left_is_zero(method):
    target = torch.arange(N)
    counts = torch.arange(N) % 3 != 0
    found = []
    for filler in (0.0, 1e30, math.nan):
        v = torch.where(counts[:, None], V, filler).requires_grad_()
        value = losses(method, v[counts], U[counts], target[counts])
        found.append((value, torch.autograd.grad(value, v)[0]))
        assert found[-1][1][~counts].eq(0).all()
    for value, slope in found[1:]:
        assert torch.equal(value, found[0][0]) and torch.equal(slope, found[0][1])
    v, none = V.clone().requires_grad_(), torch.zeros(N, dtype=torch.bool)
    value = losses(method, v[none], U[none], target[none])
    assert value == 0 and torch.autograd.grad(value, v)[0].eq(0).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_loss_is_below_zero(divergence, dtype):
    u = rows(2, 200, 300).to(dtype)
    near = (u.double() + 1e-3 * rows(3, 200, 300)).to(dtype)  # where rounding is as large as the divergence
    for v in (near, u, u.float(), rows(4, 200, 300).to(dtype)):  # logits of two types, too
        for rule in RULES.values():
            t = rule(v, u, TAU)
            assert (DIVERGENCES[divergence](v, u, t.student, t.teacher) >= -1e-6).all()


def kinds(n, classes, seed):
    """Pairs of logits (n, K) of four kinds: normal, spikes, spikes alone and ties."""
    generator = torch.Generator().manual_seed(seed)

    def draw(kind):
        scale = 10 ** (3 * torch.rand(n, 1, generator=generator, dtype=torch.float64) - 1.5)
        values = scale * torch.randn(n, classes, generator=generator, dtype=torch.float64)
        if kind == "ties":
            values = values.round()
        if kind == "alone":
            values = torch.zeros_like(values)
        if kind in ("spikes", "alone"):
            place = torch.randint(classes, (n, 1), generator=generator)
            values.scatter_add_(1, place, 0.1 + 20 * torch.rand(n, 1, generator=generator, dtype=torch.float64))
        varied = values.amax(1, keepdim=True) > values.amin(1, keepdim=True)
        return torch.where(varied, values, torch.arange(classes).double())

    for kind in ("normal", "spikes", "alone", "ties"):
        yield draw(kind), draw("normal")
        yield draw(kind), draw(kind)


def sharpness_gap(v, u, x):
    """Of the softened u over that of the softened v, at T_teacher / T_student = exp(x)."""
    t_student, t_teacher = 2 * TAU * (-x).sigmoid(), 2 * TAU * x.sigmoid()
    return (u / t_teacher).logsumexp(1, keepdim=True) - (v / t_student).logsumexp(1, keepdim=True)


@pytest.mark.parametrize("classes", [2, 3, 17, 130])
def test_centred_sharpness_has_one_root_and_finds_it(classes):
    end = math.log(99)  # its margin is 0.01
    grid = torch.linspace(-end, end, 33).double()
    for v, u in kinds(320, classes, classes):  # 4 x 8 x 320 = 10,240 rows
        gap = functools.partial(sharpness_gap, v - v.mean(1, keepdim=True), u - u.mean(1, keepdim=True))
        along = torch.cat([gap(x) for x in grid], 1)
        assert (along.diff(dim=1) <= 1e-12 * along.abs().amax(1, keepdim=True)).all(), "it falls: there is one root"
        low, high = torch.full_like(v[:, :1], -end), torch.full_like(v[:, :1], end)
        for _ in range(45):
            middle = (low + high) / 2
            above = gap(middle) > 0
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        t = L.centred_sharpness(v, u, TAU)
        assert t.sound.all()
        torch.testing.assert_close(t.teacher, 2 * TAU * low.sigmoid(), rtol=0, atol=1e-5)
        torch.testing.assert_close(t.student + t.teacher, torch.full_like(t.student, 2 * TAU))
        single = L.centred_sharpness(v.float(), u.float(), TAU)
        torch.testing.assert_close(single.teacher.double(), t.teacher, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", RULES)
def test_no_token_at_all(name):
    none = torch.zeros(0, K, requires_grad=True)
    for divergence in DIVERGENCES.values():
        t = RULES[name](none, none.detach(), TAU)
        assert all(part.shape == (0, 1) for part in t)
        value = L.softened_kl(none, none.detach(), t, divergence=divergence)
        value.backward()
        assert value == 0
