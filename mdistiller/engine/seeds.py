"""Several students of one configuration side by side in one process, each with its own seed, order and folder."""

import contextlib
import json
import statistics
from collections.abc import Iterable, Sequence
from numbers import Integral
from pathlib import Path

from yacs.config import CfgNode

from mdistiller.config import needs_teacher, teacher_names
from mdistiller.device import OwnGenerators, resolve_device, side_stream
from mdistiller.engine.build import Workspace
from mdistiller.engine.ranks import here
from mdistiller.engine.run import OpenRun, RunRequest, entered, failures, open_workspace
from mdistiller.engine.trainer import Trainer
from mdistiller.errors import FolderInUse, Preempted, RunFailed, TrainingDiverged, UserError
from mdistiller.files import write_atomic
from mdistiller.runs import checkpoint
from mdistiller.runs.folder import check_writable, in_use, resumable, run_folder
from mdistiller.terminal import counted, say

# torch has 32 streams, which it gives out again and again: two students on one would wait for each other, and one on
# the stream of the teacher's graph would share its workspace
MOST_ON_CUDA = 24


def seeds_of(seeds: int | Iterable[int] | None) -> list[int] | None:
    """Return the seeds as a list, None for SEED's alone. Raises UserError for what are no seeds."""
    if seeds is None:
        return None
    numbers = [seeds] if isinstance(seeds, int) or not isinstance(seeds, Iterable) else list(seeds)
    whole = all(isinstance(seed, Integral) and not isinstance(seed, bool) and 0 <= seed < 2**32 for seed in numbers)
    if not (numbers and whole and len({*numbers}) == len(numbers)):
        raise UserError(f"seeds: must be different whole numbers from 0, such as [0, 1, 2] or range(3); got {seeds!r}")
    return [int(seed) for seed in numbers]


def of_seed(cfg: CfgNode, seed: int) -> CfgNode:
    """Return the configuration of one student of a set."""
    own = cfg.clone()
    own.defrost()
    own.merge_from_list(["SEED", seed])
    if any(key == "EXPERIMENT.NAME" for key, _ in own.overrides):  # a name stands alone, and each needs its own
        own.EXPERIMENT.NAME += f"+SEED:{seed}"
    own.freeze()
    return own


def train_seeds(
    cfg: CfgNode, seeds: Sequence[int], resume: bool | str = False, workspace: Workspace | None = None
) -> dict:
    """Train a student for each of `seeds`; every one is what `train` makes of `cfg` with that SEED.

    They share the images, the teacher and its bank, and take turns, a step each; on CUDA each on a stream of its own.
    A loss that is no longer finite ends that student alone. Returns the summary that is written beside the runs'
    folders, with each run's "history" and "student". `resume`, `workspace`: as for `train`. Raises as `train` does;
    RunFailed at the end if a student was lost.
    """
    if cfg.LOG.WANDB:
        raise UserError(
            "--seeds: Weights & Biases takes one run of a process; set LOG.WANDB False, or run seed by seed"
        )
    if len(seeds) > MOST_ON_CUDA and resolve_device(cfg.DEVICE).type == "cuda":
        raise UserError(
            f"--seeds: {len(seeds)} students are too many side by side on CUDA; give {MOST_ON_CUDA} at a time, such as "
            f"--seeds 0-{MOST_ON_CUDA - 1}"
        )
    if (world := here().world) > 1:
        raise UserError(f"--seeds: {world} processes train one student together; set SEED in its place, run by run")
    width = max(len(str(seed)) for seed in seeds)
    requests = []
    for row, seed in enumerate(seeds):
        requests.append(RunRequest(of_seed(cfg, seed), f"seed {seed:>{width}}  ", row))
    missing = [str(r.cfg.SEED) for r in requests if resume is True and not resumable(r.path)]
    if missing:
        raise UserError(
            f"--resume: there is no run of seed {', '.join(missing)} in {requests[0].path.parent}; --resume auto "
            "starts what is missing and goes on with the others"
        )
    for request in requests:
        request.check(resume, workspace)
        if request.path.is_dir() and in_use(request.path):  # before the first of them is touched
            raise FolderInUse(f"{request.path}: another process trains there; wait for it, or leave that seed out")
    file = summary_file(cfg, seeds)
    check_writable(file, "LOG.PREFIX")
    workspace = workspace or open_workspace(cfg, len(seeds))
    for request in requests:
        request.find_teacher(resume, workspace)
        workspace.teachers.files.append(request.teacher_file)

    with failures(cfg, workspace.kept), entered(workspace) as closing:
        students = [Student(request, resume, workspace, closing) for request in requests]
        for student in students:
            student.start()
        take_turns(students, workspace)
        summary = summarise(cfg, students)
        write_atomic(file, json.dumps(summary, indent=2).encode() + b"\n")
    for line in table(summary):
        say(line)
    if workspace.kept:
        say(f"summary: {file}")
    lost = [student for student in students if isinstance(student.error, TrainingDiverged)]
    if lost:
        raise RunFailed(*(f"{student.label.strip()}: {line}" for student in lost for line in student.error.lines))
    for run, student in zip(summary["runs"], students, strict=True):
        run |= student.run.outcome()
    return summary


