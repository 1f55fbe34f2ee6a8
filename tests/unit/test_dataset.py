"""Data sets: what is drawn from them, the files that they come from, and the lines that refuse other files."""

import re
import zipfile

import numpy as np
import pytest
import torch
from helpers import Bomb, refused
from PIL import Image
from torch.utils.data import TensorDataset
from torchvision.transforms import functional as TF

from mdistiller.dataset import Batches, ImageSet, image_set, load_dataset
from mdistiller.dataset._images import channel_statistics
from mdistiller.engine.feed import Feed
from mdistiller.errors import UserError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


def random_images(n=20, size=32, seed=0):
    return torch.from_numpy(np.random.RandomState(seed).randint(0, 256, (n, size, size, 3)).astype(np.uint8))


def batches(n=20, batch_size=8, augment="crop_flip", seed=0, size=32):
    return Batches(random_images(n, size), torch.arange(n), MEAN, STD, batch_size, augment, seed)


def test_augmentation_equals_torchvisions_pixel_for_pixel():
    data = batches()
    order, top, left, flip = data.plan(3)
    image = torch.cat([batch.image for batch in data.epoch(3)])
    for i in range(20):
        picture = Image.fromarray(data.images[order[i]].numpy())
        picture = TF.crop(TF.pad(picture, 4), int(top[i]), int(left[i]), 32, 32)
        picture = TF.hflip(picture) if flip[i] else picture
        expected = TF.normalize(TF.to_tensor(picture), MEAN, STD)
        torch.testing.assert_close(image[i], expected, rtol=1e-5, atol=1e-5)


def test_drop_last_leaves_out_what_fills_no_batch():
    whole, cut = batches(), batches()
    cut.drop_last = True
    assert (len(whole), len(cut)) == (3, 2) and (whole.samples_an_epoch, cut.samples_an_epoch) == (20, 16)
    for kept, every in zip(cut.epoch(2), list(whole.epoch(2))[:2], strict=True):
        assert torch.equal(kept.image, every.image) and torch.equal(kept.index, every.index)
    fed = [plan for plan, _ in Feed(cut).plans(2, 1, lambda: None)]
    assert [plan[0].tolist() for plan in fed] == [cut.plan(2)[0, 8:16].tolist()]
    assert len({index for epoch in range(20) for batch in cut.epoch(epoch) for index in batch.index.tolist()}) == 20


def test_decisions_follow_the_published_distribution():
    images = random_images(1).expand(81 * 200, -1, -1, -1)
    _, top, left, flip = Batches(images, torch.zeros(81 * 200), MEAN, STD, 8, "crop_flip").plan(1)
    for offset in (top, left):
        counts = torch.bincount(offset, minlength=9)
        assert len(counts) == 9
        chi2 = ((counts - 1800.0) ** 2 / 1800).sum()
        assert chi2 < 30  # 8 degrees of freedom
    assert 0.48 < flip.double().mean() < 0.52
    pairs = torch.bincount(9 * top + left, minlength=81)
    assert ((pairs - 200.0) ** 2 / 200).sum() < 140  # 80 degrees of freedom: rows and columns are independent


def test_an_epoch_is_a_function_of_seed_and_epoch_alone():
    first = [batch.image for batch in batches(seed=5).epoch(2)]
    data = batches(seed=5)
    list(data.epoch(7))
    torch.rand(10)
    assert all(torch.equal(a, b.image) for a, b in zip(first, data.epoch(2), strict=True))
    assert not torch.equal(batches(seed=6).plan(2)[0], data.plan(2)[0])
    assert not torch.equal(data.plan(3)[0], data.plan(2)[0])


def test_every_sample_once_and_the_last_batch_is_kept():
    data = batches(n=21, batch_size=8)
    seen = list(data.epoch(1))
    assert len(data) == len(seen) == 3
    assert [len(batch.target) for batch in seen] == [8, 8, 5]
    index = torch.cat([batch.index for batch in seen])
    assert torch.equal(index.sort().values, torch.arange(21))
    assert torch.equal(torch.cat([batch.target for batch in seen]), index)
    assert seen[0].image.is_contiguous(memory_format=torch.channels_last)
    assert seen[0].image.dtype == torch.float32


@pytest.mark.parametrize(("augment", "crops", "flips"), [("crop", True, False), ("none", False, False)])
def test_weaker_augmentations(augment, crops, flips):
    _, top, left, flip = batches(n=200, augment=augment).plan(1)
    assert bool((top != 4).any() and (left != 4).any()) is crops
    assert bool(flip.any()) is flips


def test_evaluation_batches_are_the_images_in_order():
    data = batches(augment=None)
    image = torch.cat([batch.image for batch in data])
    expected = TF.normalize(data.images.permute(0, 3, 1, 2) / 255, MEAN, STD)
    torch.testing.assert_close(image, expected, rtol=1e-5, atol=1e-5)


