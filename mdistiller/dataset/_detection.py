"""Images with boxes, and the batches made of them: flipped and scaled as a plan says, boxes with them."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mdistiller.config import Check, Key, add_keys
from mdistiller.dataset._images import Batches, missing
from mdistiller.dataset._pictures import Reader
from mdistiller.errors import UserError

add_keys(
    {
        "DATASET.JITTER": Key(
            [0.8, 1.0],
            "Images with boxes: the size of a training image as a share of that in a test, drawn between these two; "
            "and a flip; DATASET.AUGMENT none: neither.",
            Check(
                lambda v: len(v) == 2 and 0.1 <= v[0] <= v[1] <= 4,
                "must be two numbers from 0.1 to 4, such as [0.8, 1]",
            ),
            only={"DATASET.TYPE": ("detection",)},
        ),
        "DATASET.LONG_SIDE": Key(
            0,
            "Images with boxes: pixels of the longer side at most, before JITTER; 0: 1333, of scenes DATASET.SIZE.",
            Check(lambda v: not v or 16 <= v <= 8192, "must be 0, or 16 to 8192"),
            only={"DATASET.TYPE": ("detection",)},
        ),
    }
)


MOST_PIXELS = 2**24  # of a padded batch of a test: 9 images of 1344 x 1344, as wide and high ones together need


class Boxes(NamedTuple):
    """The boxes of N images, all M one after the other: those of image i from starts[i] to starts[i + 1]."""

    box: Tensor  # (M, 4) float32: left, top, right, bottom in pixels
    label: Tensor  # (M,) int64, from 1
    crowd: Tensor  # (M,) bool: a region of many, or one that is not to be counted
    area: Tensor  # (M,) float32, of the object itself: by it small, medium and large ones are told apart
    starts: tuple[int, ...]  # N + 1
    ids: tuple[int, ...]  # N: the images' own numbers


def boxes_of(images: Sequence[Sequence[Sequence[float]]], ids: Iterable[int]) -> Boxes:
    """Return the boxes of images, of each of which these are rows (left, top, right, bottom, area, label, crowd)."""
    rows = torch.tensor([row for rows in images for row in rows], dtype=torch.float32).view(-1, 7)
    area, label, crowd = rows[:, 4:].T.contiguous()
    starts = tuple(itertools.accumulate(map(len, images), initial=0))
    return Boxes(rows[:, :4].contiguous(), label.long(), crowd.bool(), area, starts, tuple(ids))


@dataclass(frozen=True)
class Side:
    """Training or test images with their boxes. `source` has size(place), height and width of an image that is not read
    for that, and read(place), the image, uint8 (H, W, 3), which raises UserError where it cannot be had. `held`: the
    images, uint8 (3, H, W) each, where they are in memory; else `workers` processes read them ahead of the steps.
    """

    source: Any
    boxes: Boxes
    held: tuple[Tensor, ...] | None = None
    workers: int = 0
    device: torch.device = torch.device("cpu")

    def __len__(self) -> int:
        return len(self.boxes.ids)

    def image(self, place: int) -> Tensor:
        """Return an image as it is, uint8 (3, H, W)."""
        return self.held[place] if self.held is not None else channels_first(self.source.read(place)).to(self.device)

    def decoded(self, places: Sequence[int], draws: Sequence[int]) -> list[np.ndarray]:
        """Return images as they are, (H, W, 3) each; nothing of them is drawn."""
        return [self.source.read(place) for place in places]

    def target(self, place: int) -> dict[str, Tensor | int]:
        """Return what an image shows: boxes (n, 4), labels, crowd and area (n,), image_id."""
        box, label, crowd, area, starts, ids = self.boxes
        rows = slice(starts[place], starts[place + 1])
        shown = {"boxes": box[rows], "labels": label[rows], "crowd": crowd[rows], "area": area[rows]}
        return shown | {"image_id": ids[place]}

    def to(self, device: torch.device) -> "Side":
        """Return the side with its boxes, and the images that are held, on `device`."""
        boxes = self.boxes._replace(**{name: getattr(self.boxes, name).to(device) for name in self.boxes._fields[:4]})
        held = None if self.held is None else tuple(image.to(device) for image in self.held)
        return replace(self, boxes=boxes, held=held, device=device)


class Views(NamedTuple):
    """How images come to a detector: in a test so that the shorter side has `short` pixels, or less, where the longer
    one would have more than `long`; in training that times a factor from `low` to `high`, and mirrored or not.
    """

    short: int = 800
    long: int = 1333
    low: float = 0.8
    high: float = 1.0
    flip: bool = True


@dataclass(frozen=True)
class DetectionSet:
    """Images of any sizes with boxes around the objects of K classes, whose labels are 1 to K; 0 is the background.
    It has the face of an ImageSet: the sides stand in the images' and in the labels' place.
    """

    train: Side
    test: Side
    classes: tuple[str, ...]
    source: str  # digest
    views: Views = Views()
    notes: tuple[str, ...] = ()  # what was noticed when it was read, a line each
    task: ClassVar[str] = "detection"
    unit: ClassVar[str] = "images"
    samples: ClassVar[str] = "images"
    mean: ClassVar[tuple[float, ...]] = ()  # a detector normalises images itself
    std: ClassVar[tuple[float, ...]] = ()

    @property
    def num_classes(self) -> int:
        """K + 1, with the background."""
        return 1 + len(self.classes)

    train_images = train_labels = property(lambda self: self.train)
    test_images = test_labels = property(lambda self: self.test)
    class_names = property(lambda self: self.classes)

    def doubts(self) -> list[str]:
        """Return what was noticed, and a line on classes that no training box is of, which the student cannot learn."""
        label = self.train.boxes.label[~self.train.boxes.crowd]
        return [*self.notes, *missing(torch.bincount(label, minlength=self.num_classes)[1:], "box", self.classes)]

    def to(self, device: torch.device) -> "DetectionSet":
        """Return the set on `device`."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))

    def training_batches(self, cfg: Mapping) -> "DetectionBatches":
        """Return the batches of training images that the configuration `cfg` asks for."""
        batches = DetectionBatches(self.train, cfg.SOLVER.BATCH_SIZE, self.views, cfg.SEED)
        batches.drop_last = cfg.SOLVER.DROP_LAST
        return batches

    def test_batches(self, wanted: int) -> "DetectionBatches":
        """Return the images to test on, `wanted` of them a batch, or as many as have MOST_PIXELS, at least one."""
        side = -(-self.views.long // 32) * 32  # what a detector pads to
        return DetectionBatches(self.test, max(1, min(wanted, MOST_PIXELS // side**2)))

    def digest(self) -> str:
        """Return the digest of what the set was read from."""
        return self.source


class DetectionBatch(NamedTuple):
    image: list[Tensor]  # B of float32 (3, H, W) in [0, 1], each of its own size
    target: list[dict]  # B of Side.target
    index: Tensor  # (B,) int64: the images' places in the set
    canvas: Tensor | None = None  # (B, 2) int64, in training: height and width of the largest of the whole batch, of
    # which these may be a part, in every row


class DetectionBatches(Batches):
    """Batches of images with boxes.

    Training (`views` given): each epoch has an order, and each image in it a factor and a flip, all a function of
    (seed, epoch) alone; crowds, on which nothing is trained, are left out of the targets. A test (`views` None): images
    and boxes as they are, in their order. Of several processes each has whole batches of a test, since what a detector
    finds depends on the batch whose size its image is padded to.
    """

    views = 0  # of an image: there is no end of them, so no bank can hold a teacher's answers

    def __init__(self, side: Side, batch_size: int, views: Views | None = None, seed: int = 0):
        self.side = self.images = self.labels = side
        self.batch_size, self.scaling, self.seed = batch_size, views, seed
        self.augment, self.strong = None, None
        self.reader = Reader(side) if side.held is None else None

    @property
    def plan_device(self) -> torch.device:
        """The CPU, which looks at each image's decisions."""
        return torch.device("cpu")

    def plan(self, epoch: int) -> Tensor:
        """Return the epoch's decisions on the CPU, (3, N) int64: order, flip, and the factor of the size in
        thousandths.
        """
        n, views = self.num_samples, self.scaling or Views(low=1.0, flip=False)
        generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
        order = torch.randperm(n, generator=generator) if self.scaling else torch.arange(n)
        flip = torch.randint(0, 2, (n,), generator=generator) * views.flip
        low, high = round(1000 * views.low), round(1000 * views.high)
        return torch.stack([order, flip, torch.randint(low, high + 1, (n,), generator=generator)])

    def batch(self, plan: Tensor, rows: Tensor | None = None) -> DetectionBatch:
        """Return what `plan` (3, B) says, or its places `rows` (m,)."""
        canvas, size = None, self.side.source.size
        if self.scaling is not None:  # known before an image is decoded
            pairs = ((place, factor / 1000) for place, _, factor in plan.T.tolist())
            canvas = torch.tensor([scaled_size(size(place), self.scaling, factor) for place, factor in pairs]).amax(0)
            canvas = canvas.expand(plan.shape[1] if rows is None else len(rows), 2)
        plan = self._wanted(plan, rows).cpu()
        images, targets = [], []
        for image, (place, flip, factor) in zip(self._images(plan), plan.T.tolist(), strict=True):
            target = self.side.target(place)
            image = image.float() / 255
            if self.scaling is not None:
                ours = ~target["crowd"]
                target |= {name: target[name][ours] for name in ("boxes", "labels", "crowd", "area")}
                height, width = scaled_size(image.shape[1:], self.scaling, factor / 1000)
                image, target = resize(image, target, height, width)
                image, target = mirror(image, target) if flip else (image, target)
            images.append(image)
            targets.append(target)
        return DetectionBatch(images, targets, plan[0].to(self.side.device), canvas)

    def _images(self, plan: Tensor) -> Iterator[Tensor]:
        if self.reader is None:
            yield from (self.side.held[place] for place in plan[0].tolist())
            return
        for part in self.reader.parts(self._decoded(plan)):
            yield from (self.reader.on_device(channels_first(image)) for image in part)

    def __iter__(self) -> Iterator[DetectionBatch]:
        """Yield this process's batches of the images in their order, as they are."""
        first, step = self.tester
        plans = self.plan(0).split(self.batch_size, dim=1)[first::step]
        if self.streamed:
            self.reader.expect([self._decoded(plan) for plan in plans])
        yield from map(self.batch, plans)


def channels_first(image: np.ndarray) -> Tensor:
    """Return an image (H, W, 3) as a tensor (3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def scaled_size(size: Sequence[int], views: Views, factor: float = 1.0) -> tuple[int, int]:
    """Return (height, width) of an image of `size` (height, width) as it comes to a detector."""
    factor *= min(views.short / min(size), views.long / max(size))
    return tuple(max(1, int(side * factor)) for side in size)


def resize(image: Tensor, target: dict, height: int, width: int) -> tuple[Tensor, dict]:
    """Return an image (3, H, W) bilinearly scaled to that size, as torchvision's detectors scale theirs, and its boxes
    with it.
    """
    old = image.shape[1:]
    if (height, width) == tuple(old):
        return image, target
    image = F.interpolate(image[None], (height, width), mode="bilinear", align_corners=False)[0]
    x, y = width / old[1], height / old[0]
    scale = target["boxes"].new_tensor([x, y, x, y])
    return image, target | {"boxes": target["boxes"] * scale, "area": target["area"] * (x * y)}


def mirror(image: Tensor, target: dict) -> tuple[Tensor, dict]:
    """Return an image (3, H, W) with left and right exchanged, and its boxes with it."""
    left, top, right, bottom = target["boxes"].unbind(1)
    width = image.shape[2]
    return image.flip(2), target | {"boxes": torch.stack([width - right, top, width - left, bottom], 1)}


def views_of(options: Mapping, short: int = 800, long: int = 1333) -> Views:
    """Return the views that the section DATASET asks for; `short` and `long` where it leaves that open. Raises
    UserError for an augmentation of images of one class each.
    """
    if options["AUGMENT"] not in ("auto", "none"):
        raise UserError(
            f"DATASET.AUGMENT: {options['AUGMENT']} is for images of one class each; images with boxes take auto, "
            "which is DATASET.JITTER and a flip, or none"
        )
    low, high = options["JITTER"]
    short, long = options["SIZE"] or short, options["LONG_SIDE"] or long
    if options["AUGMENT"] == "none":
        return Views(short, long, 1.0, 1.0, flip=False)
    return Views(short, long, low, high)
