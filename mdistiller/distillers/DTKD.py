"""DTKD, Dynamic Temperature Knowledge Distillation (2024). https://arxiv.org/abs/2404.12711"""

import torch
from torch import Tensor, nn

from mdistiller.distillers._base import LogitDistiller
from mdistiller.distillers._common import Temperatures, bounded, ce_loss, softened_kl, warmup
from mdistiller.distillers._registry import register_distiller
from mdistiller.distillers.KD import kd_loss

# Below these the rule's quotients leave float32. Both lie far under what training meets: a freshly initialised
# MobileNetV2 beside a strong teacher has max(v) near 0.02 and T_student near 1e-3 tau.
MIN_MAXIMUM = 1e-12
MIN_TEMPERATURE = 1e-5  # times tau


def max_logit(logits_student: Tensor, logits_teacher: Tensor, tau: float) -> Temperatures:
    """The temperature rule of DTKD (arXiv 2404.12711, section 3). Student logits v and teacher logits u, both (B, K):

        T_student = 2 tau max(v) / (max(u) + max(v)),   T_teacher = 2 tau max(u) / (max(u) + max(v))

    and the factor T_student T_teacher. The temperatures add up to 2 tau; both are tau where the maxima agree. The rule
    is defined where both maxima are positive; elsewhere both temperatures are tau. Gradients flow through both, as
    they do in the authors' code.
    """
    max_student = bounded(logits_student).max(1, keepdim=True).values  # (B, 1)
    max_teacher = bounded(logits_teacher).max(1, keepdim=True).values
    sound = (max_student > MIN_MAXIMUM) & (max_teacher > MIN_MAXIMUM)
    # chosen before the division, not after: the gradient of an unused quotient by zero is NaN all the same
    max_student = torch.where(sound, max_student, 1.0)
    max_teacher = torch.where(sound, max_teacher, 1.0)
    total = max_student + max_teacher
    t_student = (2 * tau * max_student / total).clamp(min=MIN_TEMPERATURE * tau)
    t_teacher = (2 * tau * max_teacher / total).clamp(min=MIN_TEMPERATURE * tau)
    return Temperatures(t_student, t_teacher, t_student * t_teacher, sound)


def dtkd_loss(logits_student: Tensor, logits_teacher: Tensor, temperature: float) -> Tensor:
    """Mean over the batch of T_teacher T_student KL(softmax(u / T_teacher) || softmax(v / T_student)): a scalar.

    Student logits v and teacher logits u are (B, K); `temperature` is the reference tau > 0. Finite, with finite
    gradients, for every finite input; zero for identical logits.
    """
    return softened_kl(logits_student, logits_teacher, max_logit(logits_student, logits_teacher, temperature))


@register_distiller("DTKD", defaults={"ALPHA": 3.0, "BETA": 1.0, "CE_WEIGHT": 1.0, "T": 4.0, "WARMUP": 20})
class DTKD(LogitDistiller):
    """min(epoch / WARMUP, 1) * (ALPHA * dtkd_loss + BETA * kd_loss) + CE_WEIGHT * cross entropy, reference T."""

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg):
        super().__init__(student, teacher)
        self.alpha = cfg.DTKD.ALPHA
        self.beta = cfg.DTKD.BETA
        self.ce_weight = cfg.DTKD.CE_WEIGHT
        self.temperature = cfg.DTKD.T
        self.warmup = cfg.DTKD.WARMUP

    def losses(
        self, logits_student: Tensor, logits_teacher: Tensor, target: Tensor, *, epoch: int, **kwargs
    ) -> dict[str, Tensor]:
        dtkd = self.alpha * dtkd_loss(logits_student, logits_teacher, self.temperature)
        kd = self.beta * kd_loss(logits_student, logits_teacher, self.temperature)
        return {
            "loss_ce": self.ce_weight * ce_loss(logits_student, target),
            "loss_kd": warmup(epoch, self.warmup) * (dtkd + kd),
        }
