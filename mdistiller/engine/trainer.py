"""The only loop: train an epoch, evaluate, record, keep."""

import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import nn

from mdistiller.dataset import Batches
from mdistiller.device import autocast, set_torch_generators, side_stream, torch_generators
from mdistiller.distillers import RuleDistiller
from mdistiller.engine.detection_scores import DetectionScores
from mdistiller.engine.evaluator import ImageTest, Scores, has_default_test, scores_of
from mdistiller.engine.feed import Feed
from mdistiller.engine.replay import describe_losses, dump, first_bad_tensor
from mdistiller.engine.solver import Schedule, average_of, set_lr
from mdistiller.engine.state import RunState
from mdistiller.engine.stepmode import RunStep
from mdistiller.engine.text_scores import TextScores
from mdistiller.errors import Preempted, RunFailed, TrainingDiverged
from mdistiller.runs import checkpoint
from mdistiller.runs.keeper import Keeper
from mdistiller.runs.recorder import Recorder
from mdistiller.runs.stop import Stop, StopRequested, stops_early
from mdistiller.runs.temperature import EpochBuffer, RecordFile
from mdistiller.terminal import counted

AnyScores = Scores | TextScores | DetectionScores


@dataclass(frozen=True)
class Options:
    """How long a trainer trains, and what it records."""

    epochs: int
    point_every: int = 500  # steps between TensorBoard's points inside an epoch
    temperature: str = "off"  # summary: an epoch's temperatures; samples: each sample's too
    config: str = ""  # the configuration as text, for the dump of a batch whose loss is not finite
    kept: bool = True  # whether the run's folder stays
    known: bool = True  # whether tools/replay.py can build what is trained: the caller brings none of it
    print_every: int = 0  # steps between lines inside an epoch where there is no bar; 0: none
    average: float = 0.0  # decay of the average of the student's weights; 0: none
    unit: str = "images"  # what is counted by the second
    teacher_first: bool = False  # whether what the teacher reaches on the test set is said before the first step
    patience: int = 0  # epochs without a new best after which it stops; 0: never


