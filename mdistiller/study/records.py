"""A study's runs.jsonl: one line a finished run, exported from its folder, which may be gone since."""

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

from mdistiller import config
from mdistiller.errors import UserError
from mdistiller.files import FileLock, write_atomic
from mdistiller.runs import checkpoint
from mdistiller.runs.recorder import read_metrics
from mdistiller.study.plan import PlannedGroup
from mdistiller.study.runs import Run, complete, read_environment

VERSIONS = ("mdistiller", "python", "torch", "numpy", "cuda", "cudnn")


def read_records(file: Path) -> dict[str, Run]:
    """Return {hash: run} of the lines of `file`, in their order; nothing where there is no file.

    The hash is computed anew, so that a key of the configuration which was added since has its default. Raises
    UserError that names a line which is no record.
    """
    return {run.hash: run for _, run in _lines(file)}


def _lines(file: Path) -> list[tuple[str, Run]]:
    found = []
    try:
        lines = file.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); give another folder for results") from None
    for number, line in enumerate(lines, 1):
        try:
            found.append((line, run_of(json.loads(line))))
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            raise UserError(f"{file}, line {number}: is no record of a run; mend or remove that line") from None
    return found


def run_of(record: Mapping) -> Run:
    """Return the run of a line: of each epoch the accuracy and, evenly spread, the time are known.

    Raises KeyError, TypeError, ValueError or AttributeError where the line is no record.
    """
    teacher, curve, digests = record["teacher"], record["curve"], dict(record["sha256"])
    taught_by = None
    if teacher:
        digests["teacher"] = teacher["sha256"]
        taught_by = config.computed(teacher["config"])
    if not 0 < len(curve) == record["epochs"]:
        raise ValueError
    seconds = record["seconds"] / len(curve)
    rows = [
        {"epoch": n, "test_acc": acc, "best_acc": best, "best_epoch": curve.index(best) + 1, "epoch_seconds": seconds}
        for n, (acc, best) in enumerate(zip(curve, accumulate(curve, max), strict=True), 1)
    ]
    sessions = [{"git": commit, "students": record["students"], "epoch": 0} for commit in record["git"] or [None]]
    environment = {**record["versions"], "device": record["device"], "threads": record.get("threads")}
    environment |= {"sha256": digests, "sessions": sessions}
    folder = Path(f"{record['cell']},seed{record['seed']}")
    return Run(folder, complete(record["config"]), rows, environment, taught_by, record["plan"])


def recorded(run: Run) -> Run:
    """Return the planned `run` with what its folder holds by now."""
    return replace(run, rows=read_metrics(run.folder), environment=read_environment(run.folder))


def record_of(group: PlannedGroup, run: Run, study: str) -> dict:
    """Return the line of a finished run of the group, from its folder. Raises UserError, OSError where that lacks its
    student.
    """
    run, teacher = recorded(run), group.teacher
    digests, last = run.environment.get("sha256", {}), run.rows[-1]
    student = checkpoint.digest(checkpoint.load(run.student_file)["model"])
    sources = {"data": digests.get("data", "unknown"), "student": student}
    if run.taught and not teacher:  # by weights that the plan has not trained
        sources["teacher"] = digests.get("teacher", "unknown")
    return {
        "plan": study,
        "cell": run.cell,
        "seed": run.seed,
        "last": last["test_acc"],
        "best": last["best_acc"],
        "best_epoch": last["best_epoch"],
        "epochs": run.epochs,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": round(run.seconds, 2),
        "students": round(run.students, 2),  # side by side, on average: these shared the seconds
        "device": run.environment.get("device", "unknown"),
        "threads": run.environment.get("threads"),
        "versions": {key: run.environment.get(key, "unknown") for key in VERSIONS},
        "git": run.commits,
        "sha256": sources,
        "config": run.settings,
        "teacher": teacher and {
            "run": teacher.label, "sha256": digests.get("teacher", "unknown"), "config": teacher.settings,
        },
        "curve": [row["test_acc"] for row in run.rows],
    }  # fmt: skip


def export(file: Path, record: dict) -> None:
    """Write `record` into `file`, in place of the line of the same run or behind the others, which stay as they are."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file.with_name(f".{file.name}.lock"), wait=True)
    try:
        lines = {run.hash: line for line, run in _lines(file)} | {run_of(record).hash: json.dumps(record)}
        write_atomic(file, "".join(line + "\n" for line in lines.values()).encode())
    finally:
        lock.close()
