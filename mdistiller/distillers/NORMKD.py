"""NormKD, Chi et al. (2023). https://arxiv.org/abs/2308.00520"""

from torch import Tensor, nn

from mdistiller.distillers._base import RuleDistiller
from mdistiller.distillers._common import ce_loss, softened_kl
from mdistiller.distillers._registry import register_distiller
from mdistiller.distillers._rules import norm


def normkd_loss(logits_student: Tensor, logits_teacher: Tensor, temperature: float) -> Tensor:
    """Mean over the batch of T_teacher^2 KL(softmax(u / T_teacher) || softmax(v / T_student)): a scalar.

    Student logits v and teacher logits u are (B, K); `temperature` is the paper's T_norm > 0. Zero where v and u are
    positive affine images of each other.
    """
    return softened_kl(logits_student, logits_teacher, norm(logits_student, logits_teacher, temperature))


@register_distiller("NORMKD", defaults={"TEMPERATURE": 2.0, "LOSS": {"CE_WEIGHT": 0.1, "KD_WEIGHT": 0.9}})
class NormKD(RuleDistiller):
    """CE_WEIGHT * cross entropy + KD_WEIGHT * normkd_loss at TEMPERATURE, the paper's T_norm. The paper's exact weights
    and T_norm for CIFAR-100 could not be established; these are KD's, and a T_norm of common use.
    """

    own_rule = "norm"

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg):
        super().__init__(student, teacher, cfg)
        self.temperature = cfg.NORMKD.TEMPERATURE
        self.ce_weight = cfg.NORMKD.LOSS.CE_WEIGHT
        self.kd_weight = cfg.NORMKD.LOSS.KD_WEIGHT

    def losses(self, logits_student: Tensor, logits_teacher: Tensor, target: Tensor, **kwargs) -> dict[str, Tensor]:
        temperatures = self.soften(logits_student, logits_teacher, self.temperature, **kwargs)
        kd = softened_kl(logits_student, logits_teacher, temperatures)
        return {"loss_ce": self.ce_weight * ce_loss(logits_student, target), "loss_kd": self.kd_weight * kd}
