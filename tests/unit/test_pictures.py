"""Folders of pictures: what is read, how it is cut and scaled, what is refused, and that a stream changes no number."""

import io
import os

import numpy as np
import pytest
import torch
from helpers import photo, refused, write_folder
from PIL import Image
from torchvision import transforms

from mdistiller.config import load
from mdistiller.dataset import Batches, load_dataset
from mdistiller.dataset import _pictures as pictures

KINDS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif"}


def read(root, *pairs, kind="imagefolder"):
    cfg = load(None, ["DATASET.TYPE", kind, "DATASET.SIZE", "32", *pairs])
    return load_dataset(kind, root, cfg.DATASET)


def batches(data, **more):
    given = data.train_images, data.train_labels, data.mean, data.std, 3, data.augment
    return Batches(*given, **more)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_file_is_read(tmp_path, kind):
    file = tmp_path / f"x.{KINDS[kind]}"
    photo(0).save(file, kind, **({"quality": 95} if kind in ("JPEG", "WEBP") else {}))
    difference = np.abs(np.asarray(pictures.decode(file), int) - np.asarray(photo(0), int)).mean()
    assert difference < 9 if kind in ("JPEG", "WEBP") else difference == 0


def test_every_mode_becomes_rgb(tmp_path):
    grey = photo(0).convert("L")
    half = Image.merge("RGBA", [*photo(0).split(), Image.new("L", (40, 32), 0)])
    wide = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    palette = photo(0).quantize(16)
    for image, wanted in (
        (grey, grey.convert("RGB")),
        (wide, grey.convert("RGB")),
        (palette, palette.convert("RGB")),
        (half, Image.new("RGB", (40, 32), (9, 8, 7))),
        (half.convert("LA"), Image.new("RGB", (40, 32), (9, 8, 7))),
        (grey.point(lambda value: 255 * (value > 99)).convert("1"), None),
    ):
        image.save(tmp_path / "x.png")
        found = pictures.decode(tmp_path / "x.png", (9, 8, 7))
        assert found.mode == "RGB" and (wanted is None or found.tobytes() == wanted.tobytes()), image.mode
    photo(0).convert("CMYK").save(tmp_path / "x.jpg", quality=100)
    assert np.abs(np.asarray(pictures.decode(tmp_path / "x.jpg"), int) - np.asarray(photo(0), int)).mean() < 12
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    photo(0).save(tmp_path / "x.jpg", exif=exif)
    assert pictures.decode(tmp_path / "x.jpg").size == (32, 40)


@pytest.mark.parametrize("size", [(40, 32), (37, 81), (300, 200), (20, 31), (32, 32)])
def test_the_middle_is_torchvisions(size):
    for side, crop in ((32, 0.875), (32, 1.0), (24, 0.5)):
        short = round(side / crop)
        wanted = transforms.Compose([transforms.Resize(short), transforms.CenterCrop(side)])(photo(1, *size))
        assert pictures.fit(photo(1, *size), side, crop).tobytes() == wanted.tobytes()


def test_random_crops_are_distributed_as_torchvisions(monkeypatch):
    image, boxes = Image.new("RGB", (60, 40)), []
    crop = Image.Image.crop
    monkeypatch.setattr(Image.Image, "crop", lambda self, box: boxes.append(box) or crop(self, box))
    for draw in range(2000):
        assert pictures.random_crop(image, 8, draw).size == (8, 8)
    found = np.array([[(b[2] - b[0]) * (b[3] - b[1]) / 2400, (b[2] - b[0]) / (b[3] - b[1])] for b in boxes])
    torch.manual_seed(0)
    drawn = [transforms.RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(2000)]
    theirs = np.array([[h * w / 2400, w / h] for _, _, h, w in drawn])
    for ours, other in zip(found.T, theirs.T, strict=True):
        for level in (0.1, 0.5, 0.9):
            assert np.quantile(ours, level) == pytest.approx(np.quantile(other, level), rel=0.08)


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    write_folder(tmp_path, ("b", "a", "ü"), 2)
    (tmp_path / "train" / "a" / "deep").mkdir()
    photo(5).save(tmp_path / "train" / "a" / "deep" / "UPPER.JPEG")
    (tmp_path / "train" / "a" / "notes.txt").write_text("no picture")
    (tmp_path / "train" / ".hidden").mkdir()
    data = read(tmp_path, "DATASET.AUGMENT", "none")
    assert data.class_names == ("a", "b", "ü") and data.train_labels.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert data.train_images.shape == (7, 32, 32, 3) and data.test_labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.train_images[3].numpy().tobytes() == pictures.fit(photo(0, 32), 32, 0.875).tobytes()


