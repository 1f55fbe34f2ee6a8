"""Optimizer and learning-rate schedule of the published protocol."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class MultiStep:
    """The rate falls by `decay_rate` after each epoch of `stages` (epochs count from 1)."""

    lr: float
    stages: tuple[int, ...] = ()
    decay_rate: float = 0.1

    def at(self, epoch: int) -> float:
        """Return the learning rate of `epoch`."""
        return self.lr * self.decay_rate ** sum(epoch > stage for stage in self.stages)


def sgd(parameters: Iterable[nn.Parameter], momentum: float, weight_decay: float) -> torch.optim.SGD:
    """Return SGD with weight decay on every parameter, BatchNorm's too, as published. The trainer sets the rate.

    On CUDA the fused kernel, whose momenta start at zero: its own first step would leave them undefined if the step
    is skipped. Its rate is a tensor, so that a captured step sees the rate of now.
    """
    parameters = list(parameters)
    fused = True if parameters[0].is_cuda else None  # None: torch's own choice
    lr = torch.zeros((), device=parameters[0].device) if fused else 0.0
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=fused)
    if fused:
        zero_momenta(optimizer)
    return optimizer


def zero_momenta(optimizer: torch.optim.SGD) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


class DOT(torch.optim.Optimizer):
    """Distillation-oriented trainer (Zhao et al., ICCV 2023, arXiv 2307.08436, section 4): SGD with two momenta,

        v_task <- (momentum - delta) v_task + g_task + weight_decay p
        v_kd   <- (momentum + delta) v_kd + g_kd
        p      <- p - lr (v_task + v_kd)

    so that the distillation loss, the slower to converge, leads. The penalty goes with the task, whose objective it is
    part of. At delta = 0 this is plain SGD. The trainer sets the rate, on CUDA as a tensor, like `sgd`'s; there
    `found_inf`, a 0-dim tensor, where it is set and not 0, leaves a step out without a look from the host.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], momentum: float, weight_decay: float, delta: float):
        parameters = list(parameters)
        lr = torch.zeros((), device=parameters[0].device) if parameters[0].is_cuda else 0.0
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "delta": delta})
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, distillation: Sequence[Tensor | None]) -> None:
        """Move the parameters. `distillation` holds g_kd of each parameter, None for zero; p.grad is the whole loss's
        gradient, g_task + g_kd. Parameters without a gradient stay as they are.
        """
        rest = iter(distillation)
        for group in self.param_groups:
            for p in group["params"]:
                g_kd = next(rest)
                if p.grad is None:
                    continue
                state = self.state[p]
                for name in ("task", "distillation"):
                    if name not in state:
                        state[name] = torch.zeros_like(p)
                v_task, v_kd = state["task"], state["distillation"]
                before = [(x, x.clone()) for x in (p, v_task, v_kd)] if self.found_inf is not None else ()
                v_task.mul_(group["momentum"] - group["delta"]).add_(p.grad).add_(p, alpha=group["weight_decay"])
                v_kd.mul_(group["momentum"] + group["delta"])
                if g_kd is not None:
                    v_task.sub_(g_kd)
                    v_kd.add_(g_kd)
                p.sub_((v_task + v_kd) * group["lr"])
                for x, value in before:
                    x.copy_(torch.where(self.found_inf == 0, x, value))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def state_of(optimizer: torch.optim.Optimizer) -> dict:
    """Return the optimizer's state_dict, the rate a number: for a checkpoint that any device may go on from."""
    state = optimizer.state_dict()
    return state | {"param_groups": [group | {"lr": float(group["lr"])} for group in state["param_groups"]]}


def load_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Take over what `state_of` gave; which kernels run, and that the rate is a tensor, stays this optimizer's."""
    own = [{key: group[key] for key in ("lr", "fused", "foreach") if key in group} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, kept in zip(optimizer.param_groups, own, strict=True):
        group |= kept
        for parameter in group["params"] if group.get("fused") else ():  # none yet: the state was an eager one's
            if optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
