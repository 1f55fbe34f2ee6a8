"""CIFAR's files: the official binary version, or torchvision's where that lies there; else the former is fetched."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mdistiller import download, files
from mdistiller.dataset._images import ImageSet
from mdistiller.errors import UserError

PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class BinaryLayout:
    """The official binary version: records of label bytes and 3,072 pixels, planes red, green, blue."""

    folder: str
    train_files: tuple[str, ...]
    test_file: str
    label_bytes: int  # the last of them is the label
    python_folder: str  # the python version's, pickles that torchvision reads


def load(name: str, root: Path, layout: BinaryLayout, num_classes: int, mean: tuple, std: tuple) -> ImageSet:
    """Read CIFAR. `root` holds the binary version's folder (or is it), or the python version's; else the binary one is
    fetched.
    """
    names = (*layout.train_files, layout.test_file)
    folder = next((f for f in (root, root / layout.folder) if any(os.path.lexists(f / name) for name in names)), None)
    if folder is None and (root / layout.python_folder).is_dir():
        train_images, train_labels = _torchvision(name, root, layout, train=True)
        test_images, test_labels = _torchvision(name, root, layout, train=False)
    else:
        folder = folder or _fetched(name.lower(), root)
        train = [_records(folder / file, layout.label_bytes, num_classes) for file in layout.train_files]
        train_images, train_labels = (torch.cat(parts) for parts in zip(*train, strict=True))
        test_images, test_labels = _records(folder / layout.test_file, layout.label_bytes, num_classes)
    return ImageSet(train_images, train_labels, test_images, test_labels, num_classes, mean, std)


def _fetched(name: str, root: Path) -> Path:
    try:
        return download.fetch(name, root)
    except UserError as error:
        raise UserError(f"DATASET.ROOT: {root} holds no {name}, and it could not be fetched: {error}") from None


def _records(path: Path, label_bytes: int, num_classes: int) -> tuple[Tensor, Tensor]:
    record = label_bytes + PIXELS
    with files.open_regular(path, "the whole binary version as DATASET.ROOT") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0 or size % record:
            raise UserError(f"{path}: {size:,} bytes is not a whole number of {record}-byte records; fetch it again")
        data = np.fromfile(file, np.uint8).reshape(-1, record)
    labels = data[:, label_bytes - 1].astype(np.int64)
    if labels.max() >= num_classes:
        raise UserError(f"{path}: holds label {labels.max()}, expected labels below {num_classes}; wrong file?")
    images = data[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels)


def _torchvision(name: str, root: Path, layout: BinaryLayout, train: bool) -> tuple[Tensor, Tensor]:
    from torchvision import datasets  # slow to import, and not needed for any other data

    try:
        data = getattr(datasets, name)(root, train=train, download=False)  # checks its checksums before unpickling
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{root / layout.python_folder}: cannot be read ({error}); get the binary version, which comes first: "
            f"python3 tools/download.py {name.lower()} --to {root}"
        ) from None
    return torch.from_numpy(np.asarray(data.data)), torch.tensor(data.targets)
