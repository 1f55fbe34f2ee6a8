"""Checkpoints: written atomically, with a checksum, read without running anything that lies in them."""

import argparse
import errno
import hashlib
import io
import os
import pickletools
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from mdistiller import files
from mdistiller.errors import DamagedFile, UserError
from mdistiller.files import link, write_atomic
from mdistiller.models import cifar_model_dict

# Teachers trained with mdistiller and RepDistiller carry their accuracy as a numpy scalar and may carry their
# command-line arguments. These types hold data only; everything else in a pickle stays forbidden.
_scalar = np.float64(0).__reduce__()[0]
_SAFE = [_scalar, np.dtype, argparse.Namespace]
_SAFE += [type(np.dtype(t)) for t in (np.float64, np.float32, np.int64, np.int32, np.bool_)]
if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7):  # older releases take no names
    # numpy 1 and 2 name the module of the scalar's constructor differently, and a file may come from either
    _SAFE += [(_scalar, f"{name}.scalar") for name in ("numpy.core.multiarray", "numpy._core.multiarray")]
torch.serialization.add_safe_globals(_SAFE)

LEGACY_PICKLES = 5  # magic number, version, system, the object, the keys of its storages
MOST_PARTS = 10**6
_NUMBERS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16)
_NUMBERS += (torch.int8, torch.uint8, torch.bool)


def digest(value: object) -> str:
    """SHA-256 of nested dicts and lists of tensors and plain values: of dtypes, shapes and every bit."""
    hasher = hashlib.sha256()
    _feed(hasher, value)
    return hasher.hexdigest()


def _feed(hasher, value: object) -> None:
    if isinstance(value, Tensor):
        hasher.update(f"{value.dtype}{tuple(value.shape)}".encode())
        hasher.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, (Mapping, list, tuple)):
        items = list(value.items() if isinstance(value, Mapping) else enumerate(value))
        hasher.update(f"{len(items)}:".encode())
        for key, item in items:
            hasher.update(f"{key!r}=".encode())
            _feed(hasher, item)
    else:
        hasher.update(f"{value!r};".encode())


def save(state: dict, *paths: Path) -> None:
    """torch.save of `state`, with its digest as "checksum", under each of `paths`, each atomically."""
    buffer = io.BytesIO()
    torch.save(state | {"checksum": digest(state)}, buffer)
    write_atomic(paths[0], buffer.getvalue())
    for path in paths[1:]:
        link(paths[0], path)


def load(path: str | Path) -> dict:
    """What a checkpoint holds, on the CPU. Raises UserError where it is missing or is not plain data."""
    with files.open_regular(path, "a checkpoint") as file:
        try:
            check(file)
            file.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                state = torch.load(file, map_location="cpu", weights_only=True)
            checksum = state.pop("checksum", None) if isinstance(state, dict) else None
            if isinstance(checksum, str) and checksum != digest(state):  # files of other frameworks have none
                raise ValueError("its checksum is not that of its contents")
        except MemoryError:
            raise
        except Exception as error:  # no list of what torch raises for foreign bytes is complete
            reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
            if getattr(error, "errno", None) in (errno.EIO, errno.ESTALE):
                raise UserError(f"{path}: cannot be read ({reason}); try again") from None
            raise DamagedFile(f"{path}: is no checkpoint of plain tensors, or is damaged ({reason})") from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}; expected a checkpoint: {{'model': state_dict}}")
    return state


def check(file: BinaryIO) -> None:
    """Raises ValueError for a checkpoint that would take more memory than it takes on the disk, or endless time."""
    if file.read(4) != b"PK\3\4":  # by which torch tells the two formats apart; a zip may also follow other data
        file.seek(0)
        for _ in range(LEGACY_PICKLES):
            check_pickle(file)
        return
    archive = zipfile.ZipFile(file)
    entries = archive.infolist()  # torch.save stores them as they are, each once
    stored = all(e.compress_type == zipfile.ZIP_STORED and e.compress_size == e.file_size for e in entries)
    if not stored or sum(e.file_size for e in entries) > os.fstat(file.fileno()).st_size:
        raise ValueError("its zip entries are compressed or overlap")
    if len({e.filename for e in entries}) < len(entries):
        raise ValueError("two of its zip entries share a name")
    for entry in entries:
        if entry.filename.lower().endswith("data.pkl"):
            check_pickle(io.BytesIO(archive.read(entry)))


