"""The only loop: train an epoch, evaluate, record, keep."""

import math
import time
from pathlib import Path

from torch import nn

from mdistiller.dataset import Batches
from mdistiller.distillers import RuleDistiller
from mdistiller.engine import checkpoint
from mdistiller.engine.device import autocast, rng_state, set_rng_state
from mdistiller.engine.evaluator import Scores, evaluate
from mdistiller.engine.recorder import Recorder
from mdistiller.engine.solver import MultiStep, set_lr
from mdistiller.engine.step import Meter, Step
from mdistiller.engine.temperature import EpochBuffer, RecordFile
from mdistiller.errors import TrainingDiverged, UserError


class Trainer:
    """Trains `distiller` for `epochs` epochs and keeps its run in `folder`."""

    def __init__(
        self,
        distiller: nn.Module,
        step: Step,
        schedule: MultiStep,
        train: Batches,
        test: Batches,
        epochs: int,
        folder: Path,
        save_every: int = 40,
        point_every: int = 500,
        temperature: str = "off",
    ):
        self.distiller, self.step, self.schedule = distiller, step, schedule
        self.train_batches, self.test_batches = train, test
        self.epochs, self.folder = epochs, folder
        self.save_every, self.point_every = save_every, point_every
        self.temperature = temperature if isinstance(distiller, RuleDistiller) else "off"
        self.record: RecordFile | None = None
        self.epoch = 0  # epochs that are finished
        self.last_acc = self.best_acc = -1.0
        self.best_epoch = 0

    def fit(self, recorder: Recorder) -> dict:
        """Train until `epochs`; returns the result: last_acc, best_acc, best_epoch, epochs."""
        seconds = []
        if self.temperature == "samples":
            self.record = RecordFile(self.folder / "temperatures.bin", self.train_batches.num_samples, self.epoch)
        while self.epoch < self.epochs:
            begin = time.monotonic()
            row = self.train_epoch(self.epoch + 1, recorder)
            row |= self.score(self.evaluate())
            row["epoch_seconds"] = time.monotonic() - begin
            left = (self.epochs - self.epoch) * sum(seconds + [row["epoch_seconds"]]) / (len(seconds) + 1)
            # the row first: a kill in between leaves one that a resumed run cuts, not an epoch that has none
            recorder.end_epoch(row, left)
            self.save()
            seconds.append(time.monotonic() - begin)
        result = self.result()
        recorder.finish(result)
        return result

    def train_epoch(self, epoch: int, recorder: Recorder) -> dict:
        """One pass over the training set; returns the training figures of its row."""
        self.distiller.train()
        lr = self.schedule.at(epoch)
        set_lr(self.step.optimizer, lr)
        recorder.start_epoch(epoch, self.train_batches.num_samples)
        meter, begin = Meter(), time.monotonic()
        if self.temperature != "off":
            self.step.temperatures = EpochBuffer(self.train_batches.num_samples, self.step.device)
        for number, batch in enumerate(self.train_batches.epoch(epoch), (epoch - 1) * len(self.train_batches) + 1):
            self.step(batch, epoch, meter)
            recorder.step(len(batch.target), meter.read)
            if number % self.point_every == 0:
                recorder.point(number, meter.read())
        means = meter.read()
        seconds = time.monotonic() - begin  # after the read: the device has finished
        losses = {name: value for name, value in means.items() if name.startswith("loss/")}
        bad = [name.removeprefix("loss/") for name, value in losses.items() if not math.isfinite(value)]
        if bad:
            raise TrainingDiverged(
                f"epoch {epoch}: {' and '.join(bad)} is no longer a finite number; lower SOLVER.LR (now {lr:g}). The "
                f"checkpoint before it, if any, is {self.folder / 'latest'}"
            )
        row = {
            "epoch": epoch,
            "lr": lr,
            "train_loss": means["loss"],
            "train_acc": 100 * means["correct"],
            "train_losses": losses,
            "images_per_second": meter.samples / seconds,
        }
        if self.step.temperatures is not None:
            row["temperature"] = self.step.temperatures.summary()
            recorder.histograms(epoch, self.step.temperatures)
            if self.record:
                self.record.append(self.step.temperatures)
        return row

    def evaluate(self) -> Scores:
        self.distiller.eval()
        with autocast(self.step.device, self.step.amp):
            return evaluate(lambda image: self.distiller(image=image), self.test_batches)

    def score(self, scores: Scores) -> dict:
        """Close the epoch with its test scores; returns the test figures of its row."""
        self.epoch += 1
        self.last_acc = scores.top1
        if scores.top1 > self.best_acc:
            self.best_acc, self.best_epoch = scores.top1, self.epoch
        return {
            "test_acc": scores.top1,
            "test_acc_top5": scores.top5,
            "test_loss": scores.loss,
            "best_acc": self.best_acc,
            "best_epoch": self.best_epoch,
        }

    def result(self) -> dict:
        return {
            "epochs": self.epoch,
            "last_acc": self.last_acc,
            "best_acc": self.best_acc,
            "best_epoch": self.best_epoch,
        }

    def save(self) -> None:
        """latest, student_latest; best and student_best where this epoch is the best; epoch_N, student_N at times.

        `latest` comes last: what a resumed run starts from never names a file that is not there yet.
        """
        names = ["latest"]
        if self.best_epoch == self.epoch:
            names.insert(0, "best")
        if self.epoch % self.save_every == 0:
            names.insert(0, f"epoch_{self.epoch}")
        students = [f"student_{name.removeprefix('epoch_')}" for name in names]
        student = {"model": self.distiller.student.state_dict(), "epoch": self.epoch, "acc": self.last_acc}
        checkpoint.save(student, *(self.folder / name for name in students))
        checkpoint.save(self.state(), *(self.folder / name for name in names))

    def state(self) -> dict:
        return {
            "model": self.distiller.state_dict(),
            "optimizer": self.step.optimizer.state_dict(),
            "scaler": self.step.scaler.state_dict(),
            "rng": rng_state(),
            **{key: getattr(self, key) for key in ("epoch", "last_acc", "best_acc", "best_epoch")},
        }

    def load_state(self, state: dict, path: Path) -> None:
        """Go on from `state`, read from `path`. Raises UserError where it is of another model or method."""
        try:
            self.distiller.load_state_dict(state["model"])
            self.step.optimizer.load_state_dict(state["optimizer"])
            self.step.scaler.load_state_dict(state["scaler"])
            set_rng_state(state["rng"])
            for key in ("epoch", "last_acc", "best_acc", "best_epoch"):
                setattr(self, key, state[key])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            reason = str(error).split("\n")[0]
            raise UserError(f"{path}: is no checkpoint of this run ({reason}); start anew without --resume") from None
