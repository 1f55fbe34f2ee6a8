"""Images with boxes: what is read and what is refused, and how batches flip and scale them."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from helpers import photo, refused
from PIL import Image

from mdistiller.config import load
from mdistiller.dataset import DetectionBatches, load_dataset
from mdistiller.dataset._annotations import Files
from mdistiller.dataset._detection import Views, mirror, resize, scaled_size
from mdistiller.dataset._shapes import SHAPES, SOLID, shape
from mdistiller.dataset.scenes import SMALLEST

SMALL = ["DATASET.SCENES.TRAIN", "12", "DATASET.SCENES.TEST", "5"]
SIZES = [(40, 32), (30, 50), (64, 20)]  # width and height of the pictures that tests write
WIDE = [2.0, 3.0, 10.5, 20.0]  # a box that fits into all of them but the last


def read(kind, root, *pairs):
    return load_dataset(kind, root, load(None, [*pairs]).DATASET)


def tree(count=3, first=10):
    """COCO's tree of so many pictures: ids with gaps, one box each but for the last picture, which has none."""
    pictures = [
        {"id": first + 5 * n, "file_name": f"{n}.png", "width": w, "height": h}
        for n, (w, h) in enumerate(SIZES[:count])
    ]
    boxes = [
        {"id": 100 + n, "image_id": first + 5 * n, "category_id": (7, 3)[n], "bbox": WIDE, "area": 50.0, "iscrowd": 0}
        for n in range(count - 1)
    ]
    return {"images": pictures, "annotations": boxes, "categories": [{"id": 7, "name": "ox"}, {"id": 3, "name": "ant"}]}


# folder and JSON file to train on, and those to test on
LAYOUTS = [
    "train2017/ annotations/instances_train2017.json val2017/ annotations/instances_val2017.json",
    "train/ train.json val/ val.json",
    "train/ annotations/train.json test/ annotations/test.json",
    "train/ train/_annotations.coco.json valid/ valid/_annotations.coco.json",
    "images/train2017/ annotations/instances_train2017.json images/val2017/ annotations/instances_val2017.json",
]


def write_coco(root, layout=LAYOUTS[0]):
    layout = layout.split()
    for number in (0, 2):
        folder, file = root / layout[number], root / layout[number + 1]
        for path in (folder, file.parent):
            path.mkdir(parents=True, exist_ok=True)
        for n, size in enumerate(SIZES):
            photo(10 * number + n, *size).save(folder / f"{n}.png")
        file.write_text(json.dumps(tree()))
    return root


def write_voc(root, names=("a", "b"), splits=("train", "val")):
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for split in splits:
        for n, name in enumerate(names):
            width, height = SIZES[n]
            photo(n, width, height).save(root / "JPEGImages" / f"{split}{name}.jpg")
            corners = "".join(
                f"<{side}>{v}</{side}>"
                for side, v in zip(("xmin", "ymin", "xmax", "ymax"), (3, 4, 12, 20), strict=True)
            )
            thing = "<object><name>{}</name><difficult>{}</difficult><bndbox>" + corners + "</bndbox></object>"
            (root / "Annotations" / f"{split}{name}.xml").write_text(
                f"<annotation><size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
                + thing.format("cow", 0) + thing.format("bat", 1) + "</annotation>"
            )  # fmt: skip
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{split}{name}\n" for name in names))
    return root


