"""Optimizers and learning-rate schedules: the published protocol's, and those of networks that need others."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


@dataclass(frozen=True)
class Schedule:
    """The learning rate over the `epochs`, which count from 1.

    multistep: it falls by `decay_rate` after each epoch of `stages`, and stays the same within an epoch. cosine: it
    falls to 0 along half a wave, from step to step. In the first `warmup` epochs it rises linearly to what it is then.
    """

    lr: float
    stages: tuple[int, ...] = ()
    decay_rate: float = 0.1
    kind: str = "multistep"
    epochs: int = 1
    warmup: float = 0.0

    def at(self, epoch: int, step: int = 0, steps: int = 1) -> float:
        """Return the learning rate of a step, the number `step` (from 0) of the `steps` of `epoch`."""
        past = epoch - 1 + step / steps
        if past < self.warmup:
            return self.lr * min(1.0, (past + 1 / steps) / self.warmup)
        if self.kind == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * (past - self.warmup) / (self.epochs - self.warmup)))
        return self.lr * self.decay_rate ** sum(epoch > stage for stage in self.stages)

    def changes_within(self, epoch: int) -> bool:
        """Return whether the rate differs from step to step of the epoch."""
        return self.kind == "cosine" or epoch - 1 < self.warmup


def by_decay(parameters: Iterable[nn.Parameter], norms_too: bool = True) -> list:
    """Return what an optimizer takes: all parameters, or two groups, of which the second, norms and biases, those of
    one dimension, has no weight decay.
    """
    parameters = list(parameters)
    if norms_too:
        return parameters
    groups = [[p for p in parameters if (p.ndim > 1) == wide] for wide in (True, False)]
    return [{"params": group} | ({} if group is groups[0] else {"weight_decay": 0.0}) for group in groups if group]


def _where(parameters: Iterable[nn.Parameter | dict]) -> tuple[list, Tensor | float, bool]:
    """Return the parameters, or groups of them; the rate, which the trainer sets, on CUDA as a tensor, so that a
    captured step sees the rate of now; and whether they lie there, where fused kernels serve.
    """
    parameters = list(parameters)
    first = parameters[0]["params"][0] if isinstance(parameters[0], dict) else parameters[0]
    return parameters, torch.zeros((), device=first.device) if first.is_cuda else 0.0, first.is_cuda


def sgd(parameters: Iterable[nn.Parameter | dict], momentum: float, weight_decay: float) -> torch.optim.SGD:
    """Return SGD, its weight decay on every parameter, BatchNorm's too, as published, or as groups say.

    On CUDA the fused kernel, whose momenta start at zero: its own first step would leave them undefined if the step
    is skipped.
    """
    parameters, lr, fused = _where(parameters)
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=fused or None)
    if fused:
        zero_momenta(optimizer)
    return optimizer


def adamw(parameters: Iterable[nn.Parameter | dict], weight_decay: float) -> torch.optim.AdamW:
    """Return torch's AdamW."""
    parameters, lr, fused = _where(parameters)
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=fused or None, capturable=fused)


def zero_momenta(optimizer: torch.optim.SGD) -> None:
    """Let the momenta that are missing start at zero."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


class DOT(torch.optim.Optimizer):
    """Distillation-oriented trainer (Zhao et al., ICCV 2023, arXiv 2307.08436, section 4): SGD with two momenta,

        v_task <- (momentum - delta) v_task + g_task + weight_decay p
        v_kd   <- (momentum + delta) v_kd + g_kd
        p      <- p - lr (v_task + v_kd)

    so that the distillation loss, the slower to converge, leads. The penalty goes with the task, whose objective it is
    part of. At delta = 0 this is plain SGD. On CUDA `found_inf`, a 0-dim tensor, where it is set and not 0, leaves a
    step out without a look from the host.
    """

    def __init__(self, parameters: Iterable[nn.Parameter | dict], momentum: float, weight_decay: float, delta: float):
        parameters, lr, _ = _where(parameters)
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
    names = ("lr", "fused", "foreach", "capturable")
    own = [{key: group[key] for key in names if key in group} for group in optimizer.param_groups]
    groups = [group | kept for group, kept in zip(state["param_groups"], own, strict=True)]  # say where states lie
    optimizer.load_state_dict(state | {"param_groups": groups})
    for group, kept in zip(optimizer.param_groups, own, strict=True):
        group |= kept
    if isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["fused"]:  # none yet: the state was an eager one's
        zero_momenta(optimizer)


def average_of(network: nn.Module, decay: float) -> AveragedModel:
    """Return the exponential average of a network's weights and statistics, which begins as a copy of the network."""
    with torch.random.fork_rng(devices=[]):
        return AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True).requires_grad_(False)
