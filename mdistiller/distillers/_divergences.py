"""Divergences between the softened outputs of teacher and student: what a method's loss is the mean of.

Each maps student logits v (B, K), teacher logits u (B, K) and their temperatures, (B, 1) or numbers, to one value for
each row, (B,), with p = softmax(u / T_teacher) and q = softmax(v / T_student). It is 0 where p = q and above elsewhere,
up to rounding. All are computed from log-probabilities in float32, whatever the type of the logits: finite, with finite
gradients, for every finite input. DIVERGENCE.TYPE puts any of them in the place of a method's KL divergence.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mdistiller.distillers.losses import bounded, kl_divergence

Temperature = Tensor | float


def reverse_kl(
    logits_student: Tensor, logits_teacher: Tensor, t_student: Temperature, t_teacher: Temperature
) -> Tensor:
    """Return KL(q || p) of each sample, (B,): it seeks modes of the teacher, where KL(p || q) covers all of them."""
    return kl_divergence(logits_teacher, logits_student, t_teacher, t_student)


def jensen_shannon(
    logits_student: Tensor, logits_teacher: Tensor, t_student: Temperature, t_teacher: Temperature, beta: float = 0.5
) -> Tensor:
    """Return the generalised Jensen-Shannon divergence of each sample, (B,), 0 < beta < 1 (GKD, arXiv 2306.13649):

        beta KL(p || m) + (1 - beta) KL(q || m),   m = beta p + (1 - beta) q

    Over beta it tends to KL(p || q) for beta -> 0, and over 1 - beta to KL(q || p) for beta -> 1. It is bounded by the
    entropy of (beta, 1 - beta): by log 2 at most.
    """
    log_q, log_p = _log_probabilities(logits_student, logits_teacher, t_student, t_teacher)
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def skewed_kl(
    logits_student: Tensor, logits_teacher: Tensor, t_student: Temperature, t_teacher: Temperature, skew: float = 0.1
) -> Tensor:
    """Return KL(p || skew p + (1 - skew) q) of each sample, (B,), 0 < skew < 1 (DistiLLM, arXiv 2402.03898): at most
    log(1 / skew), where KL(p || q) has no bound.
    """
    log_q, log_p = _log_probabilities(logits_student, logits_teacher, t_student, t_teacher)
    return _kl(log_p, _log_mixture(log_p, log_q, skew))


def skewed_reverse_kl(
    logits_student: Tensor, logits_teacher: Tensor, t_student: Temperature, t_teacher: Temperature, skew: float = 0.1
) -> Tensor:
    """Return KL(q || skew q + (1 - skew) p) of each sample, (B,), 0 < skew < 1 (DistiLLM, arXiv 2402.03898)."""
    return skewed_kl(logits_teacher, logits_student, t_teacher, t_student, skew)


def total_variation(
    logits_student: Tensor, logits_teacher: Tensor, t_student: Temperature, t_teacher: Temperature
) -> Tensor:
    """Return half the sum of |p - q| over the classes, of each sample, (B,): at most 1. No gradient where p = q."""
    log_q, log_p = _log_probabilities(logits_student, logits_teacher, t_student, t_teacher)
    return (log_p.exp() - log_q.exp()).abs().sum(1) / 2


DIVERGENCES: dict[str, Callable[..., Tensor]] = {  # DIVERGENCE.TYPE
    "forward": kl_divergence,
    "reverse": reverse_kl,
    "jsd": jensen_shannon,
    "skewed": skewed_kl,
    "skewed_reverse": skewed_reverse_kl,
    "tv": total_variation,
}
OPTIONS = {"jsd": "BETA", "skewed": "SKEW", "skewed_reverse": "SKEW"}  # the key under DIVERGENCE that each one reads


def build_divergence(cfg) -> Callable[[Tensor, Tensor, Temperature, Temperature], Tensor]:
    """Return the divergence that `cfg` asks for, with its option."""
    name = cfg.DIVERGENCE.TYPE
    if name not in OPTIONS:
        return DIVERGENCES[name]
    option = OPTIONS[name]
    return functools.partial(DIVERGENCES[name], **{option.lower(): cfg.DIVERGENCE[option]})


def _log_probabilities(
    logits_student: Tensor, logits_teacher: Tensor, t_student: Temperature, t_teacher: Temperature
) -> tuple[Tensor, Tensor]:
    log_q = F.log_softmax(bounded(logits_student) / t_student, dim=1)
    return log_q, F.log_softmax(bounded(logits_teacher) / t_teacher, dim=1)


def _log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """Return log(share p + (1 - share) q), which is finite where both logarithms are."""
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
