"""Conducting a study: teachers first, what is done is left alone, what fails is reported and the rest goes on."""

import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mdistiller import config
from mdistiller.device import resolve_device
from mdistiller.errors import Preempted, UserError
from mdistiller.runs import checkpoint
from mdistiller.runs.environment import device_name
from mdistiller.runs.folder import RunFolder, in_use, resumable
from mdistiller.runs.recorder import read_metrics
from mdistiller.runs.stop import Stop
from mdistiller.study.jobs import Local, LocalJob, Slurm, SlurmJob
from mdistiller.study.plan import PlannedGroup
from mdistiller.study.records import export, read_records, record_of, recorded
from mdistiller.study.runs import Run
from mdistiller.terminal import counted, say

TRIES = 3  # starts in a row that finish no epoch, after which a group whose jobs die has failed
IN_USE = "in use"
PAUSE_SECONDS = 0.2  # between two looks at the jobs
POLL_SECONDS = 2.0  # between two looks at folders in which other processes train


def state(run: Run) -> str:
    """Return what the run's folder holds: missing, half-done, finished, another (run) or in use (by a process)."""
    if in_use(run.folder):
        return IN_USE
    if not resumable(run.folder):
        return "missing"
    try:
        if config.computed(config.read(run.folder / "config.yaml")) != run.settings:
            return "another"
        # the row of an epoch is written before its checkpoint
        found = recorded(run)
        done = found.finished and len(found.rows) == found.epochs
        if done and checkpoint.load(run.folder / "latest").get("epoch") == found.epochs:
            return "finished"
    except (UserError, TypeError):  # training says what is wrong with it
        pass
    return "half-done"


def lost_teachers(groups: Sequence[PlannedGroup], records: Mapping[str, Run]) -> set[str]:
    """Return the labels of teachers that are on record, but whose networks are gone and are needed: they are trained
    again.
    """
    needed = [g.teacher for g in groups if g.teacher and any(run.hash not in records for run in g.runs)]
    return {teacher.label for teacher in needed if teacher.hash in records and state(teacher) != "finished"}


def epoch_seconds(group: PlannedGroup, records: Mapping[str, Run]) -> float | None:
    """Return the seconds that an epoch of one student takes, by the latest run of the group's method and pair with its
    batches and precision on this device: of those whose folders are here, else of those on record; None where there is
    none.
    """

    device = device_name(resolve_device(group.cfg.DEVICE))

    def kind(run: Run) -> tuple:
        return run.cell, *(config.get(run.cfg, key) for key in ("DATASET.TYPE", "SOLVER.BATCH_SIZE", "SOLVER.AMP"))

    for run in (*reversed([recorded(run) for run in group.runs]), *reversed(records.values())):
        if run.rows and kind(run) == kind(group.first) and run.environment.get("device") == device:
            return run.seconds / run.epochs / run.students
    return None


class Running(NamedTuple):
    group: PlannedGroup
    runs: list[Run]
    job: LocalJob | SlurmJob
    epochs: int  # that were finished when it was started


