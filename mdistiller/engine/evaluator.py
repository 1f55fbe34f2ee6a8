"""Accuracy and loss over a data set."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mdistiller.dataset import Batch


class Scores(NamedTuple):
    top1: float  # percent
    top5: float  # percent; of all classes where there are fewer than five
    loss: float  # mean cross entropy


@torch.no_grad()
def evaluate(logits_of: Callable[[Tensor], Tensor], batches: Iterable[Batch]) -> Scores:
    """Scores of `logits_of`, images (B, 3, H, W) -> logits (B, K). Reads the device once, at the end."""
    counts, samples = None, 0
    for image, target, _ in batches:
        logits = logits_of(image).float()
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices  # (B, 5), best first
        hit = top == target[:, None]
        loss = F.cross_entropy(logits, target, reduction="sum")
        batch = torch.stack([hit[:, 0].sum().float(), hit.sum().float(), loss])
        counts = batch if counts is None else counts + batch
        samples += len(target)
    top1, top5, loss = (counts / samples).tolist()
    return Scores(100 * top1, 100 * top5, loss)
