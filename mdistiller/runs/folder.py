"""A run's folder: its name, its lock, and what happens to an earlier run that lies there."""

import contextlib
import errno
import json
import os
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import torch
from yacs.config import CfgNode

from mdistiller import config, files
from mdistiller.errors import FolderInUse, UserError
from mdistiller.files import FileLock, is_locked, remove_leftovers, write_atomic
from mdistiller.runs.environment import environment
from mdistiller.terminal import say

MOST_BYTES = 200  # of a run's name: what is made of it has to fit 255


def run_folder(cfg: config.Config) -> Path:
    """Return LOG.PREFIX/EXPERIMENT.PROJECT/NAME-or-TAG[+overrides that are read]; a NAME that is an override stands
    alone. Names keep their spaces, overrides lose theirs. Of a name that is too long for a folder the end is replaced
    by a hash of it. A run that lies under a name with all overrides, as all once did, keeps it.

    Raises UserError where that is no name for a folder.
    """
    flat, project = config.leaves(cfg), files.expand(cfg.LOG.PREFIX) / cfg.EXPERIMENT.PROJECT
    named = [(key, value) for key, value in cfg.overrides if config.role(key) == "computes"]
    before = project / _name(cfg, named)
    return before if resumable(before) else project / _name(cfg, [p for p in named if not config.unread(flat, p[0])])


def _name(cfg: config.Config, changes: Sequence[tuple[str, object]]) -> str:
    name = (cfg.EXPERIMENT.NAME or cfg.EXPERIMENT.TAG).strip()
    if all(key != "EXPERIMENT.NAME" for key, _ in cfg.overrides):
        changed = [f"{key}:{value}".replace(" ", "") for key, value in changes]
        name = "+".join([name, ",".join(changed)]) if changed else name
    name = "".join("_" if c in "/\\\0" else c for c in name)
    if name.strip(".") == "" or not name.isprintable():
        raise UserError(f"the run's name would be {name!r}, which is no folder's name; set EXPERIMENT.NAME or TAG")
    if len(name.encode()) > MOST_BYTES:
        name = name.encode()[: MOST_BYTES - 10].decode(errors="ignore") + ".." + sha256(name.encode()).hexdigest()[:8]
    return name


def check_writable(path: Path, key: str) -> None:
    """Raise UserError where the file or folder `path` could not be made. Nothing is made."""
    parent = next(p for p in (path, *path.absolute().parents) if os.path.exists(p))
    if not (os.path.isdir(parent) or parent == path) or not os.access(parent, os.W_OK):
        raise UserError(f"{path}: {parent} cannot be written; set {key} to a place of yours")


def resumable(path: Path) -> bool:
    """Return whether the run in the folder `path` has left a checkpoint to go on from."""
    return any(os.path.exists(path / name) for name in ("latest", "previous"))


def in_use(path: Path) -> bool:
    """Return whether a process trains in the folder `path`."""
    return is_locked(path / ".lock")


class RunFolder:
    """A run's folder, whose lock is held for as long as the object lives.

    `resume`: True, or "auto" for a run that may be there or not; `resumed` says which, found out under the lock.
    Otherwise an earlier run that lies there is kept under a new name, never written over. Raises FolderInUse where
    another process trains there, UserError where the folder cannot be written.
    """

    def __init__(self, path: Path, resume: bool | str = False):
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(path / ".lock")
            remove_leftovers(path)
            self.resumed = resumable(path) if resume == "auto" else resume
            rows = path / "metrics.jsonl"
            if not resume and (resumable(path) or (rows.exists() and rows.stat().st_size)):
                self._set_aside()
        except BlockingIOError as error:
            raise FolderInUse(f"{path}: {error.strerror} trains there; wait for it, or set EXPERIMENT.NAME") from None
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            raise UserError(
                f"{path}: cannot be written ({error.strerror}); set LOG.PREFIX to a folder of yours"
            ) from None

    def _set_aside(self) -> None:
        number = next(n for n in range(1, 10**6) if not self._aside(n).exists())
        self.path.rename(self._aside(number))
        self._lock.close()
        self.path.mkdir(exist_ok=True)
        self._lock = FileLock(self.path / ".lock")
        say(f"the earlier run in {self.path} is kept as {self._aside(number).name} (--resume goes on with a run)")

    def _aside(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}~{number}")

    def close(self) -> None:
        self._lock.close()

    def check_config(self, cfg: CfgNode) -> None:
        """Raise UserError where `cfg` would compute something else than the run's config.yaml says."""
        file = self.path / "config.yaml"
        try:
            then = config.read(file)
        except UserError as error:
            raise UserError(f"--resume: {error}; start a new run without --resume") from None
        bad = config.misfit(then)
        if bad:
            raise UserError(f"--resume: {file}: {bad} holds a value of another kind; start a new run without --resume")
        then, now = config.computed(then), config.computed(cfg)
        ignored = {"SOLVER.EPOCHS", "DATASET.ROOT"}  # a file may have moved: the digest of its images is compared
        differ = [k for k in now if k in then and then[k] != now[k] and k not in ignored]
        if differ:
            raise UserError(
                *(f"--resume: {k} is {now[k]!r}, but this run was started with {then[k]!r}" for k in differ),
                f"pass the values it was started with ({file}), or start a new run without --resume",
            )

    def write_config(self, cfg: CfgNode, teacher_file: Path | None) -> None:
        """Write config.yaml, which names the teacher's file that was found: none is to be trained."""
        found = cfg.clone()
        found.defrost()
        found.DISTILLER.TEACHER_CKPT = str(teacher_file or "")
        found.DISTILLER.TRAIN_TEACHER = False
        write_atomic(self.path / "config.yaml", found.dump().encode())

    def write_environment(
        self, device: torch.device, seed: int, resume: bool, origin: dict[str, str], session: dict[str, int]
    ) -> str:
        """Write environment.json: what has to be known to run this again. A resumed run adds to `sessions`. `session`:
        how many "students" train side by side, from the "epoch" that was finished then. Return what differs from the
        session before and changes roundings, in words.
        """
        file = self.path / "environment.json"
        sessions = []
        if resume:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # lost: nothing depends on it
                sessions = [dict(session) for session in json.loads(file.read_text())["sessions"]]
        before, now = sessions[-1] if sessions else {}, environment(device)
        sessions.append(now | session)
        body = {**sessions[0], "seed": seed, "sha256": origin, "sessions": sessions}
        write_atomic(file, json.dumps(body, indent=2).encode() + b"\n")
        what = ("device", "torch") if device.type == "cuda" else ("threads", "device", "torch")
        other = [f"{key} {now[key]} in place of {before[key]}" for key in what if before.get(key, now[key]) != now[key]]
        return f"; {', '.join(other)}: figures differ in roundings from a run without a stop" if other else ""
