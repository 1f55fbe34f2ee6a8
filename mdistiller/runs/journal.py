"""What a run has done since its last checkpoint, kept after every training step: a kill -9 costs a step, no epoch.

Two files, `journal.a` and `journal.b`, are written over in turn and never synced: what a process has written outlives
it, though not a power cut. A digest tells a file whose write was cut short; the other one is whole then. A file:

    HEAD          MAGIC, bytes of the tensors, bytes of the text, SHA-256 of the text and of the tensors' block sums
    tensors       each from a multiple of ALIGNED bytes on, zeros behind the last up to a multiple of BLOCK
    text          JSON: {"run": ..., "state": ...}, where {"t": [dtype, shape, channels last]} stands for a tensor, in
                  their order, and {"d": [[key, value], ...]} for a dictionary
"""

import contextlib
import hashlib
import json
import math
import os
import statistics
import struct
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mdistiller.errors import DamagedFile, UserError
from mdistiller.files import open_regular

NAMES = ("journal.a", "journal.b")
MAGIC = b"KDjourn1"
HEAD = struct.Struct("<8sQQ32s8x")
ALIGNED, BLOCK = 64, 1024
SHARE = 0.02  # of the training time that writing may take
INTERVAL = 10.0  # seconds between two writes off the CPU, where each waits for the device
NUMBERS = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
DTYPES = {name: getattr(torch, name) for name in NUMBERS}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
Kind = tuple[str, tuple[int, ...], bool]  # a tensor's dtype, shape, and whether it lies channels last