@pytest.mark.parametrize("below", ["", "coco"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_coco_is_found_in_the_layouts_that_people_have(tmp_path, layout, below):
    write_coco(tmp_path / below, layout)
    data = read("coco", tmp_path)
    assert data.classes == ("ant", "ox") and data.num_classes == 3
    assert [data.train.target(n)["image_id"] for n in range(3)] == [10, 15, 20]
    assert data.train.target(0)["labels"].tolist() == [2] and data.train.target(1)["labels"].tolist() == [1]
    assert data.train.target(0)["boxes"].tolist() == [[2.0, 3.0, 12.5, 23.0]] and data.train.target(0)["area"] == 50
    assert data.train.target(2)["boxes"].shape == (0, 4)
    assert data.train.image(1).shape == (3, 50, 30) and data.train.image(1).dtype == torch.uint8
    assert data.doubts() == [
        f"1 of 3 {what} images have no box: they are kept, as background alone" for what in ("training", "test")
    ]


def change(entry, place, **values):
    """What sets values of an entry of the training file; None removes one."""

    def write(root):
        file = root / "annotations/instances_train2017.json"
        content = json.loads(file.read_text())
        content[entry][place] |= values
        content[entry][place] = {name: value for name, value in content[entry][place].items() if value is not None}
        file.write_text(json.dumps(content))

    return write


def replace(old, new, name="train", count=-1):
    def write(root):
        file = root / f"annotations/instances_{name}2017.json"
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new, count))

    return write


def content(text, name="train"):
    return lambda root: (root / f"annotations/instances_{name}2017.json").write_bytes(text)


def box(*values):
    return change("annotations", 0, bbox=list(values))


def save(place, *size):
    return lambda root: photo(0, *size).save(root / "train2017" / f"{place}.png")


def several(**lists):
    return lambda root: (root / "annotations/instances_train2017.json").write_text(json.dumps(tree() | lists))


AT = r"instances_train2017.json: annotations\[0\], id 100: "
BROKEN = {
    "no folder": (lambda r: os.rename(r / "train2017", r / "x"), "has no folder of training pictures, train2017"),
    "no test folder": (lambda r: os.rename(r / "val2017", r / "x"), "has no folder of test pictures, val2017"),
    "no JSON": (lambda r: shutil.rmtree(r / "annotations"), "the JSON file of its boxes is missing"),
    "an empty file": (content(b""), "is no JSON .it is empty"),
    "cut off": (content(b'{"images": [{"id": 1'), "is no JSON"),
    "a page": (content(b"<!DOCTYPE html>"), "is no JSON"),
    "a list": (content(b"[]"), "has no list 'categories'"),
    "no list": (several(categories={"1": "ox"}), "has no list 'categories'"),
    "an image that is none": (several(images=[7]), r"images\[0\] must be an object"),
    "no boxes": (several(annotations=[]), "has no box"),
    "crowds alone": (several(annotations=[tree()["annotations"][0] | {"iscrowd": 1}]), "has no box"),
    "an id of text": (change("images", 1, id="15"), "its id must be a whole number; got '15'"),
    "an image twice": (change("images", 1, id=10), r"images\[1\], id 10: another one has the id 10 too"),
    "no name of a file": (change("images", 0, file_name=None), "id 10: its file_name must be a text"),
    "a missing picture": (lambda r: os.remove(r / "train2017/1.png"), "id 15: there is no picture .*1.png"),
    "no width": (change("images", 0, width=None), "id 10: the size of 0.png must be two whole numbers"),
    "a height of 0": (change("images", 0, height=0), "id 10: the size of 0.png must be .*got 40 x 0"),
    "another size": (save(0, 41, 32), "0.png: is 41 x 32 pixels, and its annotations are for 40 x 32"),
    "a picture of text": (lambda r: (r / "train2017/0.png").write_text("no"), "0.png: is no picture that can be read"),
    "a category without name": (change("categories", 0, name=""), "id 7: its name must be a text"),
    "a category twice": (change("categories", 1, id=7), "id 7: another one has the id 7 too"),
    "a name twice": (change("categories", 1, name="ox"), "id 3: another one has the name 'ox' too"),
    "other categories": (replace('"ox"', '"cow"', "val"), "the category 7, 'cow', is in one of training and test"),
    "no such image": (change("annotations", 0, image_id=11), AT + "its image_id 11 is no image's id"),
    "an unknown category": (change("annotations", 0, category_id=1), AT + "its category_id 1 is none of"),
    "a category that is a list": (change("annotations", 0, category_id=[3]), AT + "its category_id must be a whole"),
    "no box in it": (change("annotations", 0, bbox=None), AT + "its bbox must be four numbers"),
    "not a number": (replace("[2.0, 3.0, 10.5, 20.0]", "[2.0, NaN, 10.5, 20.0]"), AT + "its bbox must be four numbers"),
    "endless digits": (box(1, 2, 3, 10**400), AT + "its bbox must be four numbers"),
    "no width of a box": (box(3, 3, 0, 9), AT + "its box has no width or no height .0 x 9.*BAD_BOXES drop"),
    "hardly a width": (box(39.0, 3, 1e-6, 9), AT + "its box has no width or no height"),
    "hardly inside": (box(-5, 3, 5.001, 9), AT + "its box .* lies outside of the image"),
    "outside": (box(41, 3, 5, 5), AT + r"its box \(41, 3\) to \(46, 8\) lies outside of the image, 40 x 32"),
    "an area of text": (change("annotations", 0, area="9"), AT + "its area must be a number"),
    "a file twice": (change("images", 1, file_name="0.png"), "id 15: another one has the file_name '0.png' too"),
    "fractions": (
        several(annotations=[one | {"bbox": [0.2, 0.3, 0.5, 0.4]} for one in tree()["annotations"]]),
        "train2017.json: no box reaches beyond the first pixel, .* multiply them by its width and height",
    ),
    "a crowd of 2": (change("annotations", 0, iscrowd=2), AT + "its iscrowd must be 0 or 1"),
}  # fmt: skip


