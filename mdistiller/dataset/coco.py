"""Folders in COCO's format: pictures, and a JSON file of the boxes in them."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from mdistiller.dataset._annotations import Annotations, detection_set, number_below
from mdistiller.dataset._detection import DetectionSet
from mdistiller.dataset._registry import register_dataset
from mdistiller.errors import UserError
from mdistiller.files import open_regular

NAMES = {"training": ("train2017", "train2014", "train"), "test": ("val2017", "val2014", "val", "valid", "test")}
WHOLE = (lambda value: type(value) is int), "a whole number"
TEXT = (lambda value: isinstance(value, str) and value != ""), "a text"
FIELDS = {  # of each list's entries: what a value must be
    "categories": {"id": WHOLE, "name": TEXT},
    "images": {"id": WHOLE, "file_name": TEXT},
    "annotations": {
        "image_id": WHOLE,
        "category_id": WHOLE,
        "bbox": (
            lambda value: isinstance(value, list) and len(value) == 4 and all(map(number_below, value)),
            "four numbers, left, top, width and height",
        ),
        "area": (lambda value: value is None or (number_below(value, 2**62) and value >= 0), "a number of 0 or more"),
        "iscrowd": (lambda value: value in (None, 0, 1), "0 or 1"),
    },
}
UNIQUE = ("id", "name", "file_name")  # fields of which no two entries have the same


@register_dataset("coco", task="detection")
def coco(root: Path, options: Mapping) -> DetectionSet:
    """Read the pictures and boxes in `root` or `root`/coco, as `find` finds them. Raises UserError that names the first
    file and entry that cannot be.
    """
    if (root / "coco").is_dir() and not any((root / name).is_dir() for name in (*NAMES["training"], "images")):
        root = root / "coco"
    hasher, drop = hashlib.sha256(options["BAD_BOXES"].encode()), options["BAD_BOXES"] == "drop"
    sides, classes = [], {}
    for what in NAMES:
        folder, file = find(root, what)
        with open_regular(file, "a JSON file in COCO's format") as opened:
            content = opened.read()
        hasher.update(hashlib.sha256(content).digest())
        tree = parsed(content, file)
        named = {entry["id"]: entry["name"] for _, entry in entries(tree, "categories", file)}
        if classes and (differing := sorted({*classes.items()} ^ {*named.items()})):
            number, name = differing[0]
            raise UserError(
                f"{file}: the category {number}, '{name}', is in one of training and test alone; both need the same"
            )
        classes = classes or named
        labels = {number: label for label, number in enumerate(sorted(classes), 1)}
        found, pictures = Annotations(what, drop), {}
        for where, entry in entries(tree, "images", file):
            number, name, size = entry["id"], entry["file_name"], (entry.get("width"), entry.get("height"))
            pictures[number] = found.picture(where, folder / name, name, size, number)
        for where, entry in entries(tree, "annotations", file):
            image, category = entry["image_id"], entry["category_id"]
            if image not in pictures:
                raise UserError(f"{where}: its image_id {image} is no image's id; mend or remove it")
            if category not in labels:
                raise UserError(f"{where}: its category_id {category} is none of the categories; mend or remove it")
            left, top, width, height = entry["bbox"]
            corners, crowd = (left, top, left + width, top + height), bool(entry.get("iscrowd"))
            found.box(where, pictures[image], corners, labels[category], crowd, entry.get("area"))
        del tree, content
        sides.append((found, folder, file))
    return detection_set(sides, [classes[number] for number in sorted(classes)], hasher.hexdigest(), options)


def find(root: Path, what: str) -> tuple[Path, Path]:
    """Return the folder of the "training" or "test" pictures below `root`, and the JSON file of their boxes."""
    for name in NAMES[what]:
        for folder in (root / name, root / "images" / name):
            if not folder.is_dir():
                continue
            files = [
                root / "annotations" / f"instances_{name}.json", root / "annotations" / f"{name}.json",
                root / f"{name}.json", folder / "_annotations.coco.json",
            ]  # fmt: skip
            if there := next((file for file in files if file.is_file()), None):
                return folder, there
            wanted = ", ".join(str(file.relative_to(root)) for file in files)
            raise UserError(f"{folder}: the JSON file of its boxes is missing; put it at one of {wanted}")
    raise UserError(
        f"{root}: has no folder of {what} pictures, {', '.join(NAMES[what])}, there or in images/; DATASET.ROOT is the "
        "folder that holds them"
    )


def parsed(content: bytes, file: Path) -> dict:
    """Return the tree of a JSON file with the lists images, annotations and categories."""
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError) as error:
        reason = "it is empty" if not content.strip() else str(error).split("\n")[0]
        raise UserError(f"{file}: is no JSON ({reason}); write it again") from None
    for name in FIELDS:
        if not (isinstance(tree, dict) and isinstance(tree.get(name), list)):
            raise UserError(f"{file}: has no list '{name}'; COCO's format has images, annotations and categories")
    return tree


def entries(tree: dict, name: str, file: Path) -> Iterator[tuple[str, dict]]:
    """Yield the entries of a list, each behind what names it in a line. Raises UserError for a value that FIELDS does
    not have there.
    """
    seen = set()
    for place, entry in enumerate(tree[name]):
        where = f"{file}: {name}[{place}]"
        if not isinstance(entry, dict):
            raise UserError(f"{where} must be an object, names with values; got {entry!r}")
        where += f", id {entry.get('id')!r}"
        for key, (is_right, wanted) in FIELDS[name].items():
            value = entry.get(key)
            if not is_right(value):
                raise UserError(f"{where}: its {key} must be {wanted}; got {value!r}")
            if key in UNIQUE and (key, value) in seen:
                raise UserError(f"{where}: another one has the {key} {value!r} too; give each its own")
            if key in UNIQUE:
                seen.add((key, value))
        yield where, entry
