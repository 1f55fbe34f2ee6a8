"""PKT, Passalis and Tefas (ECCV 2018). https://arxiv.org/abs/1803.10837"""

import torch
from torch import Tensor, nn

from mdistiller.distillers import keys
from mdistiller.distillers._registry import register_distiller
from mdistiller.distillers.base import FeatureDistiller
from mdistiller.distillers.features import unit
from mdistiller.distillers.losses import in_float32


def _affinity(f: Tensor, eps: float) -> Tensor:
    """Map (B, C) to (B, B): row i is the distribution of sample i's neighbours by the cosine kernel (section 3)."""
    f = unit(f, 1)
    kernel = (f @ f.mT + 1) / 2
    return kernel / kernel.sum(1, keepdim=True).clamp(min=eps)


@in_float32
def pkt_loss(f_s: Tensor, f_t: Tensor, eps: float = 1e-7) -> Tensor:
    """Return the KL of the student's affinities from the teacher's, mean over all B^2 pairs: a scalar (section 3).

    Features (B, C_s) and (B, C_t); widths may differ. A zero feature is half as near to everyone. Zero for equal
    features, whatever each sample's scale.
    """
    p_s, p_t = _affinity(f_s, eps), _affinity(f_t, eps)
    # rounding may take a cosine below -1, hence an affinity below 0, where the logarithm has no value
    return (p_t * torch.log((p_t.clamp(min=0) + eps) / (p_s.clamp(min=0) + eps))).mean()


@register_distiller("PKT", defaults={"LOSS": keys.feature_weights(30000.0)})
class PKT(FeatureDistiller):
    """CE_WEIGHT * cross entropy + FEAT_WEIGHT * pkt_loss of the pooled features."""

    needs_features = ("pooled_feat",)
    needs_batch = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg):
        super().__init__(student, teacher, cfg.PKT.LOSS.CE_WEIGHT, cfg.PKT.LOSS.FEAT_WEIGHT)

    def feature_loss(self, feats_student: dict, feats_teacher: dict, **kwargs) -> Tensor:
        return pkt_loss(feats_student["pooled_feat"], feats_teacher["pooled_feat"])
