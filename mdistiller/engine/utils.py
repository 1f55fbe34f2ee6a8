"""mdistiller's engine.utils, for code with a loop of its own."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mdistiller.config import Config
from mdistiller.engine.build import schedule_of
from mdistiller.engine.evaluator import scores_on_loader
from mdistiller.engine.solver import set_lr
from mdistiller.files import find_above, write_atomic
from mdistiller.runs import checkpoint

COLOURS = {"TRAIN": 33, "EVAL": 32}


class AverageMeter:
    """The latest value, and the mean over `count` samples."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.val = self.avg = self.sum = self.count = 0

    def update(self, val: float, n: int = 1) -> None:
        """Add the mean `val` of `n` samples."""
        self.val = val
        self.sum += val * n
        self.count += n
        self.avg = self.sum / self.count


def accuracy(output: Tensor, target: Tensor, topk: Sequence[int] = (1,)) -> list[Tensor]:
    """Return the top-k accuracies of logits (B, K), in percent, a tensor (1,) for each of `topk`."""
    best = output.topk(min(max(topk), output.shape[1]), dim=1).indices  # best first
    hit = best == target[:, None]
    return [100 * hit[:, :k].any(1).float().mean(0, keepdim=True) for k in topk]


def validate(val_loader: Iterable, distiller: nn.Module) -> tuple[float, float, float]:
    """Return top-1 and top-5 in percent and the mean cross entropy of `distiller(image=...)`, put into eval mode, on
    batches that begin with (image, target).
    """
    scores = scores_on_loader(val_loader, distiller)
    return scores.top1, 100.0 if scores.top5 is None else scores.top5, scores.loss


def adjust_learning_rate(epoch: int, cfg: Config, optimizer: torch.optim.Optimizer) -> float:
    """Set the learning rate of `epoch`, which counts from 1, and return it: one that changes within it, its first."""
    lr = schedule_of(cfg.SOLVER).at(epoch)
    set_lr(optimizer, lr)
    return lr


def log_msg(msg: str, mode: str = "INFO") -> str:
    """Return `msg` behind its mode, in the mode's colour; the caller's next "\\033[0m" ends it."""
    return f"\033[{COLOURS.get(mode, 36)}m[{mode}] {msg}"


def save_checkpoint(obj: object, path: str | Path) -> None:
    """Save `obj`, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    write_atomic(Path(path), buffer.getvalue())


def load_checkpoint(path: str | Path) -> dict:
    """Return what a checkpoint holds, on the CPU. A relative path is also looked for in the folders above this one.
    Nothing in the file is run; raises UserError where it cannot be read.
    """
    return checkpoint.load(find_above(path))
