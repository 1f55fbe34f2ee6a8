"""Folders laid out as Pascal VOC's: JPEGImages, Annotations/*.xml, and lists of names in ImageSets/Main."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from mdistiller.dataset._annotations import Annotations, detection_set, number_below
from mdistiller.dataset._detection import DetectionSet
from mdistiller.dataset._registry import register_dataset
from mdistiller.dataset.imagefolder import SUFFIXES
from mdistiller.errors import UserError
from mdistiller.files import open_regular

LISTS = {"training": ("train.txt",), "test": ("val.txt", "test.txt")}
SIDES = ("xmin", "ymin", "xmax", "ymax")


@register_dataset("voc", task="detection")
def voc(root: Path, options: Mapping) -> DetectionSet:
    """Read the pictures and boxes in `root`, or in its VOCdevkit/VOC*. Objects that are marked as difficult are crowds:
    they are neither trained on nor counted. Raises UserError that names the first file and object that cannot be.
    """
    root, trees, lists = inner(root), {}, {}
    hasher = hashlib.sha256(options["BAD_BOXES"].encode())
    for what, known in LISTS.items():
        files = [root / "ImageSets" / "Main" / name for name in known]
        listed = lists[what] = next((file for file in files if file.is_file()), None)
        if listed is None:
            raise UserError(f"{root}: has no ImageSets/Main/{known[0]}; list the names of the {what} pictures there")
        names = [line.strip() for line in listed.read_text(errors="replace").splitlines() if line.strip()]
        if not names:
            raise UserError(f"{listed}: is empty; list the names of pictures there, one a line")
        trees[what] = [(name, *annotated(root, name, listed, hasher)) for name in names]
    classes = sorted({name for _, file, tree in trees["training"] for _, _, name in objects(file, tree)})
    sides = []
    for what, listed in lists.items():
        found = Annotations(what, options["BAD_BOXES"] == "drop")
        for entry in trees[what]:
            enter(*entry, classes, found, root / "JPEGImages")
        sides.append((found, root / "JPEGImages", listed))
    return detection_set(sides, classes, hasher.hexdigest(), options)


def inner(root: Path) -> Path:
    """Return the folder that holds Annotations: `root`, or the last one of its VOCdevkit."""
    if (root / "Annotations").is_dir():
        return root
    for folder in sorted([*root.glob("VOC20*"), *root.glob("VOCdevkit/VOC20*")], reverse=True):
        if (folder / "Annotations").is_dir():
            return folder
    raise UserError(
        f"{root}: has no folder Annotations; DATASET.ROOT is the one that holds Annotations, ImageSets and JPEGImages"
    )


def annotated(root: Path, name: str, listed: Path, hasher: "hashlib._Hash") -> tuple[Path, Element]:
    """Return the XML file of the picture `name`, and its root."""
    file = root / "Annotations" / f"{name}.xml"
    if not file.is_file():
        raise UserError(f"{listed}: there is no {file}; put it there, or remove {name} from the list")
    with open_regular(file, "an XML file as Pascal VOC has them") as opened:
        content = opened.read()
    hasher.update(hashlib.sha256(content).digest())
    try:
        return file, ElementTree.fromstring(content)
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # an unknown encoding
        reason = "it is empty" if not content.strip() else str(error)
        raise UserError(f"{file}: is no XML ({reason}); write it again") from None


def text(element: Element, name: str, where: object) -> str:
    """Return the text of the part `name` of an element."""
    found = (element.findtext(name) or "").strip()
    if not found:
        raise UserError(f"{where}: has no {name}; add it")
    return found


def number(element: Element, name: str, where: object) -> float:
    try:
        value = float(text(element, name, where))
    except ValueError:
        value = float("nan")
    if not number_below(value):
        raise UserError(f"{where}: its {name} must be a number; got {text(element, name, where)!r}")
    return value


def objects(file: Path, tree: Element) -> Iterator[tuple[str, Element, str]]:
    """Yield each object of an XML file: what names it in a line, itself, and its class."""
    for count, thing in enumerate(tree.findall("object"), 1):
        where = f"{file}: object {count}"
        yield where, thing, text(thing, "name", where)


def enter(name: str, file: Path, tree: Element, classes: list[str], found: Annotations, folder: Path) -> None:
    """Enter the picture `name` of an XML file, and its boxes, into `found`."""
    size = [number(tree, f"size/{side}", file) for side in ("width", "height")]
    names = [f"{name}{suffix}" for known in SUFFIXES for suffix in (known, known.upper())]
    chosen = next((chosen for chosen in names if (folder / chosen).is_file()), names[0])
    picture = found.picture(str(file), folder / chosen, chosen, size, len(found.pictures))
    for where, thing, label in objects(file, tree):
        if label not in classes:
            raise UserError(f"{where}: its class '{label}' is not in training; it can be no student's answer")
        left, top, right, bottom = (number(thing, f"bndbox/{side}", where) for side in SIDES)
        crowd = (thing.findtext("difficult") or "0").strip() == "1"
        # VOC counts pixels from 1, and right and bottom are the last ones inside
        found.box(where, picture, (left - 1, top - 1, right, bottom), 1 + classes.index(label), crowd)