class Conductor:
    """Runs the `groups` of a study by `executor` and exports finished runs to `file`, a runs.jsonl.

    `budget` in seconds: nothing is started that is known to take longer than what is left of it, and what still runs at
    its end is stopped with a checkpoint.
    """

    def __init__(
        self,
        study: str,
        groups: Sequence[PlannedGroup],
        file: Path,
        executor: Local | Slurm,
        budget: float | None = None,
    ):
        self.study, self.groups, self.file, self.executor = study, groups, file, executor
        self.deadline = None if budget is None else time.monotonic() + budget
        self.records = read_records(file)
        self.lost = lost_teachers(groups, self.records)
        self.jobs: list[Running] = []
        self.failed: dict[str, str] = {}  # label of a run -> reason
        self.waiting: dict[str, str] = {}  # label of a run -> what it waits for
        self.tries: Counter[str] = Counter()  # name of a group -> starts in a row that finished no epoch

    def run(self) -> int:
        """Return the exit status: 0 all is done, 1 a run failed, 75 stopped, or something does not fit the budget."""
        try:
            with Stop() as stop:
                return self._run(stop)
        finally:  # none is left, unless something was raised, as by a second Ctrl-C
            for running in self.jobs:
                running.job.stop(at_once=True)

    def _run(self, stop: Stop) -> int:
        while True:
            self._collect()
            over = self.deadline is not None and time.monotonic() > self.deadline
            if stop.signal or over:
                self._halt(f"stopped by {stop.signal}" if stop.signal else "the budget is used up")
                return Preempted.status if self.left() else int(bool(self.failed))
            self._start()
            if not self.jobs and IN_USE not in self.waiting.values():
                return 1 if self.failed else Preempted.status if self.left() else 0
            time.sleep(PAUSE_SECONDS if self.jobs else POLL_SECONDS)

    def is_done(self, run: Run) -> bool:
        """Return whether the run is on record and nothing more is needed of it."""
        return run.hash in self.records and run.label not in self.lost

    def left(self) -> list[Run]:
        """Return the runs that are neither done nor failed."""
        return [run for group in self.groups for run in self._open(group)]

    def _open(self, group: PlannedGroup) -> list[Run]:
        return [run for run in group.runs if not self.is_done(run) and run.label not in self.failed]

    def _start(self) -> None:
        """Start jobs of the first groups that are ready, as many as the executor takes."""
        for group in self.groups:
            if len(self.jobs) >= self.executor.slots:
                return
            todo = [] if any(group is running.group for running in self.jobs) else self._ready(group)
            if todo and not self._launch(group, todo):
                return

    def _ready(self, group: PlannedGroup) -> list[Run]:
        """Return the group's runs that can be started now; what the others wait for is kept in `waiting`."""
        ready, teacher = [], group.teacher
        for run in self._open(group):
            self.waiting.pop(run.label, None)
            if teacher and teacher.label in self.failed:
                self._fail([run], [f"skipped: its teacher {teacher.label} failed"])
            elif teacher and not self.is_done(teacher):
                self.waiting[run.label] = f"its teacher {teacher.label} is not trained"
            elif (found := state(run)) == "finished":
                self._export(group, run)
            elif found == IN_USE:
                self.waiting[run.label] = found
            else:
                if found == "another":  # it is kept, under another name
                    RunFolder(run.folder).close()
                ready.append(run)
        return ready if self.deadline is None else self._fitting(group, ready)

    def _fitting(self, group: PlannedGroup, runs: Sequence[Run]) -> list[Run]:
        """Return those of the runs that take their turns to an end before the deadline, as far as that is known."""
        seconds = epoch_seconds(group, self.records)
        fitting, end = [], time.monotonic()
        for run in runs:
            end += (run.cfg.SOLVER.EPOCHS - len(read_metrics(run.folder))) * (seconds or 0)
            if end <= self.deadline:
                fitting.append(run)
            else:
                self.waiting[run.label] = "does not fit the budget"
        return fitting

    def _launch(self, group: PlannedGroup, runs: list[Run]) -> bool:
        """Return whether there is a job now. One that is refused beside others waits: a queue may be full."""
        seeds = [run.seed for run in runs]
        try:
            job = self.executor.start(group, seeds)
        except UserError as error:
            if not self.jobs:
                self._fail(runs, error.lines)
            return False
        done = [self.is_done(run) for other in self.groups for run in other.runs]
        said = f"seeds {', '.join(map(str, seeds))}; done so far: {sum(done)} of {counted(len(done), 'run')}"
        _say(f"start    {group.name}, {said}")
        self.jobs.append(Running(group, runs, job, _epochs(runs)))
        return True

    def _collect(self, again: bool = True) -> None:
        """Export what ended jobs have finished; under `again` the rest of them is started again, or has failed."""
        for running in [running for running in self.jobs if running.job.ended()]:
            self.jobs.remove(running)
            group, name = running.group, running.group.name
            for run in running.runs:
                if state(run) == "finished":
                    self._export(group, run)
            left = [run for run in running.runs if run in self._open(group)]
            if left and again:
                final, reasons = running.job.outcome()
                self.tries[name] = 0 if _epochs(running.runs) > running.epochs else self.tries[name] + 1
                if final or self.tries[name] >= TRIES:
                    self._fail(left, reasons or ["ended, but its folder does not hold the finished run"])
                else:
                    _say(f"stopped  {name}: {reasons[0]}; it is started again")

    def _halt(self, why: str) -> None:
        """Stop every job with a checkpoint."""
        _say(f"{why}; what runs keeps a checkpoint" if self.jobs else why)
        for running in self.jobs:
            running.job.stop()
        while self.jobs:
            time.sleep(PAUSE_SECONDS)
            self._collect(again=False)

    def _fail(self, runs: Sequence[Run], reasons: Sequence[str]) -> None:
        """Note the runs as failed, each for the line that names its seed, or else the first one."""
        for run in runs:
            own = [line for line in reasons if re.match(rf"seed +{run.seed}\b", line)]
            self.failed[run.label] = (own or list(reasons))[0]
            _say(f"FAILED   {run.label}: {self.failed[run.label]}")

    def _export(self, group: PlannedGroup, run: Run) -> None:
        """Put a finished run on record."""
        try:
            record = record_of(group, run, self.study)
            export(self.file, record)
        except (OSError, UserError, LookupError) as error:
            self._fail([run], [f"finished, but could not be put on record: {error}"])
            return
        self.records = read_records(self.file)
        self.lost.discard(run.label)
        planned, done = run.cfg.SOLVER.EPOCHS, record["epochs"]
        early = f", stopped early at epoch {done} of {planned}" if done < planned else ""
        figures = f"last {record['last']:.2f}, best {record['best']:.2f} @ {record['best_epoch']}"
        _say(f"done     {run.label}: {figures}{early}")


def _epochs(runs: Sequence[Run]) -> int:
    return sum(len(read_metrics(run.folder)) for run in runs)


def _say(text: str) -> None:
    say(f"{time.strftime('%H:%M:%S')} {text}")
