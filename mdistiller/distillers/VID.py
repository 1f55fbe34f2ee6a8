"""VID, Ahn et al. (CVPR 2019). https://arxiv.org/abs/1904.05835"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller.config import Key, positive
from mdistiller.distillers import keys
from mdistiller.distillers._registry import register_distiller
from mdistiller.distillers.base import FeatureDistiller
from mdistiller.distillers.features import get_feat_shapes, match_size, refuse
from mdistiller.distillers.losses import in_float32


@in_float32
def vid_loss(mean: Tensor, target: Tensor, log_scale: Tensor, eps: float) -> Tensor:
    """Return the mean of -log N(target; mean, variance), less its constant: a scalar (section 2).

    The predicted `mean` and the teacher's map `target` are (B, C, H, W); a channel's variance is softplus(log_scale) +
    eps, log_scale (C,). Not bounded below by zero: at a perfect prediction it is the mean of log(variance) / 2.
    """
    variance = (F.softplus(log_scale) + eps).view(1, -1, 1, 1)
    return 0.5 * ((mean - target).square() / variance + variance.log()).mean()


def regressor(in_channels: int, channels: int) -> nn.Sequential:
    """Return the predictor of the teacher's map: three 1 x 1 convolutions without bias, ReLU between them."""
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 1, bias=False),
    )


@register_distiller(
    "VID",
    defaults={
        "LOSS": keys.feature_weights(1.0),
        "EPS": Key(1e-5, "The lowest variance that can be learned.", positive),
        "INIT_PRED_VAR": Key(5.0, "Variance at the start; greater than EPS.", positive),
        "INPUT_SIZE": keys.input_size(),
    },
)
class VID(FeatureDistiller):
    """CE_WEIGHT * cross entropy + FEAT_WEIGHT * vid_loss, summed over the stages after the stem that both models have.

    The larger map is average-pooled to the smaller one's size. The variances are learned, as in the paper, from
    INIT_PRED_VAR.
    """

    least_maps = 2

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg):
        super().__init__(student, teacher, cfg.VID.LOSS.CE_WEIGHT, cfg.VID.LOSS.FEAT_WEIGHT)
        self.eps = cfg.VID.EPS
        if not 0 < self.eps < cfg.VID.INIT_PRED_VAR:
            refuse("VID", student, teacher, f"VID.INIT_PRED_VAR must exceed VID.EPS, and both 0; got EPS {self.eps}")
        shapes = get_feat_shapes(student, teacher, cfg.VID.INPUT_SIZE)
        channels = [(s[1], t[1]) for s, t in zip(shapes[0][1:], shapes[1][1:], strict=False)]
        self.regressors = nn.ModuleList(regressor(s, t) for s, t in channels)
        variance = cfg.VID.INIT_PRED_VAR - self.eps
        log_scale = variance + math.log(-math.expm1(-variance))  # the inverse of softplus
        self.log_scales = nn.ParameterList(nn.Parameter(torch.full((t,), log_scale)) for _, t in channels)

    def get_extra_parameters(self) -> int:
        """Count the regressors' parameters, as published; the log-scales, one a channel, are left out."""
        return sum(parameter.numel() for parameter in self.regressors.parameters())

    def feature_loss(self, feats_student: dict, feats_teacher: dict, **kwargs) -> Tensor:
        stages = zip(
            self.regressors, self.log_scales, feats_student["feats"][1:], feats_teacher["feats"][1:], strict=False
        )
        loss = 0.0
        for predict, log_scale, f_s, f_t in stages:
            f_s, f_t = match_size(f_s, f_t)
            loss = loss + vid_loss(predict(f_s), f_t, log_scale, self.eps)
        return loss
