"""The ImageNet zoo, 224 x 224 images: ResNet (He et al., arXiv 1512.03385; torchvision's keys) and MobileNetV1
(Howard et al., arXiv 1704.04861).
"""

import functools
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller.models._common import Network, Stage, features, global_average, init_kaiming
from mdistiller.models.libraries import library_weights
from mdistiller.registry import imagenet_models


class _Block(nn.Module):
    """`widths`: output channels of each convolution; the ReLU after the sum is the caller's."""

    def __init__(self, in_channels: int, widths: tuple[int, ...], stride: int):
        super().__init__()
        kernels = (3, 3) if len(widths) == 2 else (1, 3, 1)
        strides = (stride, 1) if len(widths) == 2 else (1, stride, 1)
        self.depth, previous = len(widths), in_channels
        for i, (width, kernel, step) in enumerate(zip(widths, kernels, strides, strict=True), 1):
            self.add_module(f"conv{i}", nn.Conv2d(previous, width, kernel, step, kernel // 2, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(width))
            previous = width
        self.downsample = None
        if stride != 1 or in_channels != widths[-1]:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, widths[-1], 1, stride, bias=False), nn.BatchNorm2d(widths[-1])
            )

    @property
    def last_bn(self) -> nn.BatchNorm2d:
        return self.get_submodule(f"bn{self.depth}")

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        for i in range(2, self.depth + 1):
            out = self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(F.relu(out)))
        return out + (x if self.downsample is None else self.downsample(x))


class ResNet(Network):
    """Four stages of two-layer (expansion 1) or bottleneck (expansion 4) blocks after a 7 x 7 stem and a max-pool."""

    def __init__(self, counts: tuple[int, int, int, int], bottleneck: bool, num_classes: int = 1000):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.channels = [64]
        for i, count in enumerate(counts):
            width = 64 * 2**i
            widths = (width, width, 4 * width) if bottleneck else (width, width)
            stage = []
            for j in range(count):
                stage.append(_Block(widths[-1] if j else self.channels[i], widths, 2 if i and not j else 1))
            self.channels.append(widths[-1])
            self.add_module(f"layer{i + 1}", Stage(*stage))
        self.fc = nn.Linear(self.channels[-1], num_classes)
        init_kaiming(self)

    def _stages(self) -> list[Stage]:
        return [self.layer1, self.layer2, self.layer3, self.layer4]

    def get_stage_channels(self) -> list[int]:
        return list(self.channels)

    def get_bn_before_relu(self) -> list[nn.BatchNorm2d]:
        return [stage[-1].last_bn for stage in self._stages()]

    def forward(self, x: Tensor) -> tuple[Tensor, dict]:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        feats, preacts = [x], [x]
        for stage in self._stages():
            x, preact = stage(x)
            feats.append(x)
            preacts.append(preact)
        pooled = global_average(x)
        return self.fc(pooled), features(feats, preacts, pooled)


class MobileNet(Network):
    """Thirteen depthwise-separable layers after the stem; stages end where the image is 56, 28, 14 and 7 high."""

    STAGE_ENDS = (3, 5, 11, 13)

    def __init__(self, num_classes: int = 1000):
        super().__init__()
        channels = (32, 64, 128, 128, 256, 256, *(512,) * 6, 1024, 1024)
        layers = [nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())]
        for i in range(1, len(channels)):
            before, after = channels[i - 1], channels[i]
            stride = 2 if i in (2, 4, 6, 12) else 1
            depthwise = nn.Conv2d(before, before, 3, stride, 1, groups=before, bias=False)
            pointwise = nn.Conv2d(before, after, 1, bias=False)
            layers.append(
                nn.Sequential(
                    *(depthwise, nn.BatchNorm2d(before), nn.ReLU()), *(pointwise, nn.BatchNorm2d(after), nn.ReLU())
                )
            )
        self.model = nn.Sequential(*layers)
        self.channels = [32] + [channels[end] for end in self.STAGE_ENDS]
        self.fc = nn.Linear(channels[-1], num_classes)

    def get_stage_channels(self) -> list[int]:
        return list(self.channels)

    def get_bn_before_relu(self) -> list[nn.BatchNorm2d]:
        return [self.model[end][-2] for end in self.STAGE_ENDS]

    def forward(self, x: Tensor) -> tuple[Tensor, dict]:
        x = self.model[0](x)
        feats, preacts = [x], [x]
        for i, layer in enumerate(self.model[1:], 1):
            preact = x
            for module in layer[:-1]:  # one by one: a trace finds no name for a slice that is called
                preact = module(preact)
            x = F.relu(preact)
            if i in self.STAGE_ENDS:
                feats.append(x)
                preacts.append(preact)
        pooled = global_average(x)
        return self.fc(pooled), features(feats, preacts, pooled)


def _register(constructor: Callable) -> Callable:
    """Enter `constructor` into imagenet_model_dict. It takes mdistiller's `pretrained` as well. A ResNet's weights are
    torchvision's first ones, as mdistiller's were.
    """
    name = constructor.__name__

    def fetch() -> dict[str, Tensor]:
        from torchvision.models import get_weight  # which takes over a second to import

        return get_weight(f"{name}_Weights.IMAGENET1K_V1").get_state_dict(progress=True)

    @functools.wraps(constructor)
    def build(num_classes: int = 1000, pretrained: bool = False) -> nn.Module:
        network = constructor(num_classes)
        if name.startswith("ResNet"):
            network.fetch = fetch
        if pretrained:
            network.load_state_dict(library_weights(network, name))
        return network

    imagenet_models[constructor.__name__] = build
    return build


@_register
def ResNet18(num_classes: int = 1000) -> ResNet:
    return ResNet((2, 2, 2, 2), False, num_classes)


@_register
def ResNet34(num_classes: int = 1000) -> ResNet:
    return ResNet((3, 4, 6, 3), False, num_classes)


@_register
def ResNet50(num_classes: int = 1000) -> ResNet:
    return ResNet((3, 4, 6, 3), True, num_classes)


@_register
def ResNet101(num_classes: int = 1000) -> ResNet:
    return ResNet((3, 4, 23, 3), True, num_classes)


@_register
def MobileNetV1(num_classes: int = 1000) -> MobileNet:
    return MobileNet(num_classes)
