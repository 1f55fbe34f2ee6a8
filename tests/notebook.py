"""What a caller of the library brings: networks that return logits alone, arrays, a short `md.distill`."""

import numpy as np
import torch
from torch import nn

import mdistiller as md

GENERATOR = np.random.default_rng(0)
LABELS = np.arange(120) % 4
IMAGES = GENERATOR.integers(0, 128, (120, 16, 16, 3), dtype=np.uint8) + (32 * LABELS[:, None, None, None]).astype("u1")
TRAIN, TEST = (IMAGES[:80], LABELS[:80]), (IMAGES[80:], LABELS[80:])


class Net(nn.Module):
    """Returns logits alone, as most people's networks do."""

    def __init__(self, width: int):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, width, 3, stride=2), nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, stride=2, groups=width)
        self.fc = nn.Linear(width, 4)

    def forward(self, x):
        return self.fc(self.depthwise(self.bn(self.conv(x)).relu()).relu().mean((2, 3)))


def nets():
    torch.manual_seed(0)
    return Net(16), Net(8)


def quick(teacher, student, train=TRAIN, test=TEST, **changes):
    given = {"method": "DTKD", "epochs": 2, "DEVICE": "cpu", "SOLVER__BATCH_SIZE": 16} | changes
    return md.distill(teacher, student, train, test, **given)
