"""Files: ours are written whole or not at all, those that others made may be anything; locks between processes."""

import contextlib
import errno
import fcntl
import os
import platform
import shutil
import stat
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, BinaryIO

from mdistiller.errors import UserError


def write_atomic(path: Path, data: bytes) -> None:
    """Write all of `data` under `path`, or leave what was there before: temporary name, flush, sync, rename, sync of
    the folder.
    """

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    _replace(path, write)


def link(source: Path, path: Path) -> None:
    """Give `source` the name `path` as well, atomically; make a copy where the file system has no links."""

    def write(temporary: Path) -> None:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)

    _replace(path, write)


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def remove_leftovers(folder: Path, older_than: float = 0.0) -> None:
    """Remove temporary files of writers that were killed, where nobody has written to them for so many seconds: with 0
    nobody else may be writing in that folder.
    """
    for file in folder.glob(".*.tmp"):
        if not older_than or time.time() - file.stat().st_mtime > older_than:
            file.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Have the names in the folder reach the disk: a file's own sync does not cover its name."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync no folders
            raise
    finally:
        os.close(folder)


def check_fits(path: str | Path, size: int) -> None:
    """Raise UserError where `size` bytes, which `path` asks for, are more than half of the machine's memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory // 2:
        raise UserError(f"{path}: needs {size:,} bytes, more than half of this machine's {memory:,}; wrong file?")


def open_regular(path: str | Path, wanted: str) -> BinaryIO:
    """Open `path` for reading. Raises UserError that asks for `wanted` unless it is a regular file that fits the
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


def check_folder(path: Path, option: str) -> None:
    """Raise UserError that names `option` where `path` can be no folder to write into."""
    place = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
    if not os.path.isdir(place) or not os.access(place, os.W_OK):
        what = "cannot be written" if os.path.isdir(place) else "is a file"
        raise UserError(f"{option} {path}: {place} {what}; name a folder of yours")


def expand(path: str | Path) -> Path:
    """Return `path` with its ~ or ~user replaced. Raises UserError where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: there is no such user; write the folder's whole path") from None


class FileLock:
    """An exclusive lock on the file `path`, which is made where it is missing and says who holds it.

    The lock lasts until `close`, or until the process and what it forked have ended, however they end.
    Raises BlockingIOError where another process holds the lock, unless told to `wait` for it; its
    `strerror` names that process.
    """

    def __init__(self, path: Path, wait: bool = False):
        while True:
            self.file = open(path, "a+", errors="replace")  # noqa: SIM115  (closing it gives the lock back)
            try:
                _flock(self.file, exclusive=True, wait=wait)
            except BlockingIOError:
                self.file.seek(0)
                holder = self.file.read().strip() or "another process"
                self.file.close()
                raise BlockingIOError(errno.EWOULDBLOCK, holder, str(path)) from None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self.file.fileno()), os.stat(path)):
                    break
            self.file.close()  # the file was moved or removed after it was opened: that lock is no longer the path's
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {platform.node()}")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def find_above(path: str | Path) -> Path:
    """Return `path`, where it is relative and not there the nearest of that name in the folders above this one: what
    lies in a checkout is so found from a notebook's folder in it.
    """
    path = expand(path)
    if path.is_absolute() or os.path.exists(path):
        return path
    return next((above / path for above in Path.cwd().parents[:-1] if os.path.exists(above / path)), path)


def is_locked(path: Path) -> bool:
    """Return whether a process holds the FileLock at `path`; False where there is no such file."""
    try:
        with open(path) as file:
            _flock(file, exclusive=False)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _flock(file: IO, exclusive: bool, wait: bool = False) -> None:
    fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB))
