"""ShuffleNetV2, width 1, for 32 x 32 images (Ma et al., ECCV 2018, arXiv 1807.11164)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller.models._common import Stage, StagedNetwork, channel_shuffle, global_average, variant


class BasicBlock(nn.Module):
    """Half the channels pass, half go through three convolutions. Returns what enters the last ReLU: (B, C, H, W) in
    the order before the shuffle, its first half the channels that pass.
    """

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        passing, out = x.chunk(2, dim=1)
        out = F.relu(self.bn1(self.conv1(out)))
        out = self.bn2(self.conv2(out))
        out = self.bn3(self.conv3(out))
        # the passing half has been through a ReLU in an earlier block, so one ReLU over both halves changes nothing
        return torch.cat([passing, out], 1)


class DownBlock(nn.Module):
    """Both branches see every channel, at stride 2."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, 2, 1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, 2, 1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        right = self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x)))))
        return torch.cat([left, self.bn5(self.conv5(right))], 1)


class ShuffledStage(Stage):
    """The channels of both branches mix behind each block's ReLU."""

    def activated(self, preact: Tensor) -> Tensor:
        return channel_shuffle(F.relu(preact), 2)


class ShuffleNetV2(StagedNetwork):
    COUNTS = (3, 7, 3)

    def __init__(self, num_classes: int = 100):
        super().__init__()
        self.channels = [24, 116, 232, 464]
        self.conv1 = nn.Conv2d(3, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        for i, count in enumerate(self.COUNTS):
            channels = self.channels[i + 1]
            stage = [DownBlock(self.channels[i], channels), *(BasicBlock(channels) for _ in range(count))]
            self.add_module(f"layer{i + 1}", ShuffledStage(*stage))
        self.conv2 = nn.Conv2d(self.channels[-1], 1024, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, num_classes)

    def pooled(self, x: Tensor) -> Tensor:
        return global_average(F.relu(self.bn2(self.conv2(x))))


ShuffleV2 = variant("ShuffleV2", ShuffleNetV2)
