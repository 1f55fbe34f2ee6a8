"""KD, Hinton et al. (NeurIPS workshop 2014). https://arxiv.org/abs/1503.02531"""

from torch import Tensor, nn

from mdistiller.distillers import keys
from mdistiller.distillers._registry import register_distiller
from mdistiller.distillers.base import RuleDistiller
from mdistiller.distillers.losses import ce_loss, kl_divergence, row_mean, softened_kl
from mdistiller.distillers.rules import std


def kd_loss(logits_student: Tensor, logits_teacher: Tensor, temperature: float, logit_stand: bool = False) -> Tensor:
    """Return tau^2 KL(softmax(u / tau) || softmax(v / tau)), mean over the batch: a scalar (section 2 of the paper).

    Student logits v and teacher logits u are (B, K), temperature tau > 0. Zero where v and u differ by a constant.
    `logit_stand`: of z-scores, as method files written for LSKD's code ask for it.
    """
    if logit_stand:
        return softened_kl(logits_student, logits_teacher, std(logits_student, logits_teacher, temperature))
    return row_mean(kl_divergence(logits_student, logits_teacher, temperature, temperature)) * temperature**2


@register_distiller("KD", defaults={"TEMPERATURE": keys.temperature(4.0), "LOSS": keys.logit_weights(0.1, 0.9)})
class KD(RuleDistiller):
    """CE_WEIGHT * cross entropy + KD_WEIGHT * kd_loss at TEMPERATURE, or any divergence at any rule's temperatures."""

    rowwise = True
    section = "KD"  # methods that are KD under another rule have one of their own
    has_parts = True
    takes_divergence = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg):
        super().__init__(student, teacher, cfg)
        weights = cfg[self.section].LOSS
        self.temperature = cfg[self.section].get("TEMPERATURE", cfg.KD.TEMPERATURE)
        self.ce_loss_weight, self.kd_loss_weight = weights.CE_WEIGHT, weights.KD_WEIGHT

    def losses(self, logits_student: Tensor, logits_teacher: Tensor, target: Tensor, **kwargs) -> dict[str, Tensor]:
        temperatures = self.soften(logits_student, logits_teacher, self.temperature, **kwargs)
        kd = softened_kl(logits_student, logits_teacher, temperatures, target, self.part, self.divergence)
        return {"loss_ce": self.ce_loss_weight * ce_loss(logits_student, target), "loss_kd": self.kd_loss_weight * kd}