def edit(old, new, name="traina", then=("", "")):
    def write(root):
        file = root / "Annotations" / f"{name}.xml"
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new, 1).replace(*then, 1))

    return write


def listed(text, name="train.txt"):
    return lambda root: (root / "ImageSets/Main" / name).write_text(text)


def write_xml(text):
    return lambda root: (root / "Annotations" / "traina.xml").write_text(text)


SECRET = '<!DOCTYPE a [<!ENTITY x SYSTEM "/etc/passwd">]><a>&x;</a>'
BROKEN_VOC = {
    "no annotations": (lambda r: shutil.rmtree(r / "Annotations"), "has no folder Annotations"),
    "no list": (lambda r: os.remove(r / "ImageSets/Main/train.txt"), "has no ImageSets/Main/train.txt"),
    "an empty list": (listed("\n"), "train.txt: is empty"),
    "a name of nothing": (listed("trainz\n"), "there is no .*trainz.xml"),
    "no picture": (lambda r: os.remove(r / "JPEGImages/traina.jpg"), "traina.xml: there is no picture .*traina.jpg"),
    "no XML": (edit("</annotation>", ""), "traina.xml: is no XML"),
    "an empty XML": (write_xml(""), "is no XML .it is empty"),
    "a file from outside": (write_xml(SECRET), "traina.xml: is no XML .undefined entity"),
    "an unknown encoding": (write_xml('<?xml version="1.0" encoding="nine"?><a/>'), "traina.xml: is no XML"),
    "no size": (edit("<width>40</width>", ""), "traina.xml: has no size/width"),
    "a size of 0": (edit("<width>40", "<width>0"), "the size of traina.jpg must be two whole numbers above 0"),
    "another size": (edit("<width>40", "<width>39"), "traina.jpg: is 40 x 32 pixels"),
    "no class": (edit("<name>cow</name>", ""), "traina.xml: object 1: has no name"),
    "a class of the test alone": (edit("<name>cow", "<name>eel", "vala"), "its class 'eel' is not in training"),
    "no box": (edit("<xmin>3</xmin>", ""), "traina.xml: object 1: has no bndbox/xmin"),
    "a text for a number": (edit("<xmin>3", "<xmin>three"), "object 1: its bndbox/xmin must be a number; got 'three'"),
    "no width": (edit("<xmax>12", "<xmax>2"), "object 1: its box has no width or no height"),
    "outside": (edit("<xmin>3</xmin>", "<xmin>-9</xmin>", then=("<xmax>12", "<xmax>0")), "its box .* lies outside of"),
}  # fmt: skip


