"""Optimizer and learning-rate schedule of the published protocol."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class MultiStep:
    """The rate falls by `decay_rate` after each epoch of `stages` (epochs count from 1)."""

    lr: float
    stages: tuple[int, ...] = ()
    decay_rate: float = 0.1

    def at(self, epoch: int) -> float:
        """The learning rate of `epoch`."""
        return self.lr * self.decay_rate ** sum(epoch > stage for stage in self.stages)


def sgd(parameters: Iterable[nn.Parameter], momentum: float, weight_decay: float) -> torch.optim.SGD:
    """SGD with weight decay on every parameter, BatchNorm's too, as published. The trainer sets the rate."""
    return torch.optim.SGD(parameters, lr=0.0, momentum=momentum, weight_decay=weight_decay)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
