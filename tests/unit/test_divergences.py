"""Divergences: their formulas, their limits, and that they stay finite and above zero."""

import inspect
import math

import pytest
import torch
from methods import logits, sides
from torch import nn

import mdistiller.losses as L
from mdistiller.config import KEYS, load
from mdistiller.distillers import distiller_dict
from mdistiller.distillers._divergences import DIVERGENCES, OPTIONS
from mdistiller.engine.cfg import unread_overrides

V, U, TARGET = logits(0), logits(1), torch.tensor([0, 3, 1, 4, 2, 0])
T_V, T_U = torch.linspace(0.5, 3, 6).double()[:, None], torch.linspace(2, 1, 6).double()[:, None]
P, Q = (U / T_U).softmax(1), (V / T_V).softmax(1)


def kl(p, q):
    return (p * (p / q).log()).sum(1)


BY_HAND = {
    "forward": lambda p, q: kl(p, q),
    "reverse": lambda p, q: kl(q, p),
    "jsd": lambda p, q: (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2,
    "skewed": lambda p, q: kl(p, 0.1 * p + 0.9 * q),
    "skewed_reverse": lambda p, q: kl(q, 0.1 * q + 0.9 * p),
    "tv": lambda p, q: 1 - torch.minimum(p, q).sum(1),
}


def test_every_name_of_the_configuration_is_a_divergence():
    assert set(KEYS["DIVERGENCE.TYPE"].check.names) == set(DIVERGENCES) == set(BY_HAND)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_properties_of_divergences(name):
    divergence = DIVERGENCES[name]
    value = divergence(V, U, T_V, T_U)
    torch.testing.assert_close(value, BY_HAND[name](P, Q), rtol=1e-9, atol=0)
    torch.testing.assert_close(divergence(V + 30, U - 9, T_V, T_U), value)
    assert divergence(U, U, 2.0, 2.0).abs().max() < 1e-12
    assert (divergence(U / 3 + 1, U, 1.0, 3.0).abs() < 1e-12).all(), "zero where the softened outputs agree"
    given = [x.clone().requires_grad_() for x in (V, U, T_V, T_U)]
    assert torch.autograd.gradcheck(lambda *x: divergence(*x), given)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_are_finite_and_not_below_zero(name):
    for corner, v, u in sides():
        value = DIVERGENCES[name](v, u, 4.0, 2.0)
        value.sum().backward()
        assert value.dtype == torch.float32 and value.isfinite().all(), corner
        assert (value >= -1e-6).all(), corner
        assert all(x.grad.isfinite().all() for x in (v, u)), corner


def test_jsd_goes_from_forward_to_reverse_as_in_the_literature():
    p, q = P, Q
    for beta in (0.1, 0.5, 0.9):
        m = beta * p + (1 - beta) * q
        expected = beta * kl(p, m) + (1 - beta) * kl(q, m)
        torch.testing.assert_close(L.jensen_shannon(V, U, T_V, T_U, beta), expected)
    for beta, end in ((1e-7, L.kl_divergence), (1 - 1e-7, L.reverse_kl)):
        small = L.jensen_shannon(V, U, 3.0, 3.0, beta) / 1e-7
        torch.testing.assert_close(small, end(V, U, 3.0, 3.0), rtol=1e-4, atol=0)


def test_divergences_that_are_bounded_stay_below_their_bound():
    far = torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]])
    for divergence, most in (
        (L.jensen_shannon, math.log(2)),
        (L.skewed_kl, math.log(10)),
        (L.skewed_reverse_kl, math.log(10)),
        (L.total_variation, 1),
    ):
        assert divergence(*far, 1.0, 1.0).item() == pytest.approx(most)


def test_the_configuration_puts_a_divergence_under_the_methods_that_take_one():
    takers = [name for name, cls in distiller_dict.items() if cls.takes_divergence]
    assert set(takers) >= {"KD", "DTKD", "NORMKD", "CTKD"}
    for name in ("KD", "DTKD", "NORMKD", "CTKD"):
        for kind in DIVERGENCES:
            cfg = load(None, ["DISTILLER.TYPE", name, "DIVERGENCE.TYPE", kind])
            made = distiller_dict[name](nn.Identity(), nn.Linear(3, 5), cfg)
            got = made.losses(V, U, TARGET, epoch=20)["loss_kd"]
            rule = made.rule(V, U, made.temperature, epoch=20)
            value = L.softened_kl(V, U, rule, divergence=DIVERGENCES[kind])
            if name == "DTKD":
                fixed = L.softened_kl(V, U, L.fixed(V, U, 4.0), divergence=DIVERGENCES[kind])
                torch.testing.assert_close(got, 3 * value + fixed)
            else:
                torch.testing.assert_close(got, 0.9 * value)
    for kind, key in OPTIONS.items():
        cfg = load(None, ["DISTILLER.TYPE", "KD", "DIVERGENCE.TYPE", kind, f"DIVERGENCE.{key}", "0.3"])
        made = distiller_dict["KD"](nn.Identity(), nn.Identity(), cfg)
        assert key.lower() in inspect.signature(DIVERGENCES[kind]).parameters
        expected = DIVERGENCES[kind](V, U, 4.0, 4.0, 0.3)
        torch.testing.assert_close(made.divergence(V, U, 4.0, 4.0), expected)


def test_a_divergence_that_nothing_reads_is_told():
    for opts, says in (
        (["DISTILLER.TYPE", "DKD", "DIVERGENCE.TYPE", "tv"], "DIVERGENCE.TYPE (DKD takes no other divergence)"),
        (["DISTILLER.TYPE", "AT", "DIVERGENCE.TYPE", "tv"], "DIVERGENCE.TYPE (AT takes no other divergence)"),
        (["DISTILLER.TYPE", "KD", "DIVERGENCE.BETA", "0.2"], "DIVERGENCE.BETA (DIVERGENCE.TYPE is forward)"),
        (["DISTILLER.TYPE", "KD", "DIVERGENCE.TYPE", "jsd", "DIVERGENCE.SKEW", "0.2"], "(DIVERGENCE.TYPE is jsd)"),
    ):
        assert says in unread_overrides(load(None, opts))
    read = ["DISTILLER.TYPE", "KD", "DIVERGENCE.TYPE", "jsd", "DIVERGENCE.BETA", "0.2"]
    assert not unread_overrides(load(None, read))
