"""What COCO-like and VOC-like folders share: picture files of announced sizes, and boxes, all of them checked."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from mdistiller.config import Key, add_keys, one_of
from mdistiller.dataset._detection import DetectionSet, Side, boxes_of, channels_first, views_of
from mdistiller.dataset._pictures import FileList, decode
from mdistiller.dataset.imagefolder import MOST_CHECKED, in_parallel
from mdistiller.errors import UserError
from mdistiller.terminal import counted

add_keys(
    {
        "DATASET.BAD_BOXES": Key(
            "refuse",
            "coco, voc: refuse a set that has a box without width or height, or outside of its image; or drop such "
            "boxes (COCO's own train2017 has some).",
            one_of(("refuse", "drop")),
            only={"DATASET.TYPE": ("coco", "voc")},
        ),
    }
)


LEAST_SIDE = 0.01  # pixels of a box; less is nothing in float32
MANY = 5  # one box in so many, and more than ten, that reach beyond their images are no slips


@dataclass(frozen=True)
class Files(FileList):
    """Pictures of announced `sizes` (N, 2), width and height."""

    sizes: np.ndarray

    def size(self, place: int) -> tuple[int, int]:
        """Return height and width as they are announced."""
        width, height = self.sizes[place].tolist()
        return height, width

    def read(self, place: int) -> np.ndarray:
        """Return a picture, uint8 (H, W, 3): upright as its EXIF data say, unless its announced size is that of the
        picture as it is stored. Raises UserError where it is neither.
        """
        path, wanted = self.path(place), tuple(self.sizes[place].tolist())
        picture = decode(path)
        if picture.size != wanted:
            upright, picture = picture.size, decode(path, upright=False)
            if picture.size != wanted:
                raise UserError(
                    f"{path}: is {upright[0]} x {upright[1]} pixels, and its annotations are for {wanted[0]} x "
                    f"{wanted[1]}; put the picture that they are of in its place, or mend them"
                )
        return np.asarray(picture)

    def look(self, place: int) -> None:
        """Raise UserError for a picture whose first bytes are no picture's, or of another size than announced."""
        try:
            with Image.open(self.path(place)) as picture:
                if sorted(picture.size) == sorted(self.sizes[place].tolist()):
                    return
        except Exception:  # it is read again, for the reason
            pass
        self.read(place)


class Picture(NamedTuple):
    """A picture of a side. `rows`: its boxes, (left, top, right, bottom, area, label, crowd) each."""

    name: str
    size: tuple[int, int]  # width and height
    number: int
    rows: list[tuple]


