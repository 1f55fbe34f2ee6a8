"""Files that are there whole or not at all, also after a crash."""

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path


def write_atomic(path: Path, data: bytes) -> None:
    """All of `data` under `path`, or what was there before: temporary name, flush, sync, rename, sync of the folder."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    _replace(path, write)


def link(source: Path, path: Path) -> None:
    """`source` under the name `path` as well, atomically; a copy where the file system has no links."""

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


def remove_leftovers(folder: Path) -> None:
    """Temporary files of writers that were killed. Nobody else may be writing there."""
    for file in folder.glob(".*.tmp"):
        file.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """The names in the folder reach the disk: a file's own sync does not cover its name."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
