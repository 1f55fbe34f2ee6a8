"""MobileNetV2 at half width for 32 x 32 images (Sandler et al., CVPR 2018, arXiv 1801.04381)."""

from torch import Tensor, nn

from mdistiller.models._common import Network, conv_bn_relu, features, global_average, init_fan_normal, variant

# expansion, channels at full width, blocks, stride of the first
SETTINGS = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """Expand, depthwise, project without activation; a shortcut where the shape stays."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int):
        super().__init__()
        hidden = in_channels * expansion
        self.use_shortcut = stride == 1 and in_channels == channels
        self.conv = nn.Sequential(
            *conv_bn_relu(in_channels, hidden, 1),
            *conv_bn_relu(hidden, hidden, 3, stride, groups=hidden),
            *conv_bn_relu(hidden, channels, 1)[:-1],
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_shortcut else self.conv(x)


class MobileNet(Network):
    """Seven groups of inverted residuals, seen as four stages after the stem: where the image is 16, 8, 4 and 2 high.

    A stage ends in a linear bottleneck, which no ReLU follows at that width: its pre-activation is its output, the
    residual stream, whose last BatchNorm get_bn_before_relu() gives.
    """

    STAGE_ENDS = (1, 2, 4, 6)

    def __init__(self, width: float = 0.5, num_classes: int = 100):
        super().__init__()
        channels = int(32 * width)
        self.conv1 = nn.Sequential(*conv_bn_relu(3, channels, 3, stride=2))
        self.channels, groups = [channels], []
        for expansion, full_width, count, stride in SETTINGS:
            out_channels, group = int(full_width * width), []
            for i in range(count):
                group.append(InvertedResidual(channels, out_channels, stride if i == 0 else 1, expansion))
                channels = out_channels
            groups.append(nn.Sequential(*group))
        self.blocks = nn.Sequential(*groups)
        self.channels += [int(SETTINGS[end][1] * width) for end in self.STAGE_ENDS]
        last = int(1280 * max(width, 1.0))
        self.conv2 = nn.Sequential(*conv_bn_relu(channels, last, 1))
        self.classifier = nn.Sequential(nn.Linear(last, num_classes))
        init_fan_normal(self, linear_std=0.01)

    def get_bn_before_relu(self) -> list[nn.BatchNorm2d]:
        return [self.blocks[end][-1].conv[-1] for end in self.STAGE_ENDS]

    def forward(self, x: Tensor) -> tuple[Tensor, dict]:
        x = self.conv1(x)
        feats = [x]
        for i, group in enumerate(self.blocks):
            x = group(x)
            if i in self.STAGE_ENDS:
                feats.append(x)
        pooled = global_average(self.conv2(x))
        return self.classifier(pooled), features(feats, list(feats), pooled)


MobileNetV2 = variant("MobileNetV2", MobileNet, 0.5)