def test_tiny_imagenet_has_a_val_of_its_own(tmp_path):
    root = write_folder(tmp_path / "tiny-imagenet-200", ("n1", "n2"), 2, splits=("train",))
    (root / "val" / "images").mkdir(parents=True)
    for place in range(3):
        photo(place, 64, 64).save(root / "val" / "images" / f"val_{place}.JPEG")
    lines = [f"val_{place}.JPEG\tn{1 + place % 2}\t0\t0\t63\t63\n" for place in range(3)]
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    data = load_dataset("tiny_imagenet", tmp_path)
    assert data.train_images.shape[1:] == (64, 64, 3) and data.augment == "crop_flip"
    assert data.test_labels.tolist() == [0, 0, 1]
    (root / "val" / "val_annotations.txt").write_text("val_9.JPEG\tn1\n")
    with refused("val_annotations.txt, line 1: names no picture"):
        load_dataset("tiny_imagenet", tmp_path)


def put(name, data):
    """Return what writes a file cat/NAME into train."""
    return lambda root: (root / "train" / "cat" / name).write_bytes(data() if callable(data) else data)


def bytes_of(image, kind, **more):
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


def part_of(kind, keep, **more):
    data = bytes_of(photo(0, 200, 200), kind, **more)
    return data[: int(keep * len(data))]


def changed(data, place, value):
    return data[:place] + value + data[place + len(value) :]


ODD = {
    "no train": (lambda r: os.rename(r / "train", r / "x"), "has no folder train"),
    "a file for train": (lambda r: (os.rename(r / "train", r / "x"), write(r / "train", b"")), "has no folder train"),
    "no val": (lambda r: os.rename(r / "val", r / "x"), "has neither val nor test"),
    "an empty class": (lambda r: (r / "train" / "eel").mkdir(), "eel: holds no picture"),
    "a class of hidden files": (lambda r: write(r / "train" / "eel" / "._a.png", b"x"), "eel: holds no picture"),
    "an empty class of val": (lambda r: clear(r / "val" / "cat"), "val/cat: holds no picture"),
    "a class of val alone": (lambda r: os.rename(r / "val" / "cat", r / "val" / "eel"), "has the class eel"),
    "one class": (lambda r: os.rename(r / "train" / "cat", r / "cat"), "holds the one class dog"),
    "no folders": (lambda r: clear(r / "val"), "val: holds no folder"),
    "pictures without classes": (lambda r: flatten(r / "train"), "train: holds no folder"),
    "a link to nothing": (lambda r: os.symlink("nowhere", r / "train" / "cat" / "9.png"), "No such file .*9.png"),
    "a link to itself": (lambda r: os.symlink("9.png", r / "train" / "cat" / "9.png"), "Too many levels .*9.png"),
    "a folder inside itself": (lambda r: os.symlink("..", r / "train" / "cat" / "up"), "Too many levels .*up"),
    "a pipe": (lambda r: os.mkfifo(r / "train" / "cat" / "9.png"), "9.png: is empty"),
    "an empty file": (put("9.png", b""), "9.png: is empty"),
    "a page that was fetched in its place": (put("9.jpg", b"<!DOCTYPE html><html>404</html>"), "9.jpg: is no picture"),
    "a PNG cut off": (put("9.png", lambda: part_of("PNG", 0.6)), "9.png: is no picture"),
    "a JPEG cut off": (put("9.jpg", lambda: part_of("JPEG", 0.6)), "9.jpg: is no picture .*truncated"),
    "a TIFF cut off": (put("9.tif", lambda: part_of("TIFF", 0.6)), "9.tif: is no picture"),
    "a wrong checksum": (put("9.png", lambda: changed(part_of("PNG", 1), 20, b"\x01")), "9.png: is no picture"),
    "floats": (put("9.tif", lambda: bytes_of(Image.new("F", (9, 9)), "TIFF")), "9.tif: .* floating point"),
    "32 bits": (put("9.tif", lambda: bytes_of(Image.new("I", (9, 9), 70000), "TIFF")), "9.tif: .*grey values"),
    "a bomb": (put("9.png", lambda: bytes_of(Image.new("1", (13500, 13500)), "PNG")), "9.png: .*decompression bomb"),
}
RIGHT = {  # odd, and read
    "one pixel": put("9.png", lambda: bytes_of(photo(0, 1, 1), "PNG")),
    "a JPEG called PNG": put("9.png", lambda: bytes_of(photo(0), "JPEG")),
    "a GIF called PNG": put("9.png", lambda: bytes_of(photo(0).convert("P"), "GIF")),
    "frames": put("9.webp", lambda: bytes_of(photo(0), "WEBP", save_all=True, append_images=[photo(1)])),
    "damaged EXIF": put("9.jpg", lambda: bytes_of(photo(0), "JPEG", exif=b"Exif\x00\x00MM\x00*junkjunkjunk")),
    "a palette with transparency": put("9.png", lambda: bytes_of(photo(0).quantize(8), "PNG", transparency=3)),
    "a progressive JPEG": put("9.jpeg", lambda: bytes_of(photo(0), "JPEG", progressive=True)),
    "junk behind it": put("9.jpg", lambda: bytes_of(photo(0), "JPEG") + b"junk" * 100),
    "letters of every kind": put("ü \n'日本.PNG", lambda: bytes_of(photo(0), "PNG")),
    "no text": lambda r: write(os.fsencode(r / "train" / "cat") + b"/\xff.png", bytes_of(photo(0), "PNG")),
}


