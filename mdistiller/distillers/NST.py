"""NST, Huang and Wang (2017). https://arxiv.org/abs/1707.01219"""

from torch import Tensor, nn

from mdistiller.distillers import keys
from mdistiller.distillers._registry import register_distiller
from mdistiller.distillers.base import FeatureDistiller
from mdistiller.distillers.features import match_size, sum_over_stages, unit
from mdistiller.distillers.losses import in_float32


def _kernel_mean(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean of the kernel (x . y)^2 over all pairs of rows x of a (B, C, N) and y of b (B, C', N)."""
    return (a @ b.mT).square().mean()


@in_float32
def nst_loss(feats_student: list[Tensor], feats_teacher: list[Tensor]) -> Tensor:
    """Return the sum over the stages of the squared MMD between the two sets of channel maps: a scalar (section 4).

    Lists of (B, C_i, H_i, W_i). Each channel's map is a sample: flattened and scaled to unit length; a dead channel
    stays zero. The kernel is polynomial, d = 2 and c = 0. Channels may differ; the larger map is average-pooled to the
    smaller one's size. Zero for equal features.
    """

    def stage(f_s: Tensor, f_t: Tensor) -> Tensor:
        f_s, f_t = (unit(f.flatten(2), 2) for f in match_size(f_s, f_t))
        return _kernel_mean(f_t, f_t) + _kernel_mean(f_s, f_s) - 2 * _kernel_mean(f_s, f_t)

    return sum_over_stages(stage, feats_student, feats_teacher)


@register_distiller("NST", defaults={"LOSS": keys.feature_weights(50.0)})
class NST(FeatureDistiller):
    """CE_WEIGHT * cross entropy + FEAT_WEIGHT * nst_loss over every stage after the stem."""

    least_maps = 2

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg):
        super().__init__(student, teacher, cfg.NST.LOSS.CE_WEIGHT, cfg.NST.LOSS.FEAT_WEIGHT)

    def feature_loss(self, feats_student: dict, feats_teacher: dict, **kwargs) -> Tensor:
        return nst_loss(feats_student["feats"][1:], feats_teacher["feats"][1:])
