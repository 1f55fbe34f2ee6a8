"""Temperature rules: how the two temperatures of each sample follow from its logits.

A rule maps student logits v (B, K), teacher logits u (B, K) and the reference temperature tau > 0 to
`losses.Temperatures`: T_student (B, 1), T_teacher (B, 1), both positive, the factor (B, 1) that scales the divergence,
and where the rule was defined. TEMPERATURE.RULE puts any of them under any method that takes one.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from mdistiller import config
from mdistiller.config import Check, Key, at_least
from mdistiller.distillers.losses import Temperatures, bounded, deviation, maximum
from mdistiller.errors import UserError, check_signature, users_code
from mdistiller.registry import same_definition, temperature_rules

# Below these the quotients of a rule leave float32. Both lie far under what training meets: a freshly initialised
# MobileNetV2 beside a strong teacher has max(v) near 0.02 and T_student near 1e-3 tau.
MIN_MAXIMUM = 1e-12
MIN_TEMPERATURE = 1e-5  # times tau
below_half = Check(lambda v: 0 < v < 0.5, "must be in (0, 0.5)")  # of margins at both ends of 2 tau
MIN_SLOPE = 1e-6  # of the sharpness difference: less than its rounding moves the root at will


def register_rule(name: str, defaults: Mapping | None = None, needs_batch: bool = False) -> Callable:
    """Enter the decorated `rule(logits_student, logits_teacher, tau, **options) -> Temperatures` under `name`.

    `defaults` become the section CFG.TEMPERATURE.<NAME in capitals>; its keys reach the rule in lower case. A class is
    built once as rule(teacher, **options), an nn.Module whose parameters are trained, and called with `epoch` besides.
    `needs_batch`: a row's temperatures depend on the other rows, so that a batch cannot be taken in chunks.
    """

    def register(rule: Callable) -> Callable:
        rule.needs_batch = needs_batch
        again = same_definition(temperature_rules.own.get(name), rule)
        temperature_rules[name] = rule
        if defaults:
            title = (rule.__doc__ or "").strip().split("\n")[0]
            config.add_section(f"TEMPERATURE.{name.upper()}", defaults, title, again=again)
        return rule

    return register


class Rule(nn.Module):
    """A rule with its options; under `detach` no gradient flows through its temperatures and factor."""

    def __init__(self, function: Callable, options: dict, detach: bool):
        super().__init__()
        self.function, self.options, self.detach = function, options, detach
        self.needs_batch = getattr(function, "needs_batch", False)

    def forward(self, logits_student: Tensor, logits_teacher: Tensor, tau: float, **kwargs) -> Temperatures:
        if self.detach:
            logits_student, logits_teacher = logits_student.detach(), logits_teacher.detach()
        return self.function(logits_student, logits_teacher, tau, **self.options)


FACTORS: dict[str, Callable[[Tensor, float], Tensor]] = {  # TEMPERATURE.FACTOR, of a rule's factor (B, 1) and tau
    "rule": lambda factor, tau: factor,
    "tau2": lambda factor, tau: torch.full_like(factor, tau**2),
    "mean": lambda factor, tau: factor / factor.mean(),
}


def rule_name(cfg, own: str) -> str:
    """Return the name of the rule that `cfg` asks for, or the method's `own`. EXPERIMENT.LOGIT_STAND means "std"."""
    return cfg.TEMPERATURE.RULE or ("std" if cfg.EXPERIMENT.LOGIT_STAND else own)


def build_rule(cfg, own: str, teacher: nn.Module) -> nn.Module:
    """Return the rule that `cfg` asks for, or the method's `own`.

    Raises UserError where TEMPERATURE.RULE and EXPERIMENT.LOGIT_STAND disagree, where a rule is to learn and to be
    detached, or where it cannot be built.
    """
    name = rule_name(cfg, own)
    if cfg.EXPERIMENT.LOGIT_STAND and name != "std":
        raise UserError(
            f"EXPERIMENT.LOGIT_STAND is the rule std, but TEMPERATURE.RULE is {name}; leave one of them out"
        )
    rule = temperature_rules[name]
    options = {key.lower(): value for key, value in cfg.TEMPERATURE.get(name.upper(), {}).items()}
    if not isinstance(rule, type):
        return Rule(rule, options, cfg.TEMPERATURE.DETACH)
    if cfg.TEMPERATURE.DETACH:
        raise UserError(f"TEMPERATURE.DETACH: the rule {name} learns from its gradient; set it to False")
    check_signature(rule, (teacher,), options, f"the temperature rule {name}", "rule(teacher, **options)")
    with users_code(f"the temperature rule {name}"):
        built = rule(teacher, **options)
    if not isinstance(built, nn.Module):
        raise UserError(f"the temperature rule {name} is a class: it must derive from torch.nn.Module")
    return built


