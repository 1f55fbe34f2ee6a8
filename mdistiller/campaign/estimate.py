"""How long runs take and how much disk: from their own epochs, from records of this device, or from a measured step."""

import itertools
import json
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch

from mdistiller.bank.inference import Inference
from mdistiller.bank.pool import choose, expected_distinct_views
from mdistiller.bank.teacher import TeacherLogits, takes_logits
from mdistiller.campaign.ledger import Ledger, state
from mdistiller.campaign.plan import Cell, Trial
from mdistiller.dataset import ImageSet, load_dataset
from mdistiller.device import autocast, resolve_device
from mdistiller.distillers import LogitDistiller, distiller_dict
from mdistiller.engine.build import Workspace, build_distiller, build_trainer
from mdistiller.engine.cfg import load
from mdistiller.errors import UserError
from mdistiller.runs.folder import device_name
from mdistiller.runs.recorder import read_metrics

SIZES = {"cifar100": (50_000, 10_000, 100), "cifar10": (50_000, 10_000, 10)}  # which nothing has to be fetched for
TIMED = 1.0  # seconds of steps


@dataclass(frozen=True)
class Measured:
    step: float  # seconds, of the student alone where the teacher's logits are asked for ahead
    epoch: float  # seconds, with its evaluation and, where no bank keeps its logits, the teacher's passes
    checkpoint: int  # bytes of `latest`
    student: int  # bytes of `student_latest`
    bank: int = 0  # bytes of its teacher's bank
    filling: float = 0.0  # seconds of the passes that fill it


def measure(file: Path, opts: list[str], students: int = 1) -> Measured | str:
    """One cell's step, eager, on its device; a text where it cannot be run. `students`: as many share a bank.

    A teacher that is asked ahead for its logits is measured apart. Where a bank keeps them, its passes are counted once
    for each view that the bank comes to hold, be they made before the first step or as the views come; else they
    belong to every epoch. A bank that lies there already is not looked for.
    """
    try:
        return _measure(file, opts, students)
    except UserError as error:
        return error.lines[0]
    except (RuntimeError, ValueError, OSError) as error:
        return str(error).split("\n")[0]


