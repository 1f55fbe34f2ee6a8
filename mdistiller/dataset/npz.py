"""A .npz file of images, as MedMNIST's are: train_images, train_labels, test_images, test_labels."""

import math
import zipfile
from pathlib import Path

import numpy as np
import torch

from mdistiller import files
from mdistiller.dataset._images import ImageSet, channel_statistics
from mdistiller.dataset._registry import register_dataset
from mdistiller.errors import UserError

SPLITS = ("train", "test")
WANTED = tuple(f"{split}_{part}" for split in SPLITS for part in ("images", "labels"))
MOST_EMPTY = 2**26  # bytes that may be all alike


@register_dataset("npz")
def npz(root: Path) -> ImageSet:
    """`root` is the file. Images uint8 (N, H, W) or (N, H, W, 1 or 3), labels integers (N,) or (N, 1) from 0 up.

    Grey images are repeated to three channels; mean and standard deviation are the training set's. Pickled arrays are
    refused.
    """
    with files.open_regular(root, "the .npz file itself as DATASET.ROOT") as file:
        if file.read(6) == np.lib.format.MAGIC_PREFIX:
            raise UserError(f"{root}: is a single array; expected a .npz file with train_images, train_labels, ...")
        try:
            with zipfile.ZipFile(file) as archive:
                arrays = _arrays(root, archive)
        except UserError:
            raise
        except Exception as error:  # zipfile, zlib and numpy raise many kinds for foreign bytes
            reason = str(error) or type(error).__name__
            raise UserError(
                f"{root}: is not a readable .npz file of plain arrays ({reason}); point DATASET.ROOT to the file itself"
            ) from None
    sets = {split: _split(root, arrays[f"{split}_images"], arrays[f"{split}_labels"], split) for split in SPLITS}
    train_images, train_labels = sets["train"]
    test_images, test_labels = sets["test"]
    if train_images.shape[1:] != test_images.shape[1:]:
        sizes = f"{tuple(train_images.shape[1:])} and {tuple(test_images.shape[1:])}"
        raise UserError(f"{root}: train_images and test_images differ in size: {sizes}")
    mean, std = channel_statistics(train_images)
    classes = 1 + int(max(train_labels.max(), test_labels.max()))
    return ImageSet(
        train_images, train_labels, test_images, test_labels, max(classes, 2), mean, std, augment="crop"
    )  # whether a mirror image is still of its class, only the user knows


def _arrays(path: Path, archive: zipfile.ZipFile) -> dict[str, np.ndarray]:
    """The wanted members, each read after its header was found to fit the member and all of them the memory."""
    members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    missing = [name for name in WANTED if name not in members]
    if missing:
        raise UserError(f"{path}: lacks {' and '.join(missing)}; it holds {', '.join(members) or 'nothing'}")
    for name in WANTED:
        _check_header(path, archive, members[name], name)
    files.check_fits(path, 3 * sum(members[name].file_size for name in WANTED))  # grey ones become three channels
    arrays = {}
    for name in WANTED:
        with archive.open(members[name]) as member:
            arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
    return arrays


def _check_header(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> None:
    with archive.open(info) as member:
        if member.read(6) != np.lib.format.MAGIC_PREFIX:
            raise UserError(f"{path}: images and labels must be arrays, and {name} is none; fetch the file again")
        version = tuple(member.read(2))
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise UserError(f"{path}: {name} has array format {version}; save it again with numpy.savez")
        shape, _, dtype = readers[version](member)
        declared, held = math.prod(shape) * dtype.itemsize, info.file_size - member.tell()
    if dtype.hasobject:
        raise UserError(f"{path}: {name} holds Python objects (allow_pickle), which may run code; save plain numbers")
    if min(shape, default=0) < 0 or declared != held:
        raise UserError(f"{path}: {name} declares {declared:,} bytes and holds {held:,}; fetch the file again")
    if held > MOST_EMPTY and held > 500 * info.compress_size:
        raise UserError(f"{path}: {name} swells from {info.compress_size:,} to {held:,} bytes; no photographs do")


def _split(path: Path, images: np.ndarray, labels: np.ndarray, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or not images.size:
        raise UserError(
            f"{path}: {split}_images is {images.dtype} {images.shape}; expected uint8 (N, H, W) or (N, H, W, 1 or 3)"
        )
    if min(images.shape[1:3]) < 8:
        raise UserError(f"{path}: {split}_images are {images.shape[1]} x {images.shape[2]}; at least 8 x 8 is needed")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != len(images):
        raise UserError(
            f"{path}: {split}_labels is {labels.dtype} {labels.shape}; expected {len(images)} integers, one an image"
        )
    labels = labels.astype(np.int64)
    if labels.min() < 0:
        raise UserError(f"{path}: {split}_labels holds {labels.min()}; labels count from 0")
    if labels.max() >= max(1000, len(images)):
        raise UserError(
            f"{path}: {split}_labels holds {labels.max()} for {len(images)} images; labels count classes from 0"
        )
    images = np.broadcast_to(images, (*images.shape[:3], 3)).copy()
    return torch.from_numpy(images), torch.from_numpy(labels)
