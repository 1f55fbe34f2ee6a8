"""Temperature rules: one set of properties for all, and what is special to each."""

import pytest
import torch

from mdistiller.config import load
from mdistiller.distillers import RuleDistiller, distiller_dict, register_rule
from mdistiller.distillers.DKD import dkd_loss
from mdistiller.distillers.DTKD import dtkd_loss
from mdistiller.distillers.KD import kd_loss
from mdistiller.distillers.losses import Temperatures, kl_divergence, part_divergences, softened_kl
from mdistiller.distillers.rules import centred, erratum, fixed, max_logit, norm, sharpness, std
from mdistiller.engine.build import refuse_unused
from mdistiller.errors import ConfigError, UserError
from mdistiller.registry import temperature_rules

TAU = 4.0
DYNAMIC = {rule.__name__: rule for rule in (max_logit, centred, erratum, sharpness, std, norm)}
RULES = {"fixed": fixed} | DYNAMIC
PAIRED = ("max_logit", "centred", "erratum", "sharpness")  # the temperatures add up to 2 tau


def logits(seed=0, batch=8, classes=6, scale=4.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    values = scale * torch.randn(batch, classes, generator=generator, dtype=dtype)
    values[:, 0] = values[:, 0].abs() + 0.5  # both maxima positive
    return values


V, U = logits(0), logits(1)


def test_the_registry_holds_them_all():
    assert set(RULES) | {"learned"} <= set(temperature_rules)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_shapes_and_signs(rule):
    t = rule(V, U, TAU)
    assert all(part.shape == (8, 1) for part in t)
    assert t.sound.dtype == torch.bool
    assert all((part > 0).all() for part in t[:3])
    for name in PAIRED:
        if rule is RULES[name]:
            torch.testing.assert_close(t.student + t.teacher, torch.full_like(t.student, 2 * TAU))
            torch.testing.assert_close(t.factor, t.student * t.teacher)


@pytest.mark.parametrize("name", ["fixed", *PAIRED])
def test_equal_logits_get_the_reference_temperature(name):
    t = RULES[name](V, V.clone(), TAU)
    for side in (t.student, t.teacher):
        torch.testing.assert_close(side, torch.full_like(side, TAU), rtol=1e-6, atol=1e-6)
    assert softened_kl(V, V, t).abs() < 1e-10


@pytest.mark.parametrize(
    ("name", "scales", "shifts"),
    # what a factor 3 on both sides does to T_student, and whether a constant on one side changes it
    [("fixed", 1, False), ("max_logit", 1, True), ("centred", 1, False), ("erratum", 1, True), ("std", 3, False),
     ("norm", 3, False)],
)  # fmt: skip
def test_scale_and_shift(name, scales, shifts):
    rule = RULES[name]
    t = rule(V, U, TAU)
    torch.testing.assert_close(rule(3 * V, 3 * U, TAU).student, scales * t.student)
    moved = rule(V + 5, U, TAU).student
    assert torch.allclose(moved, t.student) is not shifts


@pytest.mark.parametrize("rule", DYNAMIC.values(), ids=DYNAMIC)
def test_gradients_in_float64(rule):
    def loss(v, u):
        return softened_kl(v, u, rule(v, u, TAU))

    v, u = V.clone().requires_grad_(), U.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (v, u), atol=1e-6)


BIG = torch.finfo(torch.float32).max
CORNERS = {
    "zero student": (torch.zeros(4, 6), 3 * torch.randn(4, 6)),
    "zero both": (torch.zeros(4, 6), torch.zeros(4, 6)),
    "opposite": (torch.arange(6.0).expand(2, 6), -torch.arange(6.0).expand(2, 6)),
    "nearly opposite": (torch.arange(6.0).expand(2, 6), -torch.arange(6.0).expand(2, 6) * (1 + 1e-7)),
    "negative": (-10 - torch.rand(4, 6), -20 - torch.rand(4, 6)),
    "huge": (1e30 * torch.randn(4, 6), 1e4 * torch.randn(4, 6)),
    "largest": (torch.tensor([[BIG, -BIG, 0.0]]), torch.tensor([[-BIG, BIG, 1.0]])),
    "tiny": (1e-30 * torch.randn(4, 6), torch.randn(4, 6)),
    "far apart": (torch.tensor([[1e-3, -1e3]]), torch.tensor([[1e3, 1e-3]])),
    "two classes": (torch.randn(3, 2), torch.randn(3, 2)),
    "one sample": (torch.randn(1, 6), torch.randn(1, 6)),
    "bf16": (torch.randn(4, 6).bfloat16(), torch.randn(4, 6).bfloat16()),
}


