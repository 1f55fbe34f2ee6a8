"""RKD, Park et al. (CVPR 2019). https://arxiv.org/abs/1904.05068"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller.config import Key, positive
from mdistiller.distillers import keys
from mdistiller.distillers._registry import register_distiller
from mdistiller.distillers.base import FeatureDistiller
from mdistiller.distillers.features import unit
from mdistiller.distillers.losses import in_float32


def pairwise_distance(f: Tensor, eps: float, squared: bool) -> Tensor:
    """Map (B, C) to the Euclidean distances (B, B), or their squares; the diagonal is zero.

    Centred first, which changes no distance but keeps the difference of squares from cancelling. Squares below `eps`
    count as `eps` and pass no gradient, so that equal samples keep the square root's finite.
    """
    f = f - f.mean(0)
    square = f.square().sum(1)
    distance = (square[:, None] + square[None, :] - 2 * f @ f.mT).clamp(min=eps)
    distance = distance if squared else distance.sqrt()
    return distance * (1 - torch.eye(len(f), dtype=f.dtype, device=f.device))


def angles(f: Tensor) -> Tensor:
    """Map (B, C) to (B, B, B): at vertex i, the cosine of the angle between samples j and k; 0 where two coincide."""
    edges = unit(f[None, :] - f[:, None], 2)  # (B, B, C)
    return edges @ edges.mT


@in_float32
def rkd_loss(
    f_s: Tensor,
    f_t: Tensor,
    squared: bool = False,
    eps: float = 1e-12,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
) -> Tensor:
    """Return distance_weight * RKD-D + angle_weight * RKD-A: a scalar (section 3.2: Huber loss, means over all tuples).

    Features (B, C_s) and (B, C_t); widths may differ. Distances are divided by their mean over the pairs of different
    samples. Zero for equal features, and for any rotation, shift and scale of them.
    """
    pairs = max(len(f_s) * (len(f_s) - 1), 1)
    d_s, d_t = (pairwise_distance(f, eps, squared) for f in (f_s, f_t))
    d_s, d_t = (d / (d.sum() / pairs).clamp(min=eps) for d in (d_s, d_t))
    distance = F.smooth_l1_loss(d_s, d_t)
    angle = F.smooth_l1_loss(angles(f_s), angles(f_t))
    return distance_weight * distance + angle_weight * angle


@register_distiller(
    "RKD",
    defaults={
        "DISTANCE_WEIGHT": Key(25.0, "Weight of the distances' loss, RKD-D."),
        "ANGLE_WEIGHT": Key(50.0, "Weight of the angles' loss, RKD-A."),
        "LOSS": keys.feature_weights(1.0),
        "PDIST": {
            "EPSILON": Key(1e-12, "Squared distances count as this at least.", positive),
            "SQUARED": Key(False, "Compare squared distances."),
        },
    },
)
class RKD(FeatureDistiller):
    """CE_WEIGHT * cross entropy + FEAT_WEIGHT * rkd_loss of the pooled features."""

    needs_features = ("pooled_feat",)
    needs_batch = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg):
        super().__init__(student, teacher, cfg.RKD.LOSS.CE_WEIGHT, cfg.RKD.LOSS.FEAT_WEIGHT)
        self.distance_weight = cfg.RKD.DISTANCE_WEIGHT
        self.angle_weight = cfg.RKD.ANGLE_WEIGHT
        self.eps = cfg.RKD.PDIST.EPSILON
        self.squared = cfg.RKD.PDIST.SQUARED

    def feature_loss(self, feats_student: dict, feats_teacher: dict, **kwargs) -> Tensor:
        f_s, f_t = feats_student["pooled_feat"], feats_teacher["pooled_feat"]
        return rkd_loss(f_s, f_t, self.squared, self.eps, self.distance_weight, self.angle_weight)
