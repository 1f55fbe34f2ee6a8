"""What several methods use: finite logits, cross entropy, the KL divergence; for features losses in float32, unit
vectors, maps of one size, shapes and the regressor.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller.errors import UserError

# Softmax needs no logit beyond this; with it, no product in a loss or in its gradient leaves float32's range.
LOGIT_LIMIT = 1e15
# A row of logits that spreads less is taken for a constant one: what is divided by its spread would leave float32.
MIN_DEVIATION = 1e-5


def bounded(logits: Tensor) -> Tensor:
    """(B, K) in float32 (float64 stays), each row scaled into [-LOGIT_LIMIT, LOGIT_LIMIT].

    A row that lies inside comes back bit for bit. Scaling, not clamping: a row with inf or NaN becomes NaN, so that a
    loss never hides one.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    peak = logits.detach().abs().amax(1, keepdim=True)  # (B, 1)
    return logits * (LOGIT_LIMIT / peak.clamp(min=LOGIT_LIMIT))


def ce_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross entropy of logits (B, K) and labels (B,), in float32, finite for every finite logit."""
    return F.cross_entropy(bounded(logits), target)


def kl_divergence(
    logits_student: Tensor, logits_teacher: Tensor, t_student: Tensor | float, t_teacher: Tensor | float
) -> Tensor:
    """KL(softmax(u / T_teacher) || softmax(v / T_student)) of each sample: (B,).

    Logits (B, K), temperatures (B, 1) or numbers. From log-probabilities on both sides, so that a probability that
    underflows contributes its limit, 0, and a finite gradient.
    """
    log_student = F.log_softmax(bounded(logits_student) / t_student, dim=1)
    log_teacher = F.log_softmax(bounded(logits_teacher) / t_teacher, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(1)


def full_precision(tensor: Tensor) -> contextlib.AbstractContextManager:
    """A context without autocast on the tensor's device: what multiplies matrices in a loss does so in float32."""
    device = tensor.device.type
    return (
        torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else contextlib.nullcontext()
    )


