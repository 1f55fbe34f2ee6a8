"""Temperature rules: what is special to each, and what methods make of them; test_tokens_sense.py has what holds of
all of them, equal logits, shifts and scales.
"""

import pytest
import torch
from helpers import METHODS, refused
from methods import logits, sides
from torch import nn

import mdistiller.losses as L
from mdistiller.config import load
from mdistiller.distillers import LogitDistiller, RuleDistiller, distiller_dict, register_rule
from mdistiller.distillers.CTKD import LearnedTemperature
from mdistiller.distillers.rules import MIN_TEMPERATURE
from mdistiller.engine.refusals import refuse_unused
from mdistiller.errors import ConfigError, UserError
from mdistiller.registry import temperature_rules

TAU = 4.0
# those that add up to 2 tau
PAIRED = {rule.__name__: rule for rule in (L.max_logit, L.centred, L.erratum, L.sharpness, L.centred_sharpness)}
DYNAMIC = PAIRED | {"std": L.std, "norm": L.norm}
RULES = {"fixed": L.fixed} | DYNAMIC | {"adakd": L.adakd}
V, U, TARGET = logits(0, 8, 6), logits(1, 8, 6), torch.arange(8) % 6


def all_tau(*temperatures):
    return all(torch.equal(t, torch.full_like(t, TAU)) for t in temperatures)


