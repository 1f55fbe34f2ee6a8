"""The strong view of SOLVER.TRAINER ours: Pillow's operations on whole batches, drawn from (seed, epoch) alone."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch.nn import functional as F

from mdistiller.dataset import Batches
from mdistiller.dataset import _strong as strong

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images():
    """32 noisy pictures with edges, one of them of one colour: uint8 (32, 32, 32, 3)."""
    generator = torch.Generator().manual_seed(0)
    coarse = F.interpolate(torch.rand(32, 3, 8, 8, generator=generator), size=32, mode="bicubic").clamp(0, 1)
    noisy = 200 * coarse + 40 * torch.rand(coarse.shape, generator=generator)
    noisy[0] = 77
    return noisy.clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()


def pillow(picture, name, v):
    width, height = picture.size
    if name in ("brightness", "color", "contrast", "sharpness"):
        return getattr(ImageEnhance, name.title())(picture).enhance(v)
    matrix = {
        "shear_x": (1, v, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, v, 1, 0),
        "translate_x": (1, 0, v * width, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, v * height),
    }
    if name in matrix:
        return picture.transform(picture.size, Image.AFFINE, matrix[name])
    others = {
        "identity": lambda: picture,
        "autocontrast": lambda: ImageOps.autocontrast(picture),
        "equalize": lambda: ImageOps.equalize(picture),
        "posterize": lambda: ImageOps.posterize(picture, int(v)),
        "solarize": lambda: ImageOps.solarize(picture, v),
        "rotate": lambda: picture.rotate(v),
    }
    return others[name]()


@pytest.mark.parametrize("name", strong.RANGES)
def test_every_operation_is_pillows(images, name):
    low, high = strong.RANGES[name]
    decisions = torch.zeros(strong.ROWS, 32, dtype=torch.int64)  # the second operation is identity, nothing is cut
    decisions[0], decisions[1] = strong.NUMBER[name], torch.arange(32) * (strong.LEVELS // 32)
    views = strong.StrongView(32, 32, CPU)(images, decisions)
    assert views.dtype == torch.uint8
    magnitudes = [low + (high - low) * level / strong.LEVELS for level in decisions[1].tolist()]
    pairs = zip(images.numpy(), magnitudes, strict=True)
    expected = np.stack([np.asarray(pillow(Image.fromarray(picture), name, v)) for picture, v in pairs])
    difference = np.abs(views.numpy().astype(int) - expected)
    # where Pillow's own rounding decides: a value off by one, or the pixel beside
    assert (difference > 1).mean() < 1e-3 and (difference > 0).mean() < 5e-3


def test_operations_follow_one_another_and_the_square_comes_last(images):
    view = strong.StrongView(32, 32, CPU)
    half = strong.LEVELS // 2
    both = torch.tensor([strong.NUMBER["solarize"], half, strong.NUMBER["shear_x"], 0, half, half, 0])[:, None]
    solarized = both.clone()
    solarized[2:] = 0
    sheared = both.clone()
    sheared[:2] = 0
    square = torch.zeros(32, 32, dtype=torch.bool)
    square[12:21, :9] = True  # side 8, its middle at row 16.5 and column 1
    result, alone = view(images[:1], both)[0], view(view(images[:1], solarized), sheared)[0]
    assert torch.equal(result, alone)
    assert (result[square] == torch.tensor(strong.GREY)).all()
    uncut = both.clone()
    uncut[4] = 0
    assert torch.equal(result[~square], view(images[:1], uncut)[0][~square])


def test_draws_are_uniform():
    decisions = strong.draw(14_000, torch.Generator().manual_seed(0))
    assert decisions.shape == (strong.ROWS, 14_000)
    for place in range(strong.OPERATIONS):
        counts = torch.bincount(decisions[2 * place], minlength=14)
        assert len(counts) == 14 and ((counts - 1000.0) ** 2 / 1000).sum() < 40  # 13 degrees of freedom
    shares = decisions[[1, 3, 4, 5, 6]] / strong.LEVELS
    assert (shares.mean(1) - 0.5).abs().max() < 0.01 and 0 <= shares.min() and shares.max() < 1


def test_the_weak_view_stays_what_it_is_and_the_strong_one_is_a_function_of_seed_and_epoch(images):
    given = images, torch.arange(32), (0.5,) * 3, (0.25,) * 3, 12

    def batches(seed=5, augment="crop_flip", two_views=True):
        return Batches(*given, augment, seed, two_views)

    data = batches()
    list(data.epoch(9))
    torch.rand(10)
    once, again = list(data.epoch(2)), list(batches().epoch(2))
    for one, other, single in zip(once, again, batches(two_views=False).epoch(2), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(one[:3], single, strict=True))
        assert one.image_strong.shape == one.image.shape and one.image_strong.dtype == torch.float32
        assert not torch.equal(one.image_strong, one.image)
    assert torch.equal(list(data.epoch(2, done=1))[0].image_strong, once[1].image_strong)
    assert not torch.equal(next(data.epoch(3)).image_strong, once[0].image_strong)
    assert not torch.equal(next(batches(seed=6).epoch(2)).image_strong, once[0].image_strong)
    assert torch.equal(data.row_numbers(data.plan(2)), batches(two_views=False).row_numbers(data.plan(2)[:4]))
    still = batches(augment="none").plan(2)
    assert (still[[1, 2, 4, 5]] == 4).all() and (still[[3, 6]] == 0).all()
