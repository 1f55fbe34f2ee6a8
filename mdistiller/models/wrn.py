"""Wide residual networks, pre-activation (Zagoruyko and Komodakis, BMVC 2016, arXiv 1605.07146)."""

from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller.models._common import Network, features, global_average, init_fan_normal, variant


class BasicBlock(nn.Module):
    """BN-ReLU-conv twice. Returns the sum and the pre-activation bn1(x), so that no one runs bn1 a second time."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.convShortcut = None
        if in_channels != channels:
            self.convShortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        preact = self.bn1(x)
        active = F.relu(preact)
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        return out + shortcut, preact


class NetworkBlock(nn.Module):
    """A stage. Returns its output and the pre-activation with which it began."""

    def __init__(self, count: int, in_channels: int, channels: int, stride: int):
        super().__init__()
        first = BasicBlock(in_channels, channels, stride)
        self.layer = nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(count - 1)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, first_preact = self.layer[0](x)
        for block in self.layer[1:]:
            x, _ = block(x)
        return x, first_preact


class WideResNet(Network):
    """Depth 6 n + 4, widening factor k. Its features are the residual stream; the ReLU that follows a stage is the
    next stage's first (the head's for the last), so a pre-activation is the output of the BatchNorm before it.
    """

    def __init__(self, depth: int, widen_factor: int, num_classes: int = 100):
        super().__init__()
        count = (depth - 4) // 6
        self.channels = [16, 16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.block1 = NetworkBlock(count, self.channels[0], self.channels[1], 1)
        self.block2 = NetworkBlock(count, self.channels[1], self.channels[2], 2)
        self.block3 = NetworkBlock(count, self.channels[2], self.channels[3], 2)
        self.bn1 = nn.BatchNorm2d(self.channels[3])
        self.fc = nn.Linear(self.channels[3], num_classes)
        init_fan_normal(self)

    def get_bn_before_relu(self) -> list[nn.BatchNorm2d]:
        return [self.block2.layer[0].bn1, self.block3.layer[0].bn1, self.bn1]

    def forward(self, x: Tensor) -> tuple[Tensor, dict]:
        f0 = self.conv1(x)
        f1, _ = self.block1(f0)
        f2, p1 = self.block2(f1)
        f3, p2 = self.block3(f2)
        p3 = self.bn1(f3)
        pooled = global_average(F.relu(p3))
        return self.fc(pooled), features([f0, f1, f2, f3], [f0, p1, p2, p3], pooled)


wrn_16_1 = variant("wrn_16_1", WideResNet, 16, 1)
wrn_16_2 = variant("wrn_16_2", WideResNet, 16, 2)
wrn_40_1 = variant("wrn_40_1", WideResNet, 40, 1)
wrn_40_2 = variant("wrn_40_2", WideResNet, 40, 2)
