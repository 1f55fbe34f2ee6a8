"""Training a group's runs in another process, so that a crash costs that group alone."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mdistiller import config
from mdistiller.engine.seeds import train_seeds
from mdistiller.errors import FolderInUse, Preempted, UserError
from mdistiller.study.plan import PlannedGroup


class Outcome(NamedTuple):
    """How a job ended. `final`: the run itself says why, so that starting it again would not help."""

    final: bool
    reasons: list[str]


def train_group(file: Path, opts: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """Train what is left of the seeds, side by side; return what went wrong, in lines.

    Raises Preempted where a signal stopped them, FolderInUse where another process trains one of them.
    """
    try:
        train_seeds(config.load(file, opts), seeds, resume="auto")
    except (Preempted, FolderInUse):
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
