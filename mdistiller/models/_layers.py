"""The feature contract for a network that returns logits alone, from the names of its layers."""

import functools
from collections.abc import Iterable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from mdistiller.errors import UserError
from mdistiller.models._contract import in_eval_mode
from mdistiller.registry import unknown


def watch(model: nn.Module, names: Iterable[str], seen: dict[str, Tensor]) -> ExitStack:
    """Let each forward pass of `model` put into `seen` the outputs of the submodules `names`, and under "" what enters
    the last nn.Linear, (B, C); until the stack that this returns is closed.
    """
    hooks = ExitStack()
    for name in names:
        keep = functools.partial(lambda name, _module, _inputs, output: seen.__setitem__(name, output), name)
        hooks.enter_context(model.get_submodule(name).register_forward_hook(keep))
    if linear := [module for module in model.modules() if isinstance(module, nn.Linear)]:
        hook = linear[-1].register_forward_pre_hook(lambda _, inputs: seen.__setitem__("", inputs[0].flatten(1)))
        hooks.enter_context(hook)
    return hooks


def name_layers(model: nn.Module, layers: Sequence[str], size: int) -> nn.Module:
    """Let `model` return (logits, feats), and return it. It is changed in place.

    `layers`: names of its submodules in the order of the forward pass, the stem first; their outputs (B, C, H, W)
    become feats["feats"]. What enters the last nn.Linear becomes feats["pooled_feat"], (B, C). There are no
    "preact_feats". `size`: height of the images, by which the channels are found out. Raises UserError for a name that
    is no submodule, or one whose output is no map.
    """
    known = [name for name, _ in model.named_modules() if name]
    for name in layers:
        if name not in known:
            raise UserError(unknown("layer", name, known))
    seen: dict[str, Tensor] = {}
    watch(model, layers, seen)

    def collect(_model: nn.Module, _inputs: tuple, logits: Tensor) -> tuple[Tensor, dict]:
        feats = {"feats": [seen[name] for name in layers]} | ({"pooled_feat": seen[""]} if "" in seen else {})
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
