"""Checkpoints are written atomically, with a checksum, and read as plain data: nothing that lies in them is run."""

import argparse
import contextlib
import errno
import hashlib
import importlib.util
import io
import re
import tarfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from mdistiller import files
from mdistiller.errors import DamagedFile, OtherNetwork, UserError
from mdistiller.files import link, write_atomic
from mdistiller.models import cifar_model_dict, library_weights
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
# weights that are no file: a library's own, those of a detector's trunk, those in an installed package
PRETRAINED, TRUNK, PACKAGE = "pretrained", "trunk", "pkg:"
ENDINGS = (".pth", ".pt", ".safetensors")
DEPLOYED = (".pt2", ".onnx", ".xml")  # of tools/export.py's files, and others' of their kinds


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
    """Return what the checkpoint `path`, torch's or .safetensors, holds, on the CPU, without running what lies in it.

    Raises UserError where it cannot be read or is no checkpoint, DamagedFile where its bytes are not plain data or not
    what was saved.
    """
    with files.open_regular(path, "a checkpoint") as file:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if Path(path).suffix == ".safetensors":
                    state = safetensors.torch.load(file.read())
                else:
                    state = torch.load(file, map_location="cpu", weights_only=True)
            checksum = state.pop("checksum", None) if isinstance(state, dict) else None
            if isinstance(checksum, str) and checksum != digest(state):  # files of other frameworks have none
                raise ValueError("its checksum is not that of its contents")
        except (MemoryError, UserError):
            raise
        except Exception as error:  # no list of what torch raises for foreign bytes is complete
            # torch's first line is advice on its own call; what is wrong stands behind it
            reason = str(error).strip().rpartition("WeightsUnpickler error: ")[2]
            reason = reason.split("\n")[0][:200] or type(error).__name__
            if getattr(error, "errno", None) in (errno.EIO, errno.ESTALE):
                raise UserError(f"{path}: cannot be read ({reason}); try again") from None
            refuse_other_kinds(path, str(error))
            raise DamagedFile(f"{path}: is no checkpoint of plain tensors, or is damaged ({reason})") from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}; expected a checkpoint: {{'model': state_dict}}")
    return state


def is_source(text: str | Path) -> bool:
    """Return whether `text` names weights that are no file: pretrained, trunk, or pkg:PACKAGE."""
    return str(text) in (PRETRAINED, TRUNK) or str(text).startswith(PACKAGE)


def weights_at(source: str | Path, model: nn.Module, name: str) -> dict:
    """Return what a file or another source of weights holds for `model`, which is called `name`.

    The tensors in an installed package, whose networks have names of their own for their parts, are taken in their
    order. Raises UserError where there is nothing of the kind.
    """
    if str(source) in (PRETRAINED, TRUNK):
        return {"model": library_weights(model, name, str(source))}
    if not is_source(source):
        return load(source)
    path = _packaged(str(source).removeprefix(PACKAGE))
    tensors = [v for _, state in _states(load(path)) for k, v in state.items() if not k.endswith("num_batches_tracked")]
    keys = [key for key in model.state_dict() if not key.endswith("num_batches_tracked")]
    if len(tensors) != len(keys):
        raise OtherNetwork(f"{source}: holds {len(tensors)} tensors, and {name} has {len(keys)}; name its own network")
    return {"model": dict(zip(keys, tensors, strict=True))}


def _packaged(package: str) -> Path:
    """Return the one file of weights in an installed package. Nothing of the package is run. Raises UserError where
    there is none, DamagedFile where its name ends with the first digits of a SHA-256, as torch.hub's do, and lies.
    """
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{PACKAGE}{package}: is not installed; pip install {package.replace('_', '-')}")
    found = [file for place in spec.submodule_search_locations for file in sorted(Path(place).rglob("*"))]
    found = [file for file in found if file.suffix in ENDINGS]
    if len(found) != 1:
        raise UserError(
            f"{PACKAGE}{package}: has {counted(len(found), 'file')} of weights, not one; name a file's path"
        )
    said = re.search(r"-([0-9a-f]{8,64})$", found[0].stem)
    if said and not hashlib.sha256(found[0].read_bytes()).hexdigest().startswith(said[1]):
        raise DamagedFile(f"{found[0]}: is damaged: its SHA-256 does not begin with {said[1]}; install {package} anew")
    return found[0]