class Trainer:
    """Trains the distiller of `run_step` on the batches of `feed`, tests on `test`, and keeps its run by `keeper`.
    `tester` scores a network there, as its data's task says (task.py); left out: as images are scored.
    """

    def __init__(
        self,
        run_step: RunStep,
        feed: Feed,
        test: Batches,
        schedule: Schedule,
        keeper: Keeper,
        options: Options,
        stop: Stop | None = None,
        tester: Callable[..., AnyScores] | None = None,
    ):
        self.run_step, self.step, self.distiller = run_step, run_step.step, run_step.step.distiller
        self.feed, self.test, self.schedule, self.keeper = feed, test, schedule, keeper
        self.options, self.stop = options, stop or Stop()
        self.tester = tester or ImageTest(test, self.step.device, self.step.amp, self.step.ranks)
        temperature = options.temperature if isinstance(self.distiller, RuleDistiller) else "off"
        batches = feed.batches
        self.targets = batches.num_samples * batches.targets_each
        self.buffer = EpochBuffer(self.targets, self.step.device) if temperature != "off" else None
        self.records_samples = temperature == "samples"
        self.average = average_of(self.distiller.student, options.average) if options.average else None
        self.state = RunState(self.step, self.buffer, self.average)
        # torch's generators before each step since the last look at whether one was bad
        self.random: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        # called before what may draw random numbers: where several trainers take turns, it makes the process's
        # generators this one's
        self.take_generators: Callable[[], None] = lambda: None
        self.ranks = self.step.ranks

    def fit(self, recorder: Recorder) -> dict:
        """Train until the last epoch, or until no better one has come for long. Return `result`, and the signal that
        came, if any.

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
                except RuntimeError as error:  # here, where the signal by which torchrun ends the others is heeded
                    if lost := self.ranks.lost(error):
                        raise lost from None
                    raise

    def steps(self, recorder: Recorder) -> Generator[None, None, dict]:
        """Do what `fit` does, a training step at a time, so that several trainers can take turns."""
        state, record = self.state, None
        seconds: list[float] = []  # of the epochs since it was started
        if self.records_samples and self.ranks.first:
            file = self.keeper.folder / "temperatures.bin"
            record = RecordFile(file, self.targets, state.epoch)
            if record.missing:
                recorder.say(f"warning: {file.name} has nothing of {counted(record.missing, 'finished epoch')}")
        while state.epoch < self.options.epochs and not self.stopped_early:
            begin = time.monotonic() - state.seconds
            self.take_generators()
            try:
                self.prepare_teacher()
                if self.options.teacher_first and not (state.epoch or state.done):
                    self.show_teacher(recorder)
                row = yield from self.train_epoch(state.epoch + 1, recorder)
                self.share_statistics()
                scores = self.evaluate()
                averaged = self.scores_of_network(self.average.module) if self.average is not None else None
                self.agree()
                self.stop.check()
            except StopRequested:
                self.leave(recorder)
            row |= self.score(scores) | {"epoch_seconds": time.monotonic() - begin}
            if averaged is not None:
                row["ema_acc"] = state.ema_acc = averaged.score
            left = (self.options.epochs - state.epoch) * sum(seconds + [row["epoch_seconds"]]) / (len(seconds) + 1)
            if self.buffer is not None:
                self.merge_temperatures()
                row["temperature"] = self.buffer.summary()
                recorder.histograms(state.epoch, self.buffer)
                if record:
                    record.append(self.buffer)
            # the row first: a kill in between leaves one that a resumed run cuts, not an epoch that has none
            recorder.end_epoch(row, left)
            state.start_epoch()
            self.save(recorder)
            seconds.append(time.monotonic() - begin)
        recorder.finish(self.result())
        return self.result() | {"signal": self.stop.signal}

    @property
    def stopped_early(self) -> bool:
        """Whether the run is over before its last epoch. It follows from what a checkpoint holds."""
        state, options = self.state, self.options
        return state.epoch < options.epochs and stops_early(options.patience, state.epoch, state.best_epoch)

    def result(self) -> dict:
        """Return epochs, last_acc, best_acc, best_epoch and stopped_early."""
        return self.state.result() | {"stopped_early": self.stopped_early}

    def prepare_teacher(self) -> None:
        """See to what has to be there before an epoch's first step: a bank that is to be filled beforehand."""
        teacher = self.feed.teacher
        if teacher is not None:
            teacher.prepare(self.stop.check)
            if self.run_step.graph:
                self.run_step.graph.exclusive &= teacher.complete  # else its graph runs beside the steps'

    def show_teacher(self, recorder: Recorder) -> None:
        """Say what the teacher reaches on the test set, where there is one."""
        if self.distiller.teacher is None:
            return
        scores = self.scores_of_network(self.distiller.teacher)
        ap50 = scores.figures.get("AP50")
        reached = f"top-1 {scores.score:.2f}" if ap50 is None else f"AP {scores.score:.2f}, AP50 {ap50:.2f}"
        recorder.say(f"the teacher on the test set: {reached}")

    def train_epoch(self, epoch: int, recorder: Recorder) -> Generator[None, None, dict]:
        """Pass once over the training set, or over what is left of it. Return the training figures of the row."""
        self.distiller.train()
        state, step, meter = self.state, self.step, self.step.meter
        # where only the test is left, the row has the last step's
        lr = self.schedule.at(epoch, min(state.done, len(self.feed) - 1), len(self.feed))
        varies = self.schedule.changes_within(epoch)
        set_lr(step.optimizer, lr)
        step.temperatures = self.buffer
        each = self.feed.batches.targets_each
        recorder.start_epoch(epoch, each * self.feed.batches.samples_an_epoch, meter.images)
        begin = time.monotonic() - state.seconds
        for plan, logits in self.stop.watch(self.feed.plans(epoch, state.done, self.stop.check)):
            if not self.run_step.replays(plan):
                self.take_generators()
            self.random.append(torch_generators())
            if varies:
                lr = self.schedule.at(epoch, state.done, len(self.feed))
                set_lr(step.optimizer, lr)
            for line in self.run_step(plan, logits, epoch):
                recorder.say(line)
            if self.average is not None:
                self.average.update_parameters(self.distiller.student)
            state.done += 1
            state.seconds = time.monotonic() - begin
            number = (epoch - 1) * len(self.feed) + state.done
            point, last = number % self.options.point_every == 0, state.done == len(self.feed)
            due = self.agree(self.keeper.due() and not last)
            if not step.lazy or point or last or due:
                if step.bad_step() >= 0:
                    self.diverged(epoch)
                self.random.clear()
            recorder.step(each * plan.shape[1], meter.read)
            if self.options.print_every and state.done % self.options.print_every == 0 and not last:
                recorder.progress(epoch, state.done, len(self.feed), meter.read)
            if point:
                recorder.point(number, meter.read())
            if due:
                self.save(recorder)
            yield
        self.take_generators()
        means = meter.read()
        seconds = time.monotonic() - begin  # after the read: the device has finished
        if self.feed.teacher is not None and not self.state.teacher:
            line = "the method changes its teacher, which was asked ahead; set TEACHER_BANK off"
            raise self.ranks.said(RunFailed(line))
        skipped = int(means.pop("skipped"))
        if skipped == len(self.feed):
            self.give_up(f"epoch {epoch}: no step had a finite loss; lower SOLVER.LR (now {lr:g})")
        row = {
            "epoch": epoch,
            "lr": lr,
            "train_loss": means["loss"],
            **({"train_acc": 100 * means["correct"]} if "correct" in means else {}),
            "train_losses": {name: value for name, value in means.items() if name.startswith("loss/")},
            f"{self.options.unit}_per_second": meter.images / seconds,
        }
        if step.skip:
            row["skipped_steps"] = skipped
        return row

    def evaluate(self) -> AnyScores:
        """Return the student's scores on the test set; those of `forward_test` where a method has its own."""
        self.distiller.eval()
        batches = self.stop.watch(self.test)
        if not has_default_test(self.distiller):
            with autocast(self.step.device, self.step.amp):
                return scores_of(lambda image: self.distiller(image=image), batches, self.ranks)
        return self.scores_of_network(self.distiller.student)

    def scores_of_network(self, network: nn.Module) -> AnyScores:
        """Return the scores of a network on the test set."""
        return self.tester(network, self.stop.watch(self.test))

    def agree(self, due: bool = False) -> bool:
        """Let a signal that has come to any rank count on all of them. Return whether rank 0 thinks it is `due`."""
        if self.ranks.world > 1:
            self.stop.signal, due = self.ranks.agree(self.stop.asked, due)
        return due

    def share_statistics(self) -> None:
        """Take over rank 0's buffers, such as the running statistics of its normalisations, which count."""
        self.ranks.broadcast([*self.step.buffers(), *(self.average.buffers() if self.average is not None else ())])

    def merge_temperatures(self) -> None:
        """Bring together what all ranks have recorded; what no rank has seen stays NaN."""
        if self.buffer is not None and self.ranks.world > 1 and self.state.done:
            values = self.buffer.values
            values[values.isnan()] = -torch.inf
            self.ranks.largest(values)
            values[values == -torch.inf] = torch.nan

    def score(self, scores: AnyScores) -> dict:
        """Close the epoch with its test scores. Return the test figures of its row."""
        if scores.loss is not None and not math.isfinite(scores.loss):
            self.give_up(f"epoch {self.state.epoch + 1}: the test loss is {scores.loss}; lower SOLVER.LR")
        self.state.end_epoch(scores.score, scores.loss if scores.by_loss else None)
        best = {"best_acc": self.state.best_acc, "best_epoch": self.state.best_epoch}
        return scores.figures | best | ({"best_loss": self.state.best_loss} if scores.by_loss else {})

    def save(self, recorder: Recorder) -> None:
        """Write a checkpoint: an epoch's, or inside an epoch one that goes on at the next step."""
        self.take_generators()
        if self.feed.teacher is not None:
            self.feed.teacher.commit()
        self.merge_temperatures()
        if not self.ranks.first:
            return
        state = self.state
        recorder.flush()
        state.log_bytes = recorder.size
        if state.epoch and not state.done:
            best = state.best_epoch == state.epoch
            self.keeper.save_epoch(state.epoch, best, state.dump(), state.student(), state.averaged())
        else:
            self.keeper.save(state.dump())

    def leave(self, recorder: Recorder) -> NoReturn:
        """Keep what this epoch has done so far, for a run that goes on at the next step."""
        state = self.state
        if self.step.bad_step() >= 0:  # on the device, steps behind it have done nothing
            self.diverged(state.epoch + 1)
        where = f"epoch {state.epoch + 1} after step {state.done} of {len(self.feed)}"
        recorder.log(f"stopped by {self.stop.signal} in {where}")
        self.save(recorder)
        self.ranks.wait()  # torchrun ends the first one soon after the others
        goes_on = "the same command with --resume auto goes on there" if self.options.kept else "folder= would keep it"
        raise self.ranks.said(Preempted(f"stopped by {self.stop.signal} in {where}; {goes_on}"))

    def give_up(self, *lines: str) -> NoReturn:
        raise self.ranks.said(TrainingDiverged(*lines))

    def diverged(self, epoch: int) -> NoReturn:
        """Say what went bad in the step that the device has marked, and keep what runs it again."""
        self.take_generators()
        back = self.step.steps - self.step.bad_step()
        number, random = self.state.done - back, self.random[-back]  # from 0, in this epoch
        batch, logits = self.run_step.batch, self.run_step.logits
        if number != self.state.done - 1 or self.run_step.graph or self.ranks.world > 1:
            # noticed later, when the batch is another; a graph's own tensors are none any more; another rank's is bad
            plan, logits = self.feed.plan(epoch, number)
            batch = self.feed.batches.batch(plan)
        logits = None if logits is None else logits.float()  # of text they may be packed
        set_torch_generators(*random)
        state = dump(self.distiller, batch, epoch, self.options.config, random, logits)
        bad, losses = first_bad_tensor(self.distiller, batch, epoch, self.step.amp, logits)
        file = self.keeper.folder / f"bad_batch,epoch_{epoch},step_{number + 1}"
        again = f"`python3 tools/replay.py '{file}'` runs the step again"
        if not self.options.known:
            again = f"the batch and the weights before it are in {file}"
        try:
            if self.options.kept and self.ranks.first:
                checkpoint.save(state, file)
            elif not self.options.kept:
                again = "folder= keeps the batch and the weights before it"
        except OSError as error:
            again = f"the batch could not be kept: {error}"
        self.give_up(
            f"epoch {epoch}, step {number + 1} of {len(self.feed)}: the loss or its gradient is not finite "
            f"({describe_losses(losses)}); first to go bad: {bad or 'nothing when the step ran again'}",
            f"lower SOLVER.LR (now {self.schedule.at(epoch):g}), or leave such steps out with SOLVER.NAN_POLICY skip; "
            + again,
        )


def __getattr__(name: str) -> object:
    if name in ("BaseTrainer", "CRDTrainer", "DOT"):  # as mdistiller's files import them
        from mdistiller.engine import base_trainer

        return getattr(base_trainer, name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
