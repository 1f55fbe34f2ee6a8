"""OFD, Heo et al. (ICCV 2019). https://arxiv.org/abs/1904.01866"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller.config import Check, Key
from mdistiller.distillers import keys
from mdistiller.distillers._registry import register_distiller
from mdistiller.distillers.base import Distiller, FeatureDistiller
from mdistiller.distillers.features import refuse
from mdistiller.distillers.losses import in_float32

ODD = Check(lambda v: v > 0 and v % 2 == 1, "must be odd and greater than 0")


@torch.no_grad()
def negative_mean(bn: nn.BatchNorm2d) -> Tensor:
    """Return E[x | x < 0] of each channel, x ~ N(bias, weight^2) as the BatchNorm leaves it: (1, C, 1, 1) (section 3).

    -3 |weight| where less than one value in a thousand is negative: there the expectation rests on nothing.
    """
    mean, std = bn.bias.double(), bn.weight.double().abs().clamp(min=1e-12)
    ratio = mean / std
    share = torch.special.ndtr(-ratio)  # of negative values
    density = torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi)
    margin = torch.where(share > 1e-3, mean - std * density / share.clamp(min=1e-3), -3 * std)
    return margin.float().view(1, -1, 1, 1)


@in_float32
def ofd_loss(source: Tensor, target: Tensor, margin: Tensor) -> Tensor:
    """Return the partial L2 distance to the margin-ReLU'd target, summed over (C, H, W), mean over the batch: a scalar.

    The connected student map and the teacher's pre-ReLU map are (B, C, H, W), the margin (1, C, 1, 1), negative. Where
    the target is negative, only a source above it costs. Zero for equal maps.
    """
    goal = torch.maximum(target, margin)
    counts = (target > 0) | (source > goal)
    return ((source - goal).square() * counts).mean(0).sum()


def connector(in_channels: int, channels: int, kernel_size: int) -> nn.Sequential:
    """Return the student's transform: a convolution without bias and BatchNorm (section 3)."""
    conv = nn.Conv2d(in_channels, channels, kernel_size, padding=(kernel_size - 1) // 2, bias=False)
    nn.init.normal_(conv.weight, 0.0, math.sqrt(2.0 / (kernel_size**2 * channels)))
    return nn.Sequential(conv, nn.BatchNorm2d(channels))


@register_distiller(
    "OFD",
    defaults={
        "LOSS": keys.feature_weights(0.001),
        "CONNECTOR": {"KERNEL_SIZE": Key(1, "Kernel size of the student's connectors; odd.", ODD)},
    },
)
class OFD(FeatureDistiller):
    """CE_WEIGHT * cross entropy + FEAT_WEIGHT * sum_i ofd_loss_i / 2^(n - i), i = 1 .. n the stages that both have.

    Stages are counted from the last. The teacher's map is pooled to the student's size. The margins are read from the
    teacher's BatchNorms as it is built, so the teacher comes with its weights. A teacher whose last BatchNorm before
    the ReLU covers only some of the stage's channels has no margins for the others and is refused.
    """

    needs_features = ("preact_feats", "get_stage_channels")
    least_maps = 2

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg):
        super().__init__(student, teacher, cfg.OFD.LOSS.CE_WEIGHT, cfg.OFD.LOSS.FEAT_WEIGHT)
        if not hasattr(teacher, "get_bn_before_relu"):
            refuse("OFD", student, teacher, "the teacher has no get_bn_before_relu()")
        channels = list(zip(student.get_stage_channels()[:0:-1], teacher.get_stage_channels()[:0:-1], strict=False))
        channels.reverse()
        self.stages = len(channels)
        bns = teacher.get_bn_before_relu()[-self.stages :]
        if len(bns) < self.stages:
            refuse(
                "OFD", student, teacher, f"get_bn_before_relu() gives {len(bns)} BatchNorms for {self.stages} stages"
            )
        for bn, (_, width) in zip(bns, channels, strict=True):
            if bn.num_features != width:
                reason = f"the teacher's BatchNorm before the ReLU covers {bn.num_features} of {width} channels"
                refuse("OFD", student, teacher, reason)
        self.connectors = nn.ModuleList(connector(s, t, cfg.OFD.CONNECTOR.KERNEL_SIZE) for s, t in channels)
        for i, bn in enumerate(bns):
            self.register_buffer(f"margin{i}", negative_mean(bn))

    def train(self, mode: bool = True) -> "OFD":
        """Set the mode, the teacher's too, unlike every other method: OFD's authors normalise it by the batch's
        statistics, and its running statistics move. Its weights do not.
        """
        super(Distiller, self).train(mode)
        return self

    def feature_loss(self, feats_student: dict, feats_teacher: dict, **kwargs) -> Tensor:
        preacts_student = feats_student["preact_feats"][-self.stages :]
        preacts_teacher = feats_teacher["preact_feats"][-self.stages :]
        loss = 0.0
        for i, (connect, f_s, f_t) in enumerate(zip(self.connectors, preacts_student, preacts_teacher, strict=True)):
            f_s = connect(f_s)
            f_t = F.adaptive_avg_pool2d(f_t, f_s.shape[2:])
            loss = loss + ofd_loss(f_s, f_t, getattr(self, f"margin{i}")) / 2 ** (self.stages - i - 1)
        return loss
