"""TTM and WTTM, Zheng and Yang (ICLR 2024). https://arxiv.org/abs/2402.11148"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller.config import Key
from mdistiller.distillers import keys
from mdistiller.distillers._registry import register_distiller
from mdistiller.distillers.base import LogitDistiller
from mdistiller.distillers.losses import Temperatures, bounded, ce_loss, softened_kl


def power_sum(logits: Tensor, temperature: float) -> Tensor:
    """Return U = sum_k p_k^(1 / T), p = softmax(logits), of each row (Eq. 22): (B, 1). For T >= 1 it goes from 1, where
    p is one-hot, to K^(1 - 1 / T), where p is uniform.
    """
    powers = F.log_softmax(bounded(logits), dim=1) / temperature
    return powers.logsumexp(1, keepdim=True).exp()


def transformed_teacher(
    logits_student: Tensor, logits_teacher: Tensor, tau: float, weighted: bool = False
) -> Temperatures:
    """Return the temperatures of TTM: the teacher alone is softened, T_student = 1, T_teacher = tau. The factor is 1,
    or `weighted` the smoothness of the teacher's output, its `power_sum`. Logits (B, K); defined everywhere.
    """
    one = torch.ones_like(bounded(logits_teacher[:, :1]))  # (B, 1)
    factor = power_sum(logits_teacher, tau) if weighted else one
    return Temperatures(one, tau * one, factor, one.bool())


def ttm_loss(logits_student: Tensor, logits_teacher: Tensor, temperature: float) -> Tensor:
    """Return the mean over the batch of KL(softmax(u / T) || softmax(v)): a scalar (Eq. 2).

    Student logits v and teacher logits u are (B, K). Zero where v = u / T up to a constant; not for v = u.
    """
    return softened_kl(logits_student, logits_teacher, transformed_teacher(logits_student, logits_teacher, temperature))


def wttm_loss(logits_student: Tensor, logits_teacher: Tensor, temperature: float) -> Tensor:
    """Return the mean over the batch of U(u) KL(softmax(u / T) || softmax(v)), U the `power_sum`: a scalar (Eq. 23).

    Student logits v and teacher logits u are (B, K). Zero where v = u / T up to a constant; not for v = u.
    """
    rule = transformed_teacher(logits_student, logits_teacher, temperature, weighted=True)
    return softened_kl(logits_student, logits_teacher, rule)


def section(beta: float) -> dict[str, Key]:
    """Return the keys of either method. Table 8 of the paper tunes 1 / T and BETA for each pair; the defaults are those
    of resnet32x4 -> resnet8x4.
    """
    return {
        "CE_WEIGHT": keys.ce_weight(),
        "BETA": Key(beta, "Weight beta of the distillation loss."),
        "T": keys.temperature(10.0, "Temperature of the teacher alone, 1 / gamma."),
    }


@register_distiller("TTM", defaults=section(beta=100.0))
class TTM(LogitDistiller):
    """CE_WEIGHT * cross entropy + BETA * ttm_loss at T, the inverse of the paper's exponent gamma."""

    rowwise = True
    loss = staticmethod(ttm_loss)
    section = "TTM"

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg):
        super().__init__(student, teacher)
        self.ce_loss_weight = cfg[self.section].CE_WEIGHT
        self.beta = cfg[self.section].BETA
        self.temperature = cfg[self.section].T

    def losses(self, logits_student: Tensor, logits_teacher: Tensor, target: Tensor, **kwargs) -> dict[str, Tensor]:
        return {
            "loss_ce": self.ce_loss_weight * ce_loss(logits_student, target),
            "loss_kd": self.beta * self.loss(logits_student, logits_teacher, self.temperature),
        }


@register_distiller("WTTM", defaults=section(beta=3.0))
class WTTM(TTM):
    """CE_WEIGHT * cross entropy + BETA * wttm_loss at T, the inverse of the paper's exponent gamma."""

    loss = staticmethod(wttm_loss)
    section = "WTTM"
