"""Tar archives, unpacked as if an enemy had written them."""

import gzip
import hashlib
import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from mdistiller.errors import UserError
from mdistiller.files import sync_folder

CHUNK = 2**16
MEMBERS = 10_000  # of one archive
# what tarfile, gzip and a file that stands where a folder should give for a bad archive; other OSErrors are the disk's
_FAULTS = (
    tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError, OverflowError, RecursionError,
    FileExistsError, NotADirectoryError,
)  # fmt: skip


class WrongBytes(UserError):
    """An archive that is not the one expected, or not fit to unpack."""


def chunks(file: IO[bytes]) -> Iterator[bytes]:
    return iter(lambda: file.read(CHUNK), b"")


class _Bounded:
    """A stream that is cut off where an honest archive has ended long ago: weights and photographs hardly shrink, so
    none of ours unpacks to twice its size.
    """

    def __init__(self, file: IO[bytes], packed: int):
        self.file, self.left = file, 2 * packed + 2**20

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise tarfile.ReadError("it unpacks to more than twice its size")
        return data


class _Header(tarfile.TarInfo):
    """tarfile takes a damaged header behind the first for the archive's end, and reads extended headers of any length
    into memory; here both are errors.
    """

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        try:
            member = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None
        if member.size < 0 or (member.type not in tarfile.REGULAR_TYPES and member.size > CHUNK):
            raise tarfile.ReadError("a header's size is absurd")
        return member


def unpack(path: Path, origin: str | Path, folder: str, stage: Path) -> dict[str, tuple[int, str]]:
    """Unpack the tar or tar.gz file `path`, which `origin` names to the user, into the new folder `stage`.

    Returns {name: (bytes, SHA-256)} of the files under `folder` in it. Raises WrongBytes for what no honest archive
    does: links, devices, names that lead outside or come twice, more than twice its size, a missing end.
    """
    stage.mkdir()
    found = {}
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            stream = _Bounded(gzip.GzipFile(fileobj=file) if zipped else file, path.stat().st_size)
            options = {"tarinfo": _Header, "encoding": "utf-8", "errors": "strict"}
            with tarfile.open(fileobj=stream, mode="r|", **options) as tar:
                for name, member in _members(tar):
                    target = stage / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    if member.isdir():
                        target.mkdir(exist_ok=True)
                    else:
                        found[name] = _write(tar.extractfile(member), target)
            for _ in chunks(stream):  # the checksum of a gzip file stands at its end
                pass
    except _FAULTS as error:
        raise WrongBytes(f"{origin}: cannot be unpacked ({str(error) or type(error).__name__})") from None
    for parent in {(stage / name).parent for name in found}:
        sync_folder(parent)
    inside = {
        str(name.relative_to(folder)): what for name, what in found.items() if PurePosixPath(folder) in name.parents
    }
    if not inside:
        raise WrongBytes(f"{origin}: holds no files in a folder {folder}; wrong archive?")
    return inside


def _members(tar: tarfile.TarFile) -> Iterator[tuple[PurePosixPath, tarfile.TarInfo]]:
    """Folders and plain files under names that stay inside, each name once. Raises ReadError for anything else."""
    seen = set()
    for count, member in enumerate(tar, 1):
        name = PurePosixPath(member.name)
        plain = member.isdir() or member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
        for wrong, what in (
            (count > MEMBERS, f"more than {MEMBERS:,} members"),
            (not member.name.isprintable(), f"the name {member.name!a} is not printable"),
            (not (name.parts or member.isdir()), "a member has no name"),
            (len(member.name.encode()) > 255, "a name is longer than 255 bytes"),
            (name.is_absolute() or ".." in name.parts, f"the name {member.name!r} leads outside"),
            (not plain, f"{member.name!r} is a link, a device or the like"),
            (name in seen, f"the name {member.name!r} comes twice"),
        ):
            if wrong:
                raise tarfile.ReadError(what)
        seen.add(name)
        if name.parts:
            yield name, member


def _write(source: IO[bytes], target: Path) -> tuple[int, str]:
    digest = hashlib.sha256()
    with open(target, "xb") as file:
        for chunk in chunks(source):
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
        return file.tell(), digest.hexdigest()
