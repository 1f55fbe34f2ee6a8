"""results/runs.jsonl: one line a finished run, appended, synced, never twice; and what a finished run's line holds."""

import contextlib
import fcntl
import json
import math
import os
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from mdistiller import config
from mdistiller.campaign.identity import computing, identity, tree_of
from mdistiller.campaign.plan import Trial
from mdistiller.dataset import load_dataset
from mdistiller.errors import UserError
from mdistiller.files import sync_folder
from mdistiller.runs import checkpoint
from mdistiller.runs.folder import in_use, resumable
from mdistiller.runs.recorder import read_metrics

NEEDED = {  # key of a record: its kind
    "plan": str, "cell": str, "seed": int, "config": dict, "teacher": (dict, type(None)), "epochs": int, "curve": list,
    "last": (int, float), "best": (int, float), "seconds": (int, float), "students": (int, float), "device": str,
    "versions": dict, "git": list, "sha256": dict,
}  # fmt: skip


class Ledger:
    """The finished runs in `path`, by their hash. Several campaigns may share the file."""

    def __init__(self, path: Path):
        self.path = path
        self._stamp = None
        self._records: dict[str, dict] = {}

    @property
    def records(self) -> dict[str, dict]:
        """{hash: record}, in the order of the file. The hash is computed anew: a key of the configuration that was
        added since has its default. Raises UserError that names a line which is no record.
        """
        try:
            status = os.stat(self.path)
            if self._stamp == (status.st_size, status.st_mtime_ns):
                return self._records
            data = self.path.read_bytes()
        except FileNotFoundError:
            return {}
        except NotADirectoryError:
            raise UserError(f"{self.path}: lies in no folder; give a folder for results") from None
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be read ({error.strerror}); give another folder for results"
            ) from None
        self._records = {}
        for number, line in enumerate(_whole(data).decode(errors="replace").split("\n"), 1):
            if line.strip():
                record = _parse(line)
                if record is None:
                    raise UserError(f"{self.path}, line {number}: is no record of a run; mend or remove that line")
                self._records.setdefault(hash_of(record), record)
        self._stamp = (status.st_size, status.st_mtime_ns)
        return self._records

    def append(self, record: dict) -> bool:
        """Add `record`, unless its run is there; returns whether it was added. What a crash has left of a line goes."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            data = file.read()
            kept = _whole(data)
            if len(kept) < len(data):
                file.truncate(len(kept))
            if hash_of(record) in self.records:
                return False
            begin = b"\n" * bool(kept and not kept.endswith(b"\n"))
            file.write(begin + json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self.path.parent)
        return True


def _whole(data: bytes) -> bytes:
    """`data` without a last line that was cut short; one that lacks nothing but its end stays."""
    end = data.rfind(b"\n") + 1
    return data if _parse(data[end:].decode(errors="replace")) else data[:end]


def _parse(line: str) -> dict | None:
    with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError, AttributeError):
        record = json.loads(line)
        if _is_sound(record) and hash_of(record):
            return record
    return None


def _is_sound(record: dict) -> bool:
    """Whether it has all that tables are made of. Raises KeyError, TypeError where it has not."""
    teacher = record["teacher"] or {"run": "", "sha256": "", "config": {}}
    texts = [teacher["run"], teacher["sha256"], *(record["sha256"][key] for key in ("data", "student"))]
    texts += [record["versions"]["torch"], *(commit["commit"] for commit in record["git"] if commit)]
    numbers = [record["last"], record["best"], record["seconds"], *record["curve"]]
    return (
        all(isinstance(record[key], kind) for key, kind in NEEDED.items())
        and all(isinstance(text, str) for text in texts)
        and all(isinstance(commit["clean"], bool) for commit in record["git"] if commit)
        and all(map(math.isfinite, numbers))
        and record["students"] > 0
        and record["epochs"] > 0
        and not any(config.misfit(tree_of(settings)) for settings in (record["config"], teacher["config"]))
    )


def hash_of(record: dict) -> str:
    """As of today's configuration."""
    return identity(*settings_of(record))


def settings_of(record: dict) -> tuple[dict, dict | None]:
    """What the run computes, and its teacher's run."""
    teacher = record["teacher"]
    return computing(record["config"]), computing(teacher["config"]) if teacher else None


def state(trial: Trial) -> str:
    """Of the trial's folder: missing, half-done, finished, another (it holds another run) or in use (a process trains
    there).
    """
    if not os.path.isdir(trial.folder):
        return "missing"
    if in_use(trial.folder):
        return "in use"
    if not resumable(trial.folder):
        return "missing"
    if not _is_this(trial):
        return "another"
    return "finished" if is_finished(trial) else "half-done"


