"""SP, Tung and Mori (ICCV 2019). https://arxiv.org/abs/1907.09682"""

from torch import Tensor, nn

from mdistiller.distillers import keys
from mdistiller.distillers._registry import register_distiller
from mdistiller.distillers.base import FeatureDistiller
from mdistiller.distillers.features import sum_over_stages, unit
from mdistiller.distillers.losses import in_float32


def _similarity(f: Tensor) -> Tensor:
    """Map (B, ...) to (B, B): inner products of the flattened samples, each row of unit length (section 3)."""
    f = f.flatten(1)
    return unit(f @ f.mT, 1)


@in_float32
def sp_loss(f_s: Tensor | list[Tensor], f_t: Tensor | list[Tensor]) -> Tensor:
    """Return the mean squared difference of the two similarity matrices over all B^2 pairs: a scalar (section 3).

    Features (B, ...) of any two shapes, or two lists of such, for their sum. A zero feature has zero similarity to all.
    Zero for equal features.
    """
    if not isinstance(f_s, Tensor):
        return sum_over_stages(sp_loss, f_s, f_t)
    return (_similarity(f_s) - _similarity(f_t)).square().mean()


@register_distiller("SP", defaults={"LOSS": keys.feature_weights(3000.0)})
class SP(FeatureDistiller):
    """CE_WEIGHT * cross entropy + FEAT_WEIGHT * sp_loss at the last stage."""

    needs_batch = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg):
        super().__init__(student, teacher, cfg.SP.LOSS.CE_WEIGHT, cfg.SP.LOSS.FEAT_WEIGHT)

    def feature_loss(self, feats_student: dict, feats_teacher: dict, **kwargs) -> Tensor:
        return sp_loss(feats_student["feats"][-1], feats_teacher["feats"][-1])
