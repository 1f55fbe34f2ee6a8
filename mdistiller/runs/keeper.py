"""When a run's checkpoints are written, under which names, and which of them a resumed run starts from."""

import os
import time
from pathlib import Path

from mdistiller.errors import DamagedFile, UserError
from mdistiller.files import link
from mdistiller.runs import checkpoint
from mdistiller.terminal import say

MOST_SHARE = 0.02  # of a run's time may go into checkpoints inside an epoch


class Keeper:
    """Keeps the checkpoints of the run in `folder`.

    `origin` holds digests of what the run starts from, "data" and "teacher", which a resumed run must share, and
    "plugins", of their code, which may change.
    `every_epochs`: epochs between the checkpoints epoch_N that stay. `every_seconds`: seconds between checkpoints
    inside an epoch, 0 for none; they are further apart where writing them would take more than 2 % of the time.
    `students`: how many runs of the process take turns, which share both.
    """

    def __init__(
        self,
        folder: Path,
        origin: dict[str, str] | None = None,
        every_epochs: int = 40,
        every_seconds: float = 0.0,
        students: int = 1,
    ):
        self.folder, self.origin = folder, origin or {}
        self.every_epochs, self.every_seconds, self.students = every_epochs, every_seconds, students
        self._end, self._cost = time.monotonic(), 0.0  # of the last checkpoint: when it was written, in how long

    def due(self) -> bool:
        """Return whether the run has trained long enough for a checkpoint inside the epoch."""
        waited = (time.monotonic() - self._end) / self.students
        return bool(self.every_seconds) and waited > max(self.every_seconds, self._cost / MOST_SHARE)

    def save(self, state: dict, *more_names: str) -> None:
        """Write `state` to `latest`, and under `more_names`; what was `latest` before becomes `previous`.

        `latest` comes last: what a resumed run starts from never names a file that is not there yet.
        """
        begin = time.monotonic()
        if (self.folder / "latest").exists():
            link(self.folder / "latest", self.folder / "previous")
        checkpoint.save(state | {"origin": self.origin}, *(self.folder / name for name in (*more_names, "latest")))
        self._end = time.monotonic()
        self._cost = self._end - begin

    def save_epoch(self, epoch: int, best: bool, state: dict, student: dict, average: dict | None = None) -> None:
        """Write what the end of an epoch leaves: latest and student_latest, best and student_best where it is the
        best so far, epoch_N and student_N at times, and student_ema, the `average` of the student's weights.
        """
        if average:
            checkpoint.save(average, self.folder / "student_ema")
        names = ["best"] if best else []
        if epoch % self.every_epochs == 0:
            names.insert(0, f"epoch_{epoch}")
        students = [f"student_{name.removeprefix('epoch_')}" for name in (*names, "latest")]
        checkpoint.save(student, *(self.folder / name for name in students))
        self.save(state, *names)

    def restore(self) -> tuple[dict, Path]:
        """Return the newest whole checkpoint, `latest`, else `previous`, and its path.

        Raises UserError where there is none, or where it started from other data or another teacher.
        """
        latest, previous = self.folder / "latest", self.folder / "previous"
        try:
            return self._loaded(latest), latest
        except UserError as error:
            damaged = isinstance(error, DamagedFile) or not latest.exists()
            if not (damaged and previous.exists()):
                raise
            state = self._loaded(previous)
            if latest.exists():
                os.replace(latest, self.folder / "latest.damaged")
            link(previous, latest)  # before it is rotated away
            say(f"warning: {error.lines[0]}; going on from the checkpoint before it")
            return state, previous

    def _loaded(self, path: Path) -> dict:
        state = checkpoint.load(path)
        if "origin" not in state:
            return state  # of no run: RunState.load says what the file is
        origin = state["origin"]
        for name, key in (("data", "DATASET.ROOT"), ("teacher", "DISTILLER.TEACHER_CKPT")):
            if origin.get(name) != self.origin.get(name):
                raise UserError(
                    f"--resume: the {name} in {key} is not what this run was started with; point {key} to that, or "
                    "start a new run without --resume"
                )
        before, now = origin.get("plugins"), self.origin.get("plugins")
        if before is not None and before != now:
            if before and now:
                say("warning: the code of the plug-ins has changed since this run began")
            else:
                with_it, do = ("with", "name it in") if before else ("without", "leave it out of")
                raise UserError(
                    f"--resume: this run began {with_it} a plug-in's method, model or data; {do} EXPERIMENT.PLUGINS"
                )
        return state
