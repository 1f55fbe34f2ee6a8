"""NormKD, Chi et al. (2023). https://arxiv.org/abs/2308.00520"""

from torch import Tensor

from mdistiller.distillers import keys
from mdistiller.distillers._registry import register_distiller
from mdistiller.distillers.KD import KD
from mdistiller.distillers.losses import softened_kl
from mdistiller.distillers.rules import norm


def normkd_loss(logits_student: Tensor, logits_teacher: Tensor, temperature: float) -> Tensor:
    """Return the mean over the batch of T_teacher^2 KL(softmax(u / T_teacher) || softmax(v / T_student)): a scalar.

    Student logits v and teacher logits u are (B, K); `temperature` is the paper's T_norm > 0. Zero where v and u are
    positive affine images of each other.
    """
    return softened_kl(logits_student, logits_teacher, norm(logits_student, logits_teacher, temperature))


@register_distiller(
    "NORMKD",
    defaults={
        "TEMPERATURE": keys.temperature(2.0, "Factor T_norm: a sample's temperature over the deviation of its logits."),
        "LOSS": keys.logit_weights(0.1, 0.9),
    },
)
class NormKD(KD):
    """CE_WEIGHT * cross entropy + KD_WEIGHT * normkd_loss at TEMPERATURE, the paper's T_norm. The defaults are those of
    the public code, for every pair of CIFAR-100.
    """

    section = "NORMKD"
    own_rule = "norm"
    has_parts = False
