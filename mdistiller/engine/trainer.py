"""The only loop: train an epoch, evaluate, record, keep."""

import math
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

from mdistiller.bank.inference import Inference
from mdistiller.bank.teacher import WINDOW, TeacherLogits
from mdistiller.dataset import Batches
from mdistiller.device import autocast, rng_state, set_rng_state, side_stream
from mdistiller.distillers import Distiller, RuleDistiller
from mdistiller.engine.diagnose import describe_losses, dump, first_bad_tensor
from mdistiller.engine.evaluator import Scores, evaluate
from mdistiller.engine.graph import GraphStep
from mdistiller.engine.solver import MultiStep, load_state, set_lr, state_of
from mdistiller.engine.step import Meter, Step
from mdistiller.errors import Preempted, RunFailed, TrainingDiverged, UserError
from mdistiller.files import link
from mdistiller.runs import checkpoint
from mdistiller.runs.journal import Journal
from mdistiller.runs.recorder import Recorder
from mdistiller.runs.stop import Stop, StopRequested
from mdistiller.runs.temperature import EpochBuffer, RecordFile
from mdistiller.terminal import say

KEPT = ("epoch", "last_acc", "best_acc", "best_epoch", "log_bytes")


def student_is_tested(distiller: nn.Module) -> bool:
    """Whether a test is the student's forward pass alone: the method changes nothing of it, and has no hooks."""
    own = any(
        getattr(getattr(distiller, name, None), "__func__", None) is not getattr(Distiller, name)
        for name in ("forward", "forward_test")
    )
    hooks = getattr(distiller, "_forward_hooks", {}) or getattr(distiller, "_forward_pre_hooks", {})
    return not own and not hooks


