"""A .npz file of images, as MedMNIST's are: train_images, train_labels, test_images, test_labels."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from mdistiller import files
from mdistiller.dataset._images import ImageSet, channel_statistics
from mdistiller.dataset._registry import register_dataset
from mdistiller.errors import UserError

SPLITS = ("train", "test")
WANTED = tuple(f"{split}_{part}" for split in SPLITS for part in ("images", "labels"))


@register_dataset("npz")
def npz(root: Path) -> ImageSet:
    """Read the file `root`: images uint8 (N, H, W) or (N, H, W, 1 or 3), labels integers (N,) or (N, 1) from 0 up.

    Grey images are repeated to three channels; mean and standard deviation are the training set's. Raises UserError for
    anything else, pickled arrays among them.
    """
    with files.open_regular(root, "the .npz file itself as DATASET.ROOT") as file:
        try:
            arrays = _arrays(root, file)
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


def _arrays(path: Path, file: BinaryIO) -> dict[str, np.ndarray]:
    archive = np.load(file, allow_pickle=False)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise UserError(f"{path}: is a single array; expected a .npz file with {', '.join(WANTED)}")
    missing = [name for name in WANTED if name not in archive.files]
    if missing:
        raise UserError(f"{path}: lacks {' and '.join(missing)}; it holds {', '.join(archive.files) or 'nothing'}")
    sizes = {info.filename.removesuffix(".npy"): info.file_size for info in archive.zip.infolist()}
    files.check_fits(path, 3 * sum(sizes[name] for name in WANTED))  # grey images become three channels
    return {name: np.asarray(archive[name]) for name in WANTED}


def _split(path: Path, images: np.ndarray, labels: np.ndarray, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or not images.size:
        raise UserError(
            f"{path}: {split}_images is {images.dtype} {images.shape}; expected uint8 (N, H, W) or (N, H, W, 1 or 3)"
            + _remedy(images)
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


def _remedy(images: np.ndarray) -> str:
    """Return what to call on images of another layout or type before they are saved, where that can be told."""
    if images.dtype.kind not in "biuf" or not images.size:
        return ""
    calls = ""
    if images.ndim == 4 and images.shape[3] not in (1, 3) and images.shape[1] in (1, 3):
        calls += ".transpose(0, 2, 3, 1)"
    low, high = images.min(), images.max()
    if images.dtype.kind == "f" and 0 <= low and high <= 1:
        calls = f"(255 * images{calls}).round().astype('uint8')"
    elif images.dtype != np.uint8 and 0 <= low and high <= 255:
        calls = f"images{calls}.astype('uint8')"
    elif calls:
        calls = "images" + calls
    return f"; save {calls}" if calls else ""