def write(path, data):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)


def flatten(folder):
    for path in list(folder.glob("*/*")):
        path.rename(folder / f"{path.parent.name}-{path.name}")
    for path in folder.glob("*/"):
        path.rmdir()


@pytest.mark.parametrize("case", RIGHT)
def test_odd_files_are_read(tmp_path, case):
    RIGHT[case](write_folder(tmp_path, count=1))
    held, streamed = (read(tmp_path, "DATASET.AUGMENT", "crop_flip", *more) for more in ((), ("DATASET.MEMORY", "0")))
    assert held.train_images.shape == (3, 32, 32, 3)
    assert torch.equal(streamed.train_images[1:2], held.train_images[1:2])


def clear(folder):
    for name in os.listdir(folder):
        os.rename(folder / name, folder.parent / f"was-{name}")


@pytest.mark.parametrize("case", ODD)
def test_what_cannot_be_is_one_line_before_training(tmp_path, case):
    change, says = ODD[case]
    change(write_folder(tmp_path, count=1))
    for augment in ("crop_flip", "resized_crop"):  # decoded, and streamed
        with refused(says):
            read(tmp_path, "DATASET.AUGMENT", augment)


def test_a_class_without_a_picture_to_test_on_is_named(tmp_path, capsys):
    os.rename(write_folder(tmp_path) / "val" / "cat", tmp_path / "cat")
    read(tmp_path)
    assert "val: 1 class of train have no picture to test on, such as cat" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_gives_the_images_of_memory(tmp_path, workers):
    write_folder(tmp_path, size=(45, 38))
    words = ["DATASET.AUGMENT", "crop_flip", "DATASET.NUM_WORKERS", str(workers)]
    held, streamed = read(tmp_path, *words), read(tmp_path, *words, "DATASET.MEMORY", "0")
    assert held.digest() == streamed.digest()
    ours, theirs = batches(streamed, seed=3), batches(held, seed=3)
    for epoch, done in ((1, 0), (2, 1)):
        for one, other in zip(ours.epoch(epoch, done), theirs.epoch(epoch, done), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    next(ours.epoch(3))  # which nobody ends
    plan = theirs.plan(7)[:, :5]  # and a batch out of turn
    assert torch.equal(ours.batch(plan).image, theirs.batch(plan).image)
    tests = [Batches(d.test_images, d.test_labels, d.mean, d.std, 3) for d in (streamed, held)]
    for one, other in zip(*tests, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_random_crops_are_a_function_of_seed_and_epoch(tmp_path):
    write_folder(tmp_path, size=(45, 38))
    found = []
    for workers in (0, 2):
        data = read(tmp_path, "DATASET.NUM_WORKERS", str(workers))
        assert data.augment == "resized_crop" and batches(data).streamed
        found.append([list(batches(data, seed=1).epoch(epoch)) for epoch in (1, 2)])
        late = list(batches(data, seed=1).epoch(2, 2))
        assert len(late) == 1 and torch.equal(late[0].image, found[-1][1][2].image)
    for one, other in zip(sum(found[0], []), sum(found[1], []), strict=True):
        assert torch.equal(one.image, other.image)
    assert not torch.equal(found[0][0][0].image, found[0][1][0].image)
    held = torch.zeros(4, 8, 8, 3, dtype=torch.uint8), torch.zeros(4).long(), (0,) * 3, (1,) * 3
    with refused("resized_crop needs picture files"):
        Batches(*held, 2, "resized_crop")


def test_a_file_that_breaks_while_training_ends_the_run_in_a_line(tmp_path):
    write_folder(tmp_path)
    data = read(tmp_path, "DATASET.NUM_WORKERS", "2")
    (tmp_path / "train" / "dog" / "2.png").write_bytes(b"gone")
    with refused("dog/2.png: is no picture that can be read .*--resume auto goes on then"):
        list(batches(data).epoch(1))
