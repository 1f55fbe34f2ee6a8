"""What feature methods share: unit vectors, maps of one size, shapes of a model's features, the regressor."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller.errors import UserError
from mdistiller.models import in_eval_mode

_size: ContextVar[tuple[int, int] | None] = ContextVar("size", default=None)  # of the images of the method being built


@contextlib.contextmanager
def images_of(size: tuple[int, int]) -> Iterator[None]:
    """Let a method that is built inside see features of images of `size` (H, W), whatever size it asks for."""
    token = _size.set(size)
    try:
        yield
    finally:
        _size.reset(token)


def unit(x: Tensor, dim: int) -> Tensor:
    """Return x divided by its L2 norm along `dim`. A vector shorter than 1e-12 stays as it is, so that no gradient is
    scaled by the inverse of nothing.
    """
    square = x.square().sum(dim, keepdim=True)
    return x * torch.where(square > 1e-24, square, 1.0).rsqrt()


def match_size(f_s: Tensor, f_t: Tensor) -> tuple[Tensor, Tensor]:
    """Return two maps (B, C, H, W) at the smaller of their two sizes: the larger one is average-pooled."""
    size = [min(s, t) for s, t in zip(f_s.shape[2:], f_t.shape[2:], strict=True)]
    f_s, f_t = (f if list(f.shape[2:]) == size else F.adaptive_avg_pool2d(f, size) for f in (f_s, f_t))
    return f_s, f_t


def sum_over_stages(loss: Callable, feats_student: Sequence[Tensor], feats_teacher: Sequence[Tensor]) -> Tensor:
    """Return the sum of loss(f_s, f_t) over the stages that both lists have, counted from the first."""
    return sum(loss(f_s, f_t) for f_s, f_t in zip(feats_student, feats_teacher, strict=False))


def probe(model: nn.Module, input_size: tuple[int, int] = (32, 32)) -> dict:
    """Return the features of one black image (3, *input_size), inside `images_of` of its size. The probe leaves no
    trace: it runs in eval mode, so that it does not shift BatchNorm statistics, and draws no random numbers.
    """
    return _of_one_image(model, input_size)[1]


def probe_logits(model: nn.Module) -> Tensor:
    """Return the logits (1, K) of such an image, of a model that may have no features."""
    output = _of_one_image(model, (32, 32))
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def _of_one_image(model: nn.Module, input_size: tuple[int, int]) -> tuple | Tensor:
    with in_eval_mode(model):
        return model(next(model.parameters()).new_zeros(1, 3, *(_size.get() or input_size)))


def get_feat_shapes(
    student: nn.Module, teacher: nn.Module, input_size: tuple[int, int]
) -> tuple[list[torch.Size], list[torch.Size]]:
    """Return the shapes of feats["feats"] of student and teacher for one image as `probe` takes it, without a trace."""
    student_shapes, teacher_shapes = ([f.shape for f in probe(m, input_size)["feats"]] for m in (student, teacher))
    return student_shapes, teacher_shapes


def pooled_width(model: nn.Module) -> int:
    """Return the channels of the model's pooled_feat, which some models widen after their last stage."""
    return probe(model)["pooled_feat"].shape[1]


def refuse(method: str, student: nn.Module, teacher: nn.Module, reason: str) -> NoReturn:
    """Raise the UserError of a pair, or of a setting, on which the method is not defined."""
    raise UserError(f"{method}: {type(teacher).__name__} -> {type(student).__name__}: {reason}")


def stage_widths(model: nn.Module) -> list[int]:
    """Return the channels of the model's stages after the stem, or of the levels of a detector's pyramid."""
    if hasattr(model, "level_shapes"):
        return [channels for channels, _, _ in model.level_shapes().values()]
    return list(model.get_stage_channels()[1:])


def aligned(widths_student: Sequence[int], widths_teacher: Sequence[int]) -> nn.ModuleList:
    """Return for each pair of stages a 1 x 1 convolution from the student's channels to the teacher's, or nothing."""
    pairs = zip(widths_student, widths_teacher, strict=False)
    return nn.ModuleList(nn.Identity() if s == t else nn.Conv2d(s, t, 1) for s, t in pairs)


class ConvReg(nn.Module):
    """Regressor from a student's feature map to a teacher's (FitNets, arXiv 1412.6550, section 2.2).

    Shapes (B, C, H, W). Halves, doubles or crops the map to the teacher's size; raises NotImplementedError where the
    student's map is smaller than the teacher's by another factor than 2.
    """

    def __init__(self, s_shape: torch.Size, t_shape: torch.Size, use_relu: bool = True):
        super().__init__()
        _, s_c, s_h, s_w = s_shape
        _, t_c, t_h, t_w = t_shape
        if s_h == 2 * t_h:
            self.conv = nn.Conv2d(s_c, t_c, 3, stride=2, padding=1)
        elif s_h * 2 == t_h:
            self.conv = nn.ConvTranspose2d(s_c, t_c, 4, stride=2, padding=1)
        elif s_h >= t_h:
            self.conv = nn.Conv2d(s_c, t_c, (1 + s_h - t_h, 1 + s_w - t_w))
        else:
            raise NotImplementedError(f"no regressor from a {s_h} x {s_w} map to {t_h} x {t_w}")
        self.use_relu = use_relu
        self.bn = nn.BatchNorm2d(t_c)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return F.relu(x) if self.use_relu else x
