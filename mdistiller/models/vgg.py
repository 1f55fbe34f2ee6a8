"""VGG with batch normalisation for 32 x 32 images (Simonyan and Zisserman, ICLR 2015, arXiv 1409.1556)."""

from torch import Tensor, fx, nn
from torch.nn import functional as F

from mdistiller.models._common import Network, features, global_average, init_fan_normal, variant

CHANNELS = (64, 128, 256, 512, 512)


def _block(in_channels: int, channels: int, count: int) -> nn.Sequential:
    """Return `count` convolutions, each with BatchNorm; the last ReLU is the caller's."""
    layers: list[nn.Module] = []
    for _ in range(count):
        layers += [nn.Conv2d(in_channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
        in_channels = channels
    return nn.Sequential(*layers[:-1])


@fx.wrap  # a trace cannot follow a branch on the size, and takes it as one operation
def _halve_tall(x: Tensor, image: Tensor) -> Tensor:
    """Return x (B, C, H, W), halved where `image` is 64 pixels high."""
    return F.max_pool2d(x, 2) if image.shape[2] == 64 else x


class VGG(Network):
    """Five blocks of `counts` convolutions. The image is halved after each of the first three blocks, and after the
    fourth as well where it is 64 pixels high.
    """

    channels = CHANNELS

    def __init__(self, counts: tuple[int, int, int, int, int], num_classes: int = 100):
        super().__init__()
        in_channels = 3
        for i, (channels, count) in enumerate(zip(CHANNELS, counts, strict=True)):
            self.add_module(f"block{i}", _block(in_channels, channels, count))
            in_channels = channels
        self.classifier = nn.Linear(CHANNELS[-1], num_classes)
        init_fan_normal(self, linear_std=0.01)

    def get_bn_before_relu(self) -> list[nn.BatchNorm2d]:
        return [block[-1] for block in (self.block1, self.block2, self.block3, self.block4)]

    def forward(self, x: Tensor) -> tuple[Tensor, dict]:
        image, feats, preacts = x, [], []
        for i, block in enumerate((self.block0, self.block1, self.block2, self.block3, self.block4)):
            preact = block(x)
            x = F.relu(preact)
            feats.append(x)
            preacts.append(preact if i else x)
            if i < 3:
                x = F.max_pool2d(x, 2)
            elif i == 3:
                x = _halve_tall(x, image)
        pooled = global_average(x)
        return self.classifier(pooled), features(feats, preacts, pooled)


vgg8 = variant("vgg8", VGG, (1, 1, 1, 1, 1))
vgg11 = variant("vgg11", VGG, (1, 1, 2, 2, 2))
vgg13 = variant("vgg13", VGG, (2, 2, 2, 2, 2))
vgg16 = variant("vgg16", VGG, (2, 2, 3, 3, 3))
vgg19 = variant("vgg19", VGG, (2, 2, 4, 4, 4))