def check_rule(rule: nn.Module, name: str, num_classes: int) -> None:
    """Raise UserError where what `rule` makes of 16 rows of random logits is not what `register_rule` asks for.

    No trace is left: generators and the rule's state are as before.
    """
    what = f"the temperature rule {name}"
    generator = torch.Generator().manual_seed(0)
    device = next((parameter.device for parameter in rule.parameters()), torch.device("cpu"))
    student, teacher = (2 * torch.randn(2, 16, num_classes, generator=generator)).to(device)
    before = {key: value.clone() for key, value in rule.state_dict().items()}
    with torch.random.fork_rng(devices=[]):
        # in training it gets these too, and its gradient is taken
        given = {"epoch": 1, "index": torch.arange(16, device=device)}
        function = rule.function if isinstance(rule, Rule) else rule.forward
        options, call = (rule.options, ", **options") if isinstance(rule, Rule) else (given, ", *, epoch, **kwargs")
        wanted = f"rule(logits_student, logits_teacher, tau{call})"
        check_signature(function, (student, teacher, 4.0), options, what, wanted)
        with users_code(what):
            found = rule(student.requires_grad_(), teacher, 4.0, **given)
    rule.load_state_dict(before)
    if not isinstance(found, Temperatures):
        got = type(found).__name__
        raise UserError(
            f"{what} must return mdistiller.losses.Temperatures(student, teacher, factor, sound); got {got}"
        )
    for part, value in found._asdict().items():
        if not (isinstance(value, Tensor) and value.shape == (16, 1)):
            got = f"{tuple(value.shape)} for B = 16" if isinstance(value, Tensor) else type(value).__name__
            raise UserError(f"{what}: {part} must be a tensor (B, 1); got {got}")
        if part in ("student", "teacher") and not bool(((value > 0) & value.isfinite()).all()):
            worst = value[~((value > 0) & value.isfinite())][0].item()
            raise UserError(f"{what}: the {part}'s temperatures must be positive and finite; got {worst:.4g}")


def _both(tau: float, like: Tensor) -> tuple[Tensor, Tensor]:
    column = torch.full_like(like[:, :1], tau)
    return column, torch.ones_like(column, dtype=torch.bool)


@register_rule("fixed")
def fixed(logits_student: Tensor, logits_teacher: Tensor, tau: float) -> Temperatures:
    """Return tau on both sides and the factor tau^2, for every sample (Hinton et al., arXiv 1503.02531)."""
    column, sound = _both(tau, bounded(logits_student[:, :1]))
    return Temperatures(column, column, column * column, sound)


def _shares(max_student: Tensor, max_teacher: Tensor, tau: float) -> Temperatures:
    """Share out 2 tau in proportion to two maxima (B, 1); tau each where one of them is not positive."""
    sound = (max_student > MIN_MAXIMUM) & (max_teacher > MIN_MAXIMUM)
    # chosen before the division, not after: the gradient of an unused quotient by zero is NaN all the same
    max_student = torch.where(sound, max_student, 1.0)
    max_teacher = torch.where(sound, max_teacher, 1.0)
    total = max_student + max_teacher
    t_student = (2 * tau * max_student / total).clamp(min=MIN_TEMPERATURE * tau)
    t_teacher = (2 * tau * max_teacher / total).clamp(min=MIN_TEMPERATURE * tau)
    return Temperatures(t_student, t_teacher, t_student * t_teacher, sound)


