"""Losses on rows of a vocabulary on a CPU: some rows at a time, which stay in its cache, and the gradients found beside
the values, where autograd would keep and pass through (B, K) once for every operation.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

MOST_IMAGE_CLASSES = 1000  # rows that are longer are those of a vocabulary
CACHED = 2**17  # logits that a core works on at a time, where it would go through all of them more than once


def on_the_host(tensor: Tensor) -> bool:
    """Return whether the step may look at the values of `tensor` at no cost: on a CPU, where it is not compiled."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def are_long(rows: Tensor) -> bool:
    """Return whether `rows` (B, K) are to be worked on in parts. Those of images keep the arithmetic that published
    figures were made with.
    """
    return rows.shape[1] > MOST_IMAGE_CLASSES and on_the_host(rows)


def parts(rows: Tensor) -> Iterator[slice]:
    """Yield slices of `rows` (B, K), at least one, each of as many rows as the caches hold; all of them on a device."""
    cached = CACHED * torch.get_num_threads() // max(1, rows.shape[1])
    size = max(1, cached if on_the_host(rows) else len(rows))
    for start in range(0, max(1, len(rows)), size):
        yield slice(start, start + size)


class KL(torch.autograd.Function):
    """KL(softmax(u / T_u) || softmax(v / T_v)) of each row of logits v and u (B, K): (B,).

    The temperatures are (B, 1) or numbers. With p and q the two softmaxes, d = log p - log q, and E_p the mean under p:

        dKL / dv = (q - p) / T_v,       dKL / dT_v = E_p[log q] - E_q[log q], over T_v
        dKL / du = p (d - KL) / T_u,    dKL / dT_u = E_p[log p (KL - d)], over T_u

    The last two have log q in the place of v / T_v, from which it differs by a constant a row, since the weights beside
    it add up to 0.
    """

    @staticmethod
    def forward(ctx, v: Tensor, u: Tensor, t_v: Tensor | float, t_u: Tensor | float) -> Tensor:
        of_v, of_u, of_t_v, of_t_u = ctx.needs_input_grad
        slopes = [
            torch.empty_like(like) if wanted else None
            for like, wanted in ((v, of_v), (u, of_u), (t_v, of_t_v), (t_u, of_t_u))
        ]
        values = v.new_empty(len(v))
        for part in parts(v):
            of_part = [t[part] if isinstance(t, Tensor) else t for t in (t_v, t_u)]
            log_q, log_p = F.log_softmax(v[part] / of_part[0], 1), F.log_softmax(u[part] / of_part[1], 1)
            p, d = log_p.exp(), log_p - log_q
            value = torch.sum(p * d, 1, keepdim=True, out=values[part, None])
            if of_v or of_t_v:
                excess = log_q.exp().sub_(p)
                if of_t_v:
                    slopes[2][part] = -(excess * log_q).sum(1, keepdim=True) / of_part[0]
                if of_v:
                    torch.div(excess, of_part[0], out=slopes[0][part])
            if of_u or of_t_u:
                excess = p.mul_(d.sub_(value))
                if of_t_u:
                    slopes[3][part] = -(excess * log_p).sum(1, keepdim=True) / of_part[1]
                if of_u:
                    torch.div(excess, of_part[1], out=slopes[1][part])
        ctx.save_for_backward(*slopes)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradient[:, None]
        return tuple(None if slope is None else slope * gradient for slope in ctx.saved_tensors)


class Variance(torch.autograd.Function):
    """The variance of each row (B, K), over K: (B, 1)."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        variances = rows.new_empty(len(rows), 1)
        means = rows.mean(1, keepdim=True)
        for part in parts(rows):
            torch.mean((rows[part] - means[part]).square_(), 1, keepdim=True, out=variances[part])
        ctx.save_for_backward(rows, means)
        return variances

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        rows, means = ctx.saved_tensors
        return (rows - means).mul_(2 / rows.shape[1] * gradient)
