"""The terminal, which may go away while training goes on."""

import contextlib
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator
from typing import TextIO

from tqdm import tqdm


@contextlib.contextmanager
def unbroken() -> Iterator[None]:
    """Survive a closed terminal or pipe behind stdout: what is left to say goes nowhere, the run's files have it."""
    try:
        yield
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        with contextlib.suppress(OSError, ValueError):
            os.dup2(nowhere, sys.stdout.fileno())  # the interpreter flushes what it has buffered when it ends
        sys.stdout = os.fdopen(nowhere, "w")


_silent = False


@contextlib.contextmanager
def silence(wanted: bool = True) -> Iterator[None]:
    """Say nothing inside, in no thread, and show no progress bar, if that is `wanted`."""
    global _silent
    before, _silent = _silent, wanted or _silent
    try:
        yield
    finally:
        _silent = before


def shows_bars(stream: TextIO | None = None) -> bool:
    """Return whether a progress bar on `stream`, stdout where it is left out, is for anybody to see."""
    return not _silent and (stream or sys.stdout).isatty()


def columns() -> int | None:
    """Return how many letters fit on a line of the terminal behind stdout; None where it is a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def fitted(text: str) -> str:
    """Return `text` with line breaks between words where a terminal is too narrow for a line."""
    width = columns()
    if width is None:
        return text
    wrapper = textwrap.TextWrapper(width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(wrapper.fill(line) if len(line) > width else line for line in text.split("\n"))


def counted(number: int, noun: str) -> str:
    """Return 1 run, 2,000 runs, 2 classes, 2 boxes."""
    plural = f"{noun}es" if noun.endswith(("s", "x")) else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def say(text: str) -> None:
    """Print a line on stdout, above a progress bar."""
    if _silent:
        return
    with unbroken():
        tqdm.write(fitted(text), file=sys.stdout)
        sys.stdout.flush()