class Journal:
    """The journal in a run's `folder`. `run`: what tells this run from another one in the same folder; `share` of the
    time may be spent on it, and `interval` seconds lie between two writes at least.
    """

    def __init__(self, folder: Path, run: str, share: float = SHARE, interval: float = 0.0):
        self.paths = [folder / name for name in NAMES]
        self.run, self.share, self.interval = run, share, interval
        self._files: list[int | None] = [None, None]
        self._turn = 0
        self._kinds: list[Kind] | None = None
        self._costs: deque[float] = deque(maxlen=5)  # their median: a stall of the machine must not end the writing
        self._begin = self._last = time.perf_counter()

    def due(self) -> bool:
        """Whether a write now keeps to the share; what the state's making takes from here on counts."""
        expected = statistics.median(self._costs) if self._costs else 0.0
        self._begin = time.perf_counter()
        return self._begin - self._last >= max(self.interval, expected / self.share)

    def write(self, state: dict) -> None:
        """Keep `state`: dictionaries and lists of tensors and what JSON knows. Raises OSError where the disk does not
        take it, KeyError or TypeError where it holds something else.
        """
        tensors: list[Tensor] = []
        kinds: list[Kind] = []
        tree = describe(state, tensors, kinds)
        text = json.dumps({"run": self.run, "state": tree}, separators=(",", ":")).encode()
        self._stage(tensors, kinds)
        HEAD.pack_into(self._bytes, 0, MAGIC, len(self._body), len(text), digest(text, self._body))
        if self._files[self._turn] is None:
            self._open()
        file = self._files[self._turn]
        write_at(file, 0, self._bytes)
        write_at(file, len(self._bytes), text)
        self._turn = 1 - self._turn
        self._last = time.perf_counter()
        self._costs.append(self._last - self._begin)

    def _stage(self, tensors: list[Tensor], kinds: list[Kind]) -> None:
        """Copy the tensors into the buffer that is written, which stays while their kinds do."""
        if kinds != self._kinds:
            size = sum(stored(*kind) for kind in kinds)
            buffer = torch.zeros(HEAD.size + -(-size // BLOCK) * BLOCK, dtype=torch.uint8)
            self._body, self._bytes = buffer[HEAD.size :], memoryview(buffer.numpy())
            self._views, self._kinds = views(self._body, kinds), kinds
        torch._foreach_copy_(self._views, tensors)

    def _open(self) -> None:
        path = self.paths[self._turn]
        path.unlink(missing_ok=True)  # it may be a pipe, or another name of somebody's file
        self._files[self._turn] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)

    def read(self) -> tuple[dict | None, str]:
        """The newest state of this run that is whole, if there is one, and what was wrong with the others."""
        found: tuple[dict | None, str] = (None, "")
        for turn, path in enumerate(self.paths):
            if not os.path.lexists(path):
                continue
            try:
                run, state = read(path)
                if run != self.run:
                    raise DamagedFile(f"{path}: is the journal of another run")
            except UserError as error:
                found = found[0], error.lines[0]
                continue
            if found[0] is None or place(state) > place(found[0]):
                found, self._turn = (state, found[1]), 1 - turn
        return found

    def close(self) -> None:
        for file in filter(None, self._files):
            os.close(file)
        self._files = [None, None]

    def remove(self) -> None:
        """The files go; a later write makes them anew."""
        self.close()
        for path in self.paths:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def exists(folder: Path) -> bool:
    """Whether a run in `folder` can go on from a journal there."""
    for name in NAMES:
        with contextlib.suppress(UserError):
            read(folder / name)
            return True
    return False


def place(state: dict) -> tuple[int, int]:
    """Finished epochs, and training steps of the next one."""
    return state["epoch"], state["progress"]["done"]


def read(path: Path) -> tuple[str, dict]:
    """The run and the state that a file of a journal holds. Raises UserError unless it is whole."""
    with open_regular(path, "a run's journal") as file:
        try:
            data = bytearray(file.read())
            magic, size, length, expected = HEAD.unpack_from(data)
            if magic != MAGIC or size % BLOCK or HEAD.size + size + length > len(data):
                raise ValueError("its head does not fit")
            body = torch.frombuffer(data, dtype=torch.uint8)[HEAD.size : HEAD.size + size]
            text = bytes(data[HEAD.size + size : HEAD.size + size + length])
            if digest(text, body) != expected:
                raise ValueError("its checksum is not that of its contents")
            content = json.loads(text)
            kinds: list[Kind] = []
            collect(content["state"], kinds)
            # copies: nothing of the file stays in the model
            state = build(content["state"], iter([view.clone() for view in views(body, kinds)]))
            if [type(part) for part in place(state)] != [int, int] or min(place(state)) < 0:
                raise ValueError("it holds no run")
            return str(content["run"]), state
        except (OSError, ValueError, KeyError, TypeError, IndexError, RuntimeError, RecursionError, struct.error) as e:
            reason = str(e).split("\n")[0][:200]
            raise DamagedFile(f"{path}: is no journal, or is damaged ({reason})") from None


def digest(text: bytes, body: Tensor) -> bytes:
    """SHA-256 of the text and of the sums of BLOCK bytes each, as whole numbers of 64 bits: any bit that differs alone
    changes it, and a page of an earlier state does, at a tenth of the time that hashing all of it takes.
    """
    sums = body.view(torch.int64).view(-1, BLOCK // 8).sum(1)
    return hashlib.sha256(text + sums.numpy().tobytes()).digest()


def kind_of(tensor: Tensor) -> Kind:
    """Raises KeyError for a tensor that is not of plain numbers."""
    if tensor.layout != torch.strided or tensor.dtype not in DTYPE_NAMES:
        raise KeyError(f"a tensor of {tensor.dtype}, {tensor.layout}")
    shape = tuple(tensor.shape)
    last = len(shape) == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
    return DTYPE_NAMES[tensor.dtype], shape, last


def stored(name: str, shape: Sequence[int], _last: bool) -> int:
    """Bytes that a tensor takes with what follows it."""
    return -(-math.prod(shape) * DTYPES[name].itemsize // ALIGNED) * ALIGNED


def views(body: Tensor, kinds: Iterable[Kind]) -> list[Tensor]:
    """Where tensors of these kinds lie in `body` (bytes,), one behind the other."""
    result, start = [], 0
    for kind in kinds:
        name, shape, last = kind
        end = start + math.prod(shape) * DTYPES[name].itemsize
        flat = body[start:end].view(DTYPES[name])
        if last:
            n, c, h, w = shape
            result.append(flat.view(n, h, w, c).permute(0, 3, 1, 2))
        else:
            result.append(flat.view(shape))
        start += stored(*kind)
    return result


def describe(value: object, tensors: list[Tensor], kinds: list[Kind]) -> object:
    """`value` for JSON, its tensors and their kinds moved to the lists."""
    if isinstance(value, Tensor):
        kind = kind_of(value)
        tensors.append(value)
        kinds.append(kind)
        return {"t": kind}
    if isinstance(value, Mapping):
        return {"d": [(key, describe(item, tensors, kinds)) for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [describe(item, tensors, kinds) for item in value]
    return value


def collect(tree: object, kinds: list[Kind]) -> None:
    """The kinds of the tensors in what `describe` gave. Raises ValueError where they are none."""
    if isinstance(tree, list):
        for item in tree:
            collect(item, kinds)
    elif isinstance(tree, dict) and "d" in tree:
        for _, item in tree["d"]:
            collect(item, kinds)
    elif isinstance(tree, dict):
        name, shape, last = tree["t"]
        if name not in DTYPES or any(type(n) is not int or n < 0 for n in shape) or (last and len(shape) != 4):
            raise ValueError("one of its tensors is none")
        kinds.append((name, tuple(shape), last))


def build(tree: object, tensors: Iterable[Tensor]) -> object:
    """What `describe` was given, tuples as lists."""
    if isinstance(tree, list):
        return [build(item, tensors) for item in tree]
    if isinstance(tree, dict):
        return {key: build(item, tensors) for key, item in tree["d"]} if "d" in tree else next(tensors)
    return tree


def write_at(file: int, start: int, data: bytes | memoryview) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:], start + done)
