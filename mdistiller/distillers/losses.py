"""The losses on logits that methods are made of: cross entropy, the KL divergence and its parts, warm-up; and the
arithmetic that keeps them finite: bounded logits, float32 whatever the autocast.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mdistiller.distillers._long_rows import KL, Variance, are_long, on_the_host

# Softmax needs no logit beyond this; with it, no product in a loss or in its gradient leaves float32's range.
LOGIT_LIMIT = 1e15
# A row of logits that spreads less is taken for a constant one: what is divided by its spread would leave float32.
MIN_DEVIATION = 1e-5


def bounded(logits: Tensor) -> Tensor:
    """Return logits (B, K) in float32 (float64 stays), each row scaled into [-LOGIT_LIMIT, LOGIT_LIMIT].

    A row that lies inside comes back bit for bit. Scaling, not clamping: a row with inf or NaN becomes NaN, so that a
    loss never hides one. What it has found to lie inside, it does not look at again: a method with three losses on
    rows of a vocabulary calls it seven times.
    """
    if getattr(logits, "is_bounded", False):
        return logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if on_the_host(logits) and _are_bounded(logits.detach()):
        # spares a copy each way; as a view it is a node of its own, so that gradients are added up in the same order
        inside = logits.view_as(logits)
        inside.is_bounded = True
        return inside
    return logits * (LOGIT_LIMIT / largest(logits).clamp(min=LOGIT_LIMIT))


def _are_bounded(logits: Tensor) -> bool:
    if not logits.numel():
        return True
    low, high = torch.aminmax(logits)  # NaN where a logit is
    return float(low) >= -LOGIT_LIMIT and float(high) <= LOGIT_LIMIT


def largest(logits: Tensor) -> Tensor:
    """Return the largest absolute value of each row of logits (B, K), without its gradient: (B, 1)."""
    logits = logits.detach()
    return torch.maximum(logits.amax(1, keepdim=True), -logits.amin(1, keepdim=True))


def maximum(logits: Tensor) -> Tensor:
    """Return the largest value of each row of logits (B, K): (B, 1). Of a tie the first has the gradient."""
    if not logits.requires_grad:
        return logits.amax(1, keepdim=True)  # several times as fast on a CPU, where it need not know the place
    return logits.max(1, keepdim=True).values


def row_mean(values: Tensor) -> Tensor:
    """Return the mean of one value a row, (B,): a scalar; 0 of no row, as where every token of a batch is masked."""
    return values.mean() if len(values) else values.sum()


def ce_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean cross entropy of logits (B, K) and labels (B,), in float32, finite for every finite logit; 0 of
    no row.
    """
    return F.cross_entropy(bounded(logits), target, reduction="mean" if len(logits) else "sum")


def kl_divergence(
    logits_student: Tensor, logits_teacher: Tensor, t_student: Tensor | float, t_teacher: Tensor | float
) -> Tensor:
    """Return KL(softmax(u / T_teacher) || softmax(v / T_student)) of each sample: (B,).

    Logits (B, K), temperatures (B, 1) or numbers. From log-probabilities on both sides, so that a probability that
    underflows contributes its limit, 0, and a finite gradient.
    """
    student, teacher = bounded(logits_student), bounded(logits_teacher)
    if are_long(student):
        return KL.apply(student, teacher, t_student, t_teacher)
    log_student = F.log_softmax(student / t_student, dim=1)
    log_teacher = F.log_softmax(teacher / t_teacher, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(1)


def full_precision(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Return a context without autocast on the tensor's device, in which matrix products are in float32."""
    device = tensor.device.type
    return (
        torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else contextlib.nullcontext()
    )


def deviation(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the standard deviation (over K, not K - 1) of each row of logits (B, K), and where it is above
    MIN_DEVIATION: (B, 1) each. Elsewhere the deviation given is 1, so that it may stand in a denominator.
    """
    rows = bounded(logits)
    # the library's own is exact and slow on a CPU; of classes of images it is what published figures were made with
    lean = are_long(rows) or not len(rows)
    variance = Variance.apply(rows) if lean else rows.var(1, correction=0, keepdim=True)
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
    """Split logits (B, K), K >= 2, by labels (B,) into two problems, both logits again (DKD, arXiv 2203.08679).

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
    """Return TCKD and NCKD of each sample, (B,) each (DKD, arXiv 2203.08679, Eq. 5 to 7): the KL divergence between the
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
    divergence: Callable | None = None,
) -> Tensor:
    """Return the mean over the batch of factor * KL at the temperatures: a scalar. `part`: all of it, or its "target"
    (TCKD) or "non_target" (NCKD) half alone, which need the labels `target` (B,). `divergence`: another one in KL's
    place, of those in _divergences.py, which has no parts. 0 of no row.
    """
    t_student, t_teacher = temperatures.student, temperatures.teacher
    if part == "all":
        values = (divergence or kl_divergence)(logits_student, logits_teacher, t_student, t_teacher)  # (B,)
    else:
        halves = part_divergences(logits_student, logits_teacher, target, t_student, t_teacher)
        values = halves[("target", "non_target").index(part)]
    return row_mean(temperatures.factor.squeeze(1) * values)


def warmup(epoch: int | Tensor, length: float) -> float | Tensor:
    """Return min(epoch / length, 1), the weight of a loss raised over the first `length` epochs; 1 if length is 0.

    A step that is captured once and replayed for many epochs passes the epoch as a 0-dim tensor.
    """
    if length <= 0:
        return 1.0
    share = epoch / length
    return share.clamp(max=1.0) if isinstance(share, Tensor) else min(share, 1.0)


def in_float32(loss: Callable) -> Callable:
    """Compute the decorated loss of tensors and lists of tensors in float32 (float64 stays), whatever the autocast.

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