class Trainer:
    """Trains `distiller` for `epochs` epochs and keeps its run in `folder`.

    `teacher`: gives the teacher's logits of a plan, so that the step needs no pass of it; `graph`: whether a step is
    captured (CUDA), `alone`: whether no other trainer takes turns with this one; `origin`: digests of what the run
    starts from (its data, its teacher), which a resumed run must share; `config`: the configuration as text, for the
    dump of a batch whose loss is not finite; `journal`: keeps what was done since the last checkpoint.
    """

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
        origin: dict[str, str] | None = None,
        config: str = "",
        teacher: TeacherLogits | None = None,
        graph: bool = False,
        alone: bool = True,
        stop: Stop | None = None,
        journal: Journal | None = None,
    ):
        self.distiller, self.step, self.schedule = distiller, step, schedule
        self.train_batches, self.test_batches = train, test
        self.epochs, self.folder = epochs, folder
        self.save_every, self.point_every = save_every, point_every
        self.temperature = temperature if isinstance(distiller, RuleDistiller) else "off"
        self.origin, self.config = origin or {}, config
        self.teacher, self.stop, self.journal = teacher, stop or Stop(), journal
        self.shares_teacher = False  # whether other students read the same memory
        owner = getattr(distiller, "teacher", None)
        self._frozen = owner is not None and {*owner.parameters()}.isdisjoint(step.parameters)
        self._teacher_sums = self.teacher_sums()
        self.inference: Inference | None = None  # the student's, from the first evaluation on
        self.record: RecordFile | None = None
        self.meter = Meter()
        self.buffer = EpochBuffer(train.num_samples, step.device) if self.temperature != "off" else None
        self.work: Callable = GraphStep(self.compute, distiller, step.device, alone) if graph else self.compute
        self.epoch = 0  # epochs that are finished
        self.last_acc = self.best_acc = -1.0
        self.best_epoch = 0
        self.log_bytes = 0  # of worklog.txt at the last checkpoint
        self._start_epoch()

    def _start_epoch(self) -> None:
        """What an epoch gathers until its row is written; a checkpoint inside an epoch holds it."""
        self.done = 0  # training steps of this epoch
        self.seconds = 0.0  # that this epoch's training has taken
        self.meter.reset()
        if self.buffer is not None:
            self.buffer.reset()

    def fit(self, recorder: Recorder) -> dict:
        """Train until `epochs`; returns the result: last_acc, best_acc, best_epoch, epochs.

        Raises Preempted when a signal has come and the run up to that step is kept, TrainingDiverged where a loss is
        no longer finite.
        """
        with self.stop, side_stream(self.step.device):
            steps = self.steps(recorder)
            while True:
                try:
                    next(steps)
                except StopIteration as end:
                    return end.value

    def steps(self, recorder: Recorder) -> Generator[None, None, dict]:
        """`fit`, a training step at a time, so that several trainers can take turns."""
        seconds: list[float] = []  # of the epochs since it was started
        if self.temperature == "samples":
            self.record = RecordFile(self.folder / "temperatures.bin", self.train_batches.num_samples, self.epoch)
            if self.record.missing:
                recorder.say(f"warning: {self.record.path.name} has nothing of {self.record.missing} finished epochs")
        while self.epoch < self.epochs:
            try:
                if self.teacher is not None:
                    self.teacher.prepare(self.stop.check)
                    if self.work != self.compute:
                        self.work.alone &= self.teacher.complete  # else its graph runs beside the steps'
                begin = time.monotonic() - self.seconds
                row = yield from self.train_epoch(self.epoch + 1, recorder)
                if not self.teacher_is_frozen() and self.teacher is not None:
                    raise RunFailed("the method changes its teacher, which was asked ahead; set TEACHER_BANK off")
                scores = self.evaluate()
            except StopRequested:
                self.leave(recorder)
            row |= self.score(scores)
            row["epoch_seconds"] = time.monotonic() - begin
            left = (self.epochs - self.epoch) * sum(seconds + [row["epoch_seconds"]]) / (len(seconds) + 1)
            if self.buffer is not None:
                row["temperature"] = self.buffer.summary()
                recorder.histograms(self.epoch, self.buffer)
                if self.record:
                    self.record.append(self.buffer)
            # the row first: a kill in between leaves one that a resumed run cuts, not an epoch that has none
            recorder.end_epoch(row, left)
            self._start_epoch()
            self.save(recorder)
            seconds.append(time.monotonic() - begin)
        if self.journal is not None:
            self.journal.remove()
        result = self.result()
        recorder.finish(result)
        return result | {"signal": self.stop.signal}

    def train_epoch(self, epoch: int, recorder: Recorder) -> Generator[None, None, dict]:
        """One pass over the training set, or what is left of it; gives the training figures of its row."""
        self.distiller.train()
        lr = self.schedule.at(epoch)
        set_lr(self.step.optimizer, lr)
        self.step.temperatures = self.buffer
        batches = self.train_batches
        recorder.start_epoch(epoch, batches.num_samples, self.meter.images)
        begin = time.monotonic() - self.seconds
        for plan, logits in self.stop.watch(self.plans(epoch)):
            self.random = torch.get_rng_state()
            self.work(plan, logits, epoch)
            self.step.count(plan.shape[1], self.meter)
            self.done += 1
            number = (epoch - 1) * len(batches) + self.done
            point = number % self.point_every == 0
            if (not self.step.lazy or point or self.done == len(batches)) and self.step.bad_step() >= 0:
                self.diverged(epoch)
            recorder.step(plan.shape[1], self.meter.read)
            if point:
                recorder.point(number, self.meter.read())
            if getattr(self.work, "refusal", ""):
                recorder.say(f"steps run one operation at a time, not as a graph: {self.work.refusal}")
                self.work = self.compute
            if self.step.refusal:
                recorder.say(f"steps run as they are, not compiled: {self.step.refusal}")
                self.step.refusal = ""
            self.seconds = time.monotonic() - begin
            if self.journal is not None and self.journal.due():
                self.keep(recorder)
            yield
        means = self.meter.read()
        seconds = time.monotonic() - begin  # after the read: the device has finished
        skipped = int(means.pop("skipped"))
        if skipped == len(batches):
            raise TrainingDiverged(f"epoch {epoch}: no step had a finite loss; lower SOLVER.LR (now {lr:g})")
        return {
            "epoch": epoch,
            "lr": lr,
            "train_loss": means["loss"],
            "train_acc": 100 * means["correct"],
            "train_losses": {name: value for name, value in means.items() if name.startswith("loss/")},
            "images_per_second": self.meter.images / seconds,
        } | ({"skipped_steps": skipped} if self.step.skip else {})

    def plans(self, epoch: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """What is left of the epoch, a batch at a time: its plan (4, B) and the teacher's logits (B, K), on the
        device. The teacher is asked for some batches together.
        """
        size, samples = self.train_batches.batch_size, self.train_batches.num_samples
        plan = self.train_batches.plan(epoch)
        local = plan.to(self.step.device)  # one transfer an epoch
        window = size * max(1, WINDOW // size)
        for start in range(self.done * size, samples, window):
            stop = min(start + window, samples)
            logits = None if self.teacher is None else self.teacher(plan[:, start:stop], self.stop.check)
            for batch in range(start, stop, size):
                part = slice(batch, min(batch + size, stop))
                yield local[:, part], None if logits is None else logits[part.start - start : part.stop - start]

    def compute(self, plan: Tensor, logits: Tensor | None, epoch: int | Tensor) -> None:
        self.current = self.train_batches.batch(plan), logits
        self.step.compute(self.current[0], epoch, self.meter, logits)

    def diverged(self, epoch: int) -> NoReturn:
        """Say what went bad in the step that the device has marked, and keep what runs it again."""
        if self.journal is not None:
            self.journal.remove()  # with it, a run that goes on would meet this step at once
        number = self.done - (self.step.steps - self.step.bad_step())  # from 0, in this epoch
        batch, logits = self.current
        if number != self.done - 1 or self.work != self.compute:
            # noticed later, when the generator's state is another; a graph's own tensors are no batch any more
            size = self.train_batches.batch_size
            plan = self.train_batches.plan(epoch)[:, number * size : (number + 1) * size]
            logits = None if self.teacher is None else self.teacher(plan)
            batch = self.train_batches.batch(plan.to(self.step.device))
        torch.set_rng_state(self.random)
        state = dump(self.distiller, batch, epoch, self.config, self.random, logits)
        bad, losses = first_bad_tensor(self.distiller, batch, epoch, self.step.amp, logits)
        file = self.folder / f"bad_batch,epoch_{epoch},step_{number + 1}"
        again = f"`python3 tools/replay.py '{file}'` runs the step again"
        try:
            checkpoint.save(state, file)
        except OSError as error:
            again = f"the batch could not be kept: {error}"
        raise TrainingDiverged(
            f"epoch {epoch}, step {number + 1} of {len(self.train_batches)}: the loss or its gradient is not finite "
            f"({describe_losses(losses)}); first to go bad: {bad or 'nothing when the step ran again'}",
            f"lower SOLVER.LR (now {self.schedule.at(epoch):g}), or leave such steps out with SOLVER.NAN_POLICY skip; "
            + again,
        )

    def evaluate(self) -> Scores:
        """Scores of the student on the test set; of what `forward_test` gives where a method has its own."""
        self.distiller.eval()
        batches = self.stop.watch(self.test_batches)
        if not student_is_tested(self.distiller):
            with autocast(self.step.device, self.step.amp):
                return evaluate(lambda image: self.distiller(image=image), batches)
        if self.inference is None:
            size = self.test_batches.images.shape[1]
            self.inference = Inference(self.distiller.student, self.step.device, self.step.amp, size)
        else:
            self.inference.refresh()
        return evaluate(self.inference, batches)

    def score(self, scores: Scores) -> dict:
        """Close the epoch with its test scores; returns the test figures of its row."""
        if not math.isfinite(scores.loss):
            raise TrainingDiverged(f"epoch {self.epoch + 1}: the test loss is {scores.loss}; lower SOLVER.LR")
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

    def leave(self, recorder: Recorder) -> NoReturn:
        """Keep what this epoch has done so far, for a run that goes on at the next step."""
        if self.step.bad_step() >= 0:  # on the device, steps behind it have done nothing
            self.diverged(self.epoch + 1)
        where = f"epoch {self.epoch + 1} after step {self.done} of {len(self.train_batches)}"
        recorder.events.flush()
        recorder.log(f"stopped by {self.stop.signal} in {where}")
        self.save(recorder)
        if self.journal is not None:
            self.journal.remove()
        raise Preempted(f"stopped by {self.stop.signal} in {where}; the same command with --resume auto goes on there")

    def keep(self, recorder: Recorder) -> None:
        """Keep this step in the journal. Where that fails, training goes on without one."""
        if self.step.bad_step() >= 0:  # on the device, steps behind it have done nothing
            return
        self.log_bytes = recorder.size
        try:
            self.journal.write(self.state())
        except (OSError, KeyError, TypeError, ValueError) as error:
            self.journal.remove()
            self.journal = None
            reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
            # not to the worklog: the disk may be full
            say(f"{recorder.label}warning: no journal is kept ({reason}); kill -9 costs what follows a checkpoint")

    def save(self, recorder: Recorder) -> None:
        """latest, and at an epoch's end student_latest; best and student_best where this epoch is the best; epoch_N,
        student_N at times. What was `latest` before is `previous`.

        `latest` comes last: what a resumed run starts from never names a file that is not there yet.
        """
        self.log_bytes = recorder.size
        names = ["latest"]
        if self.teacher is not None:
            self.teacher.commit()
        if self.epoch and not self.done:
            if self.best_epoch == self.epoch:
                names.insert(0, "best")
            if self.epoch % self.save_every == 0:
                names.insert(0, f"epoch_{self.epoch}")
            student = {"model": self.distiller.student.state_dict(), "epoch": self.epoch, "acc": self.last_acc}
            checkpoint.save(student, *(self.folder / f"student_{name.removeprefix('epoch_')}" for name in names))
        if (self.folder / "latest").exists():
            link(self.folder / "latest", self.folder / "previous")
        checkpoint.save(self.state(), *(self.folder / name for name in names))

    def teacher_sums(self) -> list[int]:
        """Of the bits of each of the teacher's parameters, as whole numbers: another one where any value differs. (A
        parameter's version does not rise where a method writes to its `.data`.) Waits for the device.
        """
        if not self._frozen:
            return []
        parameters = [p.detach() for p in self.distiller.teacher.parameters()]
        sums = [p.view(getattr(torch, f"int{8 * p.element_size()}")).sum() for p in parameters]
        return torch.stack(sums).tolist() if sums else []

    def teacher_is_frozen(self) -> bool:
        """Whether the teacher is as its file has it: it does not learn, nor has the method written to it. Raises
        RunFailed where the method has, and other students share it.
        """
        if self.teacher_sums() != self._teacher_sums:
            if self.shares_teacher:
                raise RunFailed("--seeds: the method writes to its teacher, which the students share; run seed by seed")
            self._frozen, self._teacher_sums = False, []
        return self._frozen

    def model_state(self) -> dict[str, Tensor]:
        """The method's state_dict, without a teacher that is frozen."""
        modules, plain = self.distiller._modules, type(self.distiller).state_dict is nn.Module.state_dict
        frozen = self.teacher_is_frozen()
        if not (frozen and plain):
            state = self.distiller.state_dict()
            return {key: value for key, value in state.items() if not (frozen and key.startswith("teacher."))}
        teacher, modules["teacher"] = modules["teacher"], None  # a deep one takes longer than all the rest
        try:
            return dict(self.distiller.state_dict())
        finally:
            modules["teacher"] = teacher

    def state(self) -> dict:
        """All that the run's future depends on, but for a teacher whose parameters have stayed: `origin` tells whether
        it is the same. (OFD's gathers BatchNorm statistics, which nothing reads.)
        """
        return {
            "model": self.model_state(),
            "optimizer": state_of(self.step.optimizer),
            "scaler": self.step.scaler.state_dict(),
            "rng": rng_state(),
            "origin": self.origin,
            "progress": {
                "done": self.done,
                "seconds": self.seconds,
                "images": self.meter.images,
                "sums": self.meter.sums,
                "temperatures": self.buffer.values if self.buffer is not None and self.done else None,
            },
            **{key: getattr(self, key) for key in KEPT},
        }

    def load_state(self, state: dict, path: Path) -> None:
        """Go on from `state`, read from `path`. Raises UserError where it is of another model, method, data set or
        teacher.
        """
        try:
            missing, unknown = self.distiller.load_state_dict(state["model"], strict=False)
            if self.teacher_is_frozen():  # it is not, where `state` holds another one
                missing = [key for key in missing if not key.startswith("teacher.")]
            if missing or unknown:
                raise KeyError(f"weights of another method: {(missing + unknown)[0]}")
            load_state(self.step.optimizer, state["optimizer"])
            self.step.scaler.load_state_dict(state["scaler"])
            set_rng_state(state["rng"])
            progress, origin = state["progress"], state["origin"]
            self.done, self.seconds = progress["done"], progress["seconds"]
            self.meter.images = progress["images"]
            self.meter.sums = {name: value.to(self.step.device) for name, value in progress["sums"].items()}
            if self.buffer is not None:
                self.buffer.reset()
            if self.buffer is not None and progress["temperatures"] is not None:
                self.buffer.values.copy_(progress["temperatures"])
            for key in KEPT:
                setattr(self, key, state[key])
        except (KeyError, IndexError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            reason = str(error).split("\n")[0]
            raise UserError(f"{path}: is no checkpoint of this run ({reason}); start anew without --resume") from None
        for name, key in (("data", "DATASET.ROOT"), ("teacher", "DISTILLER.TEACHER_CKPT")):
            if origin.get(name) != self.origin.get(name):
                raise UserError(
                    f"--resume: the {name} in {key} is not what this run was started with; point {key} to that, or "
                    "start a new run without --resume"
                )
