"""Files that others made: opened without waiting for a pipe, refused before they fill the memory."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from mdistiller.errors import UserError


def check_fits(path: str | Path, size: int) -> None:
    """Raises UserError where `size` bytes, which `path` asks for, are more than half of the machine's memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory // 2:
        raise UserError(f"{path}: needs {size:,} bytes, more than half of this machine's {memory:,}; wrong file?")


def open_regular(path: str | Path, wanted: str) -> BinaryIO:
    """`path`, opened for reading. Raises UserError that asks for `wanted` unless it is a regular file that fits the
    memory: a pipe would block, a device has no end.
    """
    try:
        # a pipe without a writer opens at once under O_NONBLOCK, which regular files ignore
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}); pass {wanted}") from None
    try:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: is a pipe or a device; pass {wanted}")
        check_fits(path, status.st_size)
    except UserError:
        file.close()
        raise
    return file


def expand(path: str | Path) -> Path:
    """`path` with its ~ or ~user. Raises UserError where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: there is no such user; write the folder's whole path") from None