def refuse_other_kinds(path: str | Path, error: str) -> None:
    """Raise UserError where the file, which torch refused with that `error`, is of a kind that can be named: a
    pickled object, safetensors under another name, a network to deploy, text, a network of TorchScript, an archive.
    """
    if Path(path).suffix in DEPLOYED:
        raise UserError(f"{path}: is no checkpoint but a network to deploy; take the .safetensors beside it")
    if pickled := re.search(r"(?:GLOBAL|global:?) '?([\w.]+\.\w+)", error):
        raise UserError(
            f"{path}: is no checkpoint of plain tensors but a pickled {pickled[1]}, which would run code; where its "
            f"code is, do torch.save(torch.load('{Path(path).name}', weights_only=False).state_dict(), 'weights.pth')"
        )
    with open(path, "rb") as file:
        start = file.read(80)
    if start[8:10] == b'{"' and Path(path).suffix != ".safetensors":
        raise UserError(f"{path}: is a file of safetensors; give it a name that ends so, {Path(path).stem}.safetensors")
    if text := re.match(rb"\s*([ -~]{10,})", start):  # a page that says "not found", Git LFS's pointer
        raise DamagedFile(f"{path}: is no checkpoint but text, '{text[1].decode()} ...'; fetch the file itself")
    if "TorchScript" in error:
        name = Path(path).name
        raise UserError(
            f"{path}: is no checkpoint but a network of TorchScript; "
            f"do torch.save(torch.jit.load('{name}').state_dict(), 'weights.pth')"
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


def load_weights(model: nn.Module, name: str, num_classes: int, path: str | Path, new_head: bool | None = None) -> dict:
    """Load the weights in `path`, or of another source, into `model`, the architecture `name` for `num_classes`;
    returns the checkpoint. `new_head`: whether, where only the number of classes differs, the model keeps its own last
    layer; None where that cannot be asked for.

    Raises UserError that names both sides where the checkpoint is of another architecture or number of classes, or
    holds a weight of another kind or one that is not finite.
    """
    checkpoint, own = weights_at(path, model, name), model.state_dict()
    heads = getattr(model, "heads", ())  # of a detector: several layers, and several rows for each class
    state = own | find_weights(checkpoint, own, (name, num_classes, heads), path, new_head)
    for key, value in state.items():
        if value.is_floating_point() != own[key].is_floating_point():
            raise UserError(f"{path}: weight '{key}' is {value.dtype}, expected {own[key].dtype}; wrong file?")
        if not value.to(own[key].dtype).isfinite().all():
            raise UserError(
                f"{path}: weight '{key}' holds NaN or infinity; the file is damaged or its training diverged"
            )
    model.load_state_dict(state)
    return checkpoint


def find_weights(
    checkpoint: dict,
    own: dict[str, Tensor],
    network: tuple[str, int, tuple[str, ...]],
    path: str | Path,
    new_head: bool | None,
) -> dict[str, Tensor]:
    """Return the weights in `checkpoint` that have the keys and shapes of `own`, the state_dict of a `network`, (name,
    number of classes, beginnings of the last layers' names, if they are several): under whatever key, inside other
    dicts, and with whatever prefix their names begin.

    Where several fit, those under "model" or "state_dict" are taken, of a distiller the student's. The counters that
    checkpoints older than PyTorch 0.4.1 lack may be missing. Raises UserError where none fits, or several do.
    """
    states, wanted = dict(_states(checkpoint)), f"{network[0]} with {network[1]} classes"
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
    classes, rest = _other_head(closest, own, *network[1:])
    if classes and new_head:
        return rest
    found = (network[0], classes) if classes else identify(closest)
    holds = f"holds {found[0]} with {counted(found[1], 'class')}" if found else "holds no architecture of the zoo"
    misfit = "" if found else f" (it has {_listed(checkpoint)}; the first that does not fit: {_misfit(closest, own)})"
    ask = ", or set DISTILLER.NEW_HEAD True for a new last layer, with DISTILLER.TRAIN_TEACHER True for a teacher's"
    ask = ask if classes and new_head is not None else ""
    raise OtherNetwork(f"{path}: {holds}, but {wanted} is wanted{misfit}; pass the file that fits{ask}")


def _other_head(
    part: dict[str, Tensor], own: dict[str, Tensor], num_classes: int, last: tuple[str, ...]
) -> tuple[int, dict[str, Tensor]]:
    """Return (number of classes, all but the last layer, or those whose names begin with any of `last`) of weights
    that differ from `own` in that number alone; (0, {}) for others.
    """
    differ = {f"{key.rpartition('.')[0]}." for key in own if key in part and not _fits(part, own, key)}
    begins = last or tuple(differ)
    heads = [key for key in own if key.startswith(begins)]
    rest = {key: value for key, value in part.items() if not key.startswith(begins)}
    if not part.keys() >= {*heads} or _misfit(rest, {key: own[key] for key in own if key not in heads}):
        return 0, {}
    shapes = [(part[key].shape, own[key].shape) for key in heads if own[key].ndim]
    alike = all(a[1:] == b[1:] and len(a) == len(b) and (last or b[0] == num_classes) for a, b in shapes)
    counts = {a.numel() * num_classes / b.numel() for a, b in shapes} if alike else set()
    classes = counts.pop() if len(counts) == 1 else 0
    return (int(classes), rest) if 0 < classes < 2**31 and classes == int(classes) else (0, {})


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
    for name, (constructor, _) in cifar_model_dict.active.items():
        try:
            with torch.device("meta"):
                model = constructor(num_classes=num_classes)
        except Exception:  # a constructor of the user's may need values, which a meta tensor has not
            continue
        own = {k: v.shape for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
        if own == shapes:
            return name, num_classes
    return None
