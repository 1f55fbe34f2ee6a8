"""Slurm, through submitit: every group of a study is a job of its own."""

import contextlib
import importlib.util
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from mdistiller.errors import UserError
from mdistiller.study.jobs import Outcome, train_group
from mdistiller.study.plan import PlannedGroup


class SlurmJob:
    def __init__(self, job):
        self.job = job

    def ended(self) -> bool:
        return self.job.done()

    def stop(self, at_once: bool = False) -> None:
        with contextlib.suppress(subprocess.SubprocessError, OSError):  # it may have ended
            self.job.cancel(check=False)

    def outcome(self) -> Outcome:
        try:
            return Outcome(True, self.job.result())
        except Exception as error:  # cancelled, out of time, a node that failed, a crash: submitit has a class for each
            return Outcome(False, [" ".join(str(error).split())[-300:] or type(error).__name__])


class Slurm:
    """Jobs of Slurm, whose files lie in `folder`; `parameters` are submitit's. `cluster` may be submitit's "local" or
    "debug" too. Raises UserError where submitit is missing or refuses the parameters.
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

    def start(self, group: PlannedGroup, seeds: Sequence[int]) -> SlurmJob:
        self.executor.update_parameters(name=re.sub(r"[^\w.-]", "_", group.name))
        try:
            return SlurmJob(self.executor.submit(train_group, group.file, group.opts, list(seeds)))
        except (RuntimeError, OSError) as error:  # sbatch refuses, is missing, or finds no space
            raise UserError(f"cannot be submitted: {' '.join(str(error).split())}") from None
