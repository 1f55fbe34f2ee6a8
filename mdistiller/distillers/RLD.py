"""RLD, Refined Logit Distillation, Sun et al. (ICCV 2025). https://arxiv.org/abs/2408.07703"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller.config import Key, at_least
from mdistiller.distillers import keys
from mdistiller.distillers._registry import register_distiller
from mdistiller.distillers.base import LogitDistiller
from mdistiller.distillers.losses import bounded, ce_loss, row_mean, warmup


def binary_log_probabilities(logits: Tensor, index: Tensor) -> Tensor:
    """Return log of (p_index, 1 - p_index), p = softmax(logits (B, K)), index (B,): (B, 2)."""
    log_p = F.log_softmax(logits, dim=1)
    chosen = F.one_hot(index, logits.shape[1]).bool()
    rest = log_p.masked_fill(chosen, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([log_p.gather(1, index[:, None]), rest], dim=1)


def scd_loss(logits_student: Tensor, logits_teacher: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Return the sample confidence: tau^2 KL((p_max, 1 - p_max) || (q_target, 1 - q_target)), mean over the batch.

    q = softmax(v / tau) and p = softmax(u / tau) of student logits v and teacher logits u, (B, K); target (B,). Zero
    for identical logits where the teacher is right: where it errs, the student learns its confidence, not its class.
    """
    student, teacher = (bounded(logits) / temperature for logits in (logits_student, logits_teacher))
    log_student = binary_log_probabilities(student, target)
    log_teacher = binary_log_probabilities(teacher, teacher.argmax(1))
    divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(1)
    return row_mean(divergence) * temperature**2


def mcd_loss(logits_student: Tensor, logits_teacher: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Return the masked correlation: tau^2 KL(softmax(u / tau) || softmax(v / tau)) over the classes that the teacher
    ranks below the target, {k: u_k < u_target}, mean over the batch: a scalar.

    Student logits v and teacher logits u are (B, K), target (B,). Zero for identical logits, and for a sample of which
    fewer than two classes remain.
    """
    student, teacher = bounded(logits_student), bounded(logits_teacher)
    keep = teacher < teacher.gather(1, target[:, None])
    some = keep.any(1, keepdim=True)  # (B, 1)
    keep = keep | ~some  # a softmax over no class is NaN; such a row is weighted with 0 below
    logs = []
    for logits in (student, teacher):
        log_p = F.log_softmax((logits / temperature).masked_fill(~keep, -torch.inf), dim=1)
        logs.append(torch.where(keep, log_p, 0.0))  # equal on both sides: adds nothing
    divergence = F.kl_div(*logs, reduction="none", log_target=True).sum(1)
    return row_mean(divergence * some.squeeze(1)) * temperature**2


def rld_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
    alpha_temperature: float | None = None,
) -> Tensor:
    """Return alpha * scd_loss + beta * mcd_loss: a scalar. Logits (B, K), target (B,). The target itself is never among
    the correlated classes, so that the two parts do not pull at it both. `alpha_temperature` is scd_loss's, None for
    the same.
    """
    scd = scd_loss(logits_student, logits_teacher, target, alpha_temperature or temperature)
    return alpha * scd + beta * mcd_loss(logits_student, logits_teacher, target, temperature)


@register_distiller(
    "RLD",
    defaults={
        "CE_WEIGHT": keys.ce_weight(),
        "ALPHA": Key(1.0, "Weight alpha of the sample confidence."),
        "BETA": Key(8.0, "Weight beta of the masked correlation."),
        "T": keys.temperature(4.0, "Temperature of the masked correlation."),
        # runs from before these keys had neither a warm-up nor a temperature of the confidence's own
        "ALPHA_T": Key(1.0, "Temperature of the sample confidence; 0: T.", at_least(0), absent=0.0),
        "WARMUP": keys.warmup()._replace(absent=0.0),
    },
)
class RLD(LogitDistiller):
    """CE_WEIGHT * cross entropy + min(epoch / WARMUP, 1) * rld_loss at ALPHA, BETA, T and ALPHA_T."""

    rowwise = True
    needs_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg):
        super().__init__(student, teacher)
        self.ce_loss_weight = cfg.RLD.CE_WEIGHT
        self.alpha = cfg.RLD.ALPHA
        self.beta = cfg.RLD.BETA
        self.temperatures = cfg.RLD.T, cfg.RLD.ALPHA_T
        self.warmup = cfg.RLD.WARMUP

    def losses(
        self, logits_student: Tensor, logits_teacher: Tensor, target: Tensor, *, epoch: int, **kwargs
    ) -> dict[str, Tensor]:
        rld = rld_loss(logits_student, logits_teacher, target, self.alpha, self.beta, *self.temperatures)
        return {
            "loss_ce": self.ce_loss_weight * ce_loss(logits_student, target),
            "loss_kd": warmup(epoch, self.warmup) * rld,
        }
