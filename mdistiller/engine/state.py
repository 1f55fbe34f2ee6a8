"""What a run's future depends on: all of it lies in a checkpoint, so that a resumed run goes on bit for bit."""

import math
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from mdistiller.device import rng_state, set_rng_state
from mdistiller.engine.shard import own_part
from mdistiller.engine.solver import load_state, state_of
from mdistiller.engine.step import Step
from mdistiller.errors import RunFailed, UserError
from mdistiller.runs.temperature import EpochBuffer

KEPT = ("epoch", "last_acc", "best_acc", "best_epoch", "log_bytes")
LOSSES = ("last_loss", "best_loss")


class FrozenTeacher:
    """Tells whether the teacher is as its file has it: it does not learn, and the method has not written to it."""

    def __init__(self, distiller: nn.Module, learning: list[nn.Parameter]):
        self.model = distiller.teacher
        self.shared = False  # whether other students read the same memory
        self._frozen = self.model is not None and {*self.model.parameters()}.isdisjoint(learning)
        self._sums = self._checksums()

    def __bool__(self) -> bool:
        """Return whether it is frozen. Waits for the device. Raises RunFailed where the method has written to a teacher
        that other students share.
        """
        if self._checksums() != self._sums:
            if self.shared:
                raise RunFailed("--seeds: the method writes to its teacher, which the students share; run seed by seed")
            self._frozen, self._sums = False, []
        return self._frozen

    def _checksums(self) -> list[int]:
        """Return a checksum of each parameter's bits. (Its version does not rise where a method writes to `.data`.)"""
        if not self._frozen:
            return []
        parameters = [own_part(p.detach()) for p in self.model.parameters()]
        sums = [p.view(getattr(torch, f"int{8 * p.element_size()}")).sum() for p in parameters]
        return torch.stack(sums).tolist() if sums else []


class RunState:
    """A run's progress, and with `dump` and `load` all that a checkpoint holds of it."""

    def __init__(self, step: Step, buffer: EpochBuffer | None = None, average: AveragedModel | None = None):
        self.step, self.buffer, self.average = step, buffer, average
        self.ema_acc: float | None = None  # test accuracy of the average of weights
        self.teacher = FrozenTeacher(step.distiller, step.parameters)
        self.epoch = 0  # epochs that are finished
        self.last_acc = self.best_acc = -1.0
        self.best_epoch = 0
        self.last_loss: float | None = None  # on the test, of a text, whose best epoch is that of the lowest
        self.best_loss = math.inf
        self.log_bytes = 0  # of worklog.txt at the last checkpoint
        self.start_epoch()

    def start_epoch(self) -> None:
        """Forget what an epoch gathers until its row is written; a checkpoint inside an epoch holds it."""
        self.done = 0  # training steps of this epoch
        self.seconds = 0.0  # that this epoch's training has taken
        self.step.meter.reset()
        if self.buffer is not None:
            self.buffer.reset()

    def end_epoch(self, accuracy: float, loss: float | None = None) -> None:
        """Count an epoch whose test accuracy is `accuracy` percent. The best one has the highest; where the test's
        `loss` is given, the lowest loss.
        """
        self.epoch += 1
        self.last_acc, self.last_loss = accuracy, loss
        if (accuracy > self.best_acc) if loss is None else (loss < self.best_loss):
            self.best_acc, self.best_epoch = accuracy, self.epoch
            self.best_loss = math.inf if loss is None else loss

    def result(self) -> dict:
        """Return epochs, last_acc, best_acc and best_epoch; accuracies in percent, -1 before the first epoch; of a text
        last_loss and best_loss too.
        """
        figures = {"last_acc": self.last_acc, "best_acc": self.best_acc, "best_epoch": self.best_epoch}
        if self.last_loss is not None:
            figures |= {"last_loss": self.last_loss, "best_loss": self.best_loss}
        return {"epochs": self.epoch} | figures | ({} if self.ema_acc is None else {"ema_acc": self.ema_acc})

    def student(self) -> dict:
        """Return what the student's own checkpoints hold."""
        return {"model": self.step.distiller.student.state_dict(), "epoch": self.epoch, "acc": self.last_acc}

    def averaged(self) -> dict | None:
        """Return what the checkpoint of the average holds; None without one."""
        if self.average is None:
            return None
        return {"model": self.average.module.state_dict(), "epoch": self.epoch, "acc": self.ema_acc}

    def dump(self) -> dict:
        """Return the checkpoint. A teacher whose parameters have stayed is not in it: its digest tells whether it is
        the same. (OFD's gathers BatchNorm statistics, which nothing reads.)
        """
        meter, buffer, frozen = self.step.meter, self.buffer, bool(self.teacher)
        weights = self.step.distiller.state_dict()
        return {
            "model": {key: value for key, value in weights.items() if not (frozen and key.startswith("teacher."))},
            "optimizer": state_of(self.step.optimizer),
            "scaler": self.step.scaler.state_dict(),
            "rng": rng_state(),
            "progress": {
                "done": self.done,
                "seconds": self.seconds,
                "images": meter.images,
                "sums": meter.sums,
                "temperatures": buffer.values if buffer is not None and self.done else None,
            },
            **({} if self.average is None else {"average": self.average.state_dict(), "ema_acc": self.ema_acc}),
            **({} if self.last_loss is None else {key: getattr(self, key) for key in LOSSES}),
            **{key: getattr(self, key) for key in KEPT},
        }

    def load(self, state: dict, path: Path) -> None:
        """Go on from `state`, read from `path`. Raises UserError where it is of another model or method."""
        try:
            missing, unknown = self.step.distiller.load_state_dict(state["model"], strict=False)
            if self.teacher:  # it is not, where `state` holds another one
                missing = [key for key in missing if not key.startswith("teacher.")]
            if missing or unknown:
                raise KeyError(f"weights of another method: {(missing + unknown)[0]}")
            load_state(self.step.optimizer, state["optimizer"])
            self.step.scaler.load_state_dict(state["scaler"])
            set_rng_state(state["rng"])
            progress = state["progress"]
            self.done, self.seconds = progress["done"], progress["seconds"]
            self.step.meter.images = progress["images"]
            self.step.meter.sums = {name: value.to(self.step.device) for name, value in progress["sums"].items()}
            if self.buffer is not None:
                self.buffer.reset()
                if progress["temperatures"] is not None:
                    self.buffer.values.copy_(progress["temperatures"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
                self.ema_acc = state["ema_acc"]
            for key in (*KEPT, *(key for key in LOSSES if key in state)):
                setattr(self, key, state[key])
        except (KeyError, IndexError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            reason = str(error).split("\n")[0]
            raise UserError(f"{path}: is no checkpoint of this run ({reason}); start anew without --resume") from None
