"""Checkpoints are written atomically, with a checksum, and read as plain data: nothing that lies in them is run."""

import argparse
import errno
import hashlib
import io
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mdistiller import files
from mdistiller.errors import DamagedFile, UserError
from mdistiller.files import link, write_atomic
from mdistiller.models import cifar_model_dict

# Checkpoints of mdistiller and RepDistiller carry their accuracy as a numpy scalar, and some their command line. These
# types hold data only; every other one in a pickle stays forbidden.
_scalar = np.float64(0).__reduce__()[0]
_SAFE = [np.dtype, argparse.Namespace, *(type(np.dtype(name)) for name in ("f8", "f4", "i8", "i4", "?")), _scalar]
if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7):  # older releases take no names
    # numpy 1 and 2 name the module of the scalar's constructor differently, and a file may come from either
    _SAFE += [(_scalar, f"{name}.scalar") for name in ("numpy.core.multiarray", "numpy._core.multiarray")]
torch.serialization.add_safe_globals(_SAFE)


def digest(value: object) -> str:
    """Return the SHA-256 of nested dicts and lists of tensors and plain values: of dtypes, shapes and every bit."""
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
    """Save `state`, with its digest as "checksum", under each of `paths`, each atomically."""
    buffer = io.BytesIO()
    torch.save(state | {"checksum": digest(state)}, buffer)
    write_atomic(paths[0], buffer.getvalue())
    for path in paths[1:]:
        link(paths[0], path)


def load(path: str | Path) -> dict:
    """Return what the checkpoint `path` holds, on the CPU, without running anything that lies in it.

    Raises UserError where it cannot be read or is no checkpoint, DamagedFile where its bytes are not plain data or not
    what was saved.
    """
    with files.open_regular(path, "a checkpoint") as file:
        try:
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


def model_state(checkpoint: dict, path: str | Path) -> dict[str, Tensor]:
    """Return the network's state_dict in any checkpoint of this field: {"model": ...}, {"state_dict": ...} or bare,
    with or without "module."; of a distiller's state, the student's. Raises UserError where there is none.
    """
    state = next((checkpoint[key] for key in ("model", "state_dict") if key in checkpoint), checkpoint)
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: holds no weights; expected {{'model': state_dict}}")
    state = {str(key).removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}
    for key, value in state.items():
        if value.layout != torch.strided or value.is_nested or value.is_meta:
            raise UserError(f"{path}: weight '{key}' is sparse, nested or without data; pass plain tensors")
    student = {key.removeprefix("student."): value for key, value in state.items() if key.startswith("student.")}
    return {key.removeprefix("module."): value for key, value in (student or state).items()}


def load_weights(model: nn.Module, name: str, num_classes: int, path: str | Path) -> dict:
    """Load the weights in `path` into `model`, the architecture `name` for `num_classes`; returns the checkpoint.

    Raises UserError that names both sides where the checkpoint is of another architecture or number of classes, or
    holds a weight of another kind or one that is not finite.
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
    for key, value in state.items():
        if value.is_floating_point() != own[key].is_floating_point():
            raise UserError(f"{path}: weight '{key}' is {value.dtype}, expected {own[key].dtype}; wrong file?")
        if not value.to(own[key].dtype).isfinite().all():
            raise UserError(
                f"{path}: weight '{key}' holds NaN or infinity; the file is damaged or its training diverged"
            )
    model.load_state_dict(state)
    return checkpoint


def identify(state: dict[str, Tensor]) -> tuple[str, int] | None:
    """Return (name, number of classes) of the model in the zoo whose keys and shapes these are, or None."""
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
