"""What every family shares: registration, the feature contract, weight initialisation.

The feature contract. A model maps images (B, 3, H, W) to `(logits, feats)`: logits (B, K) and a dict of
- `feats`: stage outputs, the stem first, each (B, C_i, H_i, W_i);
- `preact_feats`: as long as `feats`; from the first stage on, what enters the ReLU that follows the stage
  (the stem's entry is the stem's output);
- `pooled_feat`: (B, C), what enters the classifier.
It also has `get_stage_channels()` -> [C_i] along `feats`, and `get_bn_before_relu()` -> the last BatchNorm2d before
that ReLU, one for each stage after the stem.
"""

import functools
import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller.errors import UserError
from mdistiller.registry import cifar_models


def default_checkpoint(name: str, dataset: str = "cifar100") -> str:
    """Return where the teacher `name` for `dataset` lies, relative to the working directory; mdistiller's layout."""
    folder = "cifar" if dataset == "cifar100" else dataset
    return f"download_ckpts/{folder}_teachers/{name}_vanilla/ckpt_epoch_240.pth"


def register_model(constructor: Callable | str) -> Callable:
    """Enter `constructor(num_classes=...)`, a class or function, into cifar_model_dict: under its own name, by
    @register_model("name") under that one. Raises UserError for anything else.
    """
    if isinstance(constructor, str):
        return functools.partial(_enter, constructor)
    return _enter(getattr(constructor, "__name__", type(constructor).__name__), constructor)


def _enter(name: str, constructor: Callable) -> Callable:
    cifar_models[name] = constructor
    return constructor


def constructor_of(name: str, network: type, *given: object) -> Callable:
    """Return `network` of those arguments as a constructor of that name."""

    def constructor(num_classes: int = 100) -> nn.Module:
        return network(*given, num_classes=num_classes)

    constructor.__name__ = constructor.__qualname__ = name
    return constructor


def variant(name: str, network: type, *given: object) -> Callable:
    """Register `network` of those arguments as the model `name`, and return its constructor."""
    return register_model(constructor_of(name, network, *given))


def entry(name: str, constructor: object) -> object:
    """Return what cifar_model_dict holds for a bare constructor: the pair with its default teacher checkpoint. Raises
    UserError where there is none.
    """
    first = constructor[0] if isinstance(constructor, (tuple, list)) and constructor else constructor
    if isinstance(first, nn.Module) or not callable(first):
        made = f"an object, {type(first).__name__}(...): pass the class itself"
        got = made if isinstance(first, nn.Module) else f"{first!r:.100}"
        raise UserError(f"the model '{name}': must be a class or a function of num_classes; got {got}")
    return constructor if first is not constructor else (constructor, default_checkpoint(name))


cifar_models.accept = entry


@functools.cache
def adapted(base: type, kind: type) -> type:
    """Return a library's class `base` with what `kind` puts before it."""
    return type(base.__name__, (kind, base), {"__module__": base.__module__})


def features(feats: list[Tensor], preact_feats: list[Tensor], pooled_feat: Tensor) -> dict:
    return {"feats": feats, "preact_feats": preact_feats, "pooled_feat": pooled_feat}


class Stage(nn.Sequential):
    """Blocks that leave their last ReLU to the caller, run one after the other. Returns, as mdistiller's stages do, the
    output and what entered its ReLU; a hook on it sees both.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for block in self:
            preact = block(x)
            x = self.activated(preact)
        return x, preact

    def activated(self, preact: Tensor) -> Tensor:
        return F.relu(preact)


class Network(nn.Module):
    """Base of the zoo's networks, which set `channels`, the stages' widths: the contract's part that follows from them,
    and what code written for mdistiller reads beside the contract.
    """

    channels: Sequence[int]

    def get_stage_channels(self) -> list[int]:
        return list(self.channels)

    @property
    def relu(self) -> nn.Module:
        """Return a ReLU; a subclass's own submodule of that name, where it has one."""
        return self._modules.get("relu", _RELU)

    @property
    def avgpool(self) -> nn.Module:
        """Return the mean over H and W as a module, (B, C, H, W) -> (B, C, 1, 1), or a subclass's own."""
        return self._modules.get("avgpool", _AVERAGE)

    def get_feat_modules(self) -> nn.ModuleList:
        """Return the parts that make the features: every child but those that hold the classifier."""
        return nn.ModuleList(
            child for child in self.children() if not any(isinstance(part, nn.Linear) for part in child.modules())
        )


# of no network: a child would be run, traced and counted
_RELU, _AVERAGE = nn.ReLU(), nn.AdaptiveAvgPool2d(1)


class StagedNetwork(Network):
    """A stem of `conv1` and `bn1`, Stages `layer1`, `layer2`, ..., and a linear layer, which is called `HEAD`."""

    HEAD = "linear"

    def stages(self) -> list[Stage]:
        return [getattr(self, f"layer{number}") for number in range(1, len(self.channels))]

    def get_bn_before_relu(self) -> list[nn.BatchNorm2d]:
        """Return the last normalisation of each stage's last block, whose names begin with bn."""
        norms = [[bn for name, bn in stage[-1].named_children() if name.startswith("bn")] for stage in self.stages()]
        return [bns[-1] for bns in norms]

    def stem(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)))

    def pooled(self, x: Tensor) -> Tensor:
        """Return what enters the classifier, (B, C), of the last stage's output."""
        return global_average(x)

    def forward(self, x: Tensor) -> tuple[Tensor, dict]:
        x = self.stem(x)
        feats, preacts = [x], [x]
        for stage in self.stages():
            x, preact = stage(x)
            feats.append(x)
            preacts.append(preact)
        pooled = self.pooled(x)
        return getattr(self, self.HEAD)(pooled), features(feats, preacts, pooled)


def conv_bn_relu(in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(channels), nn.ReLU()]


def global_average(x: Tensor) -> Tensor:
    """Return the mean over H and W of x: (B, C, H, W) -> (B, C), for any H and W."""
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Move channel c of group g of x (B, C, H, W) to c * groups + g (Zhang et al., arXiv 1707.01083, figure 1)."""
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


def init_fan_normal(model: nn.Module, linear_std: float | None = None) -> None:
    """Initialise convolutions by N(0, 2 / (k * k * C_out)), their biases and the classifier's by 0; the classifier's
    weights by N(0, linear_std^2), or as PyTorch does where linear_std is None. C_out is not divided by
    groups.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan))
        elif isinstance(module, nn.Linear) and linear_std is not None:
            nn.init.normal_(module.weight, 0.0, linear_std)
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)
