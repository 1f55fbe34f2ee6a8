"""ReviewKD, Chen et al. (CVPR 2021). https://arxiv.org/abs/2104.09044"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller.config import Key, at_least
from mdistiller.distillers import keys
from mdistiller.distillers._registry import register_distiller
from mdistiller.distillers.base import FeatureDistiller
from mdistiller.distillers.features import pooled_width, refuse
from mdistiller.distillers.losses import in_float32, warmup

SIZES, WIDTHS = [1, 8, 16, 32], [64, 128, 256, 256]  # published: those of resnet8x4


@in_float32
def hcl_loss(feats_student: list[Tensor], feats_teacher: list[Tensor]) -> Tensor:
    """Return the hierarchical context loss, summed over the stages: a scalar (section 3).

    Lists of maps of equal shapes (B, C, H, W). A stage's loss is the weighted mean of the squared differences at full
    size (weight 1) and pooled to 4, 2 and 1 pixels (1/2, 1/4, 1/8, less where the map is small). Zero for equal maps.
    """
    loss = 0.0
    for f_s, f_t in zip(feats_student, feats_teacher, strict=True):
        stage, weight, total = F.mse_loss(f_s, f_t), 1.0, 1.0
        for size in (4, 2, 1):
            if size < f_s.shape[2]:
                weight /= 2
                pooled = (F.adaptive_avg_pool2d(f, size) for f in (f_s, f_t))
                stage, total = stage + weight * F.mse_loss(*pooled), total + weight
        loss = loss + stage / total
    return loss


class ABF(nn.Module):
    """Attention based fusion (section 3): a student's stage x (B, C, h, w) with what the deeper stages passed on."""

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, fuse: bool):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(in_channels, mid_channels, 1, bias=False), nn.BatchNorm2d(mid_channels))
        self.conv2 = nn.Sequential(
            nn.Conv2d(mid_channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels)
        )
        self.att_conv = nn.Sequential(nn.Conv2d(2 * mid_channels, 2, 1), nn.Sigmoid()) if fuse else None
        for conv in (self.conv1[0], self.conv2[0]):
            nn.init.kaiming_uniform_(conv.weight, a=1)

    def forward(
        self, x: Tensor, deeper: Tensor | None, size: torch.Size, out_size: torch.Size
    ) -> tuple[Tensor, Tensor]:
        """Return what is compared with the teacher and what is passed on, fused at `size`, both at `out_size`."""
        x = self.conv1(x)
        if self.att_conv is not None:
            deeper = F.interpolate(deeper, size, mode="nearest")
            own, passed = self.att_conv(torch.cat([x, deeper], 1)).split(1, dim=1)  # (B, 1, h, w) each
            x = x * own + deeper * passed
        if x.shape[2:] != out_size:
            x = F.interpolate(x, out_size, mode="nearest")
        return self.conv2(x), x


def reviewed(abfs: Iterable[ABF], maps_student: Sequence[Tensor], maps_teacher: Sequence[Tensor]) -> Tensor:
    """Return `hcl_loss` of the student's maps (B, C_i, H_i, W_i), the deepest first, each fused with those before it
    by its ABF and brought to the size of the teacher's.
    """
    reviewed, passed = [], None
    for abf, f_s, f_t in zip(abfs, maps_student, maps_teacher, strict=True):
        result, passed = abf(f_s, passed, f_s.shape[2:], f_t.shape[2:])
        reviewed.append(result)
    return hcl_loss(reviewed, maps_teacher)


def _read_from_the_model(published: list[int], doc: str) -> Key:
    """Return the key of a list whose default is the published one, for files that read it, and means what [] means."""
    doc = f"{doc}; read from the model."
    return Key(published, doc, effect=lambda value: [] if value == published else value)


@register_distiller(
    "REVIEWKD",
    defaults={
        "CE_WEIGHT": keys.ce_weight(),
        "REVIEWKD_WEIGHT": Key(1.0, "Weight of the review's loss."),
        "WARMUP_EPOCHS": keys.warmup(),
        "SHAPES": _read_from_the_model(SIZES, "Sizes of the student's stages, the deepest first"),
        "OUT_SHAPES": _read_from_the_model(SIZES, "Sizes of the teacher's stages, the deepest first"),
        "IN_CHANNELS": _read_from_the_model(WIDTHS, "Widths of the student's stages, the deepest last"),
        "OUT_CHANNELS": _read_from_the_model(WIDTHS, "Widths of the teacher's stages, the deepest last"),
        "MAX_MID_CHANNEL": Key(512, "Width inside the fusion modules, at most.", at_least(1)),
        "STU_PREACT": Key(False, "Take the student's maps before their ReLU."),
    },
)
class ReviewKD(FeatureDistiller):
    """CE_WEIGHT * cross entropy + REVIEWKD_WEIGHT * min(epoch / WARMUP_EPOCHS, 1) * hcl_loss.

    The pooled feature counts as a last stage of 1 x 1; of two models with different numbers of stages the last ones are
    compared. Their widths and sizes are read from the models; SHAPES, OUT_SHAPES, IN_CHANNELS and OUT_CHANNELS are
    accepted for mdistiller's YAML files, the widths where they are the models'.
    """

    needs_features = ("feats", "preact_feats", "pooled_feat", "get_stage_channels")

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg):
        cfg = cfg.REVIEWKD
        super().__init__(student, teacher, cfg.CE_WEIGHT, cfg.REVIEWKD_WEIGHT)
        self.warmup, self.stu_preact = cfg.WARMUP_EPOCHS, cfg.STU_PREACT
        widths = [[*model.get_stage_channels()[1:], pooled_width(model)] for model in (student, teacher)]
        self.stages = min(map(len, widths))
        in_channels, out_channels = (channels[-self.stages :] for channels in widths)
        for name, own in (("IN_CHANNELS", in_channels), ("OUT_CHANNELS", out_channels)):
            if list(cfg[name]) not in ([], WIDTHS, own):
                refuse("REVIEWKD", student, teacher, f"REVIEWKD.{name} {cfg[name]} must be {own}, or [] to read it")
        mid_channels = min(cfg.MAX_MID_CHANNEL, in_channels[-1])
        abfs = [
            ABF(s, mid_channels, t, fuse=i < self.stages - 1)
            for i, (s, t) in enumerate(zip(in_channels, out_channels, strict=True))
        ]
        self.abfs = nn.ModuleList(abfs[::-1])

    def feature_loss(self, feats_student: dict, feats_teacher: dict, *, epoch: int, **kwargs) -> Tensor:
        kind = "preact_feats" if self.stu_preact else "feats"
        own = self.last_stages(feats_student[kind], feats_student["pooled_feat"])
        goal = self.last_stages(feats_teacher["preact_feats"], feats_teacher["pooled_feat"])
        return warmup(epoch, self.warmup) * reviewed(self.abfs, own, goal)

    def last_stages(self, feats: list[Tensor], pooled: Tensor) -> list[Tensor]:
        """Return the pooled feature as (B, C, 1, 1) and the stages before it, the deepest first."""
        return [*feats[1:], pooled[:, :, None, None]][: -self.stages - 1 : -1]
