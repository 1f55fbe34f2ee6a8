"""Where a cell's trials are trained: a process of this machine, or a job of Slurm's."""

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from mdistiller.campaign import worker
from mdistiller.campaign.plan import Cell, Trial
from mdistiller.errors import UserError


class Job(Protocol):
    def poll(self) -> int | None:
        """The exit status, negative for a signal's number; None while it runs."""

    def stop(self, at_once: bool = False) -> None:
        """Ask for a checkpoint and the end; `at_once`: without the former."""

    def complaints(self) -> str:
        """What it has said on stderr."""


class Executor(Protocol):
    slots: int  # jobs at a time

    def start(self, cell: Cell, trials: Sequence[Trial]) -> Job:
        """Raises UserError where it cannot be started."""


class LocalJob:
    """A process that the campaign holds by a pipe: it stops when the campaign is gone, whatever ended it."""

    def __init__(self, command: Sequence[str], log: Path):
        self.log = log
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "ab") as file:
                self.begin = file.tell()
                # a session of its own: Ctrl-C reaches the campaign alone, which passes it on once
                self.process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=file, stderr=file, start_new_session=True, env=environment()
                )
        except OSError as error:
            raise UserError(f"cannot be started: {error.filename or log}: {error.strerror}") from None

    def poll(self) -> int | None:
        return self.process.poll()

    def stop(self, at_once: bool = False) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGKILL if at_once else signal.SIGTERM)

    def complaints(self) -> str:
        try:
            return self.log.read_bytes()[self.begin :].decode(errors="replace")
        except OSError:  # tidied away
            return ""


def environment() -> dict[str, str]:
    """Under which a worker finds the package wherever it is started."""
    root = str(Path(worker.__file__).resolve().parents[2])
    return os.environ | {"PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}


class Local:
    """One job at a time."""

    slots = 1

    def start(self, cell: Cell, trials: Sequence[Trial]) -> LocalJob:
        return LocalJob(command_of(cell, trials), trials[0].folder.parent / ".logs" / f"{cell.name}.log")


def command_of(cell: Cell, trials: Sequence[Trial]) -> list[str]:
    """One command for `trials` of the cell, some of which may be half-done."""
    seeds = [str(trial.seed) for trial in trials]
    return [
        sys.executable, "-m", worker.__name__, "--cfg", str(cell.file), "--seeds", *seeds, "--", *cell.opts,
    ]  # fmt: skip


class SlurmJob:
    def __init__(self, job):
        self.job = job

    def poll(self) -> int | None:
        if not self.job.done():
            return None
        from submitit.core.utils import UncompletedJobError

        try:
            return self.job.result()
        except UncompletedJobError:  # it left no result: cancelled, out of time, a node that failed
            return -signal.SIGKILL
        except Exception:  # its trials' folders tell what is done
            return 1

    def stop(self, at_once: bool = False) -> None:
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            self.job.cancel(check=False)

    def complaints(self) -> str:
        return self.job.stderr() or ""


class Slurm:
    """Every cell a job of its own, through submitit; `cluster` may be submitit's "local" or "debug" too. They outlive
    the campaign: started again, it finds what they have done.
    """

    slots = 10_000

    def __init__(self, folder: Path, parameters: Mapping[str, object], cluster: str = "slurm"):
        if importlib.util.find_spec("submitit") is None:
            raise UserError("--executor slurm needs submitit: pip install submitit")
        import submitit

        try:
            self.executor = submitit.AutoExecutor(folder=folder.resolve() / "%j", cluster=cluster)
            self.executor.update_parameters(**parameters)
        except (RuntimeError, NameError, TypeError, ValueError) as error:
            raise UserError(f"--executor slurm: {error}") from None

    def start(self, cell: Cell, trials: Sequence[Trial]) -> SlurmJob:
        self.executor.update_parameters(name=re.sub(r"[^\w.-]", "_", cell.name))
        try:
            return SlurmJob(self.executor.submit(worker.run, cell.file, cell.opts, [trial.seed for trial in trials]))
        except (RuntimeError, OSError) as error:  # sbatch refuses; no sbatch, no space
            raise UserError(f"cannot be submitted: {' '.join(str(error).split())}") from None