@dataclass
class Annotations:
    """Collects the pictures of a side, and their boxes, which it checks. `drop`: leave out the bad ones."""

    what: str  # "training" or "test"
    drop: bool = False
    pictures: list[Picture] = field(default_factory=list)
    clipped: int = 0
    dropped: int = 0
    crowds: int = 0  # training images that are left out, since they show crowds alone

    def picture(self, where: str, file: Path, name: str, size: Sequence, number: int) -> Picture:
        """Enter the picture `file`, which `where` names as `name`, and return it for its boxes. Raises UserError where
        there is no such file, or `size` (width, height) is none.
        """
        if not all(number_below(side, 2**20) and side == int(side) and side > 0 for side in size):
            raise UserError(
                f"{where}: the size of {name} must be two whole numbers above 0; got {size[0]!r} x {size[1]!r}; mend it"
            )
        if not os.path.isfile(file):
            raise UserError(f"{where}: there is no picture {file}; put it there, or remove that image")
        self.pictures.append(Picture(name, (int(size[0]), int(size[1])), number, []))
        return self.pictures[-1]

    def box(
        self, where: str, picture: Picture, corners: Sequence, label: int, crowd: bool, area: float | None = None
    ) -> None:
        """Enter a box (left, top, right, bottom) of a picture, clipped to it; `area` None: the box's. Raises UserError
        that begins with `where` for one that is none.
        """
        left, top, right, bottom = corners
        width, height = picture.size
        says = ""
        shown = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
        if min(right - left, bottom - top) < LEAST_SIDE:
            says = f"its box has no width or no height ({right - left:g} x {bottom - top:g})"
        elif min(shown[2] - shown[0], shown[3] - shown[1]) < LEAST_SIDE:
            says = (
                f"its box ({left:g}, {top:g}) to ({right:g}, {bottom:g}) lies outside of the image, {width} x {height}"
            )
        if says and not self.drop:
            raise UserError(
                f"{where}: {says}; mend or remove it, or set DATASET.BAD_BOXES drop to leave such boxes out"
            )
        if says:
            self.dropped += 1
            return
        self.clipped += max(-left, -top, right - width, bottom - height) > 1  # less is how tools round
        area = (shown[2] - shown[0]) * (shown[3] - shown[1]) if area is None else area
        picture.rows.append((*shown, area, label, crowd))

    def notes(self) -> list[str]:
        """Return a line on each kind of box that is not as it was written, and on images without any."""
        found, of = [], f"of {counted(len(self.pictures), f'{self.what} image')}"
        if self.clipped:
            what = f"{counted(self.clipped, 'box')} {of}"
            found.append(f"warning: {what} reached more than a pixel beyond the image, and end there now")
            if self.clipped > max(10, sum(len(picture.rows) for picture in self.pictures) / MANY):
                found[-1] += "; they are so many that they may be given otherwise than docs/detection.md says"
        if self.dropped:
            what = f"{counted(self.dropped, 'box')} {of}"
            found.append(f"warning: {what} left out: without width or height, or outside of the image")
        if self.crowds:
            found.append(f"{counted(self.crowds, f'{self.what} image')} left out: all of their boxes are crowds")
        if empty := sum(not picture.rows for picture in self.pictures):
            found.append(f"{empty:,} {of} have no box: they are kept, as background alone")
        return found

    def side(self, root: Path, where: Path, options: Mapping) -> Side:
        """Return the side whose pictures lie below `root`, in memory where they fit. `where`: what was read. Raises
        UserError where there is no box, or a picture is not what it should be.
        """
        crowded = [all(crowd for *_, crowd in picture.rows) for picture in self.pictures]
        if all(crowded):
            raise UserError(
                f"{where}: has no box, and a detector learns from boxes and is tested by them; annotate some"
            )
        if self.what == "training":  # what is not trained on must not be taken for background
            pairs = zip(self.pictures, crowded, strict=True)
            kept = [picture for picture, out in pairs if not out or not picture.rows]
            self.crowds, self.pictures = len(self.pictures) - len(kept), kept
        names, sizes, numbers, rows = zip(*self.pictures, strict=True)
        sizes, boxes = np.array(sizes), boxes_of(rows, numbers)
        if boxes.box[:, 2:].max() <= 1 < sizes.max():
            raise UserError(
                f"{where}: no box reaches beyond the first pixel, so they seem to be fractions of the image; multiply "
                "them by its width and height"
            )
        files = Files(root, np.array([os.fsencode(name) for name in names]), sizes)
        if 3 * sizes.prod(1).sum() <= options["MEMORY"] * 2**30:
            decoded = in_parallel(
                lambda place: channels_first(files.read(place)), range(len(names)), f"decoding {self.what} images"
            )
            return Side(files, boxes, tuple(decoded))
        if len(names) <= MOST_CHECKED:
            in_parallel(files.look, range(len(names)), f"checking {self.what} images")
        return Side(files, boxes, None, options["NUM_WORKERS"])


def detection_set(
    sides: Sequence[tuple[Annotations, Path, Path]], classes: Sequence[str], digest: str, options: Mapping
) -> DetectionSet:
    """Return the set of both sides' annotations, (what is found, the folder of its pictures, where it was read), whose
    pictures are decoded or looked at only now that all annotations are known to be right.
    """
    made = [found.side(folder, file, options) for found, folder, file in sides]
    notes = [note for found, *_ in sides for note in found.notes()]
    (train, folder, _), (test, other, _) = sides
    train, test = ({picture.name for picture in found.pictures} for found in (train, test))
    # of the same name and length: the same picture
    if both := sum((folder / name).stat().st_size == (other / name).stat().st_size for name in train & test):
        notes.append(f"warning: {both:,} of {counted(len(test), 'test image')} are training images too")
    return DetectionSet(*made, tuple(classes), digest, views_of(options), tuple(notes))


def number_below(value: object, high: float = 2**31) -> bool:
    """Return whether a value that was read is a number, finite, and no further from 0 than `high`."""
    return type(value) in (int, float) and abs(value) < high
