"""Picture files as images of one size: decoded, cut and scaled when they are asked for, ahead of the steps."""

import math
import os
import random
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from mdistiller.errors import RunFailed, UserError

ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
UNIT = 32  # pictures that a worker decodes at a time
AREA, RATIO, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10  # of a random crop, torchvision's RandomResizedCrop


def decode(path: Path, background: Sequence[int] = (255, 255, 255), upright: bool = True) -> Image.Image:
    """Return the picture, `upright` as its EXIF data say, in RGB: of 16 bits the upper 8, transparent parts over the
    colour `background`, of several frames the first. Raises UserError that names a file that cannot be read.
    """
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")  # of large pictures, which are read; too large ones are an error
            return _in_rgb(ImageOps.exif_transpose(image) if upright else image, background)
    except (MemoryError, UserError):
        raise
    except Exception as error:  # no list of what damaged bytes raise in PIL is complete
        reason = str(error).split("\n")[0].replace(f"'{path}'", "it") or type(error).__name__
        if "cannot identify" in reason:
            reason = "not one of the kinds JPEG, PNG, WebP, BMP, TIFF" if path.stat().st_size else "it is empty"
        raise UserError(f"{path}: is no picture that can be read ({reason}); mend or remove it") from None


def _in_rgb(image: Image.Image, background: Sequence[int]) -> Image.Image:
    if image.mode in ALPHA or "transparency" in image.info:
        image = image.convert("RGBA")
        below = Image.new("RGBA", image.size, (*background, 255))
        return Image.alpha_composite(below, image).convert("RGB")
    if image.mode.startswith("I"):  # grey of 16 bits, or of 32 that hold 16
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"grey values from {values.min()} to {values.max()}, and 0 to 65535 can be read")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("pixels of floating point")
    return image.convert("RGB")


def fit(image: Image.Image, size: int, crop: float) -> Image.Image:
    """Return the picture's middle, size x size: its shorter side is scaled to size / crop, as torchvision's Resize and
    CenterCrop do.
    """
    short = max(size, round(size / crop))
    width, height = image.size
    if min(width, height) != short:
        width, height = (
            short if side == min(image.size) else int(short * side / min(image.size)) for side in image.size
        )
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def random_crop(image: Image.Image, size: int, draw: int) -> Image.Image:
    """Return a crop of random area and shape, scaled to size x size: torchvision's RandomResizedCrop, drawn from the
    seed `draw`.
    """
    generator, (width, height) = random.Random(draw), image.size
    for _ in range(TRIES):
        area = width * height * generator.uniform(*AREA)
        ratio = math.exp(generator.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = generator.randint(0, width - w), generator.randint(0, height - h)
            break
    else:  # the middle, as far as its shape is allowed
        w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
        left, top = (width - w) // 2, (height - h) // 2
    return image.crop((left, top, left + w, top + h)).resize((size, size), Image.Resampling.BILINEAR)


@dataclass(frozen=True)
class FileList:
    """Files below `root`, their `names` as bytes (N,), which processes that share memory do not copy."""

    root: Path
    names: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def path(self, place: int) -> Path:
        return self.root / os.fsdecode(bytes(self.names[place]))


@dataclass(frozen=True)
class Pictures(FileList):
    """Files that stand for images uint8 (N, size, size, 3): indexed, it decodes them."""

    size: int
    crop: float = 0.875
    background: tuple[int, ...] = (255, 255, 255)
    workers: int = 0
    device: torch.device = torch.device("cpu")  # where batches are to be

    dtype, ndim = torch.uint8, 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self.names), self.size, self.size, 3

    def to(self, device: torch.device) -> "Pictures":
        """Return the pictures with batches on `device`."""
        return replace(self, device=device)

    def image(self, place: int, draw: int = -1) -> np.ndarray:
        """Return a picture, (size, size, 3): its middle, or a crop that is drawn from the seed `draw`."""
        picture = decode(self.path(place), self.background)
        return np.asarray(fit(picture, self.size, self.crop) if draw < 0 else random_crop(picture, self.size, draw))

    def decoded(self, places: Sequence[int], draws: Sequence[int]) -> Tensor:
        """Return `image` of each place and draw, (n, size, size, 3); a worker's where its process sees them."""
        images = torch.empty(len(places), *self.shape[1:], dtype=torch.uint8)
        if get_worker_info() is not None:
            images.share_memory_()  # without a pipe
        for row, place, draw in zip(images.numpy(), places, draws, strict=True):
            row[...] = self.image(place, draw)
        return images

    def __getitem__(self, places: Tensor | slice | np.ndarray) -> Tensor:
        """Return the middles of the pictures at `places`, (B, size, size, 3), on the device."""
        chosen = np.arange(len(self))[places.cpu() if isinstance(places, Tensor) else places]
        return self.decoded(chosen, [-1] * len(chosen)).to(self.device)


