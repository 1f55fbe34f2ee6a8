"""ShuffleNet, three groups, for 32 x 32 images (Zhang et al., CVPR 2018, arXiv 1707.01083)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller.models._common import Stage, StagedNetwork, channel_shuffle, variant


class Bottleneck(nn.Module):
    """Grouped 1 x 1, shuffle, depthwise 3 x 3, grouped 1 x 1; the last ReLU is the caller's.

    With stride 2 the pooled input is concatenated, so the block computes only the channels that it adds.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, groups: int, first_groups: int):
        super().__init__()
        self.stride, self.first_groups = stride, first_groups
        middle = channels // 4
        self.conv1 = nn.Conv2d(in_channels, middle, 1, groups=first_groups, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, 1, groups=middle, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, channels, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(channel_shuffle(out, self.first_groups))))
        out = self.bn3(self.conv3(out))
        if self.stride == 2:
            return torch.cat([out, F.avg_pool2d(x, 3, 2, 1)], 1)
        return out + x


class ShuffleNet(StagedNetwork):
    GROUPS, COUNTS = 3, (4, 8, 4)

    def __init__(self, num_classes: int = 100):
        super().__init__()
        self.channels = [24, 240, 480, 960]
        self.conv1 = nn.Conv2d(3, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        for i, count in enumerate(self.COUNTS):
            in_channels, channels = self.channels[i], self.channels[i + 1]
            # the stem is too narrow to be grouped (section 3.2 of the paper)
            first = Bottleneck(in_channels, channels - in_channels, 2, self.GROUPS, 1 if i == 0 else self.GROUPS)
            rest = (Bottleneck(channels, channels, 1, self.GROUPS, self.GROUPS) for _ in range(count - 1))
            self.add_module(f"layer{i + 1}", Stage(first, *rest))
        self.linear = nn.Linear(self.channels[-1], num_classes)


ShuffleV1 = variant("ShuffleV1", ShuffleNet)
