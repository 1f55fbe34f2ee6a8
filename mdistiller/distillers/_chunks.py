"""Last layer and losses for some rows at a time, so that logits of all rows never exist at once.

Where every row's loss depends on that row alone (`Distiller.rowwise`), a mean over N rows is one over parts of them.
With a vocabulary of 32,768, the logits of 4,096 tokens are 512 MiB, of which a plain loss and its gradient hold seven
to seventeen; here some parts' do, and what stays is the gradient at the last layer's input, (N, C).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def chunked(
    losses: Callable[[Tensor, slice], dict[str, Tensor]],
    head: nn.Module,
    hidden: Tensor,
    size: int,
    others: Sequence[nn.Parameter] = (),
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the predicted classes (N,) int64, and the losses' means over all rows.

    `losses(logits, rows)` returns those of some rows: logits (n, V) of `head(hidden[rows])`, hidden (N, C), each a mean
    over n. At most `size` rows go through at a time. The gradients, of `hidden`, `head` and `others`, are computed
    beside the losses; whoever differentiates has to take all losses with one weight, as a sum does.
    """
    learning = [p for p in (*head.parameters(), *others) if p.requires_grad]
    names: list[str] = []

    def of(part: Tensor, rows: slice) -> tuple[Tensor, list[Tensor]]:
        logits = head(part)
        found = losses(logits, rows)
        names[:] = found
        return logits.detach().max(1).indices, [value.float().mean() for value in found.values()]

    predicted, *values = _Chunked.apply(of, size, hidden, *learning)
    return predicted, dict(zip(names, values, strict=True))


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, of: Callable, size: int, hidden: Tensor, *learning: Tensor) -> tuple[Tensor, ...]:
        wanted = any(ctx.needs_input_grad)
        gradients = [torch.zeros_like(hidden), *map(torch.zeros_like, learning)] if wanted else []
        predicted, sums, total = [], None, len(hidden)
        for start in range(0, total, size):
            rows = slice(start, min(start + size, total))
            share = (rows.stop - start) / total
            part = hidden[rows].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                classes, values = of(part, rows)
                parts = [share * value for value in values]
                loss = sum(parts)
            if wanted:
                found = torch.autograd.grad(loss, (part, *learning), allow_unused=True)
                for place, gradient in zip((gradients[0][rows], *gradients[1:]), found, strict=True):
                    if gradient is not None:
                        place.add_(gradient)
            predicted.append(classes)
            parts = torch.stack([value.detach() for value in parts])
            sums = parts if sums is None else sums + parts
        ctx.save_for_backward(*gradients)
        classes = torch.cat(predicted)
        ctx.mark_non_differentiable(classes)
        return classes, *sums.unbind()

    @staticmethod
    def backward(ctx, _classes: Tensor, *weights: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(weights[0] * gradient for gradient in ctx.saved_tensors)
