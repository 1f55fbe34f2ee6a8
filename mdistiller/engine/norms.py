"""Batch normalisation over the samples of all ranks, as one process would do it."""

from types import MethodType

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mdistiller.device import at_least_float32
from mdistiller.engine.ranks import Ranks
from mdistiller.errors import UserError


def synchronise(network: nn.Module, ranks: Ranks, device: torch.device) -> nn.Module:
    """Let the batch normalisations in `network` see the whole batch: on CUDA as torch's SyncBatchNorm, elsewhere, where
    that refuses, by `whole_batch_norm`. Return it. Raises UserError where one of them has arithmetic of its own.
    """
    if ranks.world == 1:
        return network
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        if type(norm).forward is not _BatchNorm.forward:
            raise UserError(
                f"SOLVER.SYNC_BN: the {type(norm).__name__} of a network does more than normalise; set it to False"
            )
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for norm in norms:  # as it is otherwise: a traced copy folds it into a convolution
        norm.ranks, norm.forward = ranks, MethodType(whole_batch_norm, norm)
    return network


def whole_batch_norm(norm: _BatchNorm, x: Tensor) -> Tensor:
    """Return x (B, C, ...) normalised by the statistics over all ranks' samples; in eval mode as `norm` does by itself.
    The running statistics follow those of the whole batch.
    """
    if not norm.training:
        return _BatchNorm.forward(norm, x)
    y, mean, variance, count = _WholeBatchNorm.apply(x, norm.weight, norm.bias, norm.eps, norm.ranks)
    if norm.track_running_stats:
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            share = 1 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
            unbiased = variance * count / (count - 1).clamp(min=1)
            for running, value in ((norm.running_mean, mean), (norm.running_var, unbiased)):
                running.mul_(1 - share).add_(share * value)
    return y


class _WholeBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, ranks: Ranks) -> tuple:
        wide, others = at_least_float32(x), [d for d in range(x.ndim) if d != 1]
        mean = wide.mean(others)
        spread = (wide - _column(mean, x)).square().sum(others)
        own = torch.cat([mean, spread, mean.new_tensor([x.numel() // x.shape[1]])])
        parts = [torch.empty_like(own) for _ in range(ranks.world)]
        dist.all_gather(parts, own)
        # of means and squared distances from them, so that nothing cancels (Chan, Golub and LeVeque, 1983)
        means, spreads, counts = torch.stack(parts).split([len(mean), len(mean), 1], 1)  # (W, C), (W, C), (W, 1)
        count = counts.sum()
        mean = (counts * means).sum(0) / count
        variance = (spreads + counts * (means - mean).square()).sum(0) / count
        inverse = (variance + eps).rsqrt()
        normal = (wide - _column(mean, x)) * _column(inverse, x)
        ctx.save_for_backward(normal.to(x.dtype), weight, inverse, count)
        ctx.ranks = ranks
        y = normal if weight is None else normal * _column(weight, x) + _column(bias, x)
        ctx.mark_non_differentiable(mean, variance, count)
        return y.to(x.dtype), mean, variance, count

    @staticmethod
    def backward(ctx, gradient: Tensor, *_: object) -> tuple[Tensor | None, ...]:
        normal, weight, inverse, count = ctx.saved_tensors
        dtype, others = gradient.dtype, [d for d in range(gradient.ndim) if d != 1]
        gradient, normal = at_least_float32(gradient), at_least_float32(normal)
        of_bias, of_weight = gradient.sum(others), (gradient * normal).sum(others)  # of this rank's samples
        both = torch.stack([of_bias, of_weight])
        ctx.ranks.sum([both])
        level, slope = (_column(value / count, gradient) for value in both)
        scale = inverse if weight is None else inverse * weight
        of_x = (gradient - level - normal * slope) * _column(scale, gradient)
        own = (None, None) if weight is None else (of_weight.to(weight.dtype), of_bias.to(weight.dtype))
        return of_x.to(dtype), *own, None, None


def _column(values: Tensor, x: Tensor) -> Tensor:
    """Return values (C,) as they stand beside x (B, C, ...)."""
    return values.view(1, -1, *(1 for _ in x.shape[2:]))
