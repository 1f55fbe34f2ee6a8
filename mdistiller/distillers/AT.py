"""AT, Zagoruyko and Komodakis (ICLR 2017). https://arxiv.org/abs/1612.03928"""

from torch import Tensor, nn

from mdistiller.config import Key, positive
from mdistiller.distillers import keys
from mdistiller.distillers._registry import register_distiller
from mdistiller.distillers.base import FeatureDistiller
from mdistiller.distillers.features import match_size, sum_over_stages, unit
from mdistiller.distillers.losses import in_float32


def attention(f: Tensor, p: int) -> Tensor:
    """Return the attention map of features (B, C, H, W), the channels' mean of f^p, as unit vectors (B, H W).

    F_sum^p of section 3.1 up to the factor 1 / C, which the norm takes out. The map of a zero feature is zero. For an
    odd p the sign of f stays, as in the published training code.
    """
    return unit(f.pow(p).mean(1).flatten(1), 1)


@in_float32
def at_loss(feats_student: list[Tensor], feats_teacher: list[Tensor], p: int) -> Tensor:
    """Return the sum over the stages of the mean squared difference of the attention maps: a scalar (section 3.1).

    Lists of (B, C_i, H_i, W_i); channels may differ, and the larger map is average-pooled to the smaller one's size.
    Zero for equal features, whatever their scale.
    """

    def stage(f_s: Tensor, f_t: Tensor) -> Tensor:
        f_s, f_t = match_size(f_s, f_t)
        return (attention(f_s, p) - attention(f_t, p)).square().mean()

    return sum_over_stages(stage, feats_student, feats_teacher)


@register_distiller(
    "AT",
    defaults={
        "P": Key(2, "Exponent p of the attention map F_sum^p.", positive),
        "LOSS": keys.feature_weights(1000.0),
    },
)
class AT(FeatureDistiller):
    """CE_WEIGHT * cross entropy + FEAT_WEIGHT * at_loss over every stage after the stem."""

    least_maps = 2

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg):
        super().__init__(student, teacher, cfg.AT.LOSS.CE_WEIGHT, cfg.AT.LOSS.FEAT_WEIGHT)
        self.p = cfg.AT.P

    def feature_loss(self, feats_student: dict, feats_teacher: dict, **kwargs) -> Tensor:
        return at_loss(feats_student["feats"][1:], feats_teacher["feats"][1:], self.p)