def is_finished(trial: Trial) -> bool:
    """Whether its last epoch is kept: the row of an epoch is written before its checkpoint."""
    if not (trial.folder / "latest").exists() or len(read_metrics(trial.folder)) != trial.epochs:
        return False
    try:
        return checkpoint.load(trial.folder / "latest").get("epoch") == trial.epochs
    except UserError:
        return False


def shortcoming(trial: Trial) -> str:
    """Why a run that has come to its end is not `finished`, and what to do."""
    rows = len(read_metrics(trial.folder))
    again = "remove that folder, and the same command trains it again"
    aside = "the same command keeps it under another name and trains this one"
    if not _has_settings(trial):
        return f"{trial.folder}: holds another run; {aside}"
    if not _has_teacher(trial):
        return f"{trial.folder}: was taught by other weights than {trial.cell.teacher.weights} has now; {aside}"
    if rows != trial.epochs:
        return f"{trial.folder / 'metrics.jsonl'}: has {rows} of {trial.epochs} epochs; {again}"
    return f"{trial.folder / 'latest'}: is not of its last epoch; {again}"


def has_weights(trial: Trial, record: dict) -> bool:
    """Whether its folder has the last epoch's network, for students to learn from: the one on record, or of another
    training of the same run.
    """
    digest = weights_digest(trial)
    return digest == record["sha256"]["student"] or (digest != "" and _is_this(trial) and is_finished(trial))


def _is_this(trial: Trial) -> bool:
    """Whether the folder's run was started with the trial's settings, and with the teacher's weights of today."""
    return _has_settings(trial) and _has_teacher(trial)


def _has_settings(trial: Trial) -> bool:
    try:
        return computing(config.read(trial.folder / "config.yaml")) == trial.settings
    except (UserError, KeyError, TypeError, AttributeError):
        return False


def _has_teacher(trial: Trial) -> bool:
    if trial.cell.teacher is None:
        return True
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # lost: training compares them once more
        teacher = json.loads((trial.folder / "environment.json").read_text())["sha256"]["teacher"]
        return teacher == weights_digest(trial.cell.teacher)
    return True


def weights_digest(trial: Trial) -> str:
    """Of the network that the trial has trained; empty where it is not there."""
    try:
        return _digest(trial.weights, os.stat(trial.weights).st_mtime_ns)
    except (OSError, UserError):
        return ""


@cache
def _digest(path: Path, _changed: int) -> str:
    return checkpoint.digest(checkpoint.model_state(checkpoint.load(path), path))


@cache
def train_images(kind: str, root: str) -> int:
    return len(load_dataset(kind, root).train_labels)


def record_of(trial: Trial, plan: str) -> dict:
    """The line of a finished trial of the plan."""
    rows = read_metrics(trial.folder)
    environment = json.loads((trial.folder / "environment.json").read_text())
    sessions = environment["sessions"]
    teacher = trial.cell.teacher
    seconds = sum(row["epoch_seconds"] for row in rows)
    own = sum(row["epoch_seconds"] / _sharing(sessions, row["epoch"]) for row in rows)
    images = trial.epochs * train_images(trial.cfg.DATASET.TYPE, trial.cfg.DATASET.ROOT)
    return {
        "plan": plan,
        "cell": trial.cell.name,
        "seed": trial.seed,
        "hash": trial.hash,
        "last": rows[-1]["test_acc"],
        "best": rows[-1]["best_acc"],
        "best_epoch": rows[-1]["best_epoch"],
        "epochs": trial.epochs,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": round(seconds, 2),
        "students": round(seconds / own, 2),  # side by side, on average: these shared the seconds
        "images": images,
        "device": environment["device"],
        "threads": environment["threads"],
        "versions": {key: environment[key] for key in ("mdistiller", "python", "torch", "numpy", "cuda", "cudnn")},
        "git": list(_once(session["git"] for session in sessions)),
        "command": " ".join(trial.cell.command(trial.seed)),
        "sha256": {"data": environment["sha256"]["data"], "student": weights_digest(trial)},
        "config": trial.settings,
        "teacher": {
            "run": teacher.name,
            "hash": teacher.hash,
            "sha256": environment["sha256"]["teacher"],
            "config": teacher.settings,
        }
        if teacher
        else None,
        "curve": [row["test_acc"] for row in rows],
    }


def _sharing(sessions: list[dict], epoch: int) -> int:
    """How many students of its process the run had beside itself in the `epoch`, itself included."""
    last = next((session for session in reversed(sessions) if session.get("epoch", 0) < epoch), sessions[0])
    return last.get("students", 1)


def _once(values: Iterator) -> Iterator:
    seen = []
    for value in values:
        if value not in seen:
            seen.append(value)
            yield value