@pytest.mark.parametrize("name", RULES)
def test_properties(name):
    rule = RULES[name]
    t = rule(V, U, TAU)
    assert all(part.shape == (8, 1) for part in t)
    assert t.sound.dtype == torch.bool
    assert all((part > 0).all() for part in t[:3])
    if name in PAIRED:
        torch.testing.assert_close(t.student + t.teacher, torch.full_like(t.student, 2 * TAU))
        torch.testing.assert_close(t.factor, t.student * t.teacher)
    if name not in ("sharpness", "centred_sharpness", "adakd"):  # what a factor 3 on both sides does to T_student
        torch.testing.assert_close(rule(3 * V, 3 * U, TAU).student, (3 if name in ("std", "norm") else 1) * t.student)
    v, u = V.clone().requires_grad_(), U.clone().requires_grad_()
    if name != "adakd":  # whose temperatures are constants to the gradient
        assert torch.autograd.gradcheck(lambda v, u: L.softened_kl(v, u, rule(v, u, TAU)), (v, u), atol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_finite_everywhere(name):
    for corner, v, u in sides():
        t = RULES[name](v, u, TAU)
        assert all(part.isfinite().all() and (part > 0).all() for part in t[:3]), corner
        loss = L.softened_kl(v, u, t)
        loss.backward()
        assert loss.isfinite(), corner
        assert all(x.grad is None or x.grad.isfinite().all() for x in (v, u)), corner


def test_max_logit():
    t = L.max_logit(V, U, TAU)
    ratio = V.max(1, keepdim=True).values / U.max(1, keepdim=True).values
    torch.testing.assert_close(t.student / t.teacher, ratio)
    assert t.sound.all()
    for max_v, max_u in ((-1.0, 2.0), (2.0, -1.0), (-1.0, -1.0), (0.0, 2.0), (-2.0, 2.0)):  # undefined there
        v, u = (x - x.max(1, keepdim=True).values + m for x, m in ((V, max_v), (U, max_u)))
        t = L.max_logit(v, u, TAU)
        assert not t.sound.any() and all_tau(t.student, t.teacher)
        torch.testing.assert_close(L.dtkd_loss(v, u, TAU), L.kd_loss(v, u, TAU))
    assert (L.max_logit(1e-3 * U, U, TAU).factor < 0.1).all()
    assert MIN_TEMPERATURE <= 1e-4
    t = L.max_logit(torch.tensor([[1e-9, -1.0]]), torch.tensor([[12.0, 0.0]]), TAU)
    assert t.student.item() == pytest.approx(TAU * MIN_TEMPERATURE)


def test_erratum_matches_one_class_and_the_margin_decides_where_signs_differ():
    v, u = torch.tensor([[2.0, 1.0, 3.0]]), torch.tensor([[3.0, 1.5, 9.0]])
    t = L.erratum(v, u, TAU)
    assert t.teacher.item() == pytest.approx(TAU * (1 + 6 / 12))
    assert u[0, 2] / t.teacher == pytest.approx((v[0, 2] / t.student).item())
    t = L.erratum(torch.tensor([[2.0, -1.0]]), torch.tensor([[3.0, 2.0]]), TAU, margin=0.1)
    assert t.teacher.item() == pytest.approx(1.9 * TAU)


def test_sharpness_is_equal_where_the_rule_is_sound():
    t = L.sharpness(V, U, TAU)
    assert t.sound.any()
    gap = torch.logsumexp(U / t.teacher, 1) - torch.logsumexp(V / t.student, 1)
    assert gap[t.sound[:, 0]].abs().max() < 1e-6
    far = L.sharpness(1e-4 * V.abs(), 1e4 * U, TAU)  # no root inside the bracket
    assert all_tau(far.student[~far.sound]) and not far.sound.all()
    torch.manual_seed(0)
    for mean in (-1.0, -0.5, 0.0, 1.0):  # below 0 the difference may have three roots, of which tau is one
        for scale in (0.1, 1.0, 5.0):
            v = mean + scale * torch.randn(500, 100)
            t = L.sharpness(v, v, TAU)
            assert all_tau(t.student, t.teacher)


def test_centred_is_max_logit_of_centred_logits():
    t = L.centred(V + 7, U - 3, TAU)
    expected = L.max_logit(V - V.mean(1, keepdim=True), U - U.mean(1, keepdim=True), TAU)
    torch.testing.assert_close(t.student, expected.student)
    assert t.sound.all()
    assert not L.centred(torch.full((2, 5), 3.3), U[:2, :5].float(), TAU).sound.any()


def test_centred_sharpness_agrees_and_is_clipped_beyond_the_margin():
    t = L.centred_sharpness(V + 7, U - 3, TAU)
    v, u = (x - x.mean(1, keepdim=True) for x in (V, U))
    torch.testing.assert_close((u / t.teacher).logsumexp(1), (v / t.student).logsumexp(1), rtol=1e-9, atol=0)
    v = (1e-4 * U).requires_grad_()
    t = L.centred_sharpness(v, U, TAU, margin=0.05)
    torch.testing.assert_close(t.student, torch.full_like(t.student, 2 * TAU * 0.05))
    assert t.sound.all() and torch.autograd.grad(t.student.sum(), v)[0].eq(0).all()
    constant = L.centred_sharpness(torch.full((8, 6), 3.3), U.float(), TAU)
    assert not constant.sound.any() and all_tau(constant.student, constant.teacher)


def test_adakd_is_cold_where_the_outputs_are_far_apart():
    t = L.adakd(V, U, TAU, c=0.7)
    p, q = U.softmax(1), V.softmax(1)
    s = (1 - (p * q).sqrt().sum(1)).sqrt()
    expected = TAU * torch.exp(-0.7 * torch.tanh(torch.log(s / s.sort().values[3])))  # of 8, the lower middle one
    torch.testing.assert_close(t.student[:, 0], expected)
    assert t.student is t.teacher and t.sound.all()
    torch.testing.assert_close(t.factor, t.student**2)
    assert not L.adakd(V.clone().requires_grad_(), U, TAU).student.requires_grad
    equal = torch.arange(8) < 3  # one row of which is equal is at tau; where most are, all are
    t = L.adakd(torch.where(equal[:, None], U, V), U, TAU)
    assert torch.equal(t.sound[:, 0], ~equal) and all_tau(t.student[equal])
    t = L.adakd(torch.where(torch.arange(8)[:, None] < 4, U, V), U, TAU)
    assert not t.sound.any() and all_tau(t.student)


def test_the_factor_is_the_rule_s_or_tau_squared_or_relative():
    rule = L.max_logit(V, U, TAU)
    kl = L.kl_divergence(V, U, rule.student, rule.teacher)
    for factor, values in (
        ("rule", rule.factor),
        ("tau2", torch.full_like(rule.factor, TAU**2)),
        ("mean", rule.factor / rule.factor.mean()),
    ):
        expected = 0.9 * (values[:, 0] * kl).mean()
        torch.testing.assert_close(loss_kd("KD", "max_logit", "TEMPERATURE.FACTOR", factor), expected)


def test_what_needs_the_whole_batch_says_so():
    for opts, needs in (
        (("KD", "TEMPERATURE.RULE", "centred"), False),
        (("KD", "TEMPERATURE.FACTOR", "tau2"), False),
        (("KD", "TEMPERATURE.FACTOR", "mean"), True),
        (("KD", "TEMPERATURE.RULE", "adakd"), True),
        (("CTKD",), False),
    ):
        assert method("DISTILLER.TYPE", *opts).needs_batch is needs, opts


@pytest.mark.parametrize("mode", ["global", "instance"])
def test_the_student_descends_and_the_learned_temperature_climbs(mode):
    rule = LearnedTemperature(nn.Linear(3, 6), mode, lambda_epochs=0).double()
    parameters = list(rule.parameters())

    def loss(v, strength):
        rule.lambda_max = strength
        return L.softened_kl(v, U, rule(v, U, TAU, epoch=1))

    def gradients(strength):
        v = V.clone().requires_grad_()
        return torch.autograd.grad(loss(v, strength), [v, *parameters])

    student, *plain = gradients(-1.0)  # the reversal undone
    for strength in (0.0, 0.3, 1.0):
        student_again, *reversed_ = gradients(strength)
        torch.testing.assert_close(student_again, student)  # the student never sees the reversal
        for a, b in zip(reversed_, plain, strict=True):
            torch.testing.assert_close(a, -strength * b)
    before = loss(V, 1.0).item()
    for parameter, gradient in zip(parameters, reversed_, strict=True):
        parameter.data -= 1e-3 * gradient
    assert loss(V, 1.0).item() > before


def test_the_learned_temperature_is_differentiable_and_stays_in_its_range():
    rule = LearnedTemperature(nn.Linear(3, 6), lambda_max=-1.0, lambda_epochs=0).double()  # the reversal undone

    def loss(v, theta):
        t = torch.func.functional_call(rule, {"theta": theta}, (v, U, TAU), {"epoch": 1})
        return L.softened_kl(v, U, t)

    theta = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (V.clone().requires_grad_(), theta))
    theta = torch.tensor([-1e4, -30.0, 0.0, 30.0, 1e4], requires_grad=True)
    t = L.learned_temperature(theta, 1.0, 20.0)
    torch.testing.assert_close(t[[0, 2, 4]], torch.tensor([1.0, 11.0, 21.0]))
    t.sum().backward()
    assert theta.grad.isfinite().all()


