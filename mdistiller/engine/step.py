"""One training step: forward, backward, update."""

import torch
from torch import Tensor, nn

from mdistiller.dataset import Batch
from mdistiller.engine.device import AMP_DTYPES, autocast


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
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)

    def __call__(self, batch: Batch, epoch: int, meter: Meter) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device, self.amp):
            logits, losses = self.distiller(image=batch.image, target=batch.target, index=batch.index, epoch=epoch)
            # a method may return terms of any shape, as mdistiller's loop allows
            losses = {name: value.float().mean() for name, value in losses.items()}
            loss = sum(losses.values())
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            n = len(batch.target)
            correct = (logits.argmax(1) == batch.target).sum()
            terms = {f"loss/{name}": n * value.detach() for name, value in losses.items()}
            meter.add(n, loss=n * loss.detach(), correct=correct, **terms)
