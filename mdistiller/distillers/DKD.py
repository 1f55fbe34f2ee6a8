"""DKD, Zhao et al. (CVPR 2022). https://arxiv.org/abs/2203.08679"""

from torch import Tensor, nn

from mdistiller.config import Key
from mdistiller.distillers import keys
from mdistiller.distillers._registry import register_distiller
from mdistiller.distillers.base import RuleDistiller
from mdistiller.distillers.losses import Temperatures, ce_loss, part_divergences, row_mean, warmup
from mdistiller.distillers.rules import fixed, std


def dkd_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
    logit_stand: bool = False,
) -> Tensor:
    """Return tau^2 (alpha TCKD + beta NCKD), mean over the batch: a scalar (Eq. 6 and 7).

    TCKD is the KL divergence between the probabilities (target, not target), NCKD the one among the other classes.
    Logits (B, K), K >= 2, labels (B,), temperature tau > 0. Zero where the logits differ by a constant; finite, with
    finite gradients, for every finite input. `logit_stand`: of z-scores, as method files written for LSKD's code ask.
    """
    rule = (std if logit_stand else fixed)(logits_student, logits_teacher, temperature)
    return softened_dkd(logits_student, logits_teacher, target, alpha, beta, rule)


def softened_dkd(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    temperatures: Temperatures,
) -> Tensor:
    """Return `dkd_loss` at the temperatures of any rule: the mean of factor (alpha TCKD + beta NCKD)."""
    t_student, t_teacher = temperatures.student, temperatures.teacher
    tckd, nckd = part_divergences(logits_student, logits_teacher, target, t_student, t_teacher)
    return row_mean(temperatures.factor.squeeze(1) * (alpha * tckd + beta * nckd))


@register_distiller(
    "DKD",
    defaults={
        "CE_WEIGHT": keys.ce_weight(),
        "ALPHA": Key(1.0, "Weight alpha of TCKD, the target's part."),
        "BETA": Key(8.0, "Weight beta of NCKD, the other classes' part."),
        "T": keys.temperature(4.0),
        "WARMUP": keys.warmup(),
    },
)
class DKD(RuleDistiller):
    """CE_WEIGHT * cross entropy + min(epoch / WARMUP, 1) * dkd_loss. TEMPERATURE.PART leaves one of its terms."""

    rowwise = True
    has_parts = True
    needs_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg):
        super().__init__(student, teacher, cfg)
        self.ce_loss_weight = cfg.DKD.CE_WEIGHT
        self.alpha = cfg.DKD.ALPHA if self.part != "non_target" else 0.0
        self.beta = cfg.DKD.BETA if self.part != "target" else 0.0
        self.temperature = cfg.DKD.T
        self.warmup = cfg.DKD.WARMUP

    def losses(
        self, logits_student: Tensor, logits_teacher: Tensor, target: Tensor, *, epoch: int, **kwargs
    ) -> dict[str, Tensor]:
        temperatures = self.soften(logits_student, logits_teacher, self.temperature, epoch=epoch, **kwargs)
        dkd = softened_dkd(logits_student, logits_teacher, target, self.alpha, self.beta, temperatures)
        return {
            "loss_ce": self.ce_loss_weight * ce_loss(logits_student, target),
            "loss_kd": warmup(epoch, self.warmup) * dkd,
        }
