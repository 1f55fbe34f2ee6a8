"""One training step: forward, backward, update."""

import functools

import torch
from torch import Tensor, nn

from mdistiller.dataset import Batch
from mdistiller.distillers import distiller_dict
from mdistiller.engine.device import AMP_DTYPES, autocast
from mdistiller.engine.solver import DOT
from mdistiller.engine.temperature import EpochBuffer
from mdistiller.errors import UserError


class Meter:
    """Sums over the samples of an epoch, kept on the device until somebody reads them."""

    def __init__(self):
        self.samples = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, samples: int, **values: Tensor) -> None:
        """`values`: sums over `samples` samples."""
        self.samples += samples
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def read(self) -> dict[str, float]:
        """The means so far; waits for the device."""
        if not self.sums:
            return {}
        values = torch.stack([value.float() for value in self.sums.values()]) / self.samples
        return dict(zip(self.sums, values.tolist(), strict=True))


class Step:
    """Trains a distiller on batches, in the precision `amp`."""

    def __init__(self, distiller: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, amp: str = "none"):
        self.distiller, self.optimizer = distiller, optimizer
        self.device, self.amp = device, amp
        fp16 = AMP_DTYPES[amp] is torch.float16
        self.temperatures: EpochBuffer | None = None  # where a method under a temperature rule leaves its record
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)

    def __call__(self, batch: Batch, epoch: int, meter: Meter) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        if self.temperatures is not None:
            self.distiller.observer = functools.partial(self.temperatures.put, batch.index)
        with autocast(self.device, self.amp):
            logits, losses = self.distiller(image=batch.image, target=batch.target, index=batch.index, epoch=epoch)
            # a method may return terms of any shape, as mdistiller's loop allows
            losses = {name: value.float().mean() for name, value in losses.items()}
            loss = sum(losses.values())
        extra = (self.distillation_gradients(losses),) if isinstance(self.optimizer, DOT) else ()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer, *extra)
        self.scaler.update()
        with torch.no_grad():
            n = len(batch.target)
            correct = (logits.argmax(1) == batch.target).sum()
            terms = {f"loss/{name}": n * value.detach() for name, value in losses.items()}
            meter.add(n, loss=n * loss.detach(), correct=correct, **terms)

    def distillation_gradients(self, losses: dict[str, Tensor]) -> list[Tensor | None]:
        """Gradients of all losses but the task's, by parameter of the DOT optimizer; the graph stays for backward().

        A task's loss has "ce" in its name, as a word of its own: ce, loss_ce. Raises UserError where the method's
        losses are not of both kinds.
        """
        distillation = [loss for name, loss in losses.items() if "ce" not in name.split("_")]
        if not 0 < len(distillation) < len(losses):
            names = [name for name, cls in distiller_dict.items() if cls is type(self.distiller)]
            raise UserError(
                f"SOLVER.TRAINER: dot needs a task loss (named ..._ce) and another one, and "
                f"{(names or [type(self.distiller).__name__])[0]} gives {', '.join(losses)}; set SOLVER.TRAINER base"
            )
        loss = self.scaler.scale(sum(distillation))
        gradients = torch.autograd.grad(loss, self.optimizer.parameters(), retain_graph=True, allow_unused=True)
        if not self.scaler.is_enabled():
            return list(gradients)
        scale = self.scaler.scale(torch.ones((), device=self.device))
        return [gradient if gradient is None else gradient / scale for gradient in gradients]
