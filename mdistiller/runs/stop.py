"""Signals that ask a run to stop: SIGTERM, SIGINT (Ctrl-C), SIGUSR1 (Slurm's warning), SIGHUP (a closed terminal)."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def stops_early(patience: int, epoch: int, best_epoch: int) -> bool:
    """Return whether a run ends after `epoch`, `patience` epochs behind its best one; 0: never."""
    return 0 < patience <= epoch - best_epoch


class StopRequested(Exception):
    """Raised by `Stop.watch` at the first boundary after a signal."""


class Stop:
    """While entered, the signals only leave their name here, for the loop to stop at its next step; a SIGINT after
    any of them stops at once. A signal that is ignored (nohup) stays ignored; off the main thread nothing changes.

    `shared`: several processes stop together, so a signal that comes is only `asked` for, until they have agreed on it
    and it is set as `signal`; none of them stops at once.
    """

    def __init__(self, shared: bool = False):
        self.signal = self.asked = ""
        self.shared = shared
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.getsignal(s) for s in SIGNALS if signal.getsignal(s) != signal.SIG_IGN}
            for number in self._before:
                signal.signal(number, self._ask)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT and self.signal and not self.shared:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name
        if self.shared:
            return
        self.signal = self.asked
        if number == signal.SIGINT:
            with contextlib.suppress(OSError):  # nobody may read it: `train | tee` ends tee by the same Ctrl-C
                os.write(2, b"\nstopping after this step; Ctrl-C again stops at once, without a checkpoint\n")

    def watch(self, items: Iterable[T]) -> Iterator[T]:
        """Yield `items` until a signal comes. Raises StopRequested when the work on an item is done after that."""
        for item in items:
            yield item
            self.check()

    def check(self) -> None:
        """Raise StopRequested where a signal has come."""
        if self.signal:
            raise StopRequested
