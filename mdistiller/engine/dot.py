"""DOT's optimizer under mdistiller's name, for code with a loop of its own."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from mdistiller.engine.solver import DOT, set_lr


class DistillationOrientedTrainer(DOT):
    """DOT in two calls: `step_kd()` with the distillation loss's gradients, then, these zeroed, `step()` with the
    task's. `momentum` is the task's, `momentum_kd` the distillation's.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.0,
        momentum_kd: float = 0.0,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, (momentum + momentum_kd) / 2, weight_decay, (momentum_kd - momentum) / 2)
        set_lr(self, lr)
        self._distillation: list[Tensor | None] = []

    def step_kd(self) -> None:
        """Keep the gradients that are there for `step`."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        self._distillation = [None if p.grad is None else p.grad.clone() for p in parameters]

    @torch.no_grad()
    def step(self, distillation: Sequence[Tensor | None] | None = None) -> None:
        """Move the parameters by the gradients that are there, the task's, and those of `step_kd`. With `distillation`
        as DOT.step does.
        """
        if distillation is not None:
            return super().step(distillation)
        parameters = [p for group in self.param_groups for p in group["params"]]
        kept, self._distillation = self._distillation or [None] * len(parameters), []
        for p, gradient in zip(parameters, kept, strict=True):
            if gradient is not None:
                p.grad = gradient.clone() if p.grad is None else p.grad + gradient
        super().step(kept)
