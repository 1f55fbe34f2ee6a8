"""ResNet for 32 x 32 images, three stages (He et al., CVPR 2016, section 4.2; arXiv 1512.03385), its x4 widths, and
what all ResNets are made of.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller.models._common import Stage, StagedNetwork, variant


class Block(nn.Module):
    """Base of the blocks: a shortcut around convolutions. The ReLU after the sum is the caller's."""

    expansion = 1  # of a stage's width, by its output
    SHORTCUT = "downsample"  # the name of the shortcut's layers

    def add_shortcut(self, in_channels: int, channels: int, stride: int) -> None:
        """Give the block layers for its shortcut, where the shape changes."""
        layers = None
        if stride != 1 or in_channels != channels:
            layers = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
        self.add_module(self.SHORTCUT, layers)

    def shortcut_of(self, x: Tensor) -> Tensor:
        layers = getattr(self, self.SHORTCUT)
        return x if layers is None else layers(x)


class BasicBlock(Block):
    """Two 3 x 3 convolutions."""

    def __init__(self, in_channels: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.add_shortcut(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(out)) + self.shortcut_of(x)


class Bottleneck(Block):
    """A 3 x 3 convolution between two of 1 x 1."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int):
        super().__init__()
        channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.add_shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return self.bn3(self.conv3(out)) + self.shortcut_of(x)


class ResidualNetwork(StagedNetwork):
    """Stages of `counts` blocks each; all stages but the first halve the image. Convolutions are initialised as He et
    al. do (arXiv 1502.01852): fan-out, normal.
    """

    HEAD = "fc"

    def __init__(self, stem: nn.Conv2d, block: type, widths: Sequence[int], counts: Sequence[int], num_classes: int):
        super().__init__()
        self.channels = [stem.out_channels, *(width * block.expansion for width in widths)]
        self.conv1 = stem
        self.bn1 = nn.BatchNorm2d(stem.out_channels)
        for i, (width, count) in enumerate(zip(widths, counts, strict=True)):
            first = block(self.channels[i], width, 2 if i else 1)
            rest = (block(self.channels[i + 1], width, 1) for _ in range(count - 1))
            self.add_module(f"layer{i + 1}", Stage(first, *rest))
        self.add_module(self.HEAD, nn.Linear(self.channels[-1], num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class ResNet(ResidualNetwork):
    """Depth 6 n + 2: n blocks in each of three stages. `channels`: of the stem and the stages."""

    def __init__(self, depth: int, channels: tuple[int, int, int, int] = (16, 16, 32, 64), num_classes: int = 100):
        stem = nn.Conv2d(3, channels[0], 3, 1, 1, bias=False)
        super().__init__(stem, BasicBlock, channels[1:], [(depth - 2) // 6] * 3, num_classes)


X4 = (32, 64, 128, 256)
resnet8 = variant("resnet8", ResNet, 8)
resnet14 = variant("resnet14", ResNet, 14)
resnet20 = variant("resnet20", ResNet, 20)
resnet32 = variant("resnet32", ResNet, 32)
resnet44 = variant("resnet44", ResNet, 44)
resnet56 = variant("resnet56", ResNet, 56)
resnet110 = variant("resnet110", ResNet, 110)
resnet8x4 = variant("resnet8x4", ResNet, 8, X4)
resnet32x4 = variant("resnet32x4", ResNet, 32, X4)
