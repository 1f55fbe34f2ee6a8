"""Checkpoints are written atomically, with a checksum, and read as plain data: nothing that lies in them is run."""

import argparse
import contextlib
import errno
import hashlib
import io
import re
import tarfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mdistiller import files
from mdistiller.errors import DamagedFile, OtherNetwork, UserError
from mdistiller.files import link, write_atomic
from mdistiller.models import cifar_model_dict
from mdistiller.terminal import counted

# Checkpoints of mdistiller and RepDistiller carry their accuracy as a numpy scalar, and some their command line. These
# types hold data only; every other one in a pickle stays forbidden.
_scalar = np.float64(0).__reduce__()[0]
_SAFE = [np.dtype, argparse.Namespace, *(type(np.dtype(name)) for name in ("f8", "f4", "i8", "i4", "?")), _scalar]
if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7):  # older releases take no names
    # numpy 1 and 2 name the module of the scalar's constructor differently, and a file may come from either
    _SAFE += [(_scalar, f"{name}.scalar") for name in ("numpy.core.multiarray", "numpy._core.multiarray")]
torch.serialization.add_safe_globals(_SAFE)

MOST_DEPTH = 3  # of dicts around the weights of a checkpoint


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
            refuse_other_kinds(path, str(error))
            raise DamagedFile(f"{path}: is no checkpoint of plain tensors, or is damaged ({reason})") from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}; expected a checkpoint: {{'model': state_dict}}")
    return state


def refuse_other_kinds(path: str | Path, error: str) -> None:
    """Raise UserError where the file, which torch refused with that `error`, is a pickled object or an archive."""
    if pickled := re.search(r"(?:GLOBAL|global:?) '?([\w.]+\.\w+)", error):
        raise UserError(
            f"{path}: is no checkpoint of plain tensors but a pickled {pickled[1]}, which would run code; where its "
            f"code is, do torch.save(torch.load('{Path(path).name}', weights_only=False).state_dict(), 'weights.pth')"
        )
    if _is_archive(path):
        raise UserError(
            f"{path}: is an archive, no checkpoint; unpack it and name a file in it, or, of mdistiller's teachers, "
            f"python3 tools/download.py teachers --from {path}"
        )


def _is_archive(path: str | Path) -> bool:
    """Return whether the file is a tar or zip archive that torch has not written."""
    with contextlib.suppress(Exception):  # no list of what damaged bytes raise in zipfile is complete
        if tarfile.is_tarfile(path):
            return True
        with zipfile.ZipFile(path) as file:
            return not any(name.endswith("/data.pkl") for name in file.namelist())
    return False


def load_weights(model: nn.Module, name: str, num_classes: int, path: str | Path) -> dict:
    """Load the weights in `path` into `model`, the architecture `name` for `num_classes`; returns the checkpoint.

    Raises UserError that names both sides where the checkpoint is of another architecture or number of classes, or
    holds a weight of another kind or one that is not finite.
    """
    checkpoint, own = load(path), model.state_dict()
    state = own | find_weights(checkpoint, own, f"{name} with {num_classes} classes", path)
    for key, value in state.items():
        if value.is_floating_point() != own[key].is_floating_point():
            raise UserError(f"{path}: weight '{key}' is {value.dtype}, expected {own[key].dtype}; wrong file?")
        if not value.to(own[key].dtype).isfinite().all():
            raise UserError(
                f"{path}: weight '{key}' holds NaN or infinity; the file is damaged or its training diverged"
            )
    model.load_state_dict(state)
    return checkpoint


def find_weights(checkpoint: dict, own: dict[str, Tensor], wanted: str, path: str | Path) -> dict[str, Tensor]:
    """Return the weights in `checkpoint` that have the keys and shapes of `own`, the state_dict of a network that is
    called `wanted`: under whatever key, inside other dicts, and with whatever prefix their names begin.

    Where several fit, those under "model" or "state_dict" are taken, of a distiller the student's. The counters that
    checkpoints older than PyTorch 0.4.1 lack may be missing. Raises UserError where none fits, or several do.
    """
    states = dict(_states(checkpoint))
    if not states:
        raise UserError(f"{path}: holds no weights ({_listed(checkpoint)}); expected {{'model': state_dict}}")
    parts = [(where, prefix, part) for where, state in states.items() for prefix, part in _parts(state, own)]
    for _, _, part in parts:
        for key, value in part.items():
            if value.layout != torch.strided or value.is_nested or value.is_meta:
                raise UserError(f"{path}: weight '{key}' is sparse, nested or without data; pass plain tensors")
    fits = {(where, prefix): part for where, prefix, part in parts if _misfit(part, own) is None}
    for chosen in (
        [place for place in fits if place[0] in ("model", "state_dict")],
        [place for place in fits if "student" in place[1] or "student" in place[0]],
        [*fits],
    ):
        if len(chosen) == 1:
            return fits[chosen[0]]
    if fits:
        names = ", ".join(".".join(filter(None, (where, prefix.rstrip(".")))) for where, prefix in fits)
        raise UserError(f"{path}: holds several weights that fit {wanted}: {names}; store the wanted ones alone")
    _, _, closest = max(parts, key=lambda part: sum(_fits(part[2], own, key) for key in own))
    found = identify(closest)
    holds = f"holds {found[0]} with {counted(found[1], 'class')}" if found else "holds no architecture of the zoo"
    misfit = "" if found else f" (it has {_listed(checkpoint)}; the first that does not fit: {_misfit(closest, own)})"
    raise OtherNetwork(f"{path}: {holds}, but {wanted} is wanted{misfit}; pass the file that fits")


def _states(node: Mapping, where: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield every dict in `node` that holds tensors, with the keys that lead to it; not optimizers' numbered ones."""
    tensors = {key: value for key, value in node.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if tensors:
        yield where, tensors
    for key, value in node.items() if depth < MOST_DEPTH else ():
        if isinstance(value, Mapping):
            yield from _states(value, f"{where}.{key}".lstrip("."), depth + 1)


def _parts(state: dict[str, Tensor], own: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield (prefix, the weights below it) for each prefix under which the network's first weight may lie."""
    first = next(iter(own))
    prefixes = [key.removesuffix(first) for key in state if key == first or key.endswith(f".{first}")]
    for prefix in prefixes or [""]:
        yield prefix, {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _fits(part: dict[str, Tensor], own: dict[str, Tensor], key: str) -> bool:
    return key in part and part[key].shape == own[key].shape


def _misfit(part: dict[str, Tensor], own: dict[str, Tensor]) -> str | None:
    """Return the first weight by which `part` differs from `own` in keys or shapes, or None."""
    for key, value in own.items():
        if key not in part and not key.endswith("num_batches_tracked"):
            return f"{key} is missing"
        if not _fits(part, own, key) and key in part:
            return f"{key} is {tuple(part[key].shape)}, not {tuple(value.shape)}"
    return next((f"{key} is one too many" for key in part if key not in own), None)


def _listed(checkpoint: Mapping) -> str:
    """Return the first keys of a checkpoint."""
    keys = [str(key)[:40] for key in checkpoint]
    more = f" and {len(keys) - 6} more" if len(keys) > 6 else ""
    return f"the keys {', '.join(keys[:6])}{more}" if keys else "it is empty"


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