@register_rule("max_logit")
def max_logit(logits_student: Tensor, logits_teacher: Tensor, tau: float) -> Temperatures:
    """Return the temperatures of DTKD as published (arXiv 2404.12711, section 3):

        T_student = 2 tau max(v) / (max(u) + max(v)),   T_teacher = 2 tau max(u) / (max(u) + max(v))

    and the factor T_student T_teacher. The temperatures add up to 2 tau; both are tau where the maxima agree. Blind to
    a common scale of v and u, not to a constant added to either, though softmax is. Defined where both maxima are
    positive; elsewhere both temperatures are tau.

    It does not anchor the student's scale: for v = c u every c > 0 gives v / T_student = u / T_teacher, a divergence of
    zero, and the factor falls to 0 with c. DTKD's other terms, KD at a fixed tau and cross entropy, hold the scale;
    with little of them, as under KD's weights, training can end near v = 0 (docs/temperature.md).
    """
    maxima = (maximum(bounded(logits)) for logits in (logits_student, logits_teacher))
    return _shares(*maxima, tau)


@register_rule("centred")
def centred(logits_student: Tensor, logits_teacher: Tensor, tau: float) -> Temperatures:
    """Return `max_logit` on logits minus their mean: blind, as softmax is, to a constant added to either side.

    The maximum above the mean is positive for every row that is not constant, so the rule is defined for all others;
    beside a constant row both temperatures are tau. The student's scale is no more anchored than under `max_logit`.
    """
    maxima = []
    for logits in map(bounded, (logits_student, logits_teacher)):
        top = maximum(logits)
        above = top - logits.mean(1, keepdim=True)
        maxima.append(torch.where(above > rounding(top), above, 0.0))
    return _shares(*maxima, tau)


def rounding(top: Tensor) -> Tensor:
    """Return what rounding may leave of a constant row's maximum `top` above its mean: (B, 1) each."""
    return 16 * torch.finfo(top.dtype).eps * top.detach().abs()


@register_rule(
    "erratum",
    defaults={
        "MARGIN": Key(
            0.05,
            "erratum: delta stays in [-(1 - MARGIN) tau, (1 - MARGIN) tau].",
            Check(lambda v: 0 < v <= 1, "must be in (0, 1]"),
        )
    },
)
def erratum(logits_student: Tensor, logits_teacher: Tensor, tau: float, margin: float = 0.05) -> Temperatures:
    """Return the temperatures by the correction that DTKD's authors published beside their code:

        delta = tau max_i (u_i - v_i) / (u_i + v_i),   T_teacher = tau + delta,   T_student = tau - delta

    with delta kept in [-(1 - margin) tau, (1 - margin) tau] and the factor T_student T_teacher.

    What it establishes: at that delta the scaled logits of the class that attains the maximum agree, u_i / T_teacher =
    v_i / T_student. What it does not: that the softened outputs, or their sharpness, agree; one class is matched, the
    others are not. Nor does delta stay in (-tau, tau) by itself: wherever u_i and v_i differ in sign, as for most
    samples of some class, the quotient lies outside [-1, 1], and the margin decides. Classes with u_i + v_i = 0 do not
    count; a row without others is undefined, and both temperatures are tau. With a hundred classes some u_i and v_i
    all but always differ in sign: then T_student = margin tau and T_teacher = (2 - margin) tau, for every sample.
    """
    student, teacher = bounded(logits_student), bounded(logits_teacher)
    total = student + teacher
    size = student.detach().abs() + teacher.detach().abs()
    usable = (total != 0) & (size > MIN_MAXIMUM)
    # a sum that all but cancels gives a quotient far beyond the margin; held at 1e6, its gradient stays finite as well
    total = torch.where(total.abs() < 1e-6 * size, (1e-6 * size).copysign(total.detach()), total)
    quotient = (teacher - student) / torch.where(usable, total, 1.0)
    delta = torch.where(usable, quotient, -torch.inf).max(1, keepdim=True).values
    sound = usable.any(1, keepdim=True)
    delta = tau * torch.where(sound, delta, 0.0).clamp(margin - 1, 1 - margin)
    t_student, t_teacher = tau - delta, tau + delta
    return Temperatures(t_student, t_teacher, t_student * t_teacher, sound)


