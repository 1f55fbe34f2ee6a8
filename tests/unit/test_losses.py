"""Losses as functions of tensors: the papers' formulas, one set of properties for all, and what is special to each."""

import importlib
import inspect
import pkgutil
import re

import numpy as np
import pytest
import reference
import torch
from methods import logits
from torch import nn
from torch.nn import functional as F

import mdistiller.losses as L
from mdistiller import distillers
from mdistiller.config import load
from mdistiller.distillers import _long_rows, distiller_dict
from mdistiller.distillers.DIST import pearson
from mdistiller.distillers.KDSVD import leading_vectors
from mdistiller.distillers.losses import deviation
from mdistiller.distillers.MLKD import strong_view
from mdistiller.distillers.OFD import negative_mean
from mdistiller.distillers.TTM import power_sum

GOLDEN = reference.golden()
TARGET = torch.tensor([0, 3, 1, 4, 2, 0])
ORDER = torch.tensor([3, 0, 5, 1, 4, 2])


def maps(seed, dtype=torch.float64, size=6, channels=(3, 5)):
    """Feature maps (6, C, H, W) of two stages, the second half as large."""
    generator = torch.Generator().manual_seed(seed)
    sizes = enumerate(channels)
    return [torch.randn(6, c, size >> i, size >> i, generator=generator, dtype=dtype) for i, c in sizes]


def variance(rows, *_):
    return deviation(rows)[0].squeeze(1) ** 2


def pooled(loss):
    return lambda f_s, f_t: loss(f_s[0].mean((2, 3)), f_t[0].mean((2, 3)))


def ofd(f_s, f_t):
    margins = [-0.25 * torch.ones(1, t.shape[1], 1, 1, dtype=t.dtype) for t in f_t]
    return sum(map(L.ofd_loss, f_s, f_t, margins))


def vid(f_s, f_t):
    return L.vid_loss(f_s[0], f_t[0], torch.full((3,), 0.5, dtype=f_t[0].dtype), 1e-5)


V, U = logits(0), logits(1)
LOGIT = {  # of student and teacher logits
    "KD": lambda v, u, y=TARGET: L.kd_loss(v, u, 4.0),
    "DTKD": lambda v, u, y=TARGET: L.dtkd_loss(v, u, 4.0),
    "DKD": lambda v, u, y=TARGET: L.dkd_loss(v, u, y, 1.0, 8.0, 4.0),
    "LSKD": lambda v, u, y=TARGET: L.softened_kl(v, u, L.std(v, u, 2.0)),
    "NORMKD": lambda v, u, y=TARGET: L.normkd_loss(v, u, 2.0),
    "DIST": lambda v, u, y=TARGET: L.dist_loss(v, u, 4.0),
    "TTM": lambda v, u, y=TARGET: L.ttm_loss(v, u, 10.0),
    "WTTM": lambda v, u, y=TARGET: L.wttm_loss(v, u, 10.0),
    "MLKD": lambda v, u, y=TARGET: L.mlkd_loss(v, u, (2.0, 6.0)),
    "SCD": lambda v, u, y=TARGET: L.scd_loss(v, u, y, 4.0),
    "MCD": lambda v, u, y=TARGET: L.mcd_loss(v, u, y, 4.0),
    "RLD": lambda v, u, y=TARGET: L.rld_loss(v, u, y, 1.0, 8.0, 4.0),
}
FEATURE = {  # of two lists of maps (B, C, H, W)
    "FITNET": lambda f_s, f_t: L.hint_loss(f_s[0], f_t[0]),
    "AT": lambda f_s, f_t: L.at_loss(f_s, f_t, 2),
    "NST": L.nst_loss,
    "PKT": pooled(L.pkt_loss),
    "KDSVD": lambda f_s, f_t: L.kdsvd_loss(f_s, f_t, 1),
    "OFD": ofd,
    "RKD": pooled(L.rkd_loss),
    "SP": lambda f_s, f_t: L.sp_loss(f_s[0], f_t[0]),
    "REVIEWKD": L.hcl_loss,
    "VID": vid,
    "CWD": lambda f_s, f_t: L.cwd_loss(f_s[0], f_t[0], 1.0),
    "PKD": lambda f_s, f_t: L.pkd_loss(f_s[0], f_t[0]),
}
COSTS_AT_EQUALITY = ("TTM", "WTTM", "SCD", "RLD", "VID")


