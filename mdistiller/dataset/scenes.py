"""Scenes: objects cut out and pasted on backgrounds, so that their boxes are known exactly; nothing is downloaded."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator

from mdistiller.config import Key, add_keys, at_least, between
from mdistiller.dataset._detection import Boxes, DetectionSet, Side, channels_first, views_of
from mdistiller.dataset._registry import register_dataset
from mdistiller.dataset._shapes import SHAPES, SOLID, background, pattern, shape

add_keys(
    {
        "DATASET.SCENES.TRAIN": Key(2000, "Scenes: images to train on.", between(1, 2**20)),
        "DATASET.SCENES.TEST": Key(500, "Scenes: images to test on.", between(1, 2**20)),
        "DATASET.SCENES.OBJECTS": Key(8, "Scenes: objects in an image, at most.", between(1, 100)),
        "DATASET.SCENES.SEED": Key(
            0, "Scenes: what they are drawn from, so that runs of several SEEDs see the same ones.", at_least(0)
        ),
    }
)

SIZE = 128
SIZES = (0.09, 0.5)  # of an object's longer side, as a share of the image's
SHOWN = 0.45  # of each object, at least, that is neither outside nor behind others
TRIES = 6  # at placing an object
SMALLEST = 4  # pixels of a box's side


@dataclass(frozen=True)
class Scenes:
    """Draws the scenes of a side, "train" or "test", each from (seed, side, its number) alone."""

    side: str
    count: int
    size: int  # of the longer side
    most: int
    seed: int
    classes: tuple[str, ...] = tuple(SHAPES)

    def __len__(self) -> int:
        return self.count

    def read(self, place: int) -> np.ndarray:
        return self.draw(place)[0]

    def draw(self, place: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return an image, uint8 (H, W, 3), the boxes (n, 4) of what is to be seen of its objects, and their labels."""
        random = np.random.default_rng([self.seed, self.side == "test", place])
        sides = [self.size, int(self.size * random.uniform(0.75, 1))]
        height, width = sides if random.integers(2) else sides[::-1]
        image = background(height, width, random)
        around = np.asarray(image.mean((0, 1)))
        owner = np.full((height, width), -1)  # of each pixel
        labels, areas = [], []
        for _ in range(random.integers(1, self.most + 1)):
            label = int(random.integers(len(self.classes)))
            alpha, colour = self.cut_out(label, around, random)
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
        return image.clip(0, 255).astype(np.uint8), boxes_of(owner, len(labels)), np.array(labels, int)

    def cut_out(self, label: int, around: np.ndarray, random: Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return an object's alpha (h, w), 0 to 255, and its colours (h, w, 3)."""
        size = self.size * np.exp(random.uniform(*np.log(SIZES)))
        alpha = shape(self.classes[label], size, random)
        return alpha, pattern(*alpha.shape, around, random)

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
            left_over = owner.copy()
            left_over[inside][shown] = -1
            seen = np.bincount(left_over[left_over >= 0], minlength=len(areas))
            boxes = boxes_of(left_over, len(areas))
            if all(seen >= SHOWN * np.array(areas)) and (boxes[:, 2:] - boxes[:, :2] >= SMALLEST).all():
                return inside, part
        return None


def boxes_of(owner: np.ndarray, count: int) -> np.ndarray:
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
    """Draw scenes. Nothing is read from `root`."""
    own, size, hasher = options["SCENES"], options["SIZE"] or SIZE, hashlib.sha256()
    sides = []
    for side, count in (("train", own["TRAIN"]), ("test", own["TEST"])):
        source = Scenes(side, count, size, own["OBJECTS"], own["SEED"])
        drawn = [source.draw(place) for place in range(count)]
        for image, box, label in drawn:
            for values in (image, box, label):
                hasher.update(np.ascontiguousarray(values))
        box = torch.from_numpy(np.concatenate([box for _, box, _ in drawn]))
        label = torch.from_numpy(np.concatenate([label for *_, label in drawn]))
        starts = np.cumsum([0, *(len(label) for *_, label in drawn)]).tolist()
        area = (box[:, 2:] - box[:, :2]).prod(1)
        boxes = Boxes(box, label, torch.zeros(len(box), dtype=torch.bool), area, tuple(starts), tuple(range(count)))
        sides.append(Side(source, boxes, tuple(channels_first(image) for image, *_ in drawn)))
    return DetectionSet(*sides, tuple(SHAPES), hasher.hexdigest(), views_of(options, size, size))