def check_pickle(file: BinaryIO) -> None:
    """Read one pickle without building anything. Raises ValueError where a tuple that holds tuples, each several times
    over, would be of more than MOST_PARTS parts: as the key of a dictionary it is hashed part by part, for ever.
    """
    stack, memo = [], {}  # of each object its parts: those of a tuple, 1 for all else, None for a mark
    for op, argument, _ in pickletools.genops(file):
        if op.name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif op.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif op.name == "MARK":
            stack.append(None)
        else:
            parts, taken = 1, [kind for kind in op.stack_before if kind is not pickletools.stackslice]
            for kind in reversed(taken):
                part = stack.pop()
                while kind is pickletools.markobject and part is not None:
                    parts += part
                    part = stack.pop()
                parts += part or 0
            if "TUPLE" not in op.name:
                parts = 1
            if parts > MOST_PARTS:
                raise ValueError("its tuples multiply")
            stack += [parts] * len(op.stack_after)


def model_state(checkpoint: dict, path: str | Path) -> dict[str, Tensor]:
    """The network's state_dict in any checkpoint of this field: {"model": ...}, {"state_dict": ...} or bare, with or
    without "module."; of a distiller's state, the student's.
    """
    state = next((checkpoint[key] for key in ("model", "state_dict") if key in checkpoint), checkpoint)
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: holds no weights; expected {{'model': state_dict}}")
    state = {str(key).removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}
    odd = next((key for key, value in state.items() if not is_plain(value)), None)
    if odd is not None:
        raise UserError(f"{path}: weight '{odd}' is no plain tensor of floats or whole numbers; pass a state_dict")
    student = {key.removeprefix("student."): value for key, value in state.items() if key.startswith("student.")}
    return {key.removeprefix("module."): value for key, value in (student or state).items()}


def is_plain(value: Tensor) -> bool:
    """Of real numbers that lie in memory: not sparse, nested, quantized, complex, or without data."""
    dense = value.layout == torch.strided and value.device.type == "cpu" and not value.is_nested
    return dense and value.dtype in _NUMBERS


def load_weights(model: nn.Module, name: str, num_classes: int, path: str | Path) -> dict:
    """Load the weights in `path` into `model`, the architecture `name` for `num_classes`; returns the checkpoint.

    Raises UserError that names both sides where the checkpoint is of another architecture or number of classes, or
    holds a weight that is not finite.
    """
    checkpoint = load(path)
    state = model_state(checkpoint, path)
    own = model.state_dict()
    for key in own.keys() - state.keys():  # checkpoints older than PyTorch 0.4.1 lack the counters, which nothing reads
        if key.endswith("num_batches_tracked"):
            state[key] = own[key]
    if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in own.items()}:
        found = identify(state)
        holds = f"holds {found[0]} with {found[1]} classes" if found else "holds no architecture of the zoo"
        raise UserError(f"{path}: {holds}, but {name} with {num_classes} classes is wanted; pass the file that fits")
    kind = next((k for k, v in state.items() if v.is_floating_point() != own[k].is_floating_point()), None)
    if kind:
        raise UserError(f"{path}: weight '{kind}' is {state[kind].dtype}, expected {own[kind].dtype}; wrong file?")
    bad = next((key for key, value in state.items() if not value.isfinite().all()), None)
    if bad:
        raise UserError(f"{path}: weight '{bad}' holds NaN or infinity; the file is damaged or its training diverged")
    model.load_state_dict(state)
    return checkpoint


def identify(state: dict[str, Tensor]) -> tuple[str, int] | None:
    """(name, number of classes) of the model in the zoo whose keys and shapes these are."""
    shapes = {key: value.shape for key, value in state.items() if not key.endswith("num_batches_tracked")}
    matrices = [value for value in state.values() if value.ndim == 2]
    if not matrices:
        return None
    num_classes = len(matrices[-1])
    if not 0 < num_classes < 2**31:  # a model of so many cannot be described, let alone be held
        return None
    for name, (constructor, _) in cifar_model_dict.items():
        try:
            with torch.device("meta"):
                model = constructor(num_classes=num_classes)
        except Exception:  # a constructor of the user's may need values, which a meta tensor has not
            continue
        own = {k: v.shape for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
        if own == shapes:
            return name, num_classes
    return None
