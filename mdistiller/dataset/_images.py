"""Images in memory and the batches made of them, on the training device, in whole-batch tensor operations."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mdistiller.config import AUGMENTATIONS, TWO_VIEWS
from mdistiller.dataset import _strong
from mdistiller.dataset._mixing import Mixing
from mdistiller.dataset._pictures import Pictures, Reader
from mdistiller.errors import UserError
from mdistiller.registry import unknown


@dataclass(frozen=True)
class ImageSet:
    """A data set as plain tensors. Images are uint8 (N, H, W, 3), or the files of so many `Pictures`, labels int64
    (N,), from 0 and below num_classes.

    Raises UserError for other images or labels, and for an augmentation that there is not.
    """

    train_images: Tensor | Pictures
    train_labels: Tensor
    test_images: Tensor | Pictures
    test_labels: Tensor
    num_classes: int
    mean: tuple[float, float, float]  # per channel, of pixels in [0, 1]
    std: tuple[float, float, float]
    augment: str = "crop_flip"  # what suits the images: one of AUGMENTATIONS
    class_names: tuple[str, ...] = ()  # where they are known
    source: str = ""  # digest of the files that the images are of, which stands for theirs
    task: ClassVar[str] = "classification"
    unit: ClassVar[str] = "images"  # what is counted
    samples: ClassVar[str] = "images"  # what a batch has so many of

    def __post_init__(self):
        if self.augment not in AUGMENTATIONS:
            raise UserError(f"augment: {unknown('augmentation', self.augment, AUGMENTATIONS)}")
        for name, images, labels in (
            ("train", self.train_images, self.train_labels),
            ("test", self.test_images, self.test_labels),
        ):
            size = self.train_images.shape[1:]
            if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != size or size[2] != 3:
                wanted = tuple(size) if name == "test" else "(H, W, 3)"
                got = f"{images.dtype} {tuple(images.shape)}"
                raise UserError(f"{name}: images must be uint8, {wanted} each; got {got}; md.image_set converts others")
            if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
                got = f"{labels.dtype} {tuple(labels.shape)}"
                raise UserError(f"{name}: labels must be int64 ({len(images)},), one an image; got {got}")
            low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
            if low < 0 or high >= self.num_classes:
                raise UserError(
                    f"{name}: labels must be 0 to {self.num_classes - 1}, for {self.num_classes} classes; got "
                    f"{low if low < 0 else high}; labels count from 0"
                )

    def doubts(self) -> list[str]:
        """Return a line on the classes that no training image is of, which the student cannot learn; none is fine."""
        counts = torch.bincount(self.train_labels, minlength=self.num_classes)
        lines = missing(counts, "image", range(self.num_classes))
        if tested := int((counts[self.test_labels] == 0).sum()):
            lines[0] += f"; {tested:,} test images are of them"
        if counts[0] == 0:
            lines[0] += "; labels count from 0: subtract 1 where yours count from 1"
        return lines

    def to(self, device: torch.device) -> "ImageSet":
        """Return the set with its images and labels on `device`."""
        names = ("train_images", "train_labels", "test_images", "test_labels")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def training_batches(self, cfg: Mapping) -> "Batches":
        """Return the batches of training images that the configuration `cfg` asks for."""
        solver, asked = cfg.SOLVER, cfg.DATASET
        augment = self.augment if asked.AUGMENT == "auto" else asked.AUGMENT
        given = self.train_images, self.train_labels, self.mean, self.std, solver.BATCH_SIZE, augment, cfg.SEED
        batches = Batches(*given, two_views=solver.TRAINER in TWO_VIEWS)
        batches.drop_last = solver.DROP_LAST
        soft = solver.LABEL_SMOOTHING, asked.MIXUP, asked.CUTMIX
        batches.mixing = Mixing(self.num_classes, *soft) if any(soft) else None
        return batches

    def test_batches(self, wanted: int) -> "Batches":
        """Return the test images in batches of `wanted`, or what `images_together` makes of it."""
        together = images_together(wanted, self.test_images.shape[1], self.test_images.device)
        return Batches(self.test_images, self.test_labels, self.mean, self.std, together)

    def digest(self) -> str:
        """Return the SHA-256 of images and labels, or that of their files."""
        if self.source:
            return self.source
        hasher = hashlib.sha256()
        for values in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            hasher.update(str(tuple(values.shape)).encode())
            hasher.update(values.contiguous().numpy())
        return hasher.hexdigest()


def missing(counts: Tensor, what: str, names: Iterable) -> list[str]:
    """Return a line on the classes of which there are no `counts` (K,) of training images or boxes; none is fine."""
    empty = [str(name) for name, count in zip(names, counts.tolist(), strict=True) if not count]
    shown = ", ".join(empty[:10]) + (", ..." if len(empty) > 10 else "")
    return [f"warning: {len(empty)} of {len(counts)} classes have no training {what}: {shown}"] if empty else []


def images_together(wanted: int, size: int, device: torch.device) -> int:
    """Return how many images of `size` pixels an evaluation batch has, where `wanted` are asked for: on CUDA at least
    as many pixels as 1,000 images of 32 x 32 have, since fewer leave the device idle.
    """
    return max(wanted, 1000 * 32**2 // size**2) if device.type == "cuda" else wanted


class Batch(NamedTuple):
    image: Tensor  # (B, 3, H, W) float32, normalised, channels-last in memory
    target: Tensor  # (B,) int64, or (B, K) float32 where labels are smoothed or images mixed
    index: Tensor  # (B,) int64: the samples' places in the set


class TwoViews(NamedTuple):
    image: Tensor  # (B, 3, H, W), the weak view
    target: Tensor
    index: Tensor
    image_strong: Tensor  # (B, 3, H, W), the strong one


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel of uint8 images (N, H, W, C), in units of [0, 1]."""
    flat = images.numpy().reshape(-1, images.shape[-1])
    # exact integer moments, of some pixels at a time: a float64 copy of the whole set would cost eight times its memory
    parts = np.array_split(flat, 1 + len(flat) // 2**22)
    counts = sum(np.stack([np.bincount(channel, minlength=256) for channel in part.T]) for part in parts)
    mean, square = (counts @ (np.arange(256.0) ** power) / len(flat) / 255**power for power in (1, 2))
    std = np.sqrt(np.maximum(square - mean**2, 0)).clip(min=1 / 255)
    return tuple(mean.tolist()), tuple(std.tolist())


class Batches:
    """Batches of images that lie on the training device.

    Training (`augment` given): each epoch shuffles the samples and gives each its own crop and flip, drawn from the
    distribution of torchvision's RandomCrop(H, padding=H // 8) and RandomHorizontalFlip. All of an epoch's decisions
    are a function of (seed, epoch) alone, whatever ran before, on whatever device. The last, smaller batch is kept
    unless `drop_last` is set. resized_crop: torchvision's RandomResizedCrop in the crop's place, of pictures alone.
    `two_views`: each sample comes in a strong view besides, of its own crop and flip and then RandAugment; the weak one
    is what it is without. Evaluation (`augment` None): the samples in their order.
    """

    drop_last = False  # whether an epoch leaves out the samples that fill no batch, others each time
    mixing: Mixing | None = None  # makes soft targets, and mixed images
    # where several processes share the work: of a batch of n those places that this one trains on, None for all; and
    # this one's number with that of all, who test in turn
    own: Callable[[int], Tensor | None] = staticmethod(lambda n: None)
    tester: tuple[int, int] = (0, 1)

    def __init__(
        self,
        images: Tensor | Pictures,
        labels: Tensor,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        batch_size: int,
        augment: str | None = None,
        seed: int = 0,
        two_views: bool = False,
    ):
        self.images, self.labels, device = images, labels, images.device
        self.reader = Reader(images) if isinstance(images, Pictures) else None
        if augment == "resized_crop" and (self.reader is None or two_views):
            raise UserError("DATASET.AUGMENT: resized_crop needs picture files, and one view of each; set crop_flip")
        self.strong = _strong.StrongView(*images.shape[1:3], device) if two_views else None
        self.batch_size, self.augment, self.seed = batch_size, augment, seed
        self.padding = images.shape[1] // 8  # 4 for 32 x 32
        self.scale = 1 / (255 * torch.tensor(std, device=device))
        self.shift = -torch.tensor(mean, device=device) / torch.tensor(std, device=device)
        self.rows = torch.arange(images.shape[1], device=device)
        self.columns = torch.arange(images.shape[2], device=device)

    @property
    def streamed(self) -> bool:
        """Whether the images are decoded as they are needed, in the order of a plan that `start` has announced."""
        return self.reader is not None

    @property
    def plan_device(self) -> torch.device:
        """The device on which plans are wanted: the one where images are looked up."""
        return torch.device("cpu") if self.streamed else self.images.device

    def start(self, plan: Tensor, done: int = 0) -> None:
        """Let pictures be decoded ahead for the batches of `plan`, (4, N), but for the first `done`."""
        if self.streamed:
            plan = self._decoded(plan)[:, done * self.batch_size : self.samples_an_epoch]
            batches = plan.split(self.batch_size, dim=1) if plan.shape[1] else ()
            self.reader.expect([self._wanted(batch, self.own(batch.shape[1])) for batch in batches])

    def _decoded(self, plan: Tensor) -> Tensor:
        """Return what the reader has to know of `plan`: places, and what crops are drawn from or -1, (2, B)."""
        drawn = plan[1] if self.augment == "resized_crop" else torch.full_like(plan[0], -1)
        return torch.stack([plan[0], drawn])

    @property
    def num_samples(self) -> int:
        return len(self.images)

    @property
    def targets_each(self) -> int:
        """How many targets a sample has: an image one, a block of text one for each of its tokens."""
        return len(self.labels) // self.num_samples

    def __len__(self) -> int:
        return -(-self.samples_an_epoch // self.batch_size)

    @property
    def samples_an_epoch(self) -> int:
        """How many samples an epoch gives: all, or those of its whole batches."""
        return self.num_samples - (self.num_samples % self.batch_size if self.drop_last else 0)

    @property
    def views(self) -> int:
        """Return how many different views of an image there are: crops times flips; 0 for no end of them."""
        crops = (2 * self.padding + 1) ** 2
        return {"crop_flip": 2 * crops, "crop": crops, "resized_crop": 0}.get(self.augment, 1)

    def plan(self, epoch: int) -> Tensor:
        """Return the epoch's decisions on the CPU, (4, N) int64: order, crop row, crop column (0 .. 2 * padding), flip;
        the last three by place in the order. Under `two_views` as many rows more as the strong view has decisions: crop
        row, crop column, flip and those of `_strong.draw`. Under resized_crop the second row is what crops are drawn
        from.
        """
        n = self.num_samples
        generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
        order = torch.randperm(n, generator=generator)[None]
        weak = self._crops(n, generator)
        if self.mixing is not None and self.mixing.mixes:
            return torch.cat([order, weak, self.mixing.draw(n, (self.seed << 20) + epoch)])
        if self.strong is None:
            return torch.cat([order, weak])
        return torch.cat([order, weak, self._crops(n, generator), _strong.draw(n, generator)])

    def _crops(self, n: int, generator: torch.Generator) -> Tensor:
        """Return crop row, crop column and flip of n views, (3, n)."""
        crops = torch.randint(0, 2 * self.padding + 1, (2, n), generator=generator)
        flip = torch.randint(0, 2, (1, n), generator=generator)
        if self.augment == "none":
            crops = torch.full_like(crops, self.padding)
        if self.augment == "resized_crop":
            crops[0] = torch.randint(0, 2**31, (n,), generator=generator)
        return torch.cat([crops, flip if self.augment in ("crop_flip", "resized_crop") else torch.zeros_like(flip)])

    def row_numbers(self, plan: Tensor) -> Tensor:
        """Return a number for each (weak) view in `plan` (4 or more, B), below num_samples * views: (B,)."""
        index, top, left, flip = plan[:4]
        if self.views == 1:
            return index
        side, flips = 2 * self.padding + 1, 2 if self.augment == "crop_flip" else 1
        return ((index * side + top) * side + left) * flips + flip

    def plan_of(self, rows: Tensor) -> Tensor:
        """Return the plan (4, B) whose `row_numbers` (B,) these are."""
        if self.views == 1:
            middle = torch.full_like(rows, self.padding)
            return torch.stack([rows, middle, middle, torch.zeros_like(rows)])
        side, flips = 2 * self.padding + 1, 2 if self.augment == "crop_flip" else 1
        view = rows // flips
        return torch.stack([view // side**2, view // side % side, view % side, rows % flips])

    def _wanted(self, plan: Tensor, rows: Tensor | None) -> Tensor:
        """Return the places `rows` (m,) of a plan (4, B), and behind them those that their images are mixed with."""
        if rows is None:
            return plan
        rows = rows.to(plan.device)
        return plan[:, torch.cat([rows, plan.shape[1] - 1 - rows]) if self.mixing and self.mixing.mixes else rows]

    def batch(self, plan: Tensor, rows: Tensor | None = None) -> Batch | TwoViews:
        """Return what `plan` (4, B), on the images' device, says; both views where it has the strong one's rows. `rows`
        (m,): the places in the batch that are wanted; None: all.
        """
        decisions, plan = plan[4:, :1], self._wanted(plan, rows)
        images = self.reader.take(self._decoded(plan)) if self.streamed else None
        plan = plan.to(self.labels.device, non_blocking=True)
        index, top, left, flip = plan[:4]
        images, target = self.images[index] if images is None else images, self.labels[index]
        if self.augment == "resized_crop":
            top = left = torch.full_like(index, self.padding)
        weak = self.normalise(self.crop(images, top, left, flip))
        if self.mixing is not None:
            mixes = self.mixing.mixes and len(plan) > 4
            decisions = decisions.to(target.device, non_blocking=True) if mixes else None
            weak, target = self.mixing(weak, target, decisions, rows is not None)
            index = index[: len(target)]
        if self.strong is None or len(plan) == 4:
            return Batch(weak, target, index)
        strong = self.strong(self.crop(images, *plan[4:7]), plan[7:])
        return TwoViews(weak, target, index, self.normalise(strong))

    def epoch(self, epoch: int, done: int = 0) -> Iterator[Batch | TwoViews]:
        """Yield the training batches of `epoch`, but for its first `done`."""
        plan = self.plan(epoch).to(self.plan_device)  # one transfer an epoch
        self.start(plan, done)
        for start in range(done * self.batch_size, self.samples_an_epoch, self.batch_size):
            yield self.batch(plan[:, start : start + self.batch_size])

    def crop(self, images: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
        """Return uint8 images (B, H, W, 3) padded with black, cut at (top, left) (B,), mirrored where flip (B,) is
        1.
        """
        padded = F.pad(images, (0, 0, self.padding, self.padding, self.padding, self.padding))
        columns = torch.where(flip[:, None] == 1, self.columns.flip(0), self.columns)  # (B, W)
        rows = top[:, None] + self.rows  # (B, H)
        sample = torch.arange(len(images), device=images.device)
        return padded[sample[:, None, None], rows[:, :, None], (left[:, None] + columns)[:, None, :]]

    def normalise(self, images: Tensor) -> Tensor:
        """Return uint8 images (B, H, W, 3) as float32 (B, 3, H, W), which the permutation leaves channels-last in
        memory.
        """
        return torch.addcmul(self.shift, images.float(), self.scale).permute(0, 3, 1, 2)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the samples in their order, as they are."""
        first, step = self.tester
        places = torch.arange(first, self.num_samples, step, device=self.images.device).split(self.batch_size)
        if self.streamed:
            plans = [self._decoded(index.cpu().expand(4, -1)) for index in places]
            self.reader.expect(plans)
        for number, index in enumerate(places):
            start = first + number * self.batch_size * step
            rows = slice(start, start + len(index) * step, step)
            images = self.reader.take(plans[number]) if self.streamed else self.images[rows]
            yield Batch(self.normalise(images), self.labels[rows], index)
