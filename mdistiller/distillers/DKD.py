"""DKD, Zhao et al. (CVPR 2022). https://arxiv.org/abs/2203.08679"""

import torch
from torch import Tensor, nn

from mdistiller.distillers._base import LogitDistiller
from mdistiller.distillers._common import bounded, ce_loss, kl_divergence, warmup
from mdistiller.distillers._registry import register_distiller


def split(logits: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Logits (B, K) and labels (B,) -> the two halves of the problem, both again logits.

    (B, 2): the target's, and the one that stands for all others together, tau logsumexp(z / tau) over them; (B, K - 1):
    the others alone. Gathered rather than masked: no probability is formed, so none underflows.
    """
    others = torch.arange(logits.shape[1] - 1, device=logits.device)
    others = others + (others >= target[:, None])  # (B, K - 1): every class but the target
    others = logits.gather(1, others)
    rest = temperature * torch.logsumexp(others / temperature, 1, keepdim=True)
    return torch.cat([logits.gather(1, target[:, None]), rest], 1), others


def dkd_loss(
    logits_student: Tensor, logits_teacher: Tensor, target: Tensor, alpha: float, beta: float, temperature: float
) -> Tensor:
    """tau^2 (alpha TCKD + beta NCKD), mean over the batch: a scalar (Eq. 6 and 7).

    TCKD is the KL divergence between the probabilities (target, not target), NCKD the one among the other classes.
    Logits (B, K), K >= 2, labels (B,), temperature tau > 0. Zero where the logits differ by a constant; finite, with
    finite gradients, for every finite input.
    """
    binary_student, others_student = split(bounded(logits_student), target, temperature)
    binary_teacher, others_teacher = split(bounded(logits_teacher), target, temperature)
    tckd = kl_divergence(binary_student, binary_teacher, temperature, temperature)  # (B,)
    nckd = kl_divergence(others_student, others_teacher, temperature, temperature)
    return (alpha * tckd + beta * nckd).mean() * temperature**2


@register_distiller("DKD", defaults={"CE_WEIGHT": 1.0, "ALPHA": 1.0, "BETA": 8.0, "T": 4.0, "WARMUP": 20})
class DKD(LogitDistiller):
    """CE_WEIGHT * cross entropy + min(epoch / WARMUP, 1) * dkd_loss."""

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg):
        super().__init__(student, teacher)
        self.ce_weight = cfg.DKD.CE_WEIGHT
        self.alpha = cfg.DKD.ALPHA
        self.beta = cfg.DKD.BETA
        self.temperature = cfg.DKD.T
        self.warmup = cfg.DKD.WARMUP

    def losses(
        self, logits_student: Tensor, logits_teacher: Tensor, target: Tensor, *, epoch: int, **kwargs
    ) -> dict[str, Tensor]:
        dkd = dkd_loss(logits_student, logits_teacher, target, self.alpha, self.beta, self.temperature)
        return {
            "loss_ce": self.ce_weight * ce_loss(logits_student, target),
            "loss_kd": warmup(epoch, self.warmup) * dkd,
        }
