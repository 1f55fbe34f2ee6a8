"""What scenes are made of: shapes with exact masks or pictures that are cut out, patterns in them, and backgrounds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

FINE = 4  # a mask is drawn so many times larger, and scaled down
SOLID = 128  # alpha from which on a pixel is the object's
DISTINCT = 90  # how far a shape's colour is from the picture's, at least


def arc(points: int, start: float = 0.0, stop: float = 2 * math.pi) -> np.ndarray:
    """Return points of the unit circle from one angle to another, (points, 2)."""
    angle = np.linspace(start, stop, points)
    return np.stack([np.cos(angle), np.sin(angle)], 1)


def polygon(corners: int) -> np.ndarray:
    return arc(corners + 1)[:-1]


def crescent() -> np.ndarray:
    """Return the outline of a disc out of which another one is cut, (50, 2)."""
    tip, shift = 0.3 * math.pi, 0.35
    inner = math.atan2(math.sin(tip), math.cos(tip) - shift)
    radius = math.sin(tip) / math.sin(inner)
    return np.concatenate([arc(25, tip, 2 * math.pi - tip), radius * arc(25, 2 * math.pi - inner, inner) + [shift, 0]])


def heart() -> np.ndarray:
    """Return a heart's outline, (40, 2)."""
    x, y = arc(40).T
    t = np.arctan2(y, x)
    return np.stack([16 * y**3, -(13 * x - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))], 1) / 17


ARROW = [[-1, -0.3], [0.1, -0.3], [0.1, -0.8], [1, 0], [0.1, 0.8], [0.1, 0.3], [-1, 0.3]]
QUARTER = np.array([[-0.3, -1], [0.3, -1], [0.3, -0.3]])  # of a cross
TURNS = [np.linalg.matrix_power(np.array([[0, 1], [-1, 0]]), n) for n in range(4)]
SHAPES: dict[str, tuple[np.ndarray, ...]] = {  # by class: the outline, and that of a hole
    "arrow": (np.array(ARROW),),
    "crescent": (crescent(),),
    "cross": (np.concatenate([QUARTER @ turn for turn in TURNS]),),
    "disc": (polygon(40),),
    "heart": (heart(),),
    "hexagon": (polygon(6),),
    "ring": (polygon(40), 0.55 * polygon(40)),
    "square": (polygon(4),),
    "star": (polygon(10) * np.where(np.arange(10) % 2, 0.45, 1)[:, None],),
    "triangle": (polygon(3),),
}


def shape(name: str, size: float, random: Generator) -> np.ndarray:
    """Return the alpha, uint8 (h, w), of a shape turned, narrowed and sheared at random, the longer side `size`."""
    turn, narrow, shear = random.uniform(0, 2 * math.pi), random.uniform(0.7, 1), random.uniform(-0.2, 0.2)
    matrix = np.array([[1, 0], [shear, narrow]]) @ [
        [math.cos(turn), math.sin(turn)],
        [-math.sin(turn), math.cos(turn)],
    ]
    outlines = [points @ matrix for points in SHAPES[name]]
    low, high = outlines[0].min(0), outlines[0].max(0)
    scale = FINE * size / (high - low).max()
    width, height = np.maximum(1, np.ceil((high - low) * scale / FINE)).astype(int).tolist()
    mask = Image.new("L", (FINE * width, FINE * height))
    draw = ImageDraw.Draw(mask)
    for points, fill in zip(outlines, (255, 0), strict=False):
        draw.polygon(((points - low) * scale).ravel().tolist(), fill=fill)
    return np.asarray(mask.reduce(FINE))


def pattern(height: int, width: int, far_from: np.ndarray, random: Generator) -> np.ndarray:
    """Return what fills a shape, float32 (height, width, 3): a colour that is not `far_from` (3,), shaded, and often a
    second one in stripes, checks or spots.
    """
    colours = random.uniform(0, 255, (8, 3))
    first = colours[np.argmax(np.abs(colours[:4] - far_from).sum(1) > 3 * DISTINCT)]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    turn, step = random.uniform(0, math.pi), random.uniform(3, 8)
    along, across = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
    kind = random.integers(5)  # two of them plain
    second = np.zeros((height, width), bool)
    if kind == 0:
        second = along % (2 * step) < step
    elif kind == 1:
        second = (along % (2 * step) < step) ^ (across % (2 * step) < step)
    elif kind == 2:
        second = (along % (2 * step) - step) ** 2 + (across % (2 * step) - step) ** 2 < (0.6 * step) ** 2
    filled = np.where(second[..., None], colours[5], first)
    return (filled + random.uniform(-60, 60) * (along / (abs(along).max() + 1) - 0.5)[..., None]).astype(np.float32)


@dataclass(frozen=True)
class Shapes:
    """Draws the objects of a scene: SHAPES, each filled with a pattern."""

    classes: tuple[str, ...] = tuple(SHAPES)

    def cut(self, label: int, size: float, around: np.ndarray, random: Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return the alpha (h, w) and the colours (h, w, 3), 0 to 255, of an object of class `label`, from 0, whose
        longer side is `size`. `around` (3,): the colour of what it is pasted on.
        """
        alpha = shape(self.classes[label], size, random)
        return alpha, pattern(*alpha.shape, around, random)


@dataclass(frozen=True)
class CutOuts:
    """Takes the objects of a scene from `pictures`, uint8 (h, w, 3 or 4), those of each class at the places `members`.

    `turn`: degrees by which one is turned at most; `mirrored`: or seen in a mirror; `painted`: of them the alpha alone
    counts, and is filled with a pattern.
    """

    classes: tuple[str, ...]
    pictures: Sequence[np.ndarray]
    members: Sequence[np.ndarray]
    turn: float = 0.0
    mirrored: bool = True
    painted: bool = False

    def cut(self, label: int, size: float, around: np.ndarray, random: Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return alpha and colours, as `Shapes.cut` does."""
        image = Image.fromarray(self.pictures[random.choice(self.members[label])]).convert("RGBA")
        if self.mirrored and random.integers(2):
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.turn:
            image = image.rotate(random.uniform(-self.turn, self.turn), Image.Resampling.BILINEAR, expand=True)
            image = image.crop(image.getchannel("A").getbbox())
        factor = size / max(image.size)
        image = image.resize([max(1, round(side * factor)) for side in image.size], Image.Resampling.BILINEAR)
        values = np.asarray(image)
        alpha = values[..., 3]
        return alpha, pattern(*alpha.shape, around, random) if self.painted else values[..., :3].astype(np.float32)


def background(height: int, width: int, random: Generator) -> np.ndarray:
    """Return a picture to paste on, float32 (height, width, 3): blots of several sizes, and lines that are nothing."""
    picture = np.full((height, width, 3), random.uniform(40, 215, 3), np.float32)
    for cells, strength in ((3, 60), (7, 35), (20, 20)):
        blots = Image.fromarray(random.integers(0, 256, (cells, cells, 3), np.uint8))
        smooth = np.asarray(blots.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        picture += (smooth / 128 - 1) * np.float32(strength * random.uniform(0.2, 1))
    canvas = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    for _ in range(random.integers(0, 7)):
        ends = (random.uniform(-0.2, 1.2, (2, 2)) * [width, height]).ravel().tolist()
        colour = tuple(random.integers(0, 256, 3).tolist())
        draw.line(ends, fill=colour, width=int(random.integers(1, 4)))
    return np.array(canvas, np.float32)
