"""Scenes: objects cut out and pasted on backgrounds, so that their boxes are known exactly; nothing is downloaded."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image

from mdistiller import registry
from mdistiller.config import Key, add_keys, at_least, between, one_of
from mdistiller.dataset._detection import DetectionSet, Side, boxes_of, channels_first, views_of
from mdistiller.dataset._pictures import decode
from mdistiller.dataset._registry import register_dataset
from mdistiller.dataset._shapes import SOLID, CutOuts, Shapes, background
from mdistiller.dataset.imagefolder import TESTS, by_class, with_progress
from mdistiller.errors import UserError
from mdistiller.terminal import counted

IMAGE_SETS = ("cifar10", "cifar100", "digits")
READ_BY = {"DATASET.TYPE": ("scenes",)}
add_keys(
    {
        "DATASET.SCENES.OF": Key(
            "shapes",
            "Scenes: what is in them: shapes, which need no file; pictures, cut out by their transparent parts, of "
            "ROOT/train/CLASS and ROOT/val/CLASS; or the images of cifar10, cifar100 or digits.",
            one_of(("shapes", "pictures", *IMAGE_SETS)),
            only=READ_BY,
        ),
        "DATASET.SCENES.TRAIN": Key(2000, "Scenes: images to train on.", between(1, 2**20), only=READ_BY),
        "DATASET.SCENES.TEST": Key(500, "Scenes: images to test on.", between(1, 2**20), only=READ_BY),
        "DATASET.SCENES.OBJECTS": Key(8, "Scenes: objects in an image, at most.", between(1, 100), only=READ_BY),
        "DATASET.SCENES.VARIANT": Key(
            0, "Scenes: another number draws other ones; runs of several SEEDs see the same.", at_least(0), only=READ_BY
        ),
    }
)

SIZE = 128
SIZES = (0.09, 0.5)  # of an object's longer side, as a share of the image's
SHOWN = 0.45  # of each object, at least, that is neither outside nor behind others
TRIES = 6  # at placing an object
SMALLEST = 4  # pixels of a box's side
NOBODY = -1


@dataclass(frozen=True)
class Scenes:
    """Draws the scenes of a side, "train" or "test", each from (seed, side, its number) alone."""

    objects: Shapes | CutOuts
    side: str
    long: int  # pixels of the longer side
    most: int
    seed: int

    def begun(self, place: int) -> tuple[Generator, int, int]:
        """Return what a scene is drawn from, its height and its width."""
        random = np.random.default_rng([self.seed, self.side == "test", place])
        sides = [self.long, int(self.long * random.uniform(0.75, 1))]
        return random, *(sides if random.integers(2) else sides[::-1])

    def size(self, place: int) -> tuple[int, int]:
        """Return the height and width of a scene."""
        return self.begun(place)[1:]

    def read(self, place: int) -> np.ndarray:
        return self.draw(place)[0]

    def draw(self, place: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return an image, uint8 (H, W, 3), the boxes (n, 4) of what is to be seen of its objects, and their labels."""
        random, height, width = self.begun(place)
        image = background(height, width, random)
        around = np.asarray(image.mean((0, 1)))
        owner = np.full((height, width), NOBODY, np.int16)  # of each pixel
        labels, areas = [], []
        for _ in range(random.integers(1, self.most + 1)):
            label = int(random.integers(len(self.objects.classes)))
            size = self.long * np.exp(random.uniform(*np.log(SIZES)))
            alpha, colour = self.objects.cut(label, size, around, random)
            where = self.place(alpha, owner, areas, random)
            if where is None:
                continue
            inside, part = where
            weight = alpha[part][..., None] / np.float32(255)
            image[inside] = image[inside] * (1 - weight) + colour[part] * weight
            owner[inside][alpha[part] >= SOLID] = len(labels)
            labels.append(1 + label)
            areas.append(int((alpha >= SOLID).sum()))
        noise = random.standard_normal(image.shape, np.float32) * np.float32(random.uniform(1, 7))
        image = image * np.float32(random.uniform(0.75, 1.1)) + noise
        return image.clip(0, 255).astype(np.uint8), boxes_around(owner, len(labels)), np.array(labels, int)

    def place(self, alpha: np.ndarray, owner: np.ndarray, areas: list[int], random: Generator) -> tuple | None:
        """Return where in the image an object goes, and the part of it that lies inside, as pairs of slices; None where
        no place is found in which it and all others are seen well enough.
        """
        solid = alpha >= SOLID
        (height, width), (h, w) = owner.shape, alpha.shape
        for _ in range(TRIES):
            top, left = (
                random.integers(-h // 3, height - h + h // 3 + 1),
                random.integers(-w // 3, width - w + w // 3 + 1),
            )
            inside = slice(max(0, top), min(height, top + h)), slice(max(0, left), min(width, left + w))
            part = tuple(slice(s.start - start, s.stop - start) for s, start in zip(inside, (top, left), strict=True))
            shown = solid[part]
            rows, columns = shown.any(1).sum(), shown.any(0).sum()
            if shown.sum() < SHOWN * solid.sum() or min(rows, columns) < SMALLEST:
                continue
            below = np.unique(owner[inside][shown])
            left_over = owner.copy()
            left_over[inside][shown] = NOBODY
            if all(self.is_seen(left_over == number, areas[number]) for number in below if number != NOBODY):
                return inside, part
        return None

    @staticmethod
    def is_seen(mask: np.ndarray, area: int) -> bool:
        """Return whether enough is left of an object that was so large."""
        sides = mask.any(0), mask.any(1)
        return mask.sum() >= SHOWN * area and all(np.ptp(np.flatnonzero(side)) >= SMALLEST - 1 for side in sides)


def boxes_around(owner: np.ndarray, count: int) -> np.ndarray:
    """Return the box (left, top, right, bottom) around the pixels that each object owns, (count, 4)."""
    found = np.zeros((count, 4), np.float32)
    for number in range(count):
        mask = owner == number
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if len(rows):
            found[number] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return found


@register_dataset("scenes", task="detection")
def scenes(root: Path, options: Mapping) -> DetectionSet:
    """Draw scenes. Of shapes nothing is read from `root`."""
    own, size, hasher = options["SCENES"], options["SIZE"] or SIZE, hashlib.sha256()
    objects = objects_of(own["OF"], root, size)
    held = 3 * size**2 * (own["TRAIN"] + own["TEST"]) <= options["MEMORY"] * 2**30
    sides = []
    for side, count in (("train", own["TRAIN"]), ("test", own["TEST"])):
        source = Scenes(objects[side == "test"], side, size, own["OBJECTS"], own["VARIANT"])
        images, rows = [], []
        for place in with_progress(range(count), f"drawing {side}", "scene"):
            image, boxes, labels = source.draw(place)
            for values in (image, boxes, labels):
                hasher.update(np.ascontiguousarray(values))
            area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
            rows.append(np.column_stack([boxes, area, labels, 0 * labels]).tolist())
            images += [channels_first(image)] if held else []
        if not any(rows):
            raise UserError(
                f"DATASET.SIZE {size}: no object is to be seen in {counted(count, 'scene')} ({side}); take a larger "
                f"size, or more of DATASET.SCENES.{side.upper()}"
            )
        boxes, held_images = boxes_of(rows, range(count)), tuple(images) if held else None
        sides.append(Side(source, boxes, held_images, options["NUM_WORKERS"]))
    return DetectionSet(*sides, objects[0].classes, hasher.hexdigest(), views_of(options, size, size))


def objects_of(kind: str, root: Path, size: int) -> tuple[Shapes | CutOuts, Shapes | CutOuts]:
    """Return what scenes to train and to test on are made of: different pictures of the same classes."""
    if kind == "shapes":
        return Shapes(), Shapes()
    if kind == "pictures":
        return pictures_of(root, size)
    data, grey = registry.datasets[kind](root), kind == "digits"
    classes = data.class_names or tuple(map(str, range(data.num_classes)))
    found = []
    for images, labels in ((data.train_images, data.train_labels), (data.test_images, data.test_labels)):
        pixels = images.numpy()
        if grey:  # ink is what is not transparent; the digits that are there are of 8 x 8 pixels
            pixels = np.concatenate([pixels, pixels[..., :1]], 3)[:, ::4, ::4]
        members = tuple(np.flatnonzero(labels == label) for label in range(data.num_classes))
        found.append(CutOuts(classes, pixels, members, 15.0 if grey else 0.0, not grey, grey))
    return tuple(found)


def pictures_of(root: Path, size: int) -> tuple[CutOuts, CutOuts]:
    """Return the pictures of `root`/train/CLASS and `root`/val/CLASS, or test/, none of their sides above `size`."""
    test = next((name for name in TESTS if (root / name).is_dir()), TESTS[0])
    folders = root / "train", root / test
    sides = [by_class(folder) for folder in folders]
    classes = tuple(sorted(sides[0]))
    if [*classes] != sorted(sides[1]):
        other = sorted({*classes} ^ {*sides[1]})[0]
        raise UserError(f"{folders[1]}: the class {other} is in one of train and {test} alone; both need the same ones")
    found = []
    for folder, side in zip(folders, sides, strict=True):
        pictures, members = [], []
        for name in classes:
            members.append(np.arange(len(pictures), len(pictures) + len(side[name])))
            pictures += [cut_out(folder / file, size) for file, _ in side[name]]
        found.append(CutOuts(classes, pictures, members, 15.0))
    return tuple(found)


def cut_out(file: Path, size: int) -> np.ndarray:
    """Return what of a picture is not transparent, uint8 (h, w, 4)."""
    decode(file)  # says what is wrong with a file
    with Image.open(file) as image:
        image = image.convert("RGBA")
    around = image.getchannel("A").point(lambda alpha: 255 * (alpha >= SOLID)).getbbox()
    if around is None:
        raise UserError(f"{file}: is transparent everywhere; mend or remove it")
    image = image.crop(around)
    image.thumbnail((size, size))
    return np.asarray(image)