class Student:
    """One of the set; it has the generators' states as they would be if it were alone."""

    def __init__(self, request: RunRequest, resume: bool | str, workspace: Workspace, closing: contextlib.ExitStack):
        self.seed, self.label, self.folder = request.cfg.SEED, request.label, request.path
        self.result: dict | None = None
        self.error: UserError | None = None
        self.run = OpenRun(request, resume, workspace, closing)
        self.trainer: Trainer = self.run.trainer
        self.trainer.take_generators = OwnGenerators().take
        self.teachers = workspace.teachers
        self.stream = side_stream(workspace.device)

    def start(self) -> None:
        self.steps = self.trainer.steps(self.run.start())

    @property
    def training(self) -> bool:
        return self.result is None and self.error is None

    def advance(self) -> None:
        """Do one training step, and what is due after it."""
        try:
            with self.stream:
                next(self.steps)
                self.share_teacher()
        except StopIteration as end:
            self.result = end.value
        except (Preempted, TrainingDiverged) as error:
            self.error = error

    def share_teacher(self) -> None:
        """Share the teacher's memory after the first step, which tells whether the method writes to its teacher."""
        teachers, self.teachers = self.teachers, None
        frozen = self.trainer.state.teacher
        if teachers is not None and frozen:
            teachers.tie(frozen.model, self.trainer.keeper.origin["teacher"])
            frozen.shared = True


def take_turns(students: Sequence[Student], workspace: Workspace) -> None:
    """Train the students, a step each in turn. Raises Preempted where a signal has stopped them, with all kept."""
    with workspace.stop:
        while any(student.training for student in students):
            for student in students:
                if student.training:
                    student.advance()
                    if isinstance(student.error, TrainingDiverged):
                        say(f"{student.label}is lost: {student.error.lines[0]}")
    stopped = [student for student in students if isinstance(student.error, Preempted)]
    if stopped:
        goes_on = "the same command with --resume auto goes on there" if workspace.kept else "folder= would keep them"
        raise Preempted(
            f"stopped by {workspace.stop.signal}: {len(stopped)} of {counted(len(students), 'student')} not done; "
            f"{goes_on}"
        )


def summary_file(cfg: CfgNode, seeds: Sequence[int]) -> Path:
    """Return the path NAME-or-TAG[+overrides]+SEED:0,1,2.json, beside the runs' folders; longer ranges as 0-99."""
    folder = run_folder(cfg)
    parts: list[list[int]] = []
    for seed in seeds:
        if parts and seed == parts[-1][-1] + 1:
            parts[-1].append(seed)
        else:
            parts.append([seed])
    texts = [f"{part[0]}-{part[-1]}" if len(part) > 3 else ",".join(map(str, part)) for part in parts]
    text = ",".join(texts)
    if len(folder.name.encode()) + len(text) > 235:
        text = f"{len(seeds)}-seeds-{checkpoint.digest(list(seeds))[:8]}"
    return folder.with_name(f"{folder.name}+SEED:{text}.json")


def summarise(cfg: CfgNode, students: Sequence[Student]) -> dict:
    """Return the configuration in short, each student's result, and mean and deviation (n - 1) of last and best, in
    percent, over those that came to the end.
    """
    runs = []
    for student in students:
        run = {"seed": student.seed, "folder": str(student.folder), **student.trainer.result()}
        runs.append(run | ({"error": student.error.lines[0]} if student.error else {}))
    done = [run for run in runs if "error" not in run]
    return {
        "method": cfg.DISTILLER.TYPE,
        "teacher": "+".join(teacher_names(cfg)) if needs_teacher(cfg.DISTILLER.TYPE) else None,
        "student": cfg.DISTILLER.STUDENT,
        "dataset": cfg.DATASET.TYPE,
        "epochs": cfg.SOLVER.EPOCHS,
        "seeds": [run["seed"] for run in runs],
        "last": spread([run["last_acc"] for run in done]),
        "best": spread([run["best_acc"] for run in done]),
        "runs": runs,
    }


def spread(values: Sequence[float]) -> dict[str, float | int | None]:
    """Return n, mean and sample standard deviation; None where there are too few."""
    return {
        "n": len(values),
        "mean": statistics.fmean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
    }


def table(summary: dict) -> list[str]:
    """Return a line for each student, and one for all."""
    lines = [f"{'seed':<10}{'last':>14}{'best':>14}{'best epoch':>13}"]
    for run in summary["runs"]:
        if "error" in run:
            lines.append(f"{run['seed']:<10}{'lost in epoch ' + str(run['epochs'] + 1):>28}")
        else:
            early = f"  stopped early at epoch {run['epochs']}" if run["stopped_early"] else ""
            figures = f"{run['last_acc']:>14.2f}{run['best_acc']:>14.2f}{run['best_epoch']:>13}"
            lines.append(f"{run['seed']:<10}{figures}{early}")
    cells = []
    for key in ("last", "best"):
        mean, std = summary[key]["mean"], summary[key]["std"]
        cells.append("-" if mean is None else f"{mean:.2f}" if std is None else f"{mean:.2f} ± {std:.2f}")
    return [*lines, f"{'mean ± sd':<10}{cells[0]:>14}{cells[1]:>14}{'n = ' + str(summary['last']['n']):>13}"]
