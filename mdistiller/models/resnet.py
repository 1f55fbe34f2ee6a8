"""ResNet for 32 x 32 images, three stages (He et al., CVPR 2016, section 4.2; arXiv 1512.03385), and its x4 widths."""

from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller.models._common import Network, Stage, features, global_average, init_kaiming, register_model


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut; the ReLU after the sum is the caller's."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.bn2(self.conv2(out)) + shortcut


class ResNet(Network):
    """Depth 6 n + 2: n blocks in each of three stages. `channels`: of the stem and the stages."""

    def __init__(self, depth: int, channels: tuple[int, int, int, int] = (16, 16, 32, 64), num_classes: int = 100):
        super().__init__()
        self.channels = channels
        self.conv1 = nn.Conv2d(3, channels[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        blocks = (depth - 2) // 6
        self.layer1 = self._stage(channels[0], channels[1], blocks, 1)
        self.layer2 = self._stage(channels[1], channels[2], blocks, 2)
        self.layer3 = self._stage(channels[2], channels[3], blocks, 2)
        self.fc = nn.Linear(channels[3], num_classes)
        init_kaiming(self)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> Stage:
        first = BasicBlock(in_channels, channels, stride)
        return Stage(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def get_stage_channels(self) -> list[int]:
        return list(self.channels)

    def get_bn_before_relu(self) -> list[nn.BatchNorm2d]:
        return [stage[-1].bn2 for stage in (self.layer1, self.layer2, self.layer3)]

    def forward(self, x: Tensor) -> tuple[Tensor, dict]:
        f0 = F.relu(self.bn1(self.conv1(x)))
        f1, p1 = self.layer1(f0)
        f2, p2 = self.layer2(f1)
        f3, p3 = self.layer3(f2)
        pooled = global_average(f3)
        return self.fc(pooled), features([f0, f1, f2, f3], [f0, p1, p2, p3], pooled)


@register_model
def resnet8(num_classes: int = 100) -> ResNet:
    return ResNet(8, num_classes=num_classes)


@register_model
def resnet14(num_classes: int = 100) -> ResNet:
    return ResNet(14, num_classes=num_classes)


@register_model
def resnet20(num_classes: int = 100) -> ResNet:
    return ResNet(20, num_classes=num_classes)


@register_model
def resnet32(num_classes: int = 100) -> ResNet:
    return ResNet(32, num_classes=num_classes)


@register_model
def resnet44(num_classes: int = 100) -> ResNet:
    return ResNet(44, num_classes=num_classes)


@register_model
def resnet56(num_classes: int = 100) -> ResNet:
    return ResNet(56, num_classes=num_classes)


@register_model
def resnet110(num_classes: int = 100) -> ResNet:
    return ResNet(110, num_classes=num_classes)


@register_model
def resnet8x4(num_classes: int = 100) -> ResNet:
    return ResNet(8, (32, 64, 128, 256), num_classes)


@register_model
def resnet32x4(num_classes: int = 100) -> ResNet:
    return ResNet(32, (32, 64, 128, 256), num_classes)
