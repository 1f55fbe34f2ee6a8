"""Rows of numbers on disk, such as a teacher's logits over every view of every image: filled once, read for ever.

A store is a folder: header.json says what its rows are, rows.bin holds them in the order in which they came, and the
process that may add to them has a lock on .lock and says there what it does. rows.bin is a sequence of records of one
size: a row's number + 1 (int32), its values, zeros up to a multiple of 4. Every `add` appends its records and then a
seal, a record that begins with SEAL and ends with a crc32 over all that stands before it, back to header.json: so what
a crash, a full disk, a power loss or a damaged disk left is found by reading the file once, and nothing before it is in
doubt. All numbers are little-endian.
"""

import contextlib
import errno
import fcntl
import json
import mmap
import os
import shutil
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mdistiller.errors import DamagedFile, UserError
from mdistiller.files import open_regular, remove_leftovers, sync_folder, write_atomic
from mdistiller.terminal import say

FORMAT = 1
SEAL = -1  # in place of a row's number; 0 is what never reached the disk
PIECE = 1 << 23  # bytes that are held in memory while a file is written, verified or uploaded
DTYPES = {"float16": "<f2", "float32": "<f4"}
ADVICE = "remove that folder, or choose another one"


def record_size(width: int, dtype: str) -> int:
    """Bytes on disk of a row of `width` numbers of `dtype`."""
    return 4 + -(-width * np.dtype(DTYPES[dtype]).itemsize // 4) * 4


def space_needed(folder: Path, rows: int, width: int, dtype: str) -> int:
    """Bytes that a store in `folder`, which need not exist, will still take until it holds all of its rows."""
    try:
        there = os.stat(folder / "rows.bin").st_size
    except OSError:
        there = 0
    return max(0, rows * record_size(width, dtype) - there)


def check_space(folder: Path, rows: int, width: int, dtype: str) -> None:
    """Raises UserError where the disk has no room for the rows still to come and a reserve: 5 %, at most 1 GiB."""
    needed = space_needed(folder, rows, width, dtype)
    if not needed:
        return
    needed += min(needed // 20, 1 << 30)  # for the seals and for what else is written meanwhile
    parent = next(p for p in (folder, *folder.absolute().parents) if os.path.exists(p))
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(
            f"{folder}: needs {_readable(needed)} of disk space, and {parent} has {_readable(free)} free; "
            "choose a folder on another disk, or turn the teacher bank off"
        )


def _readable(size: int) -> str:
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size} bytes"


class RowStore:
    """Rows of numbers on disk: row r of `rows` possible ones holds `width` numbers of `dtype`, float16 or float32.

    `description`, of whatever JSON knows, says what they are. The first process to open a store may add to it, any
    other one reads what was there when it came (`writable` False, `busy` True, `holder` what the first one does, where
    it has announced that), and so does one that may not write there (`writable` and `busy` False). In memory
    are 4 bytes a row; the kernel keeps of the file what it has room for. Raises UserError where the folder holds
    anything else than a store of that header, DamagedFile where its header is damaged, OSError where the disk is full.
    """

    _file = _lock = None  # descriptors
    busy, holder = False, ""

    def __init__(self, folder: Path, description: dict[str, object], rows: int, width: int, dtype: str):
        if not (0 < rows < 1 << 30 and 0 < width < 1 << 24 and dtype in DTYPES):  # slots are int32, seals among them
            raise ValueError(f"no store of {rows} x {width} {dtype}")
        self.folder, self.rows, self.width, self.dtype = folder, rows, width, dtype
        fields = {"format": FORMAT, "description": description, "rows": rows, "width": width, "dtype": dtype}
        self._fields = json.loads(json.dumps(fields, allow_nan=False))  # tuples become lists here as well
        self._size = record_size(width, dtype)
        self._slots = np.full(rows, -1, np.int32)  # where a row's record stands in rows.bin
        self.filled = self._end = self._committed = 0  # `_end`, `_committed`: in records
        self._seal = self._committed_seal = _checksum(self._fields)
        self._records = np.empty((0, 1), "<i4")  # rows.bin, as far as it was mapped last
        try:
            self._open()
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            self._release()
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{folder}: cannot be used ({reason}); choose a folder of yours") from None
        except BaseException:
            self._release()
            raise

    @property
    def complete(self) -> bool:
        return self.filled == self.rows

    @property
    def writable(self) -> bool:
        return self._lock is not None

    def __enter__(self) -> "RowStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # opening

    def _open(self) -> None:
        exists = self._check_header()  # before anything is written to a folder that may be another's
        try:
            _make_folder(self.folder)
            self._take_lock()
            if not self._check_header():  # whoever held the lock until now may have made it
                self._write_header()
            remove_leftovers(self.folder)
            self._open_rows(os.O_RDWR | os.O_CREAT)
        except OSError as error:
            self._release()
            self.busy = isinstance(error, BlockingIOError)
            if not exists and not self.busy:
                raise
            if self._check_header():  # under a lock that is another's it may be in the making
                with contextlib.suppress(FileNotFoundError):
                    self._open_rows(os.O_RDONLY)
        if self._file is not None:
            self._verify(quiet=self.busy)

    def _take_lock(self) -> None:
        self._lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.holder = os.pread(self._lock, 100, 0).decode(errors="replace")
            raise
        if os.fstat(self._lock).st_size:
            os.ftruncate(self._lock, 0)

    def announce(self, work: str) -> None:
        """Tell whoever finds the store busy what this process does with it."""
        if self.writable:
            with contextlib.suppress(OSError):  # a full disk
                os.pwrite(self._lock, work.encode(), 0)

    def _check_header(self) -> bool:
        """Whether there is a header. Raises UserError unless it is the one asked for, or nothing else lies there."""
        path = self.folder / "header.json"
        if not os.path.lexists(path):
            if os.path.lexists(self.folder):
                foreign = [n for n in os.listdir(self.folder) if n != ".lock" and not n.startswith(".header.json.")]
                if foreign:
                    raise UserError(f"{self.folder}: holds {min(foreign)} and no header.json; choose another folder")
            return False
        with open_regular(path, "another folder, or remove that one") as file:
            text = file.read(1 << 20)
        try:
            found = json.loads(text)
            checksum = found.pop("crc32")
            description = found["description"].items()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise DamagedFile(f"{path}: is no header of a store; {ADVICE}") from None
        there = {**found, **{f"description.{key}": value for key, value in description}}
        asked = {**self._fields, **{f"description.{k}": v for k, v in self._fields["description"].items()}}
        del there["description"], asked["description"]
        for name in [*asked, *there]:
            then, now = (
                json.dumps(fields[name], sort_keys=True) if name in fields else "nothing" for fields in (there, asked)
            )
            if then != now:
                name = name.removeprefix("description.")
                raise UserError(f"{self.folder}: was made with {name} {then}, asked for is {now}; {ADVICE}")
        if checksum != self._seal:
            raise DamagedFile(f"{path}: is damaged; {ADVICE}")
        return True

    def _write_header(self) -> None:
        text = json.dumps({**self._fields, "crc32": self._seal}, indent=2)
        write_atomic(self.folder / "header.json", text.encode() + b"\n")

    def _open_rows(self, flags: int) -> None:
        path = self.folder / "rows.bin"
        new = flags & os.O_CREAT and not path.exists()
        self._file = os.open(path, flags | os.O_NONBLOCK, 0o666)  # a pipe would block
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            raise UserError(f"{path}: is a pipe or a device; {ADVICE}")
        if new:
            sync_folder(self.folder)

    def _verify(self, quiet: bool) -> None:
        """Enter every row up to the last good seal; who may write cuts off what follows."""
        buffer = np.empty((PIECE // self._size + 1, self._size // 4), "<i4")
        view = memoryview(buffer).cast("B")
        unsealed: list[tuple[int, np.ndarray]] = []  # (slot of the first, numbers) of records behind the last seal
        slot, sum_, sound = 0, self._seal, True
        while sound:
            count = _read_into(self._file, view, slot * self._size) // self._size
            if not count:
                break
            numbers = buffer[:count, 0].copy()
            start = 0
            for seal in np.flatnonzero(numbers == SEAL).tolist():
                sum_ = zlib.crc32(view[start * self._size : (seal + 1) * self._size - 4], sum_)
                if sum_ != int(buffer[seal, -1]) & 0xFFFFFFFF:
                    sound = False
                    break
                start, self._seal, self._end = seal + 1, sum_, slot + seal + 1
            if start:
                for first, part in [*unsealed, (slot, numbers[:start])]:
                    self._enter(first, part)
                unsealed = []
            unsealed.append((slot + start, numbers[start:]))
            sum_ = zlib.crc32(view[start * self._size : count * self._size], sum_)
            slot += count
        self.filled = int(np.count_nonzero(self._slots >= 0))
        self._committed, self._committed_seal = self._end, self._seal
        excess = os.fstat(self._file).st_size - self._end * self._size
        if excess > 0 and not quiet:
            say(
                f"{self.folder}: {self.filled:,} rows are good; the {_readable(excess)} behind them "
                "(a write that was cut short, or damage) are left out"
            )
        if excess > 0 and self.writable:
            os.ftruncate(self._file, self._end * self._size)
            os.fsync(self._file)

    def _enter(self, first: int, numbers: np.ndarray) -> None:
        """Records from slot `first` on, seals among them, in the table."""
        held = np.flatnonzero(numbers != SEAL)
        rows = numbers[held] - 1
        if rows.size and (rows.min() < 0 or rows.max() >= self.rows):
            raise DamagedFile(f"{self.folder}: rows.bin holds rows that it cannot have; {ADVICE}")
        self._slots[rows] = first + held

    # reading

    def _slots_of(self, rows: np.ndarray) -> np.ndarray:
        rows = np.asarray(rows)
        if rows.size and (rows.min() < 0 or rows.max() >= self.rows):
            raise IndexError(f"rows from {rows.min()} to {rows.max()}, of {self.rows}")
        return self._slots[rows]

    def holds(self, rows: np.ndarray) -> np.ndarray:
        """Of each of `rows` (B,), whether it can be read: (B,) bool."""
        return self._slots_of(rows) >= 0

    def missing(self, rows: np.ndarray) -> np.ndarray:
        """Which of these rows (B,) are not held: sorted, none twice."""
        return np.unique(np.asarray(rows)[self._slots_of(rows) < 0])

    def read(self, rows: np.ndarray) -> np.ndarray:
        """The values (B, width) of `rows` (B,). Raises KeyError where one is not held, DamagedFile where somebody
        else changed the file.
        """
        slots = self._slots_of(rows)
        if not slots.size:
            return np.empty((0, self.width), self.dtype)
        if slots.min() < 0:
            raise KeyError(f"{np.count_nonzero(slots < 0)} of {len(slots)} rows are not held")
        found = self._mapped(int(slots.max()) + 1)[slots]
        if not np.array_equal(found[:, 0], np.asarray(rows) + 1):
            raise self._changed()
        return self._values(found)

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Every row that is held, in the file's order: pieces of at most PIECE bytes, rows (b,), values (b, width)."""
        end, step = self._end, PIECE // self._size + 1
        for first in range(0, end, step):
            found = self._mapped(end)[first : min(first + step, end)]
            found = found[found[:, 0] != SEAL]
            rows = found[:, 0].astype(np.int64) - 1
            if len(rows):
                yield rows, self._values(found)

    def _mapped(self, count: int) -> np.ndarray:
        """At least the first `count` records, (n, size / 4) int32."""
        if self._file is None:
            raise RuntimeError(f"{self.folder}: is closed")
        if os.fstat(self._file).st_size < self._end * self._size:  # reading behind the file's end would be a SIGBUS
            raise self._changed()
        if count > len(self._records):
            # a map costs what was read through the one before it, so there may be a new one after every add
            data = mmap.mmap(self._file, self._end * self._size, access=mmap.ACCESS_READ)
            self._records = np.frombuffer(data, "<i4").reshape(self._end, -1)
        return self._records

    def _values(self, records: np.ndarray) -> np.ndarray:
        values = records.view(DTYPES[self.dtype])[:, 4 // np.dtype(self.dtype).itemsize :][:, : self.width]
        return np.ascontiguousarray(values, self.dtype)

    def _changed(self) -> DamagedFile:
        return DamagedFile(f"{self.folder}: rows.bin was changed by somebody else; start again")

    # writing

    def add(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Append `values` (B, width), of the store's dtype, as `rows` (B,), none of which is held. They can be read at
        once. Raises OSError where the disk is full: then some of the rows may be held, and nothing else is changed.
        """
        if not self.writable:
            raise RuntimeError(f"{self.folder}: is closed, or another process adds to it, or it cannot be written")
        rows, values = np.asarray(rows), np.asarray(values)
        if values.shape != (len(rows), self.width) or values.dtype != self.dtype:
            raise ValueError(f"values {values.shape} {values.dtype} for {len(rows)} rows of {self.width} {self.dtype}")
        if (self._slots_of(rows) >= 0).any() or len(np.unique(rows)) < len(rows):
            raise ValueError("rows that are held, or come twice")
        step = PIECE // self._size + 1
        for first in range(0, len(rows), step):
            self._append(rows[first : first + step], values[first : first + step])

    def _append(self, rows: np.ndarray, values: np.ndarray) -> None:
        records = np.zeros((len(rows) + 1, self._size // 4), "<i4")
        records[:-1, 0] = rows
        records[:-1, 0] += 1
        records.view(DTYPES[self.dtype])[:-1, 4 // values.itemsize :][:, : self.width] = values
        records[-1, 0] = SEAL
        data = memoryview(records).cast("B")
        seal = zlib.crc32(data[:-4], self._seal)
        data[-4:] = seal.to_bytes(4, "little")
        try:
            done = 0
            while done < len(data):
                done += os.pwrite(self._file, data[done:], self._end * self._size + done)
        except OSError:
            with contextlib.suppress(OSError):  # what stays there has no seal, and is written over
                os.ftruncate(self._file, self._end * self._size)
            raise
        self._slots[rows] = np.arange(self._end, self._end + len(rows), dtype=np.int32)
        self._end, self._seal = self._end + len(rows) + 1, seal
        self.filled += len(rows)

    def commit(self) -> None:
        """What was added survives a power loss from here on. Raises OSError where the disk does not take it: then what
        came since the last commit is no longer held, for the kernel may have dropped it.
        """
        if not self.writable or self._end == self._committed:
            return
        try:
            os.fsync(self._file)
        except OSError:
            self._slots[self._slots >= self._committed] = -1
            self.filled = int(np.count_nonzero(self._slots >= 0))
            self._end, self._seal = self._committed, self._committed_seal
            self._records = self._records[: self._end]
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._end * self._size)
            raise
        self._committed, self._committed_seal = self._end, self._seal

    def close(self) -> None:
        """Commit, and let another process write."""
        try:
            self.commit()
        finally:
            if self.writable:
                fcntl.flock(self._lock, fcntl.LOCK_UN)  # forked children hold the descriptor as well
            self._release()

    def __del__(self) -> None:
        self._release()

    def _release(self) -> None:
        self._records = np.empty((0, 1), "<i4")
        for name in ("_file", "_lock"):
            if getattr(self, name) is not None:
                os.close(getattr(self, name))
                setattr(self, name, None)


def _make_folder(folder: Path) -> None:
    """The folder and those above it, their names on the disk."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in new:
        sync_folder(path.parent)


def _checksum(fields: dict) -> int:
    return zlib.crc32(json.dumps(fields, sort_keys=True).encode())


def _read_into(file: int, view: memoryview, offset: int) -> int:
    """Bytes read: fewer than the view has at the file's end only."""
    done = 0
    while done < len(view):
        count = os.preadv(file, [view[done:]], offset + done)
        if not count:
            break
        done += count
    return done