def softmax(x, temperature=1.0):
    e = np.exp(np.asarray(x) / temperature)
    return e / e.sum(-1, keepdims=True)


def kl(p, q):
    return (p * np.log(p / q)).sum(-1)


def by_hand(name, v, u):
    """The paper's formula in numpy, float64."""
    t_v, t_u = (2 * x.std(1, keepdims=True) for x in (v, u))
    q, p = softmax(v, 4), softmax(u, 4)
    if name == "KD":
        return 16 * kl(p, q).mean()
    if name == "DTKD":
        top_v, top_u = v.max(1, keepdims=True), u.max(1, keepdims=True)
        t_v, t_u = 8 * top_v / (top_u + top_v), 8 * top_u / (top_u + top_v)
        return ((t_v * t_u)[:, 0] * kl(softmax(u, t_u), softmax(v, t_v))).mean()
    if name == "LSKD":
        z_v, z_u = ((x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True) for x in (v, u))
        return 4 * kl(softmax(z_u, 2), softmax(z_v, 2)).mean()
    if name == "NORMKD":
        return (t_u[:, 0] ** 2 * kl(softmax(u, t_u), softmax(v, t_v))).mean()
    if name == "DIST":
        inter = np.mean([1 - np.corrcoef(p[i], q[i])[0, 1] for i in range(6)])
        return 16 * (inter + np.mean([1 - np.corrcoef(p[:, k], q[:, k])[0, 1] for k in range(5)]))
    if name in ("TTM", "WTTM"):
        power = softmax(u) ** 0.1
        weight = power.sum(1) if name == "WTTM" else 1
        return (weight * kl(power / power.sum(1, keepdims=True), softmax(v))).mean()
    if name == "MLKD":
        total = 0
        for t in (2, 6):
            q, p = softmax(v, t), softmax(u, t)
            total += t**2 * kl(p, q).mean()
            total += ((p @ p.T - q @ q.T) ** 2).sum() / 6 + ((p.T @ p - q.T @ q) ** 2).sum() / 5
        return total
    terms, rows = [], range(6)
    for i, true in zip(rows, TARGET.tolist(), strict=True):
        pair_t, pair_s = np.array([p[i, true], 1 - p[i, true]]), np.array([q[i, true], 1 - q[i, true]])
        others, below = np.arange(5) != true, u[i] < u[i, true]
        if name == "DKD":
            terms.append(kl(pair_t, pair_s) + 8 * kl(softmax(u[i, others], 4), softmax(v[i, others], 4)))
        elif name == "SCD":
            terms.append(kl(np.array([p[i].max(), 1 - p[i].max()]), pair_s))
        else:
            terms.append(kl(softmax(u[i, below], 4), softmax(v[i, below], 4)) if below.any() else 0.0)
    return 16 * np.mean(terms)


def test_every_logit_loss_is_its_papers_formula():
    for name in LOGIT.keys() - {"RLD"}:
        assert LOGIT[name](V, U).item() == pytest.approx(by_hand(name, V.numpy(), U.numpy()), rel=1e-10), name
    torch.testing.assert_close(LOGIT["RLD"](V, U), LOGIT["SCD"](V, U) + 8 * LOGIT["MCD"](V, U))
    own = L.scd_loss(V, U, TARGET, 1.0)  # at the confidence's own temperature, as published
    torch.testing.assert_close(L.rld_loss(V, U, TARGET, 1.0, 8.0, 4.0, 1.0), own + 8 * LOGIT["MCD"](V, U))


@reference.needs_reference
def test_golden_losses_and_gradients():
    cases = [key.split("/")[1:4] for key in GOLDEN if key.startswith("losses/") and key.endswith("/loss")]
    cases = [case for case in cases if case[1] in distiller_dict]
    assert {name for _, name, _ in cases} >= {"KD", "DTKD", "DKD"}
    for case, name, epoch in cases:
        parts = ("student", "teacher", "target")
        student, teacher, target = (torch.from_numpy(GOLDEN[f"losses/{case}/{part}"]) for part in parts)
        student.requires_grad_()
        method = distiller_dict[name](nn.Identity(), nn.Identity(), load())
        loss = sum(method.losses(student, teacher, target, epoch=int(epoch)).values())
        loss.backward()
        key = f"losses/{case}/{name}/{epoch}"
        assert loss.item() == pytest.approx(float(GOLDEN[f"{key}/loss"]), rel=1e-4), key
        np.testing.assert_allclose(student.grad, GOLDEN[f"{key}/grad"], rtol=1e-3, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", LOGIT)
def test_properties_of_losses_on_logits(name):
    loss = LOGIT[name]
    torch.testing.assert_close(loss(V[ORDER], U[ORDER], TARGET[ORDER]), loss(V, U))
    assert loss(V, U) > 0
    if name not in COSTS_AT_EQUALITY:
        assert loss(U, U).abs() < 1e-12
    if name != "DTKD":  # softmax is blind to a constant, max_logit is not
        torch.testing.assert_close(loss(V + 3, U - 5), loss(V, U))
    v = V[:4].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: loss(v, U[:4], TARGET[:4]), v)
    if name == "DTKD":  # its gradient flows through both temperatures
        assert torch.autograd.gradcheck(lambda v, u: loss(v, u), (v, U[:4].clone().requires_grad_()))


