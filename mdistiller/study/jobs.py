"""Training a group's runs in another process, so that a crash costs that group alone: here, or as a job of Slurm."""

import contextlib
import importlib.util
import multiprocessing
import os
import re
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mdistiller import config
from mdistiller.engine.ranks import here
from mdistiller.engine.run import train
from mdistiller.engine.seeds import of_seed, train_seeds
from mdistiller.errors import FolderInUse, Preempted, ProcessLost, UserError
from mdistiller.study.plan import PlannedGroup


class Outcome(NamedTuple):
    """How a job ended. `final`: the run itself says why, so that starting it again would not help."""

    final: bool
    reasons: list[str]


def train_group(file: Path, opts: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """Train what is left of the seeds, side by side, or one after the other where several processes share each; return
    what went wrong, in lines.

    Raises Preempted where a signal stopped them, FolderInUse where another process trains one of them, ProcessLost
    where one that shares them is gone.
    """
    try:
        cfg = config.load(file, opts)
        if here().world == 1:
            train_seeds(cfg, seeds, resume="auto")
        for seed in seeds if here().world > 1 else ():
            train(of_seed(cfg, seed), resume="auto")
    except (Preempted, FolderInUse, ProcessLost):
        raise
    except UserError as error:
        return list(error.lines)
    return []


class LocalJob:
    """A child process, so that a crash costs one group. It stops, with a checkpoint, when its parent is gone."""

    def __init__(self, *work: object):
        context = multiprocessing.get_context("spawn")
        self.answer, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=_child, args=(sender, *work))
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the child inherits it: Ctrl-C comes through its parent
        self.process.start()
        signal.signal(signal.SIGINT, before)
        sender.close()

    def ended(self) -> bool:
        return not self.process.is_alive()

    def stop(self, at_once: bool = False) -> None:
        """Ask for a checkpoint and the end; `at_once`: without the former."""
        self.process.kill() if at_once else self.process.terminate()

    def outcome(self) -> Outcome:
        try:
            return Outcome(True, self.answer.recv())
        except EOFError:
            code = self.process.exitcode
            return Outcome(False, [f"ended by signal {-code}" if code < 0 else f"exit status {code}"])


def _child(answer, *work: object) -> None:
    def leave_with_parent() -> None:
        multiprocessing.parent_process().join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    try:
        answer.send(train_group(*work))
    except (Preempted, FolderInUse) as error:
        raise SystemExit(error.status) from None


class Local:
    """Jobs on this machine, one after the other."""

    slots = 1

    def start(self, group: PlannedGroup, seeds: Sequence[int]) -> LocalJob:
        return LocalJob(group.file, group.opts, seeds)


def train_task(*work: object) -> list[str]:
    """Do `train_group` as one of the tasks of a job of submitit's, which are the processes of a run."""
    import submitit

    if submitit.JobEnvironment().num_tasks > 1:
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
    return train_group(*work)


class SlurmJob:
    """A job of submitit's."""

    def __init__(self, job):
        self.job = job

    def ended(self) -> bool:
        return self.job.done()

    def stop(self, at_once: bool = False) -> None:
        with contextlib.suppress(subprocess.SubprocessError, OSError):  # it may have ended
            self.job.cancel(check=False)

    def outcome(self) -> Outcome:
        try:
            return Outcome(True, next(filter(None, self.job.results()), []))  # of each task
        except Exception as error:  # cancelled, out of time, a node that failed, a crash: submitit has a class for each
            return Outcome(False, [" ".join(str(error).split())[-300:] or type(error).__name__])


class Slurm:
    """Jobs of Slurm, whose files lie in `folder`; `parameters` are submitit's. A job has a process for each of its
    gpus_per_node, or as tasks_per_node says. `cluster` may be submitit's "local" or "debug" too. Raises UserError where
    submitit is missing or refuses the parameters.
    """

    slots = 10_000

    def __init__(self, folder: Path, parameters: Mapping[str, object], cluster: str = "slurm"):
        if importlib.util.find_spec("submitit") is None:
            raise UserError("--executor slurm needs submitit: pip install submitit")
        import submitit

        parameters = {"tasks_per_node": parameters.get("gpus_per_node") or 1} | dict(parameters)
        try:
            self.executor = submitit.AutoExecutor(folder=folder.resolve() / "%j", cluster=cluster)
            self.executor.update_parameters(**parameters)
        except (RuntimeError, NameError, TypeError, ValueError) as error:
            raise UserError(f"--executor slurm: {error}") from None

    def start(self, group: PlannedGroup, seeds: Sequence[int]) -> SlurmJob:
        self.executor.update_parameters(name=re.sub(r"[^\w.-]", "_", group.name))
        try:
            return SlurmJob(self.executor.submit(train_task, group.file, group.opts, list(seeds)))
        except (RuntimeError, OSError) as error:  # sbatch refuses, is missing, or finds no space
            raise UserError(f"cannot be submitted: {' '.join(str(error).split())}") from None