def test_voc_folders_come_through_the_same_door(tmp_path):
    write_voc(tmp_path / "VOCdevkit" / "VOC2012")
    data = read("voc", tmp_path)
    target = data.train.target(0)
    assert data.classes == ("bat", "cow") and len(data.train) == len(data.test) == 2
    assert target["boxes"].tolist() == [[2, 3, 12, 20]] * 2 and target["labels"].tolist() == [2, 1]
    assert target["crowd"].tolist() == [False, True]  # the difficult one
    assert data.doubts() == ["warning: 1 of 2 classes have no training box: bat"]
    batch = next(iter(DetectionBatches(data.train, 2, data.views).epoch(1)))
    assert all(target["labels"].tolist() == [2] for target in batch.target)  # nothing is trained on crowds


def test_boxes_beyond_the_image_end_there_and_bad_ones_can_be_left_out(tmp_path):
    write_coco(tmp_path)
    box(-3, 3, 10, 100)(tmp_path)
    change("annotations", 1, bbox=[29.5, 0, 1, 50.4])(tmp_path)
    data = read("coco", tmp_path)
    assert data.train.target(0)["boxes"].tolist() == [[0, 3, 7, 32]]
    assert data.train.target(1)["boxes"].tolist() == [[29.5, 0, 30, 50]]
    said = "warning: 1 box of 3 training images reached more than a pixel beyond the image, and end there now"
    assert data.doubts()[0] == said
    box(3, 3, 0, 9)(tmp_path)
    data = read("coco", tmp_path, "DATASET.BAD_BOXES", "drop")
    assert len(data.train.boxes.box) == 1 and "1 box of 3 training images left out" in data.doubts()[0]
    assert "2 of 3 training images have no box" in data.doubts()[1]


def test_pictures_that_are_trained_on_and_tested_on_are_counted(tmp_path):
    listed("traina\nvalb\n", "val.txt")(write_voc(tmp_path / "voc"))
    assert "warning: 1 of 2 test images are training images too" in read("voc", tmp_path / "voc").doubts()
    photo(0, *SIZES[0]).save(write_coco(tmp_path / "coco") / "val2017" / "0.png")
    assert "warning: 1 of 3 test images are training images too" in read("coco", tmp_path / "coco").doubts()


def test_many_boxes_beyond_their_images_are_doubted(tmp_path):
    one = tree()["annotations"][0] | {"bbox": [20, 20, 39, 30]}  # a right and a bottom, no width and height
    several(annotations=[one | {"id": n} for n in range(12)])(write_coco(tmp_path))
    line = read("coco", tmp_path).doubts()[0]
    assert "12 boxes of 3 training images reached more than a pixel beyond" in line and "given otherwise" in line


def test_an_image_of_crowds_alone_is_no_background(tmp_path):
    write_coco(tmp_path)
    for name in ("train", "val"):
        replace('"iscrowd": 0', '"iscrowd": 1', name, 1)(tmp_path)
    data = read("coco", tmp_path)
    assert len(data.train) == 2 and [data.train.target(n)["image_id"] for n in range(2)] == [15, 20]
    assert data.train.image(0).shape == (3, 50, 30) and data.train.target(0)["labels"].tolist() == [1]
    assert len(data.test) == 3 and data.test.target(0)["crowd"].tolist() == [True]
    assert data.doubts()[0] == "1 training image left out: all of their boxes are crowds"