@pytest.mark.parametrize("name", FEATURE)
def test_properties_of_losses_on_features(name):
    loss, f_s, f_t = FEATURE[name], maps(1), maps(2)
    torch.testing.assert_close(loss([f[ORDER] for f in f_s], [f[ORDER] for f in f_t]), loss(f_s, f_t))
    if name not in COSTS_AT_EQUALITY:
        assert loss(f_t, f_t).abs() < 1e-10
        assert loss(f_s, f_t) > 1e-6
    if name in ("AT", "NST", "PKT", "KDSVD", "RKD", "SP"):
        assert loss(maps(1, channels=(4, 2)), f_t).isfinite(), "widths may differ"
    if name in ("AT", "NST", "KDSVD"):
        assert loss(maps(1, size=12), f_t).isfinite() and loss(f_s, maps(2, size=12)).isfinite(), "sizes may differ"
    few_s, few_t = ([f[:3] for f in maps(seed, size=4)] for seed in (1, 2))
    leaves = [f.clone().requires_grad_() for f in few_s]
    assert torch.autograd.gradcheck(lambda *f: loss(list(f), few_t), leaves, eps=1e-6, atol=1e-5, rtol=1e-3)
    half = [[f.bfloat16() for f in side] for side in (f_s, f_t)]
    whole = [[f.float() for f in side] for side in half]
    if name in ("PKT", "RKD"):  # the mean that pools is the model's business, not the loss's
        half = whole
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss(*half)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, loss(*whole))


@pytest.mark.parametrize("name", FEATURE)
def test_degenerate_features_give_finite_gradients(name):
    f_t = maps(2, torch.float32)
    for change in (lambda f: 0 * f, lambda f: f[:1].expand_as(f).clone(), lambda f: 1e-20 * f):
        f_s = [change(f).requires_grad_() for f in maps(1, torch.float32)]
        loss = FEATURE[name](f_s, f_t)
        loss.backward()
        grads = [f.grad for f in f_s if f.grad is not None]
        assert loss.isfinite()
        assert all(grad.isfinite().all() and grad.abs().max() < 1e6 for grad in grads)


def test_what_is_not_finite_is_not_hidden():
    for bad in (float("nan"), float("inf"), -float("inf")):
        v = V.float()
        v[2, 3] = bad
        for loss in (LOGIT["KD"](v, U), LOGIT["DTKD"](v, U), L.ce_loss(v, TARGET)):
            assert not loss.isfinite()


def test_dtkd_equals_the_published_numbers_for_a_fresh_mobilenet_beside_a_strong_teacher():
    v = logits(0, scale=0.005)
    v[:, 0] = 0.02
    expected = by_hand("DTKD", v.numpy(), U.numpy())
    assert L.dtkd_loss(v.float(), U.float(), 4.0).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rows_at_a_time", [1, 2, 7])