def method(*opts):
    cfg = load(None, list(map(str, opts)))
    refuse_unused(cfg)
    return distiller_dict[cfg.DISTILLER.TYPE](nn.Identity(), nn.Linear(3, 6), cfg)


def loss_kd(name, rule="", *opts):
    made = method("DISTILLER.TYPE", name, "TEMPERATURE.RULE", rule, *opts)
    return made.losses(V, U, TARGET, epoch=20)["loss_kd"]


def test_a_line_of_yaml_puts_any_rule_under_any_method():
    assert set(RULES) | {"learned"} <= set(temperature_rules)
    takers = [name for name in METHODS if issubclass(distiller_dict[name], RuleDistiller)]
    assert {"KD", "DKD", "DTKD", "MLKD", "DIST", "CTKD", "NORMKD"} <= set(takers)
    for name in takers:
        values = [loss_kd(name, rule) for rule in [*RULES, "learned"]]
        assert all(value.isfinite() for value in values)
        assert len({round(value.item(), 6) for value in values}) == len(values), name


def test_what_methods_make_of_rules_and_parts():
    dtkd, kd = L.dtkd_loss(V, U, TAU), L.kd_loss(V, U, TAU)
    torch.testing.assert_close(loss_kd("KD", "max_logit"), 0.9 * dtkd)
    torch.testing.assert_close(loss_kd("DTKD"), 3 * dtkd + kd)
    torch.testing.assert_close(loss_kd("DTKD", "fixed"), 4 * kd)
    rule = L.max_logit(V, U, TAU)
    tckd, nckd = L.part_divergences(V, U, TARGET, rule.student, rule.teacher)
    torch.testing.assert_close(loss_kd("DKD", "max_logit"), (rule.factor[:, 0] * (tckd + 8 * nckd)).mean())
    for part, weights, divergence in (("target", (1, 0), tckd), ("non_target", (0, 8), nckd)):
        whole = L.dkd_loss(V, U, TARGET, *weights, TAU)
        torch.testing.assert_close(loss_kd("DKD", "", "TEMPERATURE.PART", part), whole)
        expected = 0.9 * (rule.factor[:, 0] * divergence).mean()
        torch.testing.assert_close(loss_kd("KD", "max_logit", "TEMPERATURE.PART", part), expected)


