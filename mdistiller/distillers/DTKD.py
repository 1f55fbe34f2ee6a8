"""DTKD, Dynamic Temperature Knowledge Distillation (2024). https://arxiv.org/abs/2404.12711"""

from torch import Tensor, nn

from mdistiller.config import Key
from mdistiller.distillers import keys
from mdistiller.distillers._registry import register_distiller
from mdistiller.distillers.base import RuleDistiller
from mdistiller.distillers.losses import ce_loss, softened_kl, warmup
from mdistiller.distillers.rules import fixed, max_logit


def dtkd_loss(logits_student: Tensor, logits_teacher: Tensor, temperature: float) -> Tensor:
    """Return the batch's mean of T_teacher T_student KL(softmax(u / T_teacher) || softmax(v / T_student)): a scalar.

    Student logits v and teacher logits u are (B, K); `temperature` is the reference tau > 0. Finite, with finite
    gradients, for every finite input; zero for identical logits.
    """
    return softened_kl(logits_student, logits_teacher, max_logit(logits_student, logits_teacher, temperature))


@register_distiller(
    "DTKD",
    defaults={
        "ALPHA": Key(3.0, "Weight alpha of the loss at dynamic temperatures."),
        "BETA": Key(1.0, "Weight beta of KD at the fixed temperature T."),
        "CE_WEIGHT": keys.ce_weight(),
        "T": keys.temperature(4.0, "Reference temperature tau: half the sum of both dynamic temperatures."),
        "WARMUP": keys.warmup(),
    },
)
class DTKD(RuleDistiller):
    """min(epoch / WARMUP, 1) * (ALPHA * dtkd_loss + BETA * kd_loss) + CE_WEIGHT * cross entropy, reference T.

    TEMPERATURE.RULE puts another rule in max_logit's place; the KD term beside it keeps its fixed temperature.
    DIVERGENCE puts another divergence in KL's place, in both terms.
    """

    rowwise = True
    own_rule = "max_logit"
    has_parts = True
    takes_divergence = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg):
        super().__init__(student, teacher, cfg)
        self.alpha = cfg.DTKD.ALPHA
        self.beta = cfg.DTKD.BETA
        self.ce_loss_weight = cfg.DTKD.CE_WEIGHT
        self.temperature = cfg.DTKD.T
        self.warmup = cfg.DTKD.WARMUP

    def losses(
        self, logits_student: Tensor, logits_teacher: Tensor, target: Tensor, *, epoch: int, **kwargs
    ) -> dict[str, Tensor]:
        dynamic = self.soften(logits_student, logits_teacher, self.temperature, epoch=epoch, **kwargs)
        dtkd = softened_kl(logits_student, logits_teacher, dynamic, target, self.part, self.divergence)
        reference = fixed(logits_student, logits_teacher, self.temperature)
        kd = softened_kl(logits_student, logits_teacher, reference, target, self.part, self.divergence)
        return {
            "loss_ce": self.ce_loss_weight * ce_loss(logits_student, target),
            "loss_kd": warmup(epoch, self.warmup) * (self.alpha * dtkd + self.beta * kd),
        }