def test_digits():
    data = load_dataset("digits", "nowhere")
    assert data.train_images.shape == (1442, 32, 32, 3)
    assert len(data.test_images) == 355
    assert data.augment == "crop"  # a mirrored digit is another sign
    for labels in (data.train_labels, data.test_labels):
        share = torch.bincount(labels, minlength=10) / len(labels)
        assert (share - 0.1).abs().max() < 0.01
    again = load_dataset("digits", "nowhere")
    assert torch.equal(data.test_images, again.test_images)


def write_cifar100(folder, n=4, size=None, label=99):
    folder.mkdir(parents=True, exist_ok=True)
    records = np.random.RandomState(0).randint(0, 256, (n, 3074)).astype(np.uint8)
    records[:, 0], records[:, 1] = 3, label
    for name in ("train.bin", "test.bin"):
        (folder / name).write_bytes(records.tobytes()[:size])
    return records


@pytest.mark.parametrize("inside", [True, False])
def test_cifar100_binary(tmp_path, inside):
    folder = tmp_path / "cifar-100-binary"
    records = write_cifar100(folder)
    data = load_dataset("cifar100", folder if inside else tmp_path)
    assert data.num_classes == 100
    assert data.train_labels.tolist() == [99] * 4
    red = torch.from_numpy(records[1, 2 : 2 + 1024].reshape(32, 32))
    assert torch.equal(data.train_images[1, :, :, 0], red)


def test_cifar10_binary(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for i, name in enumerate([*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]):
        (folder / name).write_bytes(bytes([i]) + bytes(range(256)) * 12)
    data = load_dataset("cifar10", tmp_path)
    assert data.train_labels.tolist() == [0, 1, 2, 3, 4]
    assert data.test_labels.tolist() == [5]
    assert data.train_images[0, 0, 5].tolist() == [5, 5, 5]


@pytest.mark.parametrize(
    ("kwargs", "says"), [({"size": 3000}, "3,000 bytes"), ({"label": 100}, "label 100"), ({"n": 0}, "0 bytes")]
)
def test_broken_cifar_files_are_named(tmp_path, kwargs, says):
    write_cifar100(tmp_path, **kwargs)
    with pytest.raises(UserError, match=says):
        load_dataset("cifar100", tmp_path)


def arrays(**changes):
    images = random_images(12, 28).numpy()
    data = {"train_images": images[:8], "train_labels": np.arange(8).reshape(8, 1) % 3}
    data |= {"test_images": images[8:], "test_labels": np.arange(4) % 3} | changes
    return {key: value for key, value in data.items() if value is not None}


def test_npz(tmp_path):
    np.savez(tmp_path / "x.npz", **arrays(val_images=np.zeros(3)))
    data = load_dataset("npz", tmp_path / "x.npz")
    assert (data.num_classes, data.train_images.shape) == (3, (8, 28, 28, 3))
    expected = data.train_images.double().div(255).reshape(-1, 3)
    np.testing.assert_allclose(data.mean, expected.mean(0), rtol=1e-9)
    np.testing.assert_allclose(data.std, expected.std(0, unbiased=False), rtol=1e-9)
    (batch,) = Batches(data.train_images, data.train_labels, data.mean, data.std, 8, "crop").epoch(1)
    assert batch.image.shape == (8, 3, 28, 28)
    grey = {name: arrays()[name][..., 0] for name in ("train_images", "test_images")}
    np.savez_compressed(tmp_path / "grey.npz", **arrays(**grey))
    images = load_dataset("npz", tmp_path / "grey.npz").train_images
    assert torch.equal(images[..., 0], images[..., 2])
    floats = {name: arrays()[name].transpose(0, 3, 1, 2)[:, :, 4:] / 255 for name in ("train_images", "test_images")}
    np.savez(tmp_path / "floats.npz", **arrays(**floats))
    assert torch.equal(load_dataset("npz", tmp_path / "floats.npz").train_images, data.train_images[:, 4:])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"test_labels": None}, "lacks test_labels"),
        ({"train_images": np.full((8, 28, 28), 255)}, "floats in [0, 1]; got int64"),
        ({"train_images": np.full((8, 28, 28, 3), 1.5, np.float32)}, "floats in [0, 1]; got 1.5 to 1.5"),
        ({"train_images": np.zeros((8, 28, 28, 4), np.uint8)}, "must be grey or RGB, such as (N, H, W, 3); got (8, 28"),
        ({"train_images": np.zeros((8, 32, 32, 3), np.uint8)}, "differ in size"),
        ({"train_labels": np.zeros(7, int)}, "8 whole numbers"),
        ({"train_labels": np.full(8, -1)}, "count from 0"),
        ({"train_labels": np.full(8, 2**40)}, "count classes from 0"),
        ({"train_labels": np.array([Bomb()] * 8)}, "allow_pickle"),
        ({"train_labels": np.zeros(8)}, "float64"),
        ({"train_labels": np.zeros(8, [("a", "i8"), ("b", "u1")])}, "8 whole numbers"),
    ],
)
def test_bad_npz_is_refused_in_one_line(tmp_path, changes, says):
    np.savez(tmp_path / "x.npz", **arrays(**changes))
    with refused("x.npz: .*" + re.escape(says)):
        load_dataset("npz", tmp_path / "x.npz")