def test_long_rows_are_taken_in_parts_and_give_autograds_values_and_gradients(monkeypatch, rows_at_a_time):
    classes = _long_rows.MOST_IMAGE_CLASSES + 1
    monkeypatch.setattr(_long_rows, "CACHED", rows_at_a_time * classes)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    generator = torch.Generator().manual_seed(0)
    u, v = 3 * torch.randn(2, 5, classes, generator=generator, dtype=torch.float64) + 40
    t_u, t_v = 0.5 + 3 * torch.rand(2, 5, 1, generator=generator, dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (v, u, t_v, t_u)]
    weights = torch.arange(1.0, 6, dtype=torch.float64)

    def plain(v, u, t_v, t_u):
        return F.kl_div((v / t_v).log_softmax(1), (u / t_u).log_softmax(1), reduction="none", log_target=True).sum(1)

    for found, wanted in ((L.kl_divergence, plain), (variance, lambda v, *_: v.var(1, correction=0))):
        values = [function(*inputs) for function in (found, wanted)]
        assert torch.allclose(*values, rtol=1e-12, atol=0)
        pairs = [torch.autograd.grad(weights @ value, inputs, allow_unused=True) for value in values]
        for ours, autograds in zip(*pairs, strict=True):
            assert (ours is None) == (autograds is None)
            assert ours is None or torch.allclose(ours, autograds, rtol=1e-9, atol=1e-14)


def test_long_rows_of_any_size_have_finite_gradients():
    rows = torch.zeros(4, 1500)
    rows[1, 3], rows[2, :700], rows[3] = 3e38, -3e38, torch.linspace(-1e15, 1e15, 1500)
    v, u = rows.flip(0).requires_grad_(), rows.clone().requires_grad_()
    t = torch.full((4, 1), 1e-5).requires_grad_()
    for gradient in torch.autograd.grad(L.kl_divergence(v, u, t, 4.0).sum(), (v, u, t)):
        assert gradient.isfinite().all()


def test_the_parts_of_dkd_are_the_divergence():
    tckd, nckd = L.part_divergences(V, U, TARGET, 3.0, 5.0)
    p = (U / 5.0).softmax(1).gather(1, TARGET[:, None])[:, 0]
    torch.testing.assert_close(tckd + (1 - p) * nckd, L.kl_divergence(V, U, 3.0, 5.0))


def test_warmup_and_curriculum():
    assert [L.warmup(epoch, length) for epoch, length in ((1, 20), (20, 20), (21, 20), (1, 0))] == [0.05, 1, 1, 1]
    values = [L.curriculum(epoch, 10, 1.0) for epoch in range(11)]
    assert values == sorted(values) and values[0] == 0 and values[10] == L.curriculum(200, 10, 1.0) == 1
    assert values[5] == pytest.approx(0.5) and L.curriculum(1, 0, 0.7) == 0.7


def test_where_identical_logits_do_cost():
    right, wrong = U.argmax(1), U.argmin(1)
    assert L.scd_loss(U, U, right, 4.0).abs() < 1e-12
    assert L.scd_loss(U, U, wrong, 4.0) > 0
    for loss in (L.ttm_loss, L.wttm_loss):
        assert loss(U, U, 10.0) > 0
        assert loss(U / 10 + 3, U, 10.0).abs() < 1e-12
        assert loss(U, U, 1.0).abs() < 1e-12
    one_hot, uniform = torch.tensor([[1e4, 0.0, 0, 0]]), torch.zeros(1, 4)
    assert power_sum(one_hot, 10.0).item() == pytest.approx(1.0)
    assert power_sum(uniform, 10.0).item() == pytest.approx(4**0.9)


def test_correlation_is_blind_to_scale_and_defined_for_constants():
    x, y = logits(2), logits(3)
    torch.testing.assert_close(pearson(2 * x + 1, y, 1), pearson(x, y, 1))
    constant = torch.full_like(x, 0.2)
    assert torch.equal(pearson(constant, y, 1), torch.zeros(6, dtype=x.dtype))
    assert torch.equal(pearson(constant, constant, 0), torch.ones(5, dtype=x.dtype))
    v = V.clone()
    v[2] = 7.0
    rule = L.std(v, U, 2.0)
    assert rule.student[2] == 2.0 and deviation(v)[0][2] == 1.0
    assert (~rule.sound).nonzero().tolist() == [[2, 0]]


def test_rld_follows_the_teachers_confidence_not_its_mistake():
    u, v = torch.tensor([[5.0, 3.0, 1.0, 0.0]]), torch.zeros(1, 4, requires_grad=True)  # it says 0, the truth is 1
    target = torch.tensor([1])
    (gradient,) = torch.autograd.grad(L.scd_loss(v, u, target, 1.0), v)
    confidence = torch.softmax(u, 1).max()
    assert gradient[0, 1].item() == pytest.approx((0.25 - confidence).item(), rel=1e-5)  # p_true - p_max
    (gradient,) = torch.autograd.grad(L.mcd_loss(v, u, target, 1.0), v)
    assert gradient[0, :2].eq(0).all()  # the mistaken class and the target are masked
    assert gradient[0, 2:].ne(0).all()
    for few in (2, 3):  # one class is left below the target, or none
        loss = L.mcd_loss(v + torch.arange(4.0), u, torch.tensor([few]), 4.0)
        assert loss == 0 and torch.autograd.grad(loss, v)[0].eq(0).all()


