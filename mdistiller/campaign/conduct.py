"""Running a plan: teachers before their students, what is done left alone, what fails reported, nothing lost."""

import contextlib
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mdistiller.campaign import ledger as book
from mdistiller.campaign import worker
from mdistiller.campaign.estimate import Estimates, side_by_side
from mdistiller.campaign.executors import Executor, Job
from mdistiller.campaign.ledger import Ledger
from mdistiller.campaign.plan import Cell, Trial
from mdistiller.errors import FolderInUse, Preempted, UserError
from mdistiller.runs import journal
from mdistiller.runs.folder import RunFolder, in_use
from mdistiller.runs.recorder import read_metrics
from mdistiller.runs.stop import Stop

PAUSE = 0.2  # seconds between two looks at the jobs
LOOK = 2.0  # ... at what another process trains
RETRY = 30.0  # ... until a job that was refused beside others is tried again
STARTING = 20.0  # seconds that a job takes to its first step: imports, images, teacher, what the steps warm up
DEATHS = 3  # from outside, in a row and without a step, after which a trial is started again
STATUSES = ("done", "running", "waiting", "in use", "failed", "blocked")  # blocked: its teacher failed


@dataclass
class Progress:
    """How far a trial has come."""

    trial: Trial
    status: str = "waiting"  # one of STATUSES
    reason: str = ""
    rows: list[dict] = field(default_factory=list)
    active: bool = False  # whether a process is at it: ours, which may have other seeds to see to, or another's
    alone: bool = False  # whether its job is to have no other: one with others failed, and it may be their fault
    again: bool = False  # on record, but its network is gone and is needed
    deaths: int = 0  # from outside, since its last step
    changed: float = 0.0  # when its last row came, by the monotonic clock
    stamp: int = 0  # of the file that holds them

    @property
    def epochs(self) -> int:
        """That are finished."""
        return self.rows[-1]["epoch"] if self.rows else 0

    def look(self) -> None:
        """Read the rows, if there are new ones."""
        try:
            stamp = (self.trial.folder / "metrics.jsonl").stat().st_mtime_ns
        except OSError:
            stamp = 0
        if stamp != self.stamp:
            self.rows, self.stamp, self.changed = read_metrics(self.trial.folder), stamp, time.monotonic()


@dataclass
class Running:
    """A job and the trials that it is to train."""

    job: Job
    cell: Cell
    trials: list[Trial]
    marks: dict[str, int]  # when each of their checkpoints was written


class View(Protocol):
    """Shows what happens; entered while a campaign runs."""

    def say(self, text: str) -> None: ...

    def update(self, campaign: "Campaign") -> None: ...


