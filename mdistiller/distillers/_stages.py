"""Methods that compare two networks' maps, stage by stage, or level by level of two detectors' pyramids."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mdistiller.distillers.base import FeatureDistiller
from mdistiller.distillers.features import aligned, match_size, stage_widths


class StageDistiller(FeatureDistiller):
    """CE_WEIGHT * cross entropy + FEAT_WEIGHT * the mean of `map_loss` over every stage after the stem, or every level
    of a detector's pyramid. Where the widths differ, a 1 x 1 convolution brings the student's maps to the teacher's.

    A method overrides `map_loss`, and names its `section` of the configuration.
    """

    section: str
    needs_features = ("feats", "get_stage_channels")
    least_maps = 2

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg):
        weights = cfg[self.section].LOSS
        super().__init__(student, teacher, weights.CE_WEIGHT, weights.FEAT_WEIGHT)
        self.align = aligned(stage_widths(student), stage_widths(teacher))

    def map_loss(self, f_student: Tensor, f_teacher: Tensor) -> Tensor:
        """Return the loss, a scalar, of a pair of maps (B, C, H, W) of equal shapes."""
        raise NotImplementedError

    def feature_loss(self, feats_student: dict, feats_teacher: dict, **kwargs) -> Tensor:
        return self.compare(feats_student["feats"][1:], feats_teacher["feats"][1:])

    def compare(self, maps_student: Sequence[Tensor], maps_teacher: Sequence[Tensor], **kwargs) -> Tensor:
        """Return the loss of stages or levels, the finest first."""
        pairs = zip(self.align, maps_student, maps_teacher, strict=False)
        return torch.stack([self.map_loss(*match_size(align(f_s), f_t)) for align, f_s, f_t in pairs]).mean()
