"""A grid of images with the boxes that detectors find in them, and the true ones."""

import colorsys
import io
from collections.abc import Mapping, Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor

LEAST = 0.5  # the score from which on a detection is drawn
SIDE, GAP, TITLE = 240, 6, 16  # pixels: an image's longer side, between two of them, and the line above a row


def draw_detections(
    images: Sequence[Tensor], rows: Mapping[str, Sequence[Mapping[str, Tensor]]], classes: Sequence[str]
) -> Image.Image:
    """Return the images, uint8 (3, H, W) of any sizes, side by side, once for each of `rows`: {its title: the boxes in
    each image}, as dicts of boxes (n, 4), labels (n,) from 1 and, of detections, scores (n,); those below LEAST are
    left out, and the title says so where that is all. `classes`: the names of the labels; each has its colour.
    """
    height = TITLE + SIDE + GAP
    grid = Image.new("RGB", (len(images) * (SIDE + GAP) - GAP, height * len(rows)), "white")
    draw = ImageDraw.Draw(grid)
    for row, (title, found) in enumerate(rows.items()):
        weak = all("scores" in boxes and not (boxes["scores"] >= LEAST).any() for boxes in found)
        draw.text((2, row * height + 2), title + (f" (none above {LEAST})" if weak else ""), fill="black")
        for column, (image, boxes) in enumerate(zip(images, found, strict=True)):
            grid.paste(with_boxes(image, boxes, classes), (column * (SIDE + GAP), row * height + TITLE))
    return grid


def with_boxes(image: Tensor, found: Mapping[str, Tensor], classes: Sequence[str]) -> Image.Image:
    """Return an image scaled to SIDE with its boxes, each below its class and score."""
    picture = Image.fromarray(image.cpu().permute(1, 2, 0).numpy())
    factor = SIDE / max(picture.size)
    picture = picture.resize([max(1, round(side * factor)) for side in picture.size], Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    scores = found.get("scores", torch.ones(len(found["boxes"])))
    for box, label, score in zip(found["boxes"].tolist(), found["labels"].tolist(), scores.tolist(), strict=True):
        if score < LEAST:
            continue
        left, top, right, bottom = (factor * side for side in box)
        name = classes[label - 1] + (f" {score:.2f}" if "scores" in found else "")
        draw.rectangle([left, top, max(left, right - 1), max(top, bottom - 1)], outline=shade(label), width=2)
        above = max(0, top - 12)
        draw.rectangle(draw.textbbox((left, above), name), fill=shade(label))
        draw.text((left, above), name, fill="black")
    return picture


def shade(label: int) -> tuple[int, int, int]:
    """Return the colour of a label: a light one, far from its neighbours'."""
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(0.618 * label % 1, 0.6, 1))


def png(image: Image.Image) -> bytes:
    """Return an image as the bytes of a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
