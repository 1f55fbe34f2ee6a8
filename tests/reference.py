"""The reference figures of ../shared/reference, and the rule by which they fill a module (see its README)."""

import functools
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "reference"
needs_reference = pytest.mark.skipif(not FOLDER.is_dir(), reason="../shared/reference is not here")


@functools.cache
def golden() -> dict[str, np.ndarray]:
    """Every array of every golden file, by its key; empty where the folder is missing."""
    arrays: dict[str, np.ndarray] = {}
    for path in sorted(FOLDER.glob("golden_*.npz")):
        with np.load(path, allow_pickle=False) as file:
            arrays |= {key: file[key] for key in file.files}
    return arrays


def state_dict_keys() -> dict[str, list]:
    path = FOLDER / "state_dict_keys.json"
    return json.loads(path.read_text()) if path.exists() else {}


def published() -> dict:
    return json.loads((FOLDER / "published.json").read_text())


@functools.lru_cache(64)
def normal(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.RandomState(zlib.crc32(repr(shape).encode())).standard_normal(shape).astype(np.float32)


@torch.no_grad()
def fill(module: torch.nn.Module) -> torch.nn.Module:
    """Overwrite the module's tensors from their shapes and names alone."""
    for key, tensor in module.state_dict().items():
        name, shape = key.rsplit(".", 1)[-1], tuple(tensor.shape)
        if not tensor.is_floating_point():
            tensor.zero_()
            continue
        memory = name in ("memory_v1", "memory_v2")
        if name not in ("weight", "bias", "running_mean", "running_var") and not memory:
            continue
        g = normal(shape)
        if name == "running_var":
            g = 1 + 0.5 * np.abs(g)
        elif name in ("running_mean", "bias"):
            g = 0.1 * g
        elif len(shape) == 1:
            g = 0.5 + 0.05 * g
        else:
            g = g * np.sqrt(1 / np.prod(shape[1:])) * (6 if len(shape) == 2 else 1)
        tensor.copy_(torch.from_numpy(np.asarray(g, dtype=np.float32)))
    return module


def images() -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(0).standard_normal((8, 3, 32, 32)).astype(np.float32))


def labels() -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(1).randint(0, 100, 8))
