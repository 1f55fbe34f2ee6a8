"""The ImageNet zoo, 224 x 224 images: ResNet (He et al., arXiv 1512.03385; torchvision's keys) and MobileNetV1
(Howard et al., arXiv 1704.04861).
"""

import functools
import itertools
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller.models._common import Network, constructor_of, conv_bn_relu, features, global_average
from mdistiller.models.libraries import library_weights
from mdistiller.models.resnet import BasicBlock, Bottleneck, ResidualNetwork
from mdistiller.registry import imagenet_models


class ResNet(ResidualNetwork):
    """Four stages of `block`, `counts` blocks each, after a 7 x 7 stem and a max-pool."""

    def __init__(self, block: type, counts: tuple[int, int, int, int], num_classes: int = 1000):
        super().__init__(nn.Conv2d(3, 64, 7, 2, 3, bias=False), block, (64, 128, 256, 512), counts, num_classes)

    def stem(self, x: Tensor) -> Tensor:
        return F.max_pool2d(super().stem(x), 3, 2, 1)


class MobileNet(Network):
    """Thirteen depthwise-separable layers after the stem; stages end where the image is 56, 28, 14 and 7 high."""

    STAGE_ENDS = (3, 5, 11, 13)

    def __init__(self, num_classes: int = 1000):
        super().__init__()
        channels = (32, 64, 128, 128, 256, 256, *(512,) * 6, 1024, 1024)
        layers = [nn.Sequential(*conv_bn_relu(3, 32, 3, 2))]
        for i, (before, after) in enumerate(itertools.pairwise(channels), 1):
            depthwise = conv_bn_relu(before, before, 3, 2 if i in (2, 4, 6, 12) else 1, before)
            layers.append(nn.Sequential(*depthwise, *conv_bn_relu(before, after, 1)))
        self.model = nn.Sequential(*layers)
        self.channels = [32] + [channels[end] for end in self.STAGE_ENDS]
        self.fc = nn.Linear(channels[-1], num_classes)

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
        if isinstance(network, ResNet):
            network.fetch = fetch
        if pretrained:
            network.load_state_dict(library_weights(network, name))
        return network

    imagenet_models[name] = build
    return build


ResNet18 = _register(constructor_of("ResNet18", ResNet, BasicBlock, (2, 2, 2, 2)))
ResNet34 = _register(constructor_of("ResNet34", ResNet, BasicBlock, (3, 4, 6, 3)))
ResNet50 = _register(constructor_of("ResNet50", ResNet, Bottleneck, (3, 4, 6, 3)))
ResNet101 = _register(constructor_of("ResNet101", ResNet, Bottleneck, (3, 4, 23, 3)))
MobileNetV1 = _register(constructor_of("MobileNetV1", MobileNet))
