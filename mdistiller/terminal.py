"""The terminal, which may go away while training goes on."""

import contextlib
import os
import sys
from collections.abc import Iterator

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


def say(text: str) -> None:
    """Print a line on stdout, above a progress bar."""
    with unbroken():
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