def _measure(file: Path, opts: list[str], students: int) -> Measured:
    cfg = load(file, [*opts, "SOLVER.STEP", "eager"])
    device = resolve_device(cfg.DEVICE)
    if cfg.DATASET.TYPE in SIZES:
        train, test, classes = SIZES[cfg.DATASET.TYPE]
        few = torch.randint(256, (max(1024, 2 * cfg.SOLVER.BATCH_SIZE), 32, 32, 3), dtype=torch.uint8)
        labels = torch.arange(len(few)) % classes
        data = ImageSet(few, labels, few, labels, classes, (0.5,) * 3, (0.25,) * 3)
    else:
        data = load_dataset(cfg.DATASET.TYPE, cfg.DATASET.ROOT)
        train, test = len(data.train_labels), len(data.test_labels)
    distiller = build_distiller(cfg, data, None, device)
    trainer, _ = build_trainer(cfg, distiller, Workspace(data, device), Path())

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.monotonic()

    def timed(batches: Callable[[], Iterable], work: Callable) -> float:
        """Seconds a batch: after two that warm up, batches until TIMED has passed."""
        endless = itertools.chain.from_iterable(batches() for _ in itertools.count())
        for batch in itertools.islice(endless, 2):
            work(batch)
        begin = wait()
        for count, batch in enumerate(endless, 1):
            work(batch)
            if time.monotonic() - begin > TIMED:
                return (wait() - begin) / count

    ahead = cfg.TEACHER_BANK != "off" and takes_logits(distiller)
    given = torch.randn(cfg.SOLVER.BATCH_SIZE, data.num_classes, device=device) if ahead else None
    distiller.train()
    step = timed(
        lambda: trainer.feed.batches.epoch(1),
        lambda batch: trainer.step(batch, 1, None if given is None else given[: len(batch.target)]),
    )
    distiller.eval()
    with torch.no_grad(), autocast(device, cfg.SOLVER.AMP):
        look = timed(lambda: trainer.test, lambda batch: distiller(image=batch.image))
    epoch = step * -(-train // cfg.SOLVER.BATCH_SIZE) + look * -(-test // cfg.DATASET.TEST.BATCH_SIZE)
    student = sum(value.nbytes for value in distiller.student.state_dict().values())
    bank, filling = 0, 0.0
    if ahead:
        batches, dtype = trainer.feed.batches, getattr(torch, cfg.TEACHER_BANK_DTYPE)
        teacher = TeacherLogits(batches, Inference(distiller.teacher, device, cfg.SOLVER.AMP), dtype)
        parts = batches.row_numbers(batches.plan(1)).split(teacher.chunk)
        seconds = timed(lambda: parts, lambda part: list(teacher.run_teacher(part))) / teacher.chunk  # of a view
        draws = cfg.SOLVER.EPOCHS * students
        mode, _ = choose(cfg.TEACHER_BANK, batches.views, draws, 0.0, device.type == "cuda")
        if mode == "none":
            epoch += train * seconds
        else:
            rows = int(train * expected_distinct_views(batches.views, draws, mode == "full"))
            bank, filling = rows * data.num_classes * dtype.itemsize, rows * seconds
    return Measured(step, epoch, 2 * student, student, bank, filling)  # weights and momenta


class Estimates:
    """Of the trials of a plan. `told`: what has been measured, by the name of the cell."""

    def __init__(self, ledger: Ledger):
        self.ledger = ledger
        self.told: dict[str, Measured] = {}
        self.seen: dict[str, float] = {}  # seconds an epoch, as runs had it
        self.fillers: dict[str, str] = {}  # of a teacher's bank: the first of the cells that share it

    def measure(self, cells: Iterable[Cell]) -> dict[str, str]:
        """Measure a step of each cell in a process of its own, which gives the device back; returns what could not be
        measured, and why.
        """
        wanted = {cell.name: cell for cell in cells if cell.name not in self.told}
        if not wanted:
            return {}
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, context) as pool:
            words = zip(*((c.file, c.opts, len(c.trials)) for c in wanted.values()), strict=True)
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the child inherits: Ctrl-C is not for it
            try:
                values = pool.map(measure, *words)
            finally:
                signal.signal(signal.SIGINT, handler)
            try:
                found = dict(zip(wanted, values, strict=True))
            except BrokenProcessPool:  # killed, by a machine that is out of memory perhaps
                found = dict.fromkeys(wanted, "the process that measures was killed")
        self.told |= {name: value for name, value in found.items() if isinstance(value, Measured)}
        for name, cell in wanted.items():
            if name in self.told and self.told[name].filling:
                self.fillers.setdefault(cell.teacher.name, name)
        return {name: value for name, value in found.items() if isinstance(value, str)}

    def observe(self, cell: Cell, rows: list[dict], students: int = 1) -> None:
        """Take note of how long epochs took, of so many students side by side."""
        if rows:
            self._see(cell, sum(row["epoch_seconds"] for row in rows[-5:]) / len(rows[-5:]) / students)

    def _see(self, cell: Cell, epoch: float) -> None:
        self.seen[cell.name] = epoch
        if cell.teacher and issubclass(distiller_dict[cell.cfg.DISTILLER.TYPE], LogitDistiller):
            self.fillers.setdefault(cell.teacher.name, cell.name)

    def recall(self, cells: Iterable[Cell]) -> None:
        """Take note of what is on record, of this device and as many threads only, or lies in folders."""
        for cell in cells:
            device = resolve_device(cell.cfg.DEVICE)
            here = (device_name(device), torch.get_num_threads() if device.type == "cpu" else None)
            for trial in cell.trials:
                record = self.ledger.records.get(trial.hash)
                if record and here == (record["device"], record.get("threads") if here[1] else None):
                    self._see(cell, record["seconds"] / record["epochs"] / record["students"])
                elif state(trial) == "half-done":
                    self.observe(cell, read_metrics(trial.folder), side_by_side(trial.folder))

    def epoch(self, cell: Cell) -> float | None:
        """Seconds; None where nothing is known."""
        if cell.name in self.seen:
            return self.seen[cell.name]
        return self.told[cell.name].epoch if cell.name in self.told else None

    def left(self, trial: Trial, done: int) -> float | None:
        """Seconds for all but `done` epochs."""
        epoch = self.epoch(trial.cell)
        return None if epoch is None else epoch * (trial.epochs - done)

    def filling(self, cell: Cell) -> float:
        """Seconds that its students wait for passes which fill their teacher's bank. Once it has had epochs, they are
        in those.
        """
        fills = cell.teacher and self.fillers.get(cell.teacher.name) == cell.name and cell.name not in self.seen
        return self.told[cell.name].filling if fills else 0.0

    def banks(self, cells: Iterable[Cell]) -> int:
        """Bytes of all teachers' banks together, as far as cells have been measured."""
        largest: dict[str, int] = {}
        for cell in cells:
            if cell.teacher and cell.name in self.told:
                name = cell.teacher.name
                largest[name] = max(largest.get(name, 0), self.told[cell.name].bank)
        return sum(largest.values())

    def disk(self, trial: Trial) -> int | None:
        """Bytes of a whole run's folder: `latest`, the one before, the best, and every epoch_N."""
        measured = self.told.get(trial.cell.name)
        if measured is None:
            return None
        kept = trial.epochs // trial.cfg.LOG.SAVE_CHECKPOINT_FREQ
        return (3 + kept) * measured.checkpoint + (2 + kept) * measured.student


def side_by_side(folder: Path) -> int:
    """How many students its latest process has trained in turn."""
    try:
        return json.loads((folder / "environment.json").read_text())["sessions"][-1].get("students", 1)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):  # the estimate is rougher without
        return 1
