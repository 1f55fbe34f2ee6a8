"""What COCO-like and VOC-like folders share: picture files of announced sizes, and boxes, all of them checked."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mdistiller.config import Key, add_keys, one_of
from mdistiller.dataset._detection import Boxes, DetectionSet, Side, channels_first, views_of
from mdistiller.dataset._pictures import decode
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
        ),
    }
)


LEAST_SIDE = 0.01  # pixels of a box; less is nothing in float32
MANY = 5  # one box in so many, and more than ten, that reach beyond their images are no slips


@dataclass(frozen=True)
class Files:
    """Pictures of announced sizes: `names` of the files below `root`, as bytes (N,), and `sizes` (N, 2), width and
    height.
    """

    root: Path
    names: np.ndarray
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def path(self, place: int) -> Path:
        return self.root / os.fsdecode(bytes(self.names[place]))

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


@dataclass
class Annotations:
    """Collects the pictures of a side, and their boxes, which it checks. `drop`: leave out the bad ones."""

    what: str  # "training" or "test"
    drop: bool = False
    names: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    boxes: list[list[tuple]] = field(default_factory=list)  # of each picture: (left, top, right, bottom, area)
    labels: list[list[int]] = field(default_factory=list)
    crowd: list[list[bool]] = field(default_factory=list)
    clipped: int = 0
    dropped: int = 0
    crowds: int = 0  # training images that are left out, since they show crowds alone

    def picture(self, where: str, file: Path, name: str, size: Sequence, number: int) -> None:
        """Enter the picture `file`, which `where` names as `name`; its boxes follow. Raises UserError where there is no
        such file, or `size` (width, height) is none.
        """
        if not all(number_below(side, 2**20) and side == int(side) and side > 0 for side in size):
            raise UserError(
                f"{where}: the size of {name} must be two whole numbers above 0; got {size[0]!r} x {size[1]!r}; mend it"
            )
        if not os.path.isfile(file):
            raise UserError(f"{where}: there is no picture {file}; put it there, or remove that image")
        self.names.append(name)
        self.sizes.append((int(size[0]), int(size[1])))
        self.ids.append(number)
        for values in (self.boxes, self.labels, self.crowd):
            values.append([])

    def box(self, where: str, place: int, corners: Sequence, label: int, crowd: bool, area: float | None) -> None:
        """Enter a box (left, top, right, bottom) of the picture at `place`, clipped to it; `area` None: the box's.
        Raises UserError that begins with `where` for one that is none.
        """
        left, top, right, bottom = corners
        width, height = self.sizes[place]
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
        left, top, right, bottom = shown
        self.boxes[place].append((left, top, right, bottom, (right - left) * (bottom - top) if area is None else area))
        self.labels[place].append(label)
        self.crowd[place].append(crowd)

    def notes(self) -> list[str]:
        """Return a line on each kind of box that is not as it was written, and on images without any."""
        found, of = [], f"of {counted(len(self.boxes), f'{self.what} image')}"
        if self.clipped:
            what = f"{counted(self.clipped, 'box')} {of}"
            found.append(f"warning: {what} reached more than a pixel beyond the image, and end there now")
            if self.clipped > max(10, sum(map(len, self.boxes)) / MANY):
                found[-1] += "; they are so many that they may be given otherwise than docs/detection.md says"
        if self.dropped:
            what = f"{counted(self.dropped, 'box')} {of}"
            found.append(f"warning: {what} left out: without width or height, or outside of the image")
        if self.crowds:
            found.append(f"{counted(self.crowds, f'{self.what} image')} left out: all of their boxes are crowds")
        if empty := sum(not boxes for boxes in self.boxes):
            found.append(f"{empty:,} {of} have no box: they are kept, as background alone")
        return found

    def leave_out(self, places: Sequence[bool]) -> None:
        """Leave out the pictures at `places`, which show crowds alone."""
        self.crowds = sum(places)
        for name in ("names", "sizes", "ids", "boxes", "labels", "crowd"):
            kept = [value for value, out in zip(getattr(self, name), places, strict=True) if not out]
            setattr(self, name, kept)

    def side(self, root: Path, where: Path, options: Mapping) -> Side:
        """Return the side whose pictures lie below `root`, in memory where they fit. `where`: what was read. Raises
        UserError where there is no box, or a picture is not what it should be.
        """
        if not any(map(len, self.labels)) or all(all(crowd) for crowd in self.crowd):
            raise UserError(
                f"{where}: has no box, and a detector learns from boxes and is tested by them; annotate some"
            )
        if self.what == "training":  # what is not trained on must not be taken for background
            self.leave_out([bool(crowd) and all(crowd) for crowd in self.crowd])
        rows = torch.tensor([row for boxes in self.boxes for row in boxes], dtype=torch.float32).view(-1, 5)
        label = torch.tensor([label for labels in self.labels for label in labels])
        crowd = torch.tensor([one for crowd in self.crowd for one in crowd])
        starts = np.cumsum([0, *map(len, self.labels)]).tolist()
        boxes = Boxes(rows[:, :4].contiguous(), label, crowd, rows[:, 4].contiguous(), tuple(starts), tuple(self.ids))
        sizes = np.array(self.sizes)
        if rows[:, 2:4].max() <= 1 < sizes.max():
            raise UserError(
                f"{where}: no box reaches beyond the first pixel, so they seem to be fractions of the image; multiply "
                "them by its width and height"
            )
        files = Files(root, np.array([os.fsencode(name) for name in self.names]), sizes)
        side, held = Side(files, boxes, None, options["NUM_WORKERS"]), [None] * len(files)

        def put(place: int) -> None:
            held[place] = channels_first(files.read(place))

        if 3 * sizes.prod(1).sum() <= options["MEMORY"] * 2**30:
            in_parallel(put, range(len(files)), f"decoding {self.what} images")
            return Side(files, boxes, tuple(held))
        if len(files) <= MOST_CHECKED:
            in_parallel(files.look, range(len(files)), f"checking {self.what} images")
        return side


def detection_set(
    sides: Sequence[tuple[Annotations, Path, Path]], classes: tuple[str, ...], digest: str, options: Mapping
) -> DetectionSet:
    """Return the set of both sides' annotations, (what is found, the folder of its pictures, where it was read), whose
    pictures are decoded or looked at only now that all annotations are known to be right.
    """
    made = [found.side(folder, file, options) for found, folder, file in sides]
    notes = [note for found, *_ in sides for note in found.notes()]
    (train, folder, _), (test, other, _) = sides
    common = {*train.names} & {*test.names}  # of the same name and length: the same picture
    if both := sum((folder / name).stat().st_size == (other / name).stat().st_size for name in common):
        notes.append(f"warning: {both:,} of {counted(len(test.names), 'test image')} are training images too")
    return DetectionSet(*made, classes, digest, views_of(options), tuple(notes))


def number_below(value: object, high: float = 2**31) -> bool:
    """Return whether a value that was read is a number, finite, and no further from 0 than `high`."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < high


def inside(name: object) -> bool:
    """Return whether a name that was read can be that of a file below a folder."""
    return (
        isinstance(name, str)
        and bool(name)
        and "\0" not in name
        and not Path(name).is_absolute()
        and ".." not in Path(name).parts
    )