def test_a_turned_picture_is_read_as_its_annotations_saw_it(tmp_path):
    write_coco(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    stored = photo(0, 32, 40)
    stored.save(tmp_path / "train2017" / "0.png", exif=exif)
    assert read("coco", tmp_path).train.image(0).shape == (3, 32, 40)
    photo(0, 40, 32).save(tmp_path / "train2017" / "0.png", exif=exif)  # as many tools do: annotated as it is stored
    found = read("coco", tmp_path).train.image(0)
    assert torch.equal(found, torch.from_numpy(np.array(photo(0, 40, 32)).transpose(2, 0, 1)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_of_images_with_boxes_is_what_memory_gives(tmp_path, workers):
    write_coco(tmp_path)
    words = ["DATASET.SIZE", "24", "DATASET.NUM_WORKERS", str(workers)]
    held, streamed = read("coco", tmp_path, *words), read("coco", tmp_path, *words, "DATASET.MEMORY", "0")
    ours, theirs = (DetectionBatches(data.train, 2, data.views, seed=3) for data in (held, streamed))
    assert not ours.streamed and theirs.streamed and held.digest() == streamed.digest()
    for epoch, done in ((1, 0), (2, 1)):
        same_batches(list(ours.epoch(epoch, done)), list(theirs.epoch(epoch, done)))
    same_batches(list(DetectionBatches(held.test, 2)), list(DetectionBatches(streamed.test, 2)))
    (tmp_path / "train2017" / "1.png").write_text("gone")
    with refused("1.png: is no picture that can be read .*--resume auto goes on then"):
        list(theirs.epoch(3))


def same_batches(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.index, other.index)
        assert all(torch.equal(a, b) for a, b in zip(one.image, other.image, strict=True))
        for a, b in zip(one.target, other.target, strict=True):
            assert a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[n]), torch.as_tensor(b[n])) for n in a)


def test_a_plan_is_a_function_of_seed_and_epoch():
    data = read("scenes", ".", *SMALL, "DATASET.JITTER", "[0.5, 1.5]")
    batches = DetectionBatches(data.train, 5, data.views, seed=1)
    again = DetectionBatches(data.train, 4, data.views, seed=1)
    list(again.epoch(3))  # whatever ran before
    assert torch.equal(batches.plan(2), again.plan(2)) and not torch.equal(batches.plan(2), batches.plan(3))
    assert not torch.equal(batches.plan(2), DetectionBatches(data.train, 5, data.views, seed=2).plan(2))
    order, flip, factor = DetectionBatches(data.train, 5, data.views, 7).plan(1)
    assert order.sort().values.tolist() == list(range(12)) and set(flip.tolist()) == {0, 1}
    assert 500 <= factor.min() < factor.max() <= 1500
    batches.drop_last = True
    assert [len(batch.image) for batch in batches.epoch(1)] == [5, 5] and len(batches) == 2
    late = list(again.epoch(1, 2))
    same_batches(late, list(again.epoch(1))[2:])
    plan = again.plan(5)[:, :4]
    rows = torch.tensor([1, 3])
    whole, part = again.batch(plan), again.batch(plan, rows)
    assert torch.equal(part.index, whole.index[rows]) and torch.equal(part.image[1], whole.image[3])


def test_several_processes_test_on_whole_batches():
    data = read("scenes", ".", *SMALL)
    whole = list(DetectionBatches(data.train, 5))
    found = []
    for rank in range(2):
        batches = DetectionBatches(data.train, 5)
        batches.tester = rank, 2
        found.append(list(batches))
    same_batches([found[0][0], found[1][0], found[0][1]], whole)
    assert torch.cat([batch.index for batch in whole]).tolist() == list(range(12))


def test_augment_none_leaves_images_as_a_test_sees_them():
    data = read("scenes", ".", *SMALL, "DATASET.AUGMENT", "none")
    batch = next(iter(DetectionBatches(data.train, 12, data.views).epoch(1)))
    for image, target, place in zip(batch.image, batch.target, batch.index.tolist(), strict=True):
        assert torch.equal(image, data.train.image(place).float() / 255)
        assert torch.equal(target["boxes"], data.train.target(place)["boxes"])


