"""Temperature rules for the tokens of language models, where rows are long and carry arbitrary constants."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mdistiller.config import Key, at_least
from mdistiller.distillers._long_rows import on_the_host, parts
from mdistiller.distillers.losses import Temperatures, bounded, full_precision
from mdistiller.distillers.rules import MIN_MAXIMUM, below_half, register_rule, rounding

SETTLED = 1e-4  # a step of Newton's method in log(T_teacher / T_student) after which the next one is about 1e-8


@register_rule(
    "centred_sharpness",
    defaults={
        "ITERATIONS": Key(5, "centred_sharpness: Newton steps, each of two passes over the logits.", at_least(1)),
        "MARGIN": Key(
            0.01,
            "centred_sharpness: both T stay in [2 tau MARGIN, 2 tau (1 - MARGIN)].",
            below_half,
        ),
    },
)
def centred_sharpness(
    logits_student: Tensor, logits_teacher: Tensor, tau: float, iterations: int = 5, margin: float = 0.01
) -> Temperatures:
    """Return the pair with T_student + T_teacher = 2 tau at which the sharpness of logits minus their mean agrees:

        logsumexp(u' / T_teacher) = logsumexp(v' / T_student),   u' = u - mean(u), v' = v - mean(v)

    and the factor T_student T_teacher. It is what `sharpness` solves, made blind to a constant added to either side, as
    softmax is; and it is defined for every row that is not constant (beside one both temperatures are tau).

    Why: G(T) = logsumexp(z' / T) - log K is, as a function of 1 / T, convex and 0 with slope 0 at 0, so it is positive
    and log G falls in log T with a slope of -1 or steeper. Hence log G_u - log G_v falls from +inf to -inf in x =
    log(T_teacher / T_student), with a slope of -1 or steeper: there is one root. It is tau where u = v + c, and
    T_student = c T_teacher for v = c u, so the student's scale is no more anchored than under `max_logit`.

    The root is found by `iterations` steps of Newton's method in x at most, kept inside the bracket that they narrow; a
    root beyond the margin is clipped to it. On a CPU they end where a step has become so short that the next one would
    be lost in rounding: commonly after three. The gradient is that of the root itself, by the implicit function
    theorem; 0 where it is clipped.
    """
    sides = bounded(logits_student), bounded(logits_teacher)
    wanted = [torch.is_grad_enabled() and side.requires_grad for side in sides]
    slopes = [torch.empty_like(side) if want else None for side, want in zip(sides, wanted, strict=True)]
    found = []
    with torch.no_grad(), full_precision(sides[0]):
        for part in parts(sides[0]):
            x, sound, gradients = _root(*(side.detach()[part] for side in sides), 2 * tau, iterations, margin)
            found.append((x, sound))
            for slope, gradient in zip(slopes, gradients, strict=True):
                if slope is not None:
                    slope[part] = gradient()
    x, sound = (torch.cat(column) for column in zip(*found, strict=True))
    for side, slope in zip(sides, slopes, strict=True):
        if slope is not None:
            x = _WithGradient.apply(x, side, slope)
    t_student, t_teacher = 2 * tau * (-x).sigmoid(), 2 * tau * x.sigmoid()
    return Temperatures(t_student, t_teacher, t_student * t_teacher, sound)


def _root(student: Tensor, teacher: Tensor, total: float, iterations: int, margin: float):
    """Return x = log(T_teacher / T_student) of `centred_sharpness`, (n, 1), where it is defined, and two functions that
    return dx / dv and dx / du, (n, K) each; of logits (n, K) and total = T_student + T_teacher.
    """
    classes, end = student.shape[1], math.log((1 - margin) / margin)
    sides, start, sound = [], 0.0, True
    for logits, sign in ((student, -1), (teacher, 1)):
        top = logits.amax(1, keepdim=True)
        below = logits - top  # (n, K), of which an exponential is at most 1
        above = -below.mean(1, keepdim=True)  # the maximum over the mean
        varied = above > rounding(top).clamp(min=MIN_MAXIMUM)
        above = torch.where(varied, above, 1.0)
        power = below.square().mean(1, keepdim=True) / above**2 - 1  # the variance over the maximum's square
        # mostly below G lies between its value for one raised logit, which goes with the maximum, and a normal one's
        start = start + sign * (above.log() + torch.where(varied, power, 1.0).clamp(min=1e-12).log() / 4)
        sides.append((below, above))
        sound = sound & varied
    x = start.clamp(-end, end)
    low, high = torch.full_like(x, -end), torch.full_like(x, end)
    for _ in range(iterations):
        t_student, t_teacher = total * (-x).sigmoid(), total * x.sigmoid()
        of_student = _excess(*sides[0], t_student, classes)
        of_teacher = _excess(*sides[1], t_teacher, classes)
        gap = of_teacher[0].log() - of_student[0].log()
        slope = -(of_teacher[1] * t_student + of_student[1] * t_teacher) / total
        low, high = torch.where(gap > 0, x, low), torch.where(gap < 0, x, high)
        step = (x - gap / slope).clamp(-end, end)
        step = torch.where((step < low) | (step > high), (low + high) / 2, step)
        x, last = step, step - x
        if on_the_host(x) and bool((last.abs() < SETTLED).all()):
            break
    free = sound & (x.abs() < end)
    x = torch.where(sound, x, 0.0)

    def gradient(found: tuple[Tensor, ...], temperature: Tensor, sign: int) -> Tensor:
        excess, _, powers, powers_sum = found
        scale = torch.where(free, sign / (temperature * excess * slope), 0.0)
        return powers.mul_(scale / powers_sum).sub_(scale / classes)  # (softmax - 1 / K) scale

    return (
        x,
        sound,
        (lambda: gradient(of_student, t_student, 1), lambda: gradient(of_teacher, t_teacher, -1)),
    )


def _excess(below: Tensor, above: Tensor, temperature: Tensor, classes: int) -> tuple[Tensor, ...]:
    """Return G = logsumexp(z' / T) - log K and -dlog G / dlog T, (n, 1) each, and the exponentials (n, K) and their
    sum (n, 1); of logits minus their maximum, (n, K), and the maximum over the mean, (n, 1).
    """
    powers = (below / temperature).exp_()
    powers_sum = powers.sum(1, keepdim=True)
    noise = 4 * torch.finfo(powers.dtype).eps * math.log(classes + 1)  # a row this near to uniform has no G to speak of
    excess = (above / temperature + powers_sum.log() - math.log(classes)).clamp(min=noise)
    mean = above + (powers * below).sum(1, keepdim=True) / powers_sum  # of z' under the softened softmax
    return excess, (mean / (temperature * excess)).clamp(min=1.0), powers, powers_sum


class _WithGradient(torch.autograd.Function):
    """x (B, 1) as it is, with the gradient dx / dlogits (B, K) that was found beside it."""

    @staticmethod
    def forward(ctx, x: Tensor, logits: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return gradient, (gradient * slope).to(slope.dtype), None


@register_rule(
    "adakd",
    defaults={"C": Key(0.5, "adakd: T stays in [tau exp(-C), tau exp(C)].", at_least(0))},
    needs_batch=True,
)
def adakd(logits_student: Tensor, logits_teacher: Tensor, tau: float, c: float = 0.5) -> Temperatures:
    """Return one temperature for both sides, by how far the outputs of each row are apart among those of its batch, and
    the factor T^2: the token rule of AdaKD (IDTS, arXiv 2510.11615):

        T = tau exp(-c tanh(log(s / median(s)))),   s = sqrt(sum_k (sqrt(p_k) - sqrt(q_k))^2 / 2)

    s is the Hellinger distance of p = softmax(u) and q = softmax(v), at temperature 1; a row above the median (of an
    even number the lower middle one) is cold, one below is hot. Neither s nor T carries a gradient. A row with s = 0,
    and every row where the median is 0, has tau. Alone among the rules it looks at the other rows: a batch in
    chunks is another loss.
    """
    with torch.no_grad():
        roots = [(F.log_softmax(bounded(logits), dim=1) / 2).exp_() for logits in (logits_student, logits_teacher)]
        distance = ((roots[0] - roots[1]).square_().sum(1, keepdim=True) / 2).sqrt()
        median = distance.sort(0).values[(len(distance) - 1) // 2 :][:1]  # (1, 1), or none of no row
        sound = (distance > 0) & (median > 0)
        ratio = torch.where(sound, distance / median, 1.0)
        temperature = torch.where(sound, tau * (-c * ratio.log().tanh()).exp(), tau)
        return Temperatures(temperature, temperature, temperature**2, sound)