def member(header, content=b""):
    """An array's file with that header."""
    return np.lib.format.MAGIC_PREFIX + b"\1\0" + len(header).to_bytes(2, "little") + header.encode() + content


def header(shape, kind="|u1"):
    return f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}\n"


BAD_MEMBERS = {
    "a tera": member(header((10**12 // 784, 28, 28))),
    "less than it says": member(header((7, 28, 28, 3)), bytes(6 * 28 * 28 * 3)),
    "a shape beyond counting": member(header((2**70, 0, 28, 3))),
    "code": member("{'descr': __import__('os').mkdir('bomb')}\n"),
}


@pytest.mark.parametrize("kind", BAD_MEMBERS)
def test_a_member_that_is_no_array_is_refused(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("x.npz", "w") as file:
        for name in arrays():
            file.writestr(f"{name}.npy", BAD_MEMBERS[kind])
    with refused(r"x\.npz"):
        load_dataset("npz", "x.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


@pytest.mark.parametrize("content", [b"", b"not a zip", 0.1, 0.999])
def test_files_that_are_no_npz(tmp_path, content):
    np.savez(tmp_path / "whole.npz", **arrays())
    whole = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(whole[: int(content * len(whole))] if isinstance(content, float) else content)
    with pytest.raises(UserError, match=r"x\.npz"):
        load_dataset("npz", tmp_path / "x.npz")
    with pytest.raises(UserError, match=r"gone\.npz"):
        load_dataset("npz", tmp_path / "gone.npz")


def test_a_single_array_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(3))
    with pytest.raises(UserError, match="single array"):
        load_dataset("npz", tmp_path / "x.npy")


def test_constant_channels_have_a_usable_deviation():
    mean, std = channel_statistics(torch.full((3, 8, 8, 3), 255, dtype=torch.uint8))
    assert mean == (1, 1, 1)
    assert min(std) > 0


# What a user has in memory: pairs, and Datasets of (image, label)

SAMPLES = [(random_images(1, seed=label)[0], label) for label in range(3)]


class Random(list):
    """A Dataset whose transform draws anew at every read."""

    def __getitem__(self, number):
        image, label = super().__getitem__(number)
        return torch.roll(image, int(torch.randint(2, ())), 0), label


def test_pairs_and_datasets():
    images = torch.stack([image for image, _ in SAMPLES[:2]])
    for train in (
        TensorDataset(images, torch.arange(2)),
        (images, [0, 1]),
        ([*images.numpy()], [0, 1]),
        [([*images[0].numpy()], torch.ones(1).int())] * 3,
    ):
        data = image_set(train, (images, [0, 1]))
        assert data.train_images.shape[1:] == (32, 32, 3)
        assert data.augment == "crop"
    assert data.train_labels.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("train", "says"),
    [
        ([*SAMPLES, (random_images(1, 30)[0], 0)], r"images differ in size, \(30, 30, 3\) and \(32, 32, 3\)"),
        (([np.zeros((8, 8)), np.zeros((9, 9))], [0, 1]), "images differ in size"),
        (Random(SAMPLES * 4), "random transforms"),
        ([], "no samples"),
        ({"images": SAMPLES}, "must be a pair .*; got dict"),
        ([(image, [label, 0]) for image, label in SAMPLES], "3 whole numbers"),
        ([(image, "cat") for image, _ in SAMPLES], "3 whole numbers"),
    ],
)
def test_data_that_cannot_be_are_a_line(train, says):
    with pytest.raises(UserError, match=says):
        image_set(train, SAMPLES)


@pytest.mark.parametrize(
    ("part", "values", "says"),
    [
        ("train_labels", torch.zeros(4, dtype=torch.int32), r"train: labels must be int64 \(4,\)"),
        ("train_images", torch.rand(4, 8, 8, 3), r"train: images must be uint8, \(H, W, 3\) each; got torch.float32"),
        ("test_images", random_images(4, 9), r"test: images must be uint8, \(8, 8, 3\) each"),
        ("test_labels", torch.full((4,), 2), "test: labels must be 0 to 1"),
        ("augment", "flip", "unknown augmentation"),
    ],
)
def test_an_image_set_is_of_plain_tensors(part, values, says):
    labels = torch.zeros(4, dtype=torch.int64)
    parts = {f"{split}_images": random_images(4, 8) for split in ("train", "test")}
    parts |= {"train_labels": labels, "test_labels": labels, "num_classes": 2, "mean": MEAN, "std": STD}
    ImageSet(**parts)
    with pytest.raises(UserError, match=says):
        ImageSet(**parts | {part: values})
