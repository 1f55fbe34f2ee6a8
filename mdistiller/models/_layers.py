"""The feature contract for a network that returns logits alone, from the names of its layers."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mdistiller.errors import UserError
from mdistiller.models._contract import in_eval_mode
from mdistiller.registry import unknown


def name_layers(model: nn.Module, layers: Sequence[str], size: int) -> nn.Module:
    """Let `model` return (logits, feats), and return it. It is changed in place.

    `layers`: names of its submodules in the order of the forward pass, the stem first; their outputs (B, C, H, W)
    become feats["feats"]. What enters the last nn.Linear becomes feats["pooled_feat"], (B, C). There are no
    "preact_feats". `size`: height of the images, by which the channels are found out. Raises UserError for a name that
    is no submodule, or one whose output is no map.
    """
    modules = dict(model.named_modules())
    for name in layers:
        if name not in modules:
            raise UserError(unknown("layer", name, (known for known in modules if known)))
    seen: dict[str, Tensor] = {}

    def keep(name: str):
        return lambda _module, _inputs, output: seen.__setitem__(name, output)

    for name in layers:
        modules[name].register_forward_hook(keep(name))
    linear = [module for module in modules.values() if isinstance(module, nn.Linear)]
    if linear:
        linear[-1].register_forward_pre_hook(lambda _module, inputs: seen.__setitem__("", inputs[0].flatten(1)))

    def collect(_model: nn.Module, _inputs: tuple, logits: Tensor) -> tuple[Tensor, dict]:
        feats = {"feats": [seen[name] for name in layers]}
        if linear:
            feats["pooled_feat"] = seen[""]
        seen.clear()
        return logits, feats

    model.register_forward_hook(collect)
    channels = _channels(model, layers, size)
    model.get_stage_channels = lambda: list(channels)
    return model


def _channels(model: nn.Module, layers: Sequence[str], size: int) -> list[int]:
    image = next(model.parameters()).new_zeros(1, 3, size, size)
    with torch.no_grad(), in_eval_mode(model):
        maps = model(image)[1]["feats"]
    for name, value in zip(layers, maps, strict=True):
        if not (isinstance(value, Tensor) and value.ndim == 4):
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UserError(f"layer {name}: gives {shape}; a feature map is (B, C, H, W)")
    return [value.shape[1] for value in maps]
