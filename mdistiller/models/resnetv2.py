"""The four-stage ImageNet ResNets with a 3 x 3 stem for 32 x 32 images (He et al., arXiv 1512.03385)."""

from torch import nn

from mdistiller.models import resnet
from mdistiller.models._common import variant


class BasicBlock(resnet.BasicBlock):
    SHORTCUT = "shortcut"


class Bottleneck(resnet.Bottleneck):
    SHORTCUT = "shortcut"


class ResNet(resnet.ResidualNetwork):
    """Four stages of `block`, `counts` blocks each; the image keeps its size in the stem and the first stage."""

    HEAD = "linear"

    def __init__(self, block: type, counts: tuple[int, int, int, int], num_classes: int = 100):
        super().__init__(nn.Conv2d(3, 64, 3, 1, 1, bias=False), block, (64, 128, 256, 512), counts, num_classes)


ResNet18 = variant("ResNet18", ResNet, BasicBlock, (2, 2, 2, 2))
ResNet50 = variant("ResNet50", ResNet, Bottleneck, (3, 4, 6, 3))
