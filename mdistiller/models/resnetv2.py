"""The four-stage ImageNet ResNets with a 3 x 3 stem for 32 x 32 images (He et al., arXiv 1512.03385)."""

from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller.models._common import Network, Stage, features, global_average, init_kaiming, register_model


def _shortcut(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    if stride == 1 and in_channels == channels:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(in_channels, width, stride)

    @property
    def last_bn(self) -> nn.BatchNorm2d:
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(out)) + self.shortcut(x)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.shortcut = _shortcut(in_channels, width * self.expansion, stride)

    @property
    def last_bn(self) -> nn.BatchNorm2d:
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return self.bn3(self.conv3(out)) + self.shortcut(x)


class ResNet(Network):
    """Four stages of `block`, `counts` blocks each; the image keeps its size in the stem and the first stage."""

    def __init__(self, block: type, counts: tuple[int, int, int, int], num_classes: int = 100):
        super().__init__()
        self.channels = [64] + [width * block.expansion for width in (64, 128, 256, 512)]
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        for i, (count, stride) in enumerate(zip(counts, (1, 2, 2, 2), strict=True)):
            width, out_channels = 64 * 2**i, self.channels[i + 1]
            stage = [block(self.channels[i], width, stride)]
            stage += [block(out_channels, width, 1) for _ in range(count - 1)]
            self.add_module(f"layer{i + 1}", Stage(*stage))
        self.linear = nn.Linear(self.channels[-1], num_classes)
        init_kaiming(self)

    def _stages(self) -> list[Stage]:
        return [self.layer1, self.layer2, self.layer3, self.layer4]

    def get_stage_channels(self) -> list[int]:
        return list(self.channels)

    def get_bn_before_relu(self) -> list[nn.BatchNorm2d]:
        return [stage[-1].last_bn for stage in self._stages()]

    def forward(self, x: Tensor) -> tuple[Tensor, dict]:
        x = F.relu(self.bn1(self.conv1(x)))
        feats, preacts = [x], [x]
        for stage in self._stages():
            x, preact = stage(x)
            feats.append(x)
            preacts.append(preact)
        pooled = global_average(x)
        return self.linear(pooled), features(feats, preacts, pooled)


@register_model
def ResNet18(num_classes: int = 100) -> ResNet:
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes)


@register_model
def ResNet50(num_classes: int = 100) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes)