@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_finite_everywhere(rule, corner):
    v, u = (x.clone().requires_grad_() for x in CORNERS[corner])
    t = rule(v, u, TAU)
    assert all(part.isfinite().all() and (part > 0).all() for part in t[:3])
    loss = softened_kl(v, u, t)
    loss.backward()
    assert loss.isfinite()
    assert all(x.grad is None or x.grad.isfinite().all() for x in (v, u))


def test_erratum_matches_one_class_and_the_margin_decides_where_signs_differ():
    v, u = torch.tensor([[2.0, 1.0, 3.0]]), torch.tensor([[3.0, 1.5, 9.0]])
    t = erratum(v, u, TAU)
    assert t.teacher.item() == pytest.approx(TAU * (1 + 6 / 12))
    assert u[0, 2] / t.teacher == pytest.approx((v[0, 2] / t.student).item())
    t = erratum(torch.tensor([[2.0, -1.0]]), torch.tensor([[3.0, 2.0]]), TAU, margin=0.1)
    assert t.teacher.item() == pytest.approx(1.9 * TAU)


def test_sharpness_is_equal_where_the_rule_is_sound():
    t = sharpness(V, U, TAU)
    assert t.sound.any()
    gap = torch.logsumexp(U / t.teacher, 1) - torch.logsumexp(V / t.student, 1)
    assert gap[t.sound[:, 0]].abs().max() < 1e-6
    far = sharpness(1e-4 * V.abs(), 1e4 * U, TAU)  # no root inside the bracket
    assert torch.equal(far.student[~far.sound], torch.full_like(far.student[~far.sound], TAU))
    assert not far.sound.all()


def test_centred_is_max_logit_of_centred_logits():
    t, expected = centred(V + 7, U - 3, TAU), max_logit(V - V.mean(1, keepdim=True), U - U.mean(1, keepdim=True), TAU)
    torch.testing.assert_close(t.student, expected.student)
    assert t.sound.all()
    assert not centred(torch.full((2, 5), 3.3), U[:2, :5].float(), TAU).sound.any()


TARGET = torch.arange(8) % 6


def test_parts_add_up_to_the_whole():
    tckd, nckd = part_divergences(V, U, TARGET, 3.0, 5.0)
    p = (U / 5.0).softmax(1).gather(1, TARGET[:, None])[:, 0]
    torch.testing.assert_close(tckd + (1 - p) * nckd, kl_divergence(V, U, 3.0, 5.0))
    rule = max_logit(V, U, TAU)
    target, rest = (softened_kl(V, U, rule, TARGET, part) for part in ("target", "non_target"))
    tckd, nckd = part_divergences(V, U, TARGET, rule.student, rule.teacher)
    torch.testing.assert_close(target, (rule.factor[:, 0] * tckd).mean())
    torch.testing.assert_close(rest, (rule.factor[:, 0] * nckd).mean())


def method(*opts, teacher=None):
    cfg = load(None, list(map(str, opts)))
    refuse_unused(cfg)
    return distiller_dict[cfg.DISTILLER.TYPE](torch.nn.Identity(), teacher or torch.nn.Linear(3, 6), cfg)


def loss_kd(*opts):
    return method(*opts).losses(V, U, TARGET, epoch=20)["loss_kd"]


def test_a_line_of_yaml_puts_any_rule_under_any_method():
    takers = [name for name, cls in distiller_dict.items() if issubclass(cls, RuleDistiller)]
    assert {"KD", "DKD", "DTKD", "MLKD", "DIST", "CTKD", "NORMKD"} <= set(takers)
    for name in takers:
        values = [loss_kd("DISTILLER.TYPE", name, "TEMPERATURE.RULE", rule) for rule in [*RULES, "learned"]]
        assert all(value.isfinite() for value in values)
        assert len({round(value.item(), 6) for value in values}) == len(values), name


def test_dtkd_is_the_rule_max_logit_over_kl():
    torch.testing.assert_close(
        loss_kd("DISTILLER.TYPE", "KD", "TEMPERATURE.RULE", "max_logit"), 0.9 * dtkd_loss(V, U, TAU)
    )
    torch.testing.assert_close(
        loss_kd("DISTILLER.TYPE", "DTKD"), 3 * dtkd_loss(V, U, TAU) + kd_loss(V, U, TAU)
    )  # fmt: skip
    torch.testing.assert_close(
        loss_kd("DISTILLER.TYPE", "DTKD", "TEMPERATURE.RULE", "fixed"), 4 * kd_loss(V, U, TAU)
    )  # fmt: skip