class Decoding:
    """What a worker does with a unit, (places, draws): it returns what `source` decodes of it, or a line on what went
    wrong.
    """

    def __init__(self, source):
        self.source = source

    def __getitems__(self, unit: tuple[list[int], list[int]]) -> Sequence | str:
        try:
            return self.source.decoded(*unit)
        except UserError as error:
            return str(error)


class Reader:
    """Decodes batches of `source`, Pictures or a Side, ahead of who takes them, by as many processes as it has workers.

    The numbers of a batch are its own: neither the workers nor what was decoded before decide any of them.
    """

    def __init__(self, source):
        self.decoding, self.device, workers = Decoding(source), source.device, source.workers
        self.units: list[tuple[list[int], list[int]]] = []  # of the epoch, which the loader asks for
        self.expected: deque[Tensor] = deque()  # the batches that are still to be taken
        self.loader = DataLoader(
            self.decoding, batch_sampler=self.units, collate_fn=_as_it_is, num_workers=workers,
            persistent_workers=workers > 0, generator=torch.Generator(),  # nothing of the run's own is drawn
        )  # fmt: skip
        self.images: Iterator[Tensor | str] = iter(())

    def expect(self, batches: Iterable[Tensor]) -> None:
        """Begin with `batches`, each (2, B) on the CPU: places in the set, and what crops are drawn from or -1."""
        self.expected = deque(batches)
        self.units[:] = [unit for batch in self.expected for unit in units_of(batch)]
        self.images = iter(self.loader) if self.units else iter(())

    def take(self, batch: Tensor) -> Tensor:
        """Return the images of `batch` (2, B), uint8 (B, size, size, 3), on the device. Raises RunFailed where a file
        cannot be read.
        """
        parts = [part.numpy() for part in self.parts(batch)]
        size = batch.shape[1], *parts[0].shape[1:]
        images = torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        np.concatenate(parts, out=images.numpy())  # by one thread: torch's would wait on the cores that decode
        return images.to(self.device, non_blocking=True)

    def on_device(self, images: Tensor) -> Tensor:
        """Return `images` on the device of the batches."""
        return images.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else images

    def parts(self, batch: Tensor) -> list:
        """Return what the units of `batch` (2, B) are decoded to: ahead of this call, where it is the next of the
        expected batches. Raises RunFailed where a file cannot be read.
        """
        ahead = bool(self.expected) and torch.equal(self.expected[0], batch)
        units = units_of(batch)
        source = self.images if ahead else map(self.decoding.__getitems__, units)
        parts = []
        try:
            for _ in units:
                part = next(source)
                if isinstance(part, str):
                    raise RunFailed(f"{part}; put it back as it was, and --resume auto goes on then")
                parts.append(part)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise RunFailed(
                "a process that decodes pictures was killed, as the system does where memory is short, or a "
                "container's shared memory; set fewer DATASET.NUM_WORKERS, and --resume auto goes on"
            ) from None
        if ahead:
            self.expected.popleft()
        return parts


def units_of(batch: Tensor) -> list[tuple[list[int], list[int]]]:
    """Return (places, draws) of the parts of a batch (2, B) that are decoded one at a time."""
    return [tuple(part.tolist()) for part in batch.split(UNIT, dim=1)]


def _as_it_is(unit: Tensor | str) -> Tensor | str:
    return unit
