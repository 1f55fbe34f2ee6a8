"""A data set out of what the user has in memory: arrays, tensors, a torch Dataset."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from mdistiller.dataset._images import ImageSet, channel_statistics
from mdistiller.errors import UserError

FORMS = "a pair (images, labels), or a Dataset of (image, label)"


def image_set(train: object, test: object, num_classes: int = 0, augment: str = "crop") -> ImageSet:
    """Return the ImageSet of `train` and `test`, each a pair (images, labels) or a torch Dataset of (image, label).

    Images are square, grey or RGB: uint8, or floats in [0, 1], which are rounded to 8 bits; as arrays or tensors
    (N, H, W), (N, H, W, C) or (N, C, H, W), in a Dataset also as PIL images. Labels count from 0. `num_classes`: 0 for
    one more than the largest label. A Dataset is read once, so its own transforms must not be random: `augment` says
    what training does with the images, crop_flip, crop or none. Normalisation is by the training images' mean and
    deviation. Raises UserError where the data are something else.
    """
    pairs = [_arrays(train, "train")]
    pairs.append(pairs[0] if test is train else _arrays(test, "test"))
    return of_arrays(*pairs, num_classes, augment, square=True)


def of_arrays(
    train: Sequence[np.ndarray], test: Sequence[np.ndarray], num_classes: int, augment: str, square: bool = False
) -> ImageSet:
    """Return the set of two pairs (images, labels), as image_set does; images need not be `square`."""
    parts = _tensors(*train, "train")
    parts += parts if test is train else _tensors(*test, "test")
    sizes = [tuple(images.shape[1:]) for images in parts[::2]]
    if square and any(height != width for height, width, _ in sizes):
        raise UserError(f"train and test: images must be square, such as (N, H, H, 3); got {sizes[0]} and {sizes[1]}")
    if sizes[0] != sizes[1]:
        raise UserError(f"train and test differ in size: {sizes[0]} and {sizes[1]}")
    largest = int(max(parts[1].max(), parts[3].max()))
    if not num_classes and largest >= max(1000, len(parts[1])):
        raise UserError(f"train: label {largest} for {len(parts[1])} images; labels count classes from 0")
    mean, std = channel_statistics(parts[0])
    return ImageSet(*parts, num_classes or max(2, 1 + largest), mean, std, augment)


def _arrays(data: object, name: str) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(data, (tuple, list)) and len(data) == 2:
        return tuple(_as_numpy(part, name) for part in data)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, Mapping):
        return _read(data, name)
    raise UserError(f"{name}: must be {FORMS}; got {type(data).__name__}")


def _tensors(images: np.ndarray, labels: np.ndarray, name: str) -> tuple[Tensor, Tensor]:
    """Return images uint8 (N, H, W, 3) and labels int64 (N,), which may be (N, 1)."""
    images = _as_pixels(images, name)
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise UserError(f"{name}: labels must be {len(images)} whole numbers from 0; got {labels.dtype} {labels.shape}")
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))


def _read(data: Sequence, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return what a Dataset holds. Raises UserError where some of its items differ when they are read again."""

    def item(number: int) -> tuple[np.ndarray, np.ndarray]:
        sample = data[number]
        if not (isinstance(sample, Sequence) and len(sample) == 2):
            raise UserError(f"{name}: must be {FORMS}")
        return tuple(_as_numpy(part, name) for part in sample)

    if not len(data):
        raise UserError(f"{name}: holds no samples; must be {FORMS}")
    samples = [item(number) for number in range(len(data))]
    sizes = sorted({image.shape for image, _ in samples})
    if len(sizes) > 1:
        raise UserError(f"{name}: images differ in size, {sizes[0]} and {sizes[-1]}; resize them to one")
    # a mirror shows in one of two reads: eight samples hide it once in 256
    if not all(np.array_equal(image, item(number)[0]) for number, (image, _) in enumerate(samples[:8])):
        raise UserError(
            f"{name}: an image differs when it is read again, and a Dataset is read once: leave its random transforms "
            "out; augment= crops and mirrors"
        )
    labels = [label.item() if label.size == 1 else label.tolist() for _, label in samples]
    return np.stack([image for image, _ in samples]), _as_numpy(labels, name)


def _as_numpy(values: object, name: str) -> np.ndarray:
    try:
        return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    except ValueError:  # of rows of different lengths
        raise UserError(f"{name}: images differ in size, or are no numbers; must be {FORMS}") from None


def _as_pixels(images: np.ndarray, name: str) -> np.ndarray:
    given = images.shape
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim == 4 and images.shape[3] not in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    if images.ndim != 4 or images.shape[3] not in (1, 3) or not images.size:
        raise UserError(f"{name}: images must be grey or RGB, such as (N, H, W, 3); got {given}")
    if images.dtype.kind == "f":
        if not (images.min() >= 0 and images.max() <= 1):
            raise UserError(
                f"{name}: images must be uint8, or floats in [0, 1]; got {images.min():.3g} to {images.max():.3g}; "
                "leave out your own normalisation"
            )
        images = (255 * images).round().astype(np.uint8)
    if images.dtype != np.uint8:
        raise UserError(f"{name}: images must be uint8, or floats in [0, 1]; got {images.dtype}")
    return np.broadcast_to(images, (*images.shape[:3], 3)).copy()


def normalised(data: ImageSet, mean: Sequence[float] | None, std: Sequence[float] | None) -> ImageSet:
    """Return the images with what is given in place of their own mean and deviation. Raises UserError where that is no
    three numbers.
    """
    given = {name: values for name, values in (("mean", mean), ("std", std)) if values is not None}
    if given and not isinstance(data, ImageSet):
        raise UserError("mean, std: are for images of one class each; leave them out")
    for name, values in given.items():
        try:
            numbers = given[name] = tuple(map(float, values))
        except (TypeError, ValueError):
            numbers = ()
        if len(numbers) != 3 or not all(map(math.isfinite, numbers)) or (name == "std" and min(numbers) <= 0):
            raise UserError(f"{name}: must be three numbers, one a channel, of pixels in [0, 1]; got {values!r}")
    return replace(data, **given) if given else data
