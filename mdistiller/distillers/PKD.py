"""PKD, Cao et al. (NeurIPS 2022). https://arxiv.org/abs/2207.02039"""

import torch
from torch import Tensor

from mdistiller.distillers import keys
from mdistiller.distillers._registry import register_distiller
from mdistiller.distillers._stages import StageDistiller
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
class PKD(StageDistiller):
    """CE_WEIGHT * cross entropy + FEAT_WEIGHT * the mean of pkd_loss over stages or levels (StageDistiller)."""

    section = "PKD"
    needs_batch = True

    def map_loss(self, f_student: Tensor, f_teacher: Tensor) -> Tensor:
        return pkd_loss(f_student, f_teacher)
