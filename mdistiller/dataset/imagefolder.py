"""Folders of pictures: train/CLASS/*, val/CLASS/* or test/CLASS/*; ImageNet; Tiny-ImageNet with its own val/."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from mdistiller.config import Check, Key, add_keys, at_least, between
from mdistiller.dataset._images import ImageSet
from mdistiller.dataset._pictures import Pictures
from mdistiller.dataset._registry import register_dataset
from mdistiller.errors import UserError
from mdistiller.terminal import counted, say, shows_bars

FOLDERS = ("imagefolder", "imagenet", "tiny_imagenet")
add_keys(
    {
        "DATASET.SIZE": Key(
            0,
            "Picture folders: pixels of a side; 0: 224, of tiny_imagenet 64. Images with boxes: pixels of the shorter "
            "side in a test; 0: 800, of scenes 128.",
            Check(lambda v: not v or 8 <= v <= 1024, "must be 0, or 8 to 1024"),
            only={"DATASET.TYPE": (*FOLDERS, "detection")},
        ),
        "DATASET.CROP": Key(
            0.0,
            "Picture folders: the share of the shorter side that the middle keeps, as in a test; 0: 0.875, of "
            "tiny_imagenet 1.",
            between(0, 1),
            only={"DATASET.TYPE": FOLDERS},
        ),
        "DATASET.BACKGROUND": Key(
            [255, 255, 255],
            "Picture folders: the colour below transparent parts.",
            Check(lambda v: len(v) == 3 and all(0 <= n <= 255 for n in v), "must be three numbers from 0 to 255"),
            only={"DATASET.TYPE": FOLDERS},
        ),
        "DATASET.MEMORY": Key(
            4.0,
            "Picture files: GiB that the decoded pictures may take to be kept in memory; larger sets, and those "
            "under resized_crop, are decoded in each epoch by DATASET.NUM_WORKERS processes.",
            at_least(0),
            role="how",
            only={"DATASET.TYPE": (*FOLDERS, "detection")},
        ),
    }
)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which pretrained networks expect
MOST_CHECKED = 200_000  # pictures whose first and last bytes are read before training starts
END, ENDS_WITHIN = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}, 64  # of a whole file, in so many bytes at its end
TESTS = ("val", "test")
CROPS = {"imagefolder": 0.875, "imagenet": 0.875, "tiny_imagenet": 1.0}  # where DATASET.CROP is 0
Item, Made = TypeVar("Item"), TypeVar("Made")


@register_dataset("imagefolder")
def imagefolder(root: Path, options: Mapping) -> ImageSet:
    """Read `root`/train/CLASS/* and `root`/val/CLASS/*, or test/. Raises UserError that names the first file or folder
    that cannot be.
    """
    return read_folders(root, options)


@register_dataset("imagenet")
def imagenet(root: Path, options: Mapping) -> ImageSet:
    """Read ImageNet as torchvision lays it out, in `root` or `root`/imagenet."""
    return read_folders(below(root, "imagenet"), options)


@register_dataset("tiny_imagenet")
def tiny_imagenet(root: Path, options: Mapping) -> ImageSet:
    """Read Tiny-ImageNet as it is published, in `root` or `root`/tiny-imagenet-200, or with a val/ of class folders."""
    return read_folders(
        below(root, "tiny-imagenet-200"), options, size=64, crop=CROPS["tiny_imagenet"], augment="crop_flip"
    )


def below(root: Path, name: str) -> Path:
    return root if (root / "train").is_dir() or not (root / name).is_dir() else root / name


def read_folders(
    root: Path, options: Mapping, size: int = 224, crop: float = CROPS["imagefolder"], augment: str = "resized_crop"
) -> ImageSet:
    """Return the pictures below `root`, in memory where they fit and need no crops of the originals. `options`: the
    section DATASET; the others are its defaults.
    """
    size, crop = options["SIZE"] or size, options["CROP"] or crop
    augment = augment if options["AUGMENT"] == "auto" else options["AUGMENT"]
    if not (root / "train").is_dir():
        raise UserError(
            f"{root}: has no folder train; DATASET.ROOT is the folder that holds train/CLASS/ and val/CLASS/"
        )
    test = next((name for name in TESTS if (root / name).is_dir()), None)
    if test is None:
        raise UserError(f"{root}: has neither val nor test beside train; put the pictures to test on into val/CLASS/")
    names, listed = {"train": by_class(root / "train")}, root / test / "val_annotations.txt"
    names[test] = annotated(listed) if listed.is_file() else by_class(root / test)
    classes = sorted(names["train"])
    if len(classes) < 2:
        raise UserError(
            f"{root / 'train'}: holds the one class {classes[0]}; a folder for each of several classes is needed"
        )
    if unknown := [name for name in names[test] if name not in names["train"]]:
        raise UserError(
            f"{root / test}: has the class {unknown[0]}, which is not in train; it can be no student's answer"
        )
    if untested := [name for name in classes if name not in names[test]]:
        what = counted(len(untested), "class")
        say(f"warning: {root / test}: {what} of train have no picture to test on, such as {untested[0]}")
    background, workers = tuple(options["BACKGROUND"]), options["NUM_WORKERS"]
    files, labels, hasher = {}, {}, hashlib.sha256(f"{size} {crop} {[*background]}".encode())
    for split, by in names.items():
        rows = [(label, name, *found) for label, name in enumerate(classes) for found in by.get(name, ())]
        lines = (f"{split}/{name}/{file} {length}\n" for _, name, file, length in rows)
        hasher.update("".join(lines).encode(errors="surrogateescape"))
        labels[split] = torch.tensor([label for label, *_ in rows])
        paths = np.array([os.fsencode(file) for _, _, file, _ in rows])
        files[split] = Pictures(root / split, paths, size, crop, background, workers)
    images = sum(len(part) for part in files.values())
    if augment != "resized_crop" and images * 3 * size**2 <= options["MEMORY"] * 2**30:
        files = {split: decoded(part, split) for split, part in files.items()}
    elif images <= MOST_CHECKED:
        for split, part in files.items():
            check_files(part, split)
    return ImageSet(
        files["train"], labels["train"], files[test], labels[test], len(classes), MEAN, STD, augment, tuple(classes),
        hasher.hexdigest(),
    )  # fmt: skip


def by_class(folder: Path) -> dict[str, list[tuple[str, int]]]:
    """Return {class: [(file below `folder`, its bytes)]} of the folder's folders, however deep the files lie. Raises
    UserError for a class without a picture and for an empty file.
    """
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise UserError(f"{folder}: holds no folder; the pictures of a class lie in a folder of its name")
    found, passed = {}, []
    for name in with_progress(classes, f"looking through {folder.name}", "class"):
        found[name] = []
        for path, length in walk(folder / name):
            if not path.lower().endswith(SUFFIXES):
                passed.append(path)
                continue
            if not length:
                raise UserError(f"{path}: is empty; mend or remove it")
            found[name].append((os.path.relpath(path, folder), length))
        if not found[name]:
            raise UserError(
                f"{folder / name}: holds no picture ({', '.join(SUFFIXES)}); add some, or remove the folder"
            )
    if passed:
        first = os.path.relpath(passed[0], folder)
        say(f"{folder}: {counted(len(passed), 'file')} passed over, no pictures by their names, such as {first}")
    return found


def walk(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield (path, bytes) of the files below `folder` in the order of their names, but for hidden ones."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from walk(Path(entry.path))
        else:
            yield entry.path, entry.stat().st_size


def annotated(file: Path) -> dict[str, list[tuple[str, int]]]:
    """Return what `by_class` does of Tiny-ImageNet's val/, whose val_annotations.txt names each picture's class."""
    found: dict[str, list[tuple[str, int]]] = {}
    for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1):
        words = line.split("\t")
        path = file.parent / "images" / words[0]
        if len(words) < 2 or not path.is_file() or not path.stat().st_size:
            raise UserError(
                f"{file}, line {number}: names no picture of images/ and its class; mend or remove that line"
            )
        found.setdefault(words[1], []).append((f"images/{words[0]}", path.stat().st_size))
    return found


def decoded(pictures: Pictures, split: str) -> Tensor:
    """Return all pictures, uint8 (N, size, size, 3). Raises UserError for one that cannot be read."""
    images = torch.empty(pictures.shape, dtype=torch.uint8)

    def put(place: int) -> None:
        images[place] = torch.from_numpy(pictures.image(place).copy())

    in_parallel(put, range(len(pictures)), f"decoding {split}")
    return images


def check_files(pictures: Pictures, split: str) -> None:
    """Raise UserError for a file whose first bytes are no picture's, or which is cut off: what does not end as a JPEG
    or PNG does is decoded, to know.
    """

    def look(place: int) -> None:
        path = pictures.path(place)
        try:
            with Image.open(path) as image, open(path, "rb") as file:
                file.seek(-min(ENDS_WITHIN, os.path.getsize(path)), os.SEEK_END)
                whole = END[image.format] in file.read()
        except Exception:  # it is decoded, for the reason, or since its kind has no such mark
            whole = False
        if not whole:
            pictures.image(place)

    in_parallel(look, range(len(pictures)), f"checking {split}")


def in_parallel(work: Callable[[Item], Made], items: Sequence[Item], title: str) -> list[Made]:
    """Return what `work` makes of each item, by a thread a processor, which PIL lets run side by side."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            return list(with_progress(pool.map(work, items), title, "picture", len(items)))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def with_progress(items: Iterable[Item], title: str, unit: str, total: int | None = None) -> Iterable[Item]:
    """Return the items with a bar beside them, where there is a terminal."""
    return tqdm(items, title, total, leave=False, unit=unit, disable=not shows_bars())