@register_rule(
    "sharpness",
    defaults={
        "ITERATIONS": Key(24, "sharpness: bisections; each halves the error of T, tau at first.", at_least(1)),
        "MARGIN": Key(
            0.01,
            "sharpness: both T stay in [2 tau MARGIN, 2 tau (1 - MARGIN)].",
            below_half,
        ),
    },
)
def sharpness(
    logits_student: Tensor, logits_teacher: Tensor, tau: float, iterations: int = 24, margin: float = 0.01
) -> Temperatures:
    """Return the pair with T_student + T_teacher = 2 tau at which the softened sharpness agrees, which is what the
    derivation of DTKD is after (arXiv 2404.12711, section 3, sharpness = log-sum-exp of the scaled logits):

        f(T_teacher) = logsumexp(u / T_teacher) - logsumexp(v / (2 tau - T_teacher)) = 0

    and the factor T_student T_teacher. Where max(u) and max(v) are both positive, f goes from +inf at T_teacher = 0 to
    -inf at 2 tau, so a root exists; otherwise there may be none. It is the only one where the means of u and of v under
    their softened softmax are positive for every T, as they are where the plain means are not negative; elsewhere there
    may be three. It is looked for in [2 tau margin, 2 tau (1 - margin)], on the side of tau on which f changes its
    sign, and is tau where u = v, by `iterations` bisections of the whole batch at once. It is accepted where f is
    positive at the lower end and negative at the upper one, and falls at the root; elsewhere, also where a root lies
    beyond the margin, both temperatures are tau. A Newton step on it carries the gradient: by the implicit function
    theorem it is that of the root itself.
    """
    student, teacher = bounded(logits_student), bounded(logits_teacher)

    def f(t_teacher: Tensor, v: Tensor, u: Tensor) -> Tensor:
        return torch.logsumexp(u / t_teacher, 1, keepdim=True) - torch.logsumexp(
            v / (2 * tau - t_teacher), 1, keepdim=True
        )

    with torch.no_grad():
        v, u = student.detach(), teacher.detach()
        low = torch.full_like(v[:, :1], 2 * tau * margin)
        high = 2 * tau - low
        sound = (f(low, v, u) > 0) & (f(high, v, u) < 0)
        tau_column = torch.full_like(low, tau)
        at_tau = f(tau_column, v, u)
        low, high = torch.where(at_tau > 0, tau_column, low), torch.where(at_tau > 0, high, tau_column)
        for _ in range(iterations):
            middle = (low + high) / 2
            positive = f(middle, v, u) > 0
            low, high = torch.where(positive, middle, low), torch.where(positive, high, middle)
        root = torch.where(sound & (at_tau != 0), (low + high) / 2, tau)
        p, q = (u / root).softmax(1), (v / (2 * tau - root)).softmax(1)
        # df / dT_teacher; each mean logit is divided by its own squared temperature
        slope = -(p * u).sum(1, keepdim=True) / root**2 - (q * v).sum(1, keepdim=True) / (2 * tau - root) ** 2
        sound = sound & (slope < -MIN_SLOPE)  # elsewhere the root is not a simple one, and has no gradient
        root, slope = torch.where(sound, root, tau), torch.where(sound, slope, 1.0)
    newton = f(root, student, teacher) / slope
    width = tau / 2**iterations  # of the bracket that is left: what leads out of it is rounding
    value = root - newton.detach().clamp(-width, width)
    t_teacher = torch.where(sound, value - (newton - newton.detach()), tau)
    t_student = 2 * tau - t_teacher
    return Temperatures(t_student, t_teacher, t_student * t_teacher, sound)


@register_rule("std")
def std(logits_student: Tensor, logits_teacher: Tensor, tau: float) -> Temperatures:
    """Return T = tau std(logits) on each side and the factor tau^2: LSKD (Sun et al., CVPR 2024, arXiv 2403.01427,
    section 4.3).

    The same as comparing z-scores (x - mean) / std at tau, as softmax is blind to the mean. The deviation is over K,
    not K - 1. A side whose row is constant falls back to tau.
    """
    return _deviations(logits_student, logits_teacher, tau, lambda t_teacher: torch.full_like(t_teacher, tau**2))


@register_rule("norm")
def norm(logits_student: Tensor, logits_teacher: Tensor, tau: float) -> Temperatures:
    """Return T = tau std(logits) on each side and the factor T_teacher^2, which gives each sample's gradient back the
    size that its own temperature took from it: NormKD (arXiv 2308.00520).
    """
    return _deviations(logits_student, logits_teacher, tau, lambda t_teacher: t_teacher**2)


def _deviations(logits_student: Tensor, logits_teacher: Tensor, tau: float, factor: Callable) -> Temperatures:
    sides = [deviation(logits) for logits in (logits_student, logits_teacher)]
    t_student, t_teacher = (tau * value for value, _ in sides)
    return Temperatures(t_student, t_teacher, factor(t_teacher), sides[0][1] & sides[1][1])
