"""The strong view of an image: RandAugment as FixMatch and MLKD's public trainer have it, a whole batch at once."""

import torch
from torch import Tensor
from torch.nn import functional as F

# the operations, each with the range that its magnitude is drawn from, uniformly
RANGES = {
    "identity": (0.0, 1.0),
    "brightness": (0.05, 0.95),
    "color": (0.05, 0.95),
    "contrast": (0.05, 0.95),
    "sharpness": (0.05, 0.95),
    "autocontrast": (0.0, 1.0),
    "equalize": (0.0, 1.0),
    "posterize": (4.0, 8.0),  # bits that are kept, whole
    "solarize": (0.0, 256.0),  # values from here on are inverted
    "rotate": (-30.0, 30.0),  # degrees
    "shear_x": (-0.3, 0.3),
    "shear_y": (-0.3, 0.3),
    "translate_x": (-0.3, 0.3),  # of the width
    "translate_y": (-0.3, 0.3),  # of the height
}
NUMBER = {name: number for number, name in enumerate(RANGES)}
OPERATIONS = 2  # for each image, one after the other
LEVELS = 2**16  # steps in which magnitudes and places are drawn
CUTOUT = 0.5  # the largest side of the square that is cut out at the end, of the width
GREY = (125, 123, 114)  # its colour
ROWS = 2 * OPERATIONS + 3


def draw(n: int, generator: torch.Generator) -> Tensor:
    """Return the decisions of n strong views, (ROWS, n) int64: number and level of each operation, then side, row and
    column of the square, in LEVELS.
    """
    rows = [torch.randint(most, (n,), generator=generator) for most in (len(RANGES), LEVELS) * OPERATIONS]
    return torch.cat([torch.stack(rows), torch.randint(LEVELS, (3, n), generator=generator)])