def test_autocast_does_not_reach_the_correlations():
    v, u = V.float(), U.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = L.correlation_losses(v, u, 4.0, 4.0)
    assert inside == L.correlation_losses(v, u, 4.0, 4.0)
    seen = L.in_float32(lambda a, *, b: (a[0].dtype, b.dtype))([v.half()], b=V)
    assert seen == (torch.float32, torch.float64), "lists and keywords; float64 stays"


def test_rkd_is_exact_for_features_that_lie_close_together():
    f_s, f_t = (100 + 1e-2 * maps(seed, torch.float32, channels=(64,))[0].mean((2, 3)) for seed in (1, 2))
    expected = L.rkd_loss(f_s.double(), f_t.double())
    torch.testing.assert_close(L.rkd_loss(f_s, f_t).double(), expected, rtol=1e-3, atol=0)


def test_ofd_margins_and_what_it_forgives():
    bn = nn.BatchNorm2d(4)
    with torch.no_grad():
        bn.weight.copy_(torch.tensor([1.0, -2.0, 0.5, 0.1]))
        bn.bias.copy_(torch.tensor([0.0, 0.5, -1.0, 1.0]))
        x = bn.bias + bn.weight * torch.randn(1_000_000, 4, generator=torch.Generator().manual_seed(0))
    expected = (x * (x < 0)).sum(0) / (x < 0).sum(0).clamp(min=1)
    margin = negative_mean(bn).flatten()
    torch.testing.assert_close(margin[:3], expected[:3], rtol=5e-3, atol=0)
    assert margin[3] == pytest.approx(-0.3)  # ten deviations above zero: nothing is negative
    target, margin = torch.tensor([-2.0, -0.5, 1.0]).view(1, 3, 1, 1), torch.full((1, 3, 1, 1), -1.0)
    source = torch.tensor([-3.0, -1.0, 0.0]).view(1, 3, 1, 1)
    assert L.ofd_loss(source, target, margin) == 1  # only the positive target is missed
    assert L.ofd_loss(source + 3, target, margin) == 1 + 2.5**2 + 2**2


def test_leading_vectors_of_a_rank_deficient_map():
    f = torch.zeros(2, 3, 4, 4)
    f[0, :, :, 0] = 1
    f.requires_grad_()
    values, vectors = leading_vectors(f, 2)
    torch.testing.assert_close(values[0], torch.tensor([1.0, 0.0]), atol=1e-3, rtol=0)
    torch.testing.assert_close(vectors[0, :, 0], torch.tensor([1.0, 0, 0, 0]))
    vectors.square().sum().backward()
    assert f.grad.isfinite().all()


def test_the_strong_view_is_another_view_of_each_image():
    image = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    image = F.avg_pool2d(image, 5, 1, 2) * 5
    torch.manual_seed(0)
    view = strong_view(image)
    assert view.shape == image.shape and view.is_contiguous(memory_format=torch.channels_last)
    assert view.isfinite().all()
    assert ((view - image).flatten(1).abs().amax(1) > 0.5).all()
    blank = (view == 0).all(1).float().mean((1, 2))  # of each image: a quarter, less what overhangs
    assert 0.05 <= blank.min() and blank.max() <= 0.3
    torch.manual_seed(0)
    assert torch.equal(strong_view(image), view)
    same = torch.ones(8, 3, 16, 16)
    assert strong_view(same).flatten(1).std(1).unique().numel() == 8, "each image has its own draw"


def test_the_public_module_has_every_loss_and_rule_documented():
    for module in pkgutil.iter_modules(distillers.__path__):
        held = importlib.import_module(f"mdistiller.distillers.{module.name}")
        own = {name for name, item in vars(held).items() if getattr(item, "__module__", "") == held.__name__}
        losses = {name for name in own if re.fullmatch("[a-z]\\w*_loss(es)?", name)}
        assert module.name == "_upstream" or losses <= {*L.__all__}, module.name
    for name in L.__all__:
        text = inspect.getdoc(getattr(L, name)) or ""
        assert len(text) > 60, f"{name} has no docstring to go by"
