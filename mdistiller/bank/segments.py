"""Rows of numbers on disk, such as a teacher's logits, in files that are written once and never changed."""

import contextlib
import uuid
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mdistiller.errors import UserError
from mdistiller.files import remove_leftovers, write_atomic
from mdistiller.terminal import say

# A look-up visits every file, so more than MOST_SMALL files of fewer than SMALL_BYTES are merged.
MOST_SMALL = 64
SMALL_BYTES = 1 << 24


class Segment(NamedTuple):
    rows: Tensor  # (n,) int64
    values: Tensor  # (n, width); of a file: its bytes, which the kernel reads when they are looked at
    first: int  # the slot of its first row
    path: Path | None  # None until it is committed


class Segments:
    """Rows in `folder`: row r of `rows` possible ones holds `width` numbers of `dtype`.

    Every `commit` writes what was added as a safetensors file of its own, under a temporary name that is then renamed.
    So no file is ever half written, and any number of processes may read and add at the same time without a lock. Two
    of them may write the same row, which is then the same numbers twice. `description` says what the rows are, and
    lies in every file. In memory are 4 bytes for each possible row, and what is not committed yet.

    Raises UserError where a file in the folder has another description; one that cannot be read is left out, with a
    warning.
    """

    def __init__(self, folder: Path, description: dict[str, object], rows: int, width: int, dtype: torch.dtype):
        self.folder, self.rows, self.width, self.dtype = folder, rows, width, dtype
        self.table: Tensor | None = None  # (rows, width): all of them in a device's memory
        self._description = {key: str(value) for key, value in description.items()}
        self._slots = torch.full((rows,), -1, dtype=torch.int32)  # where a row is, counted over all segments, or -1
        self._segments: list[Segment] = []
        self._end = 0  # the next free slot
        self._seen: set[Path] = set()
        with contextlib.suppress(OSError):  # a folder that may only be read
            remove_leftovers(folder, older_than=3600.0)
        self.refresh()
        self._merge()

    @property
    def filled(self) -> int:
        """The number of rows that are held."""
        return int((self._slots >= 0).sum())

    def holds(self, rows: Tensor) -> Tensor:
        """Return of each of `rows` (n,) whether it is held, (n,) bool."""
        return self._slots[rows] >= 0

    def read(self, rows: Tensor) -> Tensor:
        """Return the values (n, width) of `rows` (n,), all held; on the device of `table` if there is one."""
        if self.table is not None:
            return self.table[rows.to(self.table.device)]
        slots, order = self._slots[rows].sort()
        firsts = torch.tensor([segment.first for segment in self._segments], dtype=torch.int32)
        numbers = torch.searchsorted(firsts, slots, right=True) - 1  # which segment has it
        places = (slots - firsts[numbers]).split(numbers.bincount(minlength=len(firsts)).tolist())
        # index_select copies whole rows, several times faster than an index in brackets
        found = [s.values.index_select(0, place) for s, place in zip(self._segments, places, strict=True) if len(place)]
        return torch.cat(found).index_select(0, order.argsort())

    def add(self, rows: Tensor, values: Tensor) -> None:
        """Hold `values` (n, width) of `rows` (n,), both on the CPU. They can be read at once."""
        self._append(Segment(rows, values, self._end, None))

    def commit(self) -> None:
        """Write what was added to the disk, and take up what other processes have written.

        Raises OSError where the disk does not take it; then it is held in memory as before.
        """
        fresh = [segment for segment in self._segments if segment.path is None]
        if fresh:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(fresh, uuid.uuid4())
        self.refresh()
        self._merge()

    def refresh(self) -> None:
        """Take up the files that other processes have written."""
        while new := {path for path in self.folder.glob("*.safetensors") if path.is_file()} - self._seen:
            for path in sorted(new):
                self._load(path)

    def to_device(self, device: torch.device) -> None:
        """Hold all rows, those that come later too, in the memory of `device`."""
        self.table = torch.empty(self.rows, self.width, dtype=self.dtype, device=device)
        for segment in self._segments:
            self.table[segment.rows.to(device)] = segment.values.to(device)

    def _append(self, segment: Segment) -> None:
        self._segments.append(segment)
        self._end += len(segment.rows)
        self._slots[segment.rows] = torch.arange(segment.first, self._end, dtype=torch.int32)
        if self.table is not None:
            self.table[segment.rows.to(self.table.device)] = segment.values.to(self.table.device)

    def _load(self, path: Path) -> None:
        self._seen.add(path)
        try:
            with safe_open(path, framework="pt") as file:
                found = file.metadata() or {}
                rows, values = file.get_tensor("rows"), file.get_tensor("values")
        except (SafetensorError, OSError, RuntimeError) as error:
            # where it is gone, another process has merged it, into a file that the next look into the folder finds
            if path.exists():
                say(f"warning: {path}: cannot be read and is left out ({error}); remove it")
            return
        for key, asked in self._description.items():
            if found.get(key) != asked:
                there = f"{key} {found[key]}" if key in found else f"no {key}"
                raise UserError(
                    f"{path}: was made with {there}, asked for is {asked}; remove it, or choose another folder"
                )
        self._append(Segment(rows, values, self._end, path))

    def _write(self, segments: list[Segment], name: uuid.UUID) -> None:
        """Put one new file in the place of `segments`."""
        rows, twice = torch.cat([segment.rows for segment in segments]).unique(return_inverse=True)
        places = torch.empty_like(rows).index_copy_(0, twice, torch.arange(len(twice)))
        values = torch.cat([segment.values for segment in segments]).index_select(0, places)
        path = self.folder / f"{name.hex}.safetensors"
        write_atomic(path, save({"rows": rows, "values": values}, self._description))
        gone = {id(segment) for segment in segments}
        self._segments = [segment for segment in self._segments if id(segment) not in gone]
        self._seen.discard(path)
        self.refresh()  # it is there, or another process has merged it already
        for segment in segments:
            if segment.path:
                segment.path.unlink(missing_ok=True)  # a process that has it open reads on

    def _merge(self) -> None:
        """Write many small files as one. Processes that do so at the same time write the same one."""
        small = [segment for segment in self._segments if segment.path and segment.values.nbytes < SMALL_BYTES]
        if len(small) > MOST_SMALL:
            name = uuid.uuid5(uuid.NAMESPACE_OID, "".join(segment.path.name for segment in small))
            with contextlib.suppress(OSError):  # a full disk, a folder that may only be read: look-ups take longer
                self._write(small, name)