def test_dkd_takes_parts_and_rules():
    for part, weights in (("target", (1, 0)), ("non_target", (0, 8))):
        ours = loss_kd("DISTILLER.TYPE", "DKD", "TEMPERATURE.PART", part)
        torch.testing.assert_close(ours, dkd_loss(V, U, TARGET, *weights, TAU))
    rule = max_logit(V, U, TAU)
    tckd, nckd = part_divergences(V, U, TARGET, rule.student, rule.teacher)
    expected = (rule.factor[:, 0] * (tckd + 8 * nckd)).mean()
    torch.testing.assert_close(loss_kd("DISTILLER.TYPE", "DKD", "TEMPERATURE.RULE", "max_logit"), expected)


@pytest.mark.parametrize("rule", list(DYNAMIC))
def test_detach_stops_the_gradient_through_the_temperatures(rule):
    v = V.clone().requires_grad_()
    opts = ("DISTILLER.TYPE", "KD", "TEMPERATURE.RULE", rule)
    flowing, detached = (
        torch.autograd.grad(method(*opts, *more).losses(v, U, TARGET, epoch=1)["loss_kd"], v)[0]
        for more in ((), ("TEMPERATURE.DETACH", True))
    )
    t = Temperatures(*(part.detach() for part in RULES[rule](V, U, TAU)))
    by_hand = torch.autograd.grad(0.9 * softened_kl(v, U, t), v)[0]
    torch.testing.assert_close(detached, by_hand)
    assert not torch.allclose(flowing, detached)


@pytest.mark.parametrize(
    ("opts", "says"),
    [
        (("DISTILLER.TYPE", "RLD", "TEMPERATURE.RULE", "std"), "RLD takes no temperature rule"),
        (("DISTILLER.TYPE", "AT", "EXPERIMENT.LOGIT_STAND", True), "LOGIT_STAND: AT takes no temperature rule"),
        (("DISTILLER.TYPE", "DIST", "TEMPERATURE.PART", "target"), "DIST has no parts"),
        (("DISTILLER.TYPE", "KD", "TEMPERATURE.RULE", "max", "EXPERIMENT.LOGIT_STAND", True), "did you mean max_logit"),
        (
            ("DISTILLER.TYPE", "KD", "TEMPERATURE.RULE", "fixed", "EXPERIMENT.LOGIT_STAND", True),
            "leave one of them out",
        ),
        (("DISTILLER.TYPE", "CTKD", "TEMPERATURE.DETACH", True), "learns from its gradient"),
        (("TEMPERATURE.SHARPNESS.MARGIN", 0.7), r"must be in \(0, 0\.5\)"),
    ],
)
def test_what_does_not_go_together_is_one_line(opts, says):
    with pytest.raises((ConfigError, UserError), match=says) as caught:
        method(*opts)
    assert len(caught.value.lines) == 1


def test_a_rule_of_ones_own_takes_one_function():
    @register_rule("half_and_half", defaults={"SHARE": 0.5})
    def half_and_half(logits_student, logits_teacher, tau, share=0.5):
        """A rule for this test."""
        t = fixed(logits_student, logits_teacher, tau)
        return t._replace(student=share * t.student)

    opts = ("DISTILLER.TYPE", "KD", "TEMPERATURE.RULE", "half_and_half")
    expected = 0.9 * 16 * kl_divergence(V, U, 2.0, 4.0).mean()
    torch.testing.assert_close(loss_kd(*opts), expected)
    expected = 0.9 * 16 * kl_divergence(V, U, 1.0, 4.0).mean()
    torch.testing.assert_close(loss_kd(*opts, "TEMPERATURE.HALF_AND_HALF.SHARE", 0.25), expected)


@pytest.mark.parametrize("mean", [-1.0, -0.5, 0.0, 1.0])
@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_equal_logits_have_equal_sharpness_at_tau_whatever_their_mean(mean, scale):
    """Below a mean of 0 the sharpness difference may have three roots, of which tau is one."""
    torch.manual_seed(0)
    v = mean + scale * torch.randn(500, 100)
    t = temperature_rules["sharpness"](v, v, 4.0)
    assert torch.equal(t.student, torch.full_like(t.student, 4.0))
    assert torch.equal(t.teacher, torch.full_like(t.teacher, 4.0))


def test_max_logit_does_not_anchor_the_students_scale():
    torch.manual_seed(0)
    u = torch.randn(20, 10) + 3
    for scale in (1e-3, 0.1, 1.0, 10.0):
        t = max_logit(scale * u, u, 4.0)
        torch.testing.assert_close(scale * u / t.student, u / t.teacher)
    assert (max_logit(1e-3 * u, u, 4.0).factor < 0.1).all()