def test_detach_stops_the_gradient_through_the_temperatures():
    for rule in DYNAMIC:
        v = V.clone().requires_grad_()
        opts = ("DISTILLER.TYPE", "KD", "TEMPERATURE.RULE", rule)
        flowing, detached = (
            torch.autograd.grad(method(*opts, *more).losses(v, U, TARGET, epoch=1)["loss_kd"], v)[0]
            for more in ((), ("TEMPERATURE.DETACH", True))
        )
        t = L.Temperatures(*(part.detach() for part in RULES[rule](V, U, TAU)))
        torch.testing.assert_close(detached, torch.autograd.grad(0.9 * L.softened_kl(v, U, t), v)[0])
        assert not torch.allclose(flowing, detached)


def test_what_does_not_go_together_is_one_line():
    for opts, says in (
        (("RLD", "TEMPERATURE.RULE", "std"), "RLD takes no temperature rule"),
        (("AT", "EXPERIMENT.LOGIT_STAND", True), "LOGIT_STAND: AT takes no temperature rule"),
        (("DIST", "TEMPERATURE.PART", "target"), "DIST has no parts; leave it out, or use DKD, DTKD, KD"),
        (("KD", "TEMPERATURE.RULE", "max", "EXPERIMENT.LOGIT_STAND", True), "did you mean max_logit"),
        (("KD", "TEMPERATURE.RULE", "fixed", "EXPERIMENT.LOGIT_STAND", True), "leave one of them out"),
        (("CTKD", "TEMPERATURE.DETACH", True), "learns from its gradient"),
        (("CTKD", "TEMPERATURE.LEARNED.MODE", "sample"), "known: global, instance"),
        (("KD", "TEMPERATURE.CENTRED_SHARPNESS.MARGIN", 0.5), r"must be in \(0, 0\.5\)"),
        (("DTKD", "TEMPERATURE.PART", "target", "DIVERGENCE.TYPE", "jsd"), "the divergence jsd has no parts; set"),
        (("KD", "DIVERGENCE.TYPE", "revers"), "did you mean reverse"),
        (("KD", "DIVERGENCE.BETA", 1.0), r"must be in \(0, 1\)"),
        (("KD", "TEMPERATURE.SHARPNESS.MARGIN", 0.7), r"must be in \(0, 0\.5\)"),
    ):
        with refused(says, (ConfigError, UserError)):
            method("DISTILLER.TYPE", *opts)


def test_a_rule_of_ones_own_takes_one_function():
    @register_rule("half_and_half", defaults={"SHARE": 0.5})
    def half_and_half(logits_student, logits_teacher, tau, share=0.5):
        """A rule for this test."""
        t = L.fixed(logits_student, logits_teacher, tau)
        return t._replace(student=share * t.student)

    for share, opts in ((0.5, ()), (0.25, ("TEMPERATURE.HALF_AND_HALF.SHARE", 0.25))):
        expected = 0.9 * 16 * L.kl_divergence(V, U, share * TAU, TAU).mean()
        torch.testing.assert_close(loss_kd("KD", "half_and_half", *opts), expected)


def test_rowwise_methods_are_those_whose_loss_is_a_mean_over_rows():
    for name in METHODS:
        cls = distiller_dict[name]
        if not issubclass(cls, LogitDistiller):
            assert cls.rowwise is (name == "NONE"), name
            continue
        made = method("DISTILLER.TYPE", name)
        first, rest, whole = (
            len(V[rows]) / len(V) * sum(made.losses(V[rows], U[rows], TARGET[rows], epoch=3).values())
            for rows in (slice(3), slice(3, 8), slice(8))
        )
        assert torch.allclose(whole, first + rest, rtol=1e-9) is cls.rowwise, name