def test_what_scenes_cannot_be_is_refused():
    for key, value, says in (
        ("DATASET.SIZE", "8", "SIZE 8: no object is to be seen in 12 scenes .train.; take a larger size"),
        ("DATASET.AUGMENT", "crop_flip", "AUGMENT: crop_flip is for images of one class each; .* auto"),
    ):
        with refused(says):
            read("scenes", ".", *SMALL, key, value)


def test_nothing_is_decoded_twice_and_what_a_resumed_epoch_has_done_is_not_decoded(tmp_path, monkeypatch):
    data = read("coco", write_coco(tmp_path), "DATASET.MEMORY", "0", "DATASET.NUM_WORKERS", "0")
    decoded = []
    real = Files.read
    monkeypatch.setattr(Files, "read", lambda self, place: decoded.append(place) or real(self, place))
    batches = DetectionBatches(data.train, 1, data.views)
    order = batches.plan(4)[0].tolist()
    assert len(list(batches.epoch(4, 1))) == 2 and decoded == order[1:]


def around(mask):
    """The box around what is more than half covered."""
    rows, columns = (np.flatnonzero((mask > 0.5).any(axis)) for axis in (1, 0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def test_flips_and_scales_move_boxes_with_their_images():
    generator = np.random.default_rng(0)
    for _ in range(50):
        height, width = (int(v) for v in generator.integers(20, 60, 2))
        left, top = int(generator.integers(0, width - 8)), int(generator.integers(0, height - 8))
        right, bottom = int(generator.integers(left + 4, width + 1)), int(generator.integers(top + 4, height + 1))
        image = torch.zeros(3, height, width)
        image[:, top:bottom, left:right] = 1
        target = {"boxes": torch.tensor([[left, top, right, bottom]]).float(), "area": torch.ones(1)}
        flipped, moved = mirror(image, target)
        assert moved["boxes"][0].tolist() == around(flipped[0].numpy())
        assert mirror(flipped, moved)[1]["boxes"].tolist() == target["boxes"].tolist()
        twice, grown = resize(image, target, 2 * height, 2 * width)
        assert grown["boxes"][0].tolist() == around(twice[0].numpy()) and grown["area"] == 4
        h, w = int(generator.integers(16, 80)), int(generator.integers(16, 80))
        other, moved = resize(image, target, h, w)
        off = np.abs(moved["boxes"][0].numpy() - around(other[0].numpy())).max()
        assert off <= 0.5 + max(h / height, w / width) / 2


def test_sizes_follow_the_shorter_and_the_longer_side():
    assert scaled_size((480, 640), Views(), 1.0) == (800, 1066)
    assert scaled_size((480, 640), Views(), 0.5) == (400, 533)
    assert scaled_size((100, 400), Views(), 1.0) == (333, 1333)
    assert scaled_size((1, 5000), Views(), 0.1) == (1, 133)


def test_scenes_are_a_function_of_seed_and_number():
    data = read("scenes", ".", *SMALL)
    again = read("scenes", ".", "DATASET.SCENES.TRAIN", "7", "DATASET.SCENES.TEST", "2")
    for place in range(7):
        assert torch.equal(data.train.image(place), again.train.image(place))
        one, other = data.train.target(place), again.train.target(place)
        assert torch.equal(one["boxes"], other["boxes"]) and torch.equal(one["labels"], other["labels"])
    assert data.digest() == read("scenes", ".", *SMALL).digest() != again.digest()
    other = read("scenes", ".", *SMALL, "DATASET.SCENES.VARIANT", "1")
    shown = [image.float().mean().item() for side in (data.train, data.test, other.train) for image in side.held]
    assert len(set(shown)) == 12 + 5 + 12  # no picture of one is in another


def test_boxes_of_scenes_are_around_what_is_seen():
    data = read("scenes", ".", "DATASET.SCENES.TRAIN", "60", "DATASET.SCENES.TEST", "1", "DATASET.SCENES.OBJECTS", "9")
    source = data.train.source
    labels = data.train.boxes.label
    assert labels.min() == 1 and labels.max() == len(data.classes) == len(SHAPES)
    seen = []
    for place in range(60):
        target, (height, width) = data.train.target(place), data.train.image(place).shape[1:]
        boxes = target["boxes"].numpy()
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()
        assert ((boxes[:, 2:] - boxes[:, :2]) >= SMALLEST).all() and max(width, height) == 128
        seen.append(len(boxes))
    assert 1 <= min(seen) and max(seen) > 5 and source.read(3).shape[2] == 3


def write_cut_outs(root, classes=("cup", "fork")):
    """Pictures of 40 x 30 pixels of which a rectangle of 20 x 10 is not transparent."""
    for split in ("train", "val"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            picture = photo(len(name), 40, 30).convert("RGBA")
            alpha = Image.new("L", (40, 30))
            alpha.paste(255, (5, 5, 25, 15))
            picture.putalpha(alpha)
            picture.save(root / split / name / "0.png")
    return root


def test_scenes_of_pictures_take_what_is_not_transparent(tmp_path):
    data = read("scenes", write_cut_outs(tmp_path), *SMALL, "DATASET.SCENES.OF", "pictures")
    assert data.classes == ("cup", "fork") and len(data.train.boxes.box) > 12
    alpha, colour = data.train.source.objects.cut(1, 30, np.zeros(3), np.random.default_rng(0))
    assert max(alpha.shape) == 30 and min(alpha.shape) >= 14 and (alpha > 250).mean() > 0.5
    assert colour.shape == (*alpha.shape, 3)
    digits = read("scenes", tmp_path, *SMALL, "DATASET.SCENES.OF", "digits")
    assert digits.classes == tuple("0123456789") and digits.digest() != data.digest()


ONE_SIDED = "the class cup is in one of train and val alone"
BROKEN_CUT_OUTS = {
    "no folder": (lambda r: shutil.rmtree(r / "train"), "No such file .*train"),
    "no test folder": (lambda r: shutil.rmtree(r / "val"), "No such file .*val"),
    "other classes": (lambda r: os.rename(r / "val/cup", r / "val/mug"), ONE_SIDED),
    "nothing to see": (lambda r: Image.new("RGBA", (9, 9)).save(r / "val/cup/0.png"), "0.png: is transparent every"),
    "no picture": (lambda r: (r / "train/fork/0.png").write_text("no"), "fork/0.png: is no picture"),
}
KINDS = {
    "coco": (BROKEN, write_coco, ()),
    "voc": (BROKEN_VOC, write_voc, ()),
    "scenes": (BROKEN_CUT_OUTS, write_cut_outs, (*SMALL, "DATASET.SCENES.OF", "pictures")),
}


@pytest.mark.parametrize(("kind", "case"), [(kind, case) for kind, (cases, *_) in KINDS.items() for case in cases])
def test_a_broken_folder_is_one_line(tmp_path, kind, case):
    cases, write, words = KINDS[kind]
    breaks, says = cases[case]
    breaks(write(tmp_path))
    with refused(says):
        read(kind, tmp_path, *words)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_fill_the_box_that_is_asked_for(name):
    random = np.random.default_rng(0)
    for size, share in ((12, 0.6), (40, 0.8)):
        masks = [shape(name, size, random) >= SOLID for _ in range(20)]
        for mask in masks:
            assert abs(max(mask.shape) - size) <= 1 and mask[1:-1, 1:-1].any()
            left, top, right, bottom = around(mask)
            assert right - left >= share * mask.shape[1] and bottom - top >= share * mask.shape[0]