class Campaign:
    """Runs `cells` of the plan `name` by `executor`. `deadline`, on the monotonic clock: nothing is started that would
    not be done by then, and what still runs then is stopped with a checkpoint.
    """

    def __init__(
        self,
        name: str,
        cells: Sequence[Cell],
        ledger: Ledger,
        executor: Executor,
        estimates: Estimates,
        view: View,
        deadline: float | None = None,
    ):
        self.name, self.cells, self.ledger, self.executor = name, cells, ledger, executor
        self.estimates, self.view, self.deadline = estimates, view, deadline
        self.budget = None if deadline is None else deadline - time.monotonic()
        self.jobs: list[Running] = []
        self.progress = {trial.name: Progress(trial) for cell in cells for trial in cell.trials}
        self._looked: dict[str, float] = {}
        self._refused = -RETRY  # when a job last was
        self._sweep()

    def run(self) -> int:
        """Returns the exit status: 0 all is done, 1 a run failed and nothing is left that the same command would start,
        75 something else is left to do.
        """
        with Stop() as stop, self.view:
            try:
                while True:
                    self._collect()
                    over = self.deadline is not None and time.monotonic() > self.deadline
                    if stop.signal or (over and (self.jobs or self.count("in use"))):
                        self._halt(f"stopped by {stop.signal}" if stop.signal else "the budget is used up")
                        break
                    self._start()
                    self.view.update(self)
                    if not self.jobs and not self.count("in use"):
                        break
                    time.sleep(PAUSE)
            except BaseException:  # a second Ctrl-C among them
                for running in self.jobs:
                    running.job.stop(at_once=True)
                raise
        failed, left = self.count("failed", "blocked"), self.count("waiting", "in use")
        if failed and not any(map(self._startable, self.progress.values())):
            return 1
        return Preempted.status if left else 0

    def _startable(self, p: Progress) -> bool:
        """Whether the same command would get to it, within a budget of its own."""
        teacher = self.progress[p.trial.cell.teacher.name] if p.trial.cell.teacher else None
        if p.status not in ("waiting", "in use") or (teacher and teacher.status in ("failed", "blocked")):
            return False
        if teacher and teacher.status != "done":
            return self._startable(teacher)
        left = self.left(p)
        return self.budget is None or (left is not None and STARTING + left <= self.budget)

    def count(self, *statuses: str) -> int:
        return sum(p.status in statuses for p in self.progress.values())

    def summary(self) -> str:
        counts = Counter(p.status for p in self.progress.values())
        return ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])

    def left(self, p: Progress) -> float | None:
        """Seconds that the trial will take; for a cell that nothing is known of, as long as the mean of the others'
        epochs. None where nothing is known at all.
        """
        epoch = self.estimates.epoch(p.trial.cell)
        if epoch is None and self.estimates.seen:
            epoch = sum(self.estimates.seen.values()) / len(self.estimates.seen)
        if epoch is None:
            return None
        inside = min(time.monotonic() - p.changed, epoch) if p.active and p.rows else 0
        return max(epoch * (p.trial.epochs - p.epochs) - inside, 0)

    def job_left(self, p: Progress) -> float | None:
        """Seconds until the trial is done, of which the others of its job take their turns."""
        names = next((r.trials for r in self.jobs if p.trial in r.trials), [p.trial])
        parts = [self.left(self.progress[trial.name]) for trial in names]
        return None if None in parts else sum(parts)

    def total_left(self) -> float | None:
        """Seconds that all the rest will take, one after the other."""
        open_ = [p for p in self.progress.values() if p.status in ("waiting", "running", "in use")]
        parts = [self.left(p) for p in open_]
        parts += [self.estimates.filling(cell) for cell in {p.trial.cell.name: p.trial.cell for p in open_}.values()]
        return None if None in parts else sum(parts)

    def _sweep(self) -> None:
        """What is done already. A teacher on record whose network is gone is trained again, if it is still needed."""
        for p in self.progress.values():
            if p.trial.hash in self.ledger.records:
                p.status, p.reason = "done", "on record"
            elif book.state(p.trial) in ("half-done", "finished"):
                p.look()
        for name in lost_teachers(self.cells, self.ledger):
            self.progress[name].status, self.progress[name].again = "waiting", True

    def _open(self, cell: Cell) -> list[Progress]:
        found = [self.progress[trial.name] for trial in cell.trials]
        return [p for p in found if p.status in ("waiting", "in use")]

    def _start(self) -> None:
        """Jobs for the first cells that are ready, as many as the executor takes."""
        if self.jobs and time.monotonic() - self._refused < RETRY:
            return
        for cell in self.cells:
            if len(self.jobs) >= self.executor.slots:
                return
            todo = [] if any(running.cell is cell for running in self.jobs) else self._ready(cell)
            todo = self._fitting(todo[:1] if any(p.alone for p in todo) else todo)
            if todo and not self._launch(cell, todo) and self.jobs:
                return

    def _launch(self, cell: Cell, todo: Sequence[Progress]) -> bool:
        """Whether there is a job now. Where it is refused beside others, a queue may be full, and have room later."""
        trials = [p.trial for p in todo]
        marks = {trial.name: _mark(trial) for trial in trials}
        try:
            job = self.executor.start(cell, trials)
        except UserError as error:
            self._refused = time.monotonic()
            for p in todo:
                p.reason = error.lines[0]
                if not self.jobs:
                    self._fail(p, p.reason)
            return False
        for p in todo:
            p.status, p.reason = "running", ""
        self.view.say(f"start    {cell.name}, seed{'s' * (len(todo) > 1)} {', '.join(str(t.seed) for t in trials)}")
        self.jobs.append(Running(job, cell, trials, marks))
        return True

    def _fail(self, p: Progress, why: str) -> None:
        p.status, p.reason, p.active = "failed", why, False
        self.view.say(f"FAILED   {p.trial.name}: {why}")

    def _ready(self, cell: Cell) -> list[Progress]:
        """Trials of the cell that can be started now."""
        todo, teacher = self._open(cell), self.progress[cell.teacher.name] if cell.teacher else None
        if not todo or time.monotonic() - self._looked.get(cell.name, -LOOK) < LOOK:
            return []
        if teacher and teacher.status != "done":
            lost, name = teacher.status in ("failed", "blocked"), teacher.trial.name
            why = f"its teacher {name} is not trained" + f": {teacher.reason}" * bool(teacher.reason)
            for p in todo:
                p.status, p.reason = ("blocked", f"its teacher {name} failed") if lost else (p.status, why)
            return []
        ready = []
        for p in todo:
            p.status, p.reason, p.active, state = "waiting", "", False, book.state(p.trial)
            if state == "finished":
                self._keep(p)
            elif p.trial.hash in self.ledger.records and not p.again:  # another campaign's work
                p.status, p.reason = "done", "on record"
            elif state == "in use":
                self._wait_for(p)
            else:
                if state == "another":  # it is kept, under another name
                    with contextlib.suppress(FolderInUse):  # since a moment: the worker will tell
                        RunFolder(p.trial.folder).close()
                ready.append(p)
        return ready

    def _wait_for(self, p: Progress) -> None:
        p.status, p.reason, p.active = "in use", "another process trains it", True
        self._looked[p.trial.cell.name] = time.monotonic()

    def _fitting(self, todo: Sequence[Progress]) -> list[Progress]:
        """As many of them as would be done before the deadline together, those first that have come furthest."""
        if self.deadline is None or not todo:
            return list(todo)
        fitting, end = [], time.monotonic() + STARTING + self.estimates.filling(todo[0].trial.cell)
        for p in sorted(todo, key=lambda p: -p.epochs):
            needed = self.left(p)
            if needed is None:
                p.reason = "its time is not known"
                continue
            end += needed
            if end > self.deadline:
                p.reason = "does not fit the budget"
            else:
                fitting.append(p)
        return sorted(fitting, key=lambda p: p.trial.seed)

    def _keep(self, p: Progress) -> None:
        """A finished trial goes on record."""
        p.look()
        p.active = False
        try:
            self.ledger.append(book.record_of(p.trial, self.name))
        except (OSError, ValueError, LookupError, TypeError, UserError) as error:
            self._fail(p, f"finished, but could not be put on record: {error}")
            return
        p.status, p.reason, p.again = "done", "", False
        row = p.rows[-1]
        self.view.say(
            f"done     {p.trial.name}: last {row['test_acc']:.2f}, best {row['best_acc']:.2f} @ {row['best_epoch']}"
        )

    def _collect(self) -> None:
        """How far the jobs have come, and what has become of those that ended."""
        for p in self.progress.values():
            if p.status == "in use":
                p.look()
                if p.rows and self.estimates.epoch(p.trial.cell) is None:
                    self.estimates.observe(p.trial.cell, p.rows, side_by_side(p.trial.folder))
        for running in list(self.jobs):
            status = running.job.poll()  # before the look: what it has written by then is seen
            for trial in running.trials:
                p = self.progress[trial.name]
                p.look()
                p.active = trial.folder.is_dir() and in_use(trial.folder)
                self.estimates.observe(trial.cell, p.rows, len(running.trials))
                if p.status == "running" and p.epochs == trial.epochs and book.state(trial) == "finished":
                    self._keep(p)
            if status is not None:
                self.jobs.remove(running)
                self._judge(running, status)

    def _judge(self, running: Running, status: int) -> None:
        """What the trials that an ended job has left unfinished come to."""
        came_on = any(_mark(trial) != running.marks[trial.name] for trial in running.trials)
        outside, several = status < 0 or status == Preempted.status, len(running.trials) > 1
        complaints = running.job.complaints()
        for p in (self.progress[trial.name] for trial in running.trials):
            if p.status != "running":
                continue
            p.deaths = p.deaths + 1 if outside and not came_on else 0
            if p.active or status == worker.IN_USE:  # one of them, perhaps: soon each is looked at by itself
                self._wait_for(p)
            elif outside and p.deaths <= DEATHS:
                p.status = "waiting"
                self.view.say(f"stopped  {p.trial.name}; it is started again")
            elif status == 0:
                self._fail(p, book.shortcoming(p.trial))
            elif several and not _own(complaints, p.trial.seed):
                p.status, p.alone, p.deaths = "waiting", True, 0
                self.view.say(f"stopped  {p.trial.name}; it is started again alone: {_reason(complaints, status)}")
            else:
                self._fail(p, _own(complaints, p.trial.seed) or _reason(complaints, status))

    def _halt(self, why: str) -> None:
        """Every job keeps a checkpoint and ends."""
        self.view.say(why + "; what runs keeps a checkpoint" * bool(self.jobs))
        for running in self.jobs:
            running.job.stop()
        while self.jobs:
            for running in [running for running in self.jobs if running.job.poll() is not None]:
                self.jobs.remove(running)
                for p in (self.progress[trial.name] for trial in running.trials):
                    p.look()
                    if p.status == "running":
                        p.status, p.active = "waiting", False
                        if book.state(p.trial) == "finished":
                            self._keep(p)
            self.view.update(self)
            time.sleep(PAUSE)


def lost_teachers(cells: Sequence[Cell], ledger: Ledger) -> set[str]:
    """Names of teachers that are on record, but whose networks are gone and are needed: they are trained again."""
    needed = {
        c.teacher.name: c.teacher for c in cells if c.teacher and any(t.hash not in ledger.records for t in c.trials)
    }
    records = ledger.records
    return {n for n, t in needed.items() if t.hash in records and not book.has_weights(t, records[t.hash])}


def _mark(trial: Trial) -> list[int]:
    """Changes with every step that the trial keeps."""
    marks = []
    for name in ("latest", *journal.NAMES):
        with contextlib.suppress(OSError):
            marks.append((trial.folder / name).stat().st_mtime_ns)
    return marks


def _own(complaints: str, seed: int) -> str:
    """The line about the seed; empty where there is none."""
    return next(iter(re.findall(rf"^error: (seed +{seed}\b.*)", complaints, re.M)), "")


def _reason(complaints: str, status: int) -> str:
    """The first line that names an error, else how the job ended and its last line."""
    lines = [line.strip() for line in complaints.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:
        return errors[0]
    ended = f"ended by signal {-status}" if status < 0 else f"exit status {status}"
    return f"{ended}; {lines[-1]}" if lines and status > 0 else ended