def deviation(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviation (over K, not K - 1) of each row of logits (B, K), and where it is above MIN_DEVIATION: (B, 1)
    each. Elsewhere the deviation given is 1, so that it may stand in a denominator.
    """
    variance = bounded(logits).var(1, correction=0, keepdim=True)
    sound = variance > MIN_DEVIATION**2
    # chosen before the root: its gradient at 0 is infinite even where it is not used
    return torch.where(sound, variance, 1.0).sqrt(), sound


class Temperatures(NamedTuple):
    """What a temperature rule makes of student logits (B, K), teacher logits (B, K) and the reference tau."""

    student: Tensor  # (B, 1), positive
    teacher: Tensor  # (B, 1), positive
    factor: Tensor  # (B, 1): scales the divergence, so that its gradient does not shrink with the temperatures
    sound: Tensor  # (B, 1), bool: False where the rule is undefined and fell back to tau


def split(logits: Tensor, target: Tensor, temperature: Tensor | float) -> tuple[Tensor, Tensor]:
    """Logits (B, K), K >= 2, and labels (B,) -> the two halves of the problem, both logits again (DKD, 2203.08679).

    (B, 2): the target's, and the one that stands for all others together, T logsumexp(z / T) over them; (B, K - 1): the
    others alone. Temperature T a number or (B, 1). Gathered rather than masked: no probability is formed, so none
    underflows.
    """
    others = torch.arange(logits.shape[1] - 1, device=logits.device)
    others = others + (others >= target[:, None])  # (B, K - 1): every class but the target
    others = logits.gather(1, others)
    rest = temperature * torch.logsumexp(others / temperature, 1, keepdim=True)
    return torch.cat([logits.gather(1, target[:, None]), rest], 1), others


def part_divergences(
    logits_student: Tensor, logits_teacher: Tensor, target: Tensor, t_student: Tensor | float, t_teacher: Tensor | float
) -> tuple[Tensor, Tensor]:
    """TCKD and NCKD of each sample, (B,) each (DKD, arXiv 2203.08679, Eq. 5 to 7): the KL divergence between the
    probabilities (target, not target), and the one among the other classes. KL = TCKD + (1 - p_target) NCKD.
    """
    binary_student, others_student = split(bounded(logits_student), target, t_student)
    binary_teacher, others_teacher = split(bounded(logits_teacher), target, t_teacher)
    tckd = kl_divergence(binary_student, binary_teacher, t_student, t_teacher)
    return tckd, kl_divergence(others_student, others_teacher, t_student, t_teacher)


def softened_kl(
    logits_student: Tensor,
    logits_teacher: Tensor,
    temperatures: Temperatures,
    target: Tensor | None = None,
    part: str = "all",
) -> Tensor:
    """Mean over the batch of factor * KL at the temperatures: a scalar. `part`: all of it, or its "target" (TCKD) or
    "non_target" (NCKD) half alone, which need the labels `target` (B,).
    """
    t_student, t_teacher = temperatures.student, temperatures.teacher
    if part == "all":
        divergence = kl_divergence(logits_student, logits_teacher, t_student, t_teacher)  # (B,)
    else:
        halves = part_divergences(logits_student, logits_teacher, target, t_student, t_teacher)
        divergence = halves[("target", "non_target").index(part)]
    return (temperatures.factor.squeeze(1) * divergence).mean()


def warmup(epoch: int | Tensor, length: float) -> float | Tensor:
    """min(epoch / length, 1): the weight of a loss that is raised over the first `length` epochs; 1 if length is 0.

    A step that is captured once and replayed for many epochs passes the epoch as a 0-dim tensor.
    """
    if length <= 0:
        return 1.0
    share = epoch / length
    return share.clamp(max=1.0) if isinstance(share, Tensor) else min(share, 1.0)


def in_float32(loss: Callable) -> Callable:
    """Decorator of a loss of tensors and lists of tensors: computed in float32 (float64 stays) whatever the autocast.

    Casting the arguments alone would not do: inside autocast a matrix product takes float32 back to half precision.
    """

    @functools.wraps(loss)
    def run(*args, **kwargs):
        with full_precision(next(_tensors((*args, *kwargs.values())))):
            return loss(*map(_to_float32, args), **{key: _to_float32(value) for key, value in kwargs.items()})

    return run


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _to_float32(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return [_to_float32(item) for item in value]
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value


def unit(x: Tensor, dim: int) -> Tensor:
    """x divided by its L2 norm along `dim`. A vector shorter than 1e-12 stays as it is, so that no gradient is scaled
    by the inverse of nothing.
    """
    square = x.square().sum(dim, keepdim=True)
    return x * torch.where(square > 1e-24, square, 1.0).rsqrt()


def match_size(f_s: Tensor, f_t: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps (B, C, H, W) at the smaller of their two sizes: the larger one is average-pooled."""
    size = [min(s, t) for s, t in zip(f_s.shape[2:], f_t.shape[2:], strict=True)]
    f_s, f_t = (f if list(f.shape[2:]) == size else F.adaptive_avg_pool2d(f, size) for f in (f_s, f_t))
    return f_s, f_t


def sum_over_stages(loss: Callable, feats_student: Sequence[Tensor], feats_teacher: Sequence[Tensor]) -> Tensor:
    """Sum of loss(f_s, f_t) over the stages that both lists have, counted from the first."""
    return sum(loss(f_s, f_t) for f_s, f_t in zip(feats_student, feats_teacher, strict=False))


@torch.no_grad()
def probe(model: nn.Module, input_size: tuple[int, int] = (32, 32)) -> dict:
    """The features of one black image (3, *input_size). Leaves no trace: the probe runs in eval mode, so that it does
    not shift BatchNorm statistics, and draws no random numbers.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    _, feats = model(next(model.parameters()).new_zeros(1, 3, *input_size))
    for module, mode in modes:
        module.training = mode
    return feats


def get_feat_shapes(
    student: nn.Module, teacher: nn.Module, input_size: tuple[int, int]
) -> tuple[list[torch.Size], list[torch.Size]]:
    """Shapes of feats["feats"] of student and teacher for one image (3, *input_size); leaves no trace in either."""
    student_shapes, teacher_shapes = ([f.shape for f in probe(m, input_size)["feats"]] for m in (student, teacher))
    return student_shapes, teacher_shapes


def pooled_width(model: nn.Module) -> int:
    """Channels of the model's pooled_feat, which some models widen after their last stage."""
    return probe(model)["pooled_feat"].shape[1]


def refuse(method: str, student: nn.Module, teacher: nn.Module, reason: str) -> NoReturn:
    """Raise the UserError of a pair, or of a setting, on which the method is not defined."""
    raise UserError(f"{method}: {type(teacher).__name__} -> {type(student).__name__}: {reason}")


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
