"""CWD, Shu et al. (ICCV 2021). https://arxiv.org/abs/2011.13256"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller.distillers import keys
from mdistiller.distillers._registry import register_distiller
from mdistiller.distillers.base import FeatureDistiller
from mdistiller.distillers.features import aligned, match_size, stage_widths
from mdistiller.distillers.losses import in_float32


@in_float32
def cwd_loss(f_student: Tensor, f_teacher: Tensor, temperature: float) -> Tensor:
    """Return tau^2 times the KL divergence between where each channel is active, mean over channels and batch: a scalar
    (Eq. 5 over the number of channels).

    Maps (B, C, H, W) of equal shapes; of each channel the softmax over all places of its values over tau. Zero for maps
    that differ by a constant in each channel; a map of one place has nothing to compare.
    """
    own, other = (F.log_softmax(f.flatten(2) / temperature, 2) for f in (f_student, f_teacher))  # (B, C, H W)
    return temperature**2 * F.kl_div(own, other, reduction="none", log_target=True).sum(2).mean()


@register_distiller("CWD", defaults={"TEMPERATURE": keys.temperature(1.0), "LOSS": keys.feature_weights(10.0)})
class CWD(FeatureDistiller):
    """CE_WEIGHT * cross entropy + FEAT_WEIGHT * the mean of cwd_loss over every stage after the stem, or every level of
    a detector's pyramid. Where the widths differ, a 1 x 1 convolution brings the student's maps to the teacher's.
    """

    needs_features = ("feats", "get_stage_channels")
    least_maps = 2

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg):
        super().__init__(student, teacher, cfg.CWD.LOSS.CE_WEIGHT, cfg.CWD.LOSS.FEAT_WEIGHT)
        self.temperature = cfg.CWD.TEMPERATURE
        self.align = aligned(stage_widths(student), stage_widths(teacher))

    def feature_loss(self, feats_student: dict, feats_teacher: dict, **kwargs) -> Tensor:
        return self.compare(feats_student["feats"][1:], feats_teacher["feats"][1:])

    def compare(self, maps_student: Sequence[Tensor], maps_teacher: Sequence[Tensor], **kwargs) -> Tensor:
        """Return the loss of stages or levels, the finest first."""
        pairs = zip(self.align, maps_student, maps_teacher, strict=False)
        losses = [cwd_loss(*match_size(align(f_s), f_t), self.temperature) for align, f_s, f_t in pairs]
        return torch.stack(losses).mean()
