"""PKD, Cao et al. (NeurIPS 2022). https://arxiv.org/abs/2207.02039"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mdistiller.distillers import keys
from mdistiller.distillers._registry import register_distiller
from mdistiller.distillers.base import FeatureDistiller
from mdistiller.distillers.features import aligned, match_size, stage_widths
from mdistiller.distillers.losses import in_float32

EPSILON = 1e-6  # added to a deviation, so that a channel that is constant has gradients


@in_float32
def pkd_loss(f_student: Tensor, f_teacher: Tensor) -> Tensor:
    """Return half the mean squared difference of the maps (B, C, H, W) once each channel has mean 0 and deviation 1
    over batch and places: a scalar (Eq. 3), 1 - r for Pearson's r, which does not change with a channel's scale or
    shift.
    """
    own, other = (_standardised(f) for f in (f_student, f_teacher))
    return (own - other).square().mean() / 2


def _standardised(f: Tensor) -> Tensor:
    centred = f - f.mean((0, 2, 3), keepdim=True)
    square = centred.square().mean((0, 2, 3), keepdim=True)
    return centred / (torch.where(square > 0, square, 1.0).sqrt() + EPSILON)


@register_distiller("PKD", defaults={"LOSS": keys.feature_weights(6.0)})
class PKD(FeatureDistiller):
    """CE_WEIGHT * cross entropy + FEAT_WEIGHT * the mean of pkd_loss over every stage after the stem, or every level of
    a detector's pyramid. Where the widths differ, a 1 x 1 convolution brings the student's maps to the teacher's.
    """

    needs_features = ("feats", "get_stage_channels")
    least_maps = 2
    needs_batch = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg):
        super().__init__(student, teacher, cfg.PKD.LOSS.CE_WEIGHT, cfg.PKD.LOSS.FEAT_WEIGHT)
        self.align = aligned(stage_widths(student), stage_widths(teacher))

    def feature_loss(self, feats_student: dict, feats_teacher: dict, **kwargs) -> Tensor:
        return self.compare(feats_student["feats"][1:], feats_teacher["feats"][1:])

    def compare(self, maps_student: Sequence[Tensor], maps_teacher: Sequence[Tensor], **kwargs) -> Tensor:
        """Return the loss of stages or levels, the finest first."""
        pairs = zip(self.align, maps_student, maps_teacher, strict=False)
        return torch.stack([pkd_loss(*match_size(align(f_s), f_t)) for align, f_s, f_t in pairs]).mean()
