"""Folders in COCO's format: pictures, and a JSON file of the boxes in them."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from mdistiller.dataset._annotations import Annotations, detection_set, inside, number_below
from mdistiller.dataset._detection import DetectionSet
from mdistiller.dataset._registry import register_dataset
from mdistiller.errors import UserError
from mdistiller.files import open_regular

NAMES = {"training": ("train2017", "train2014", "train"), "test": ("val2017", "val2014", "val", "valid", "test")}
WHOLE = "must be a whole number"


@register_dataset("coco", task="detection")
def coco(root: Path, options: Mapping) -> DetectionSet:
    """Read the pictures and boxes in `root` or `root`/coco, as `find` finds them. Raises UserError that names the first
    file and entry that cannot be.
    """
    if (root / "coco").is_dir() and not any((root / name).is_dir() for name in (*NAMES["training"], "images")):
        root = root / "coco"
    hasher, drop = hashlib.sha256(options["BAD_BOXES"].encode()), options["BAD_BOXES"] == "drop"
    sides, named = [], {}
    for what in NAMES:
        folder, file = find(root, what)
        content = read(file)
        hasher.update(hashlib.sha256(content).digest())
        tree = parsed(content, file)
        categories = categories_of(tree, file)
        if named and named != categories:
            number = next(n for n in sorted({*named, *categories}) if named.get(n) != categories.get(n))
            said = [f"'{names[number]}'" if number in names else "nothing" for names in (named, categories)]
            raise UserError(
                f"{file}: category {number} is {said[1]} there and {said[0]} in training; both need the same categories"
            )
        named = categories
        found = Annotations(what, drop)
        places = pictures_of(tree, file, folder, found)
        boxes_of(tree, file, places, {number: label for label, number in enumerate(sorted(named), 1)}, found)
        del tree, content
        sides.append((found, folder, file))
    classes = tuple(named[number] for number in sorted(named))
    return detection_set(sides, classes, hasher.hexdigest(), options)


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


def read(file: Path) -> bytes:
    with open_regular(file, "a JSON file in COCO's format") as opened:
        return opened.read()


def parsed(content: bytes, file: Path) -> dict:
    """Return the tree of a JSON file with the lists images, annotations and categories, all of dicts."""
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError) as error:
        reason = "it is empty" if not content.strip() else str(error).split("\n")[0]
        raise UserError(f"{file}: is no JSON ({reason}); write it again") from None
    for name in ("images", "annotations", "categories"):
        entries = tree.get(name) if isinstance(tree, dict) else None
        if not isinstance(entries, list):
            raise UserError(f"{file}: has no list '{name}'; COCO's format has images, annotations and categories")
        for place, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise UserError(f"{file}: {name}[{place}] must be an object, names with values; got {entry!r}")
    return tree


def whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def categories_of(tree: dict, file: Path) -> dict[int, str]:
    """Return {id: name} of the categories."""
    found: dict[int, str] = {}
    for place, entry in enumerate(tree["categories"]):
        where, number, name = f"{file}: categories[{place}]", entry.get("id"), entry.get("name")
        if not whole(number):
            raise UserError(f"{where}: its id {WHOLE}; got {number!r}")
        if not isinstance(name, str) or not name:
            raise UserError(f"{where}: its name must be a text; got {name!r}")
        if number in found or name in found.values():
            what = f"the id {number}" if number in found else f"the name '{name}'"
            raise UserError(f"{where}: another category has {what} too; give each its own")
        found[number] = name
    if not found:
        raise UserError(f"{file}: the list 'categories' is empty; name the classes of the boxes there")
    return found


def pictures_of(tree: dict, file: Path, folder: Path, found: Annotations) -> dict[int, int]:
    """Enter the pictures into `found`; return the place of each by its id."""
    places: dict[int, int] = {}
    files: dict[str, int] = {}
    for place, entry in enumerate(tree["images"]):
        number, name = entry.get("id"), entry.get("file_name")
        if not whole(number):
            raise UserError(f"{file}: images[{place}]: its id {WHOLE}; got {number!r}")
        where = f"{file}: image {number}"
        if number in places:
            raise UserError(f"{where}: two images have that id; give each its own")
        if not inside(name):
            raise UserError(f"{where}: its file_name must be that of a file in {folder}; got {name!r}")
        if name in files:
            raise UserError(f"{where}: {name} is image {files[name]} as well; give its boxes to one of the two")
        found.picture(where, folder / name, name, (entry.get("width"), entry.get("height")), number)
        places[number], files[name] = place, number
    if not places:
        raise UserError(f"{file}: the list 'images' is empty; there is nothing to look at")
    return places


def boxes_of(tree: dict, file: Path, places: dict[int, int], labels: dict[int, int], found: Annotations) -> None:
    """Enter the boxes into `found`."""
    seen = set()
    for place, entry in enumerate(tree["annotations"]):
        number = entry.get("id", f"[{place}]")
        where, box, area = f"{file}: annotation {number}", entry.get("bbox"), entry.get("area")
        if isinstance(number, (list, dict)) or number in seen:
            raise UserError(f"{where}: its id must be its own; number the annotations anew")
        seen.add(number)
        image, category, crowd = entry.get("image_id"), entry.get("category_id"), entry.get("iscrowd", 0)
        if not whole(image) or image not in places:
            raise UserError(f"{where}: its image_id {image!r} is no image's id; mend or remove it")
        if not whole(category) or category not in labels:
            raise UserError(f"{where}: its category_id {category!r} is none of the categories; mend or remove it")
        if not isinstance(box, list) or len(box) != 4 or not all(map(number_below, box)):
            raise UserError(f"{where}: its bbox must be four numbers, left, top, width and height; got {box!r}")
        if area is not None and not (number_below(area, 2**62) and area >= 0):
            raise UserError(f"{where}: its area must be a number of 0 or more; got {area!r}")
        if crowd not in (0, 1):
            raise UserError(f"{where}: its iscrowd must be 0 or 1; got {crowd!r}")
        left, top, width, height = box
        found.box(where, places[image], (left, top, left + width, top + height), labels[category], bool(crowd), area)