class StrongView:
    """Called with uint8 images (B, H, W, 3) and their decisions (ROWS, B), on `device`: their strong views, uint8.

    What Pillow makes of one image after the other, but for single pixels at the edge of rounding; nothing waits for the
    device.
    """

    def __init__(self, height: int, width: int, device: torch.device):
        low, high = torch.tensor(list(RANGES.values()), device=device).T
        self.low, self.span = low, (high - low) / LEVELS
        self.rows, self.columns = torch.arange(height, device=device), torch.arange(width, device=device)
        self.values = torch.arange(256, device=device)
        self.grey = torch.tensor(GREY, dtype=torch.uint8, device=device)
        smooth = torch.tensor([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]], device=device)
        self.smooth = smooth.expand(3, 1, 3, 3)  # Pillow's SMOOTH, times 13

    def __call__(self, images: Tensor, decisions: Tensor) -> Tensor:
        for place in range(OPERATIONS):
            number, level = decisions[2 * place : 2 * place + 2]
            magnitude = self.low[number] + self.span[number] * level  # (B,)
            images = self.blend(images, number, magnitude)
            images = self.recolour(images, number, magnitude)
            images = self.warp(images, number, magnitude)
        return self.cut(images, decisions[2 * OPERATIONS :] / LEVELS)

    def blend(self, images: Tensor, number: Tensor, magnitude: Tensor) -> Tensor:
        """Return images (B, H, W, 3) between themselves and, by `number` (B,), black, grey, their mean grey or their
        smoothed form: brightness, color, contrast, sharpness.
        """
        whole = images.int()
        red, green, blue = whole.split(1, dim=3)
        grey = (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16  # (B, H, W, 1)
        pixels = grey.shape[1] * grey.shape[2]
        mean = (2 * grey.sum((1, 2), keepdim=True) + pixels) // (2 * pixels)
        inner = F.conv2d(images.permute(0, 3, 1, 2).float(), self.smooth, groups=3).permute(0, 2, 3, 1)
        smooth = whole.clone()
        smooth[:, 1:-1, 1:-1] = ((2 * inner + 13) / 26).floor().int()
        end = whole
        for name, other in (("brightness", 0), ("color", grey), ("contrast", mean), ("sharpness", smooth)):
            end = torch.where(_is(name, number), other, end)
        share = torch.where(number <= NUMBER["sharpness"], magnitude, 1.0)[:, None, None, None]
        return (end + share * (whole - end)).to(torch.uint8)

    def recolour(self, images: Tensor, number: Tensor, magnitude: Tensor) -> Tensor:
        """Return images whose values are looked up anew, in a table for each image and channel: autocontrast, equalize,
        posterize, solarize.
        """
        batch, height, width, _ = images.shape
        flat = images.reshape(batch, height * width, 3).transpose(1, 2).long()  # (B, 3, H W)
        counts = flat.new_zeros(batch, 3, 256).scatter_add_(2, flat, torch.ones_like(flat))
        there = torch.where(counts > 0, self.values, -1)
        high = there.amax(2, keepdim=True)
        low = 255 - torch.where(counts > 0, 255 - self.values, -1).amax(2, keepdim=True)
        spread = high - low
        stretched = torch.where(spread > 0, (self.values - low) * 255 // spread.clamp(min=1), self.values)
        step = (height * width - counts.gather(2, high)) // 255
        before = counts.cumsum(2) - counts
        flattened = torch.where(step > 0, (step // 2 + before) // step.clamp(min=1), self.values)
        magnitude = magnitude[:, None, None]
        coarse = 2 ** (8 - magnitude.floor().long())
        table = self.values.expand(batch, 3, 256)
        for name, other in (
            ("autocontrast", stretched),
            ("equalize", flattened),
            ("posterize", self.values // coarse.clamp(min=1) * coarse),
            ("solarize", torch.where(self.values < magnitude, self.values, 255 - self.values)),
        ):
            table = torch.where(_is(name, number)[..., 0], other, table)
        values = table.clamp(0, 255).gather(2, flat)
        return values.transpose(1, 2).reshape(images.shape).to(torch.uint8)

    def warp(self, images: Tensor, number: Tensor, magnitude: Tensor) -> Tensor:
        """Return images (B, H, W, 3) that are rotated, sheared or shifted, from the nearest pixel; black comes in."""
        height, width = images.shape[1:3]

        def of(name: str, factor: float = 1.0) -> Tensor:
            return torch.where(number == NUMBER[name], factor * magnitude, 0.0)[:, None, None]

        angle = torch.deg2rad(of("rotate"))
        y, x = self.rows[:, None] + 0.5, self.columns + 0.5
        around_y, around_x = y - height / 2, x - width / 2
        from_x = angle.cos() * around_x - angle.sin() * around_y + width / 2 + of("shear_x") * y
        from_y = angle.sin() * around_x + angle.cos() * around_y + height / 2 + of("shear_y") * x
        from_x = (from_x + of("translate_x", width)).floor().long()  # (B, H, W)
        from_y = (from_y + of("translate_y", height)).floor().long()
        inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
        sample = torch.arange(len(images), device=images.device)[:, None, None]
        moved = images[sample, from_y.clamp(0, height - 1), from_x.clamp(0, width - 1)]
        return moved * inside[..., None]

    def cut(self, images: Tensor, shares: Tensor) -> Tensor:
        """Return images with a grey square. `shares` (3, B), in [0, 1): its side, of CUTOUT, and the row and column of
        its middle.
        """
        height, width = images.shape[1:3]
        side = shares[0] * CUTOUT * width
        top = (1 + shares[1] * (height - 1) - side / 2).clamp(min=0).floor()
        left = (1 + shares[2] * (width - 1) - side / 2).clamp(min=0).floor()
        rows = (self.rows >= top[:, None]) & (self.rows <= (top + side)[:, None])  # (B, H)
        columns = (self.columns >= left[:, None]) & (self.columns <= (left + side)[:, None])
        square = rows[:, :, None] & columns[:, None, :] & (side > 0)[:, None, None]
        return torch.where(square[..., None], self.grey, images)


def _is(name: str, number: Tensor) -> Tensor:
    return (number == NUMBER[name])[:, None, None, None]
