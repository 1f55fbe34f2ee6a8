"""Networks of timm and torchvision, by the names timm:NAME and tv:NAME, under the feature contract (_common.py).

They are the library's own objects, with its keys, made to return (logits, feats) and to see images as the library's
weights expect them: of their own mean, deviation and, where they take one size alone, size.
"""

import functools
import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller.errors import UserError
from mdistiller.models._common import adapted, default_checkpoint
from mdistiller.models._contract import in_eval_mode
from mdistiller.models._layers import watch
from mdistiller.registry import UnknownName, cifar_models, nearest
from mdistiller.terminal import say

MOST_STAGES = 4  # of a network whose maps are all of one size, as a ViT's are
HEADS = ("avgpool", "classifier", "fc", "head", "heads", "permute", "flatten")  # what follows torchvision's trunks
FIXED = {"vit": "image_size", "maxvit": "input_size"}  # families of torchvision for one size, and their word for it
WITH_AUX = ("googlenet", "inception_v3")  # with heads that only training has, and inputs of their own


class LibraryNetwork(nn.Module):
    """What a library's network is beside itself. It maps images (B, 3, H, W), normalised as `fit_inputs` was told, to
    (logits, feats); there are no preact_feats.

    `fetch()`: the state_dict of the library's own weights. `own_size`: the one that the images are brought to, 0 for
    any; `gives_features`: whether feats are asked for, {} where not. A subclass's `with_features` makes (logits,
    feats) of images as the library's weights expect them.
    """

    fetch: Callable[[], dict[str, Tensor]]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    own_size = 0
    probe_size = 224  # at which the stages' resolutions differ
    resized = False
    gives_features = True

    def forward(self, x: Tensor) -> tuple[Tensor, dict]:
        if self.resized:
            size = (self.own_size, self.own_size)
            x = F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)
        x = x * self.input_scale + self.input_shift
        return self.with_features(x) if self.gives_features else (super().forward(x), {})

    def get_stage_channels(self) -> list[int]:
        image = next(self.parameters()).new_zeros(1, 3, self.probe_size, self.probe_size)
        with torch.no_grad(), in_eval_mode(self):
            return [value.shape[1] for value in self.with_features(image)[1].get("feats", [])]


class TimmNetwork(LibraryNetwork):
    def with_features(self, x: Tensor) -> tuple[Tensor, dict]:
        if not hasattr(self, "forward_intermediates"):
            return super(LibraryNetwork, self).forward(x), {}
        last, maps = self.forward_intermediates(x, indices=self.taken, output_fmt="NCHW")
        pooled, classifier = self.forward_head(last, pre_logits=True), self.get_classifier()
        # not forward_head again: its dropout would draw twice
        logits = classifier(pooled) if isinstance(classifier, nn.Module) else self.forward_head(last)
        return logits, {"feats": maps, "pooled_feat": pooled.flatten(1)}

    @functools.cached_property
    def taken(self) -> list[int] | None:
        """The numbers of the maps that are features; None for all."""
        found = [stage["reduction"] for stage in self.feature_info]
        return spread(len(found)) if len({*found}) == 1 else None


class TorchvisionNetwork(LibraryNetwork):
    def with_features(self, x: Tensor) -> tuple[Tensor, dict]:
        seen: dict[str, Tensor] = {}
        with watch(self, self.taken, seen):
            logits = super(LibraryNetwork, self).forward(x)
        pooled = {"pooled_feat": seen[""]} if "" in seen else {}
        return logits, {"feats": [self.as_map(seen[name]) for name in self.taken]} | pooled

    def as_map(self, value: Tensor) -> Tensor:
        """Return a part's output as (B, C, H, W): Swin's are (B, H, W, C), ViT's (B, 1 + H W, C)."""
        if value.ndim == 3:
            side = int((value.shape[1] - 1) ** 0.5)
            value = value[:, 1:].unflatten(1, (side, side))
        last = type(self).__name__ in ("SwinTransformer", "VisionTransformer")
        return value.permute(0, 3, 1, 2) if value.ndim == 4 and last else value

    @functools.cached_property
    def taken(self) -> list[str]:
        """The names of the parts whose outputs are features: of the trunk's, the last one of each resolution."""
        if type(self).__name__ == "VisionTransformer":
            blocks = [f"encoder.layers.{name}" for name, _ in self.encoder.layers.named_children()]
            return [blocks[i] for i in spread(len(blocks))]
        seen: dict[str, Tensor] = {}
        image = next(self.parameters()).new_zeros(1, 3, self.probe_size, self.probe_size)
        with torch.no_grad(), in_eval_mode(self), watch(self, trunk(self), seen):
            super(LibraryNetwork, self).forward(image)
        maps = {name: self.as_map(value) for name, value in seen.items() if value.ndim == 4}
        last = {value.shape[2]: name for name, value in maps.items() if value.shape[2] > 1}
        return [*last.values()]


def spread(count: int) -> list[int]:
    """Return MOST_STAGES of the numbers below `count`, evenly spread, the last one among them."""
    stages = min(count, MOST_STAGES)
    return [count * (i + 1) // stages - 1 for i in range(stages)]


def trunk(network: nn.Module) -> Iterator[str]:
    """Yield the names of what comes before the head: of children, in place of a sequence of its own."""
    for name, child in network.named_children():
        if name in HEADS:
            continue
        if isinstance(child, (nn.Sequential, nn.ModuleList)):
            yield from (f"{name}.{inner}" for inner, _ in child.named_children())
        else:
            yield name


def fit_inputs(model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], size: int) -> None:
    """Tell a library's network that its images, of `size` pixels, will be normalised by `mean` and `std`; any other
    network sees them as they are.
    """
    if isinstance(model, LibraryNetwork):
        own_mean, own_std, mean, std = map(torch.tensor, (model.mean, model.std, mean, std))
        model.input_scale = (std / own_std)[:, None, None]
        model.input_shift = ((mean - own_mean) / own_std)[:, None, None]
        model.resized = model.own_size not in (0, size)


def give_features(model: nn.Module, wanted: bool) -> nn.Module:
    """Let a library's network give features or, as costs less, logits alone; any other is as it is. Return it."""
    if isinstance(model, LibraryNetwork):
        model.gives_features = wanted
    return model


def library_weights(model: nn.Module, name: str, source: str = "pretrained") -> dict[str, Tensor]:
    """Return the state_dict of the library's own weights for `model`, which is called `name`; they may be fetched.
    `source`: pretrained, or trunk for those of a detector's trunk alone.

    Raises UserError where there are none, or where they cannot be fetched.
    """
    fetch = getattr(model, "fetch" if source == "pretrained" else "fetch_trunk", None)
    if fetch is None:
        instead = getattr(model, "instead", "name a file, or a timm: or tv: network")
        kind = "weights of a library" if source == "pretrained" else "weights of a detector's trunk"
        raise UserError(f"{source}: there are no {kind} for {name}; {instead}")
    say(f"{name}: taking the library's weights, which it fetches where they are not here yet")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # which else tells of every try
    try:
        with torch.random.fork_rng(devices=[]):
            return fetch()
    except UserError:
        raise
    except Exception as error:  # of a network, a hub or a library
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        file = ", or name a file that you have, path/to/weights.safetensors" if source == "pretrained" else ""
        raise UserError(
            f"{source}: the weights of {name} cannot be fetched ({reason}); fetch them where there is a network, and "
            f"copy the cache of torch or Hugging Face from there{file}"
        ) from None


def _finish(network: nn.Module, kind: type, fetch: Callable, normal: tuple, size: int, fixed: bool) -> nn.Module:
    network.__class__ = adapted(type(network), kind)
    network.fetch, (network.mean, network.std), network.own_size = fetch, normal, size
    network.probe_size = size if fixed else network.probe_size
    for name, value in (("input_scale", 1.0), ("input_shift", 0.0)):
        network.register_buffer(name, torch.full((3, 1, 1), value), persistent=False)
    return network


def _build(name: str, make: Callable[..., nn.Module], **given) -> nn.Module:
    try:
        return make(**given)
    except Exception as error:  # a library's refusal of a size or a number of classes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        sizes = "; DISTILLER.STUDENT_SIZE and TEACHER_SIZE are in pixels of a side" if len(given) > 1 else ""
        raise UserError(f"{name}: cannot be built with {given}: {reason}{sizes}") from None


def _known(prefix: str, name: str, names: list[str]) -> None:
    if name not in names:
        near = ", ".join(f"{prefix}:{close}" for close in nearest(name, names, 3))
        library = {"timm": "timm", "tv": "torchvision.models"}[prefix]
        apart = f", {' and '.join(WITH_AUX)} apart" if prefix == "tv" else ""
        raise UnknownName(
            f"unknown model '{prefix}:{name}'; "
            + (f"near it: {near}" if near and name not in WITH_AUX else f"{library}.list_models() has them all{apart}")
        )


@functools.cache
def _timm(name: str) -> tuple[Callable, str]:
    try:
        import timm
    except ImportError:
        raise UnknownName("timm: networks need the package timm: pip install timm") from None
    _known("timm", name, [*timm.list_models(), *timm.list_pretrained()])

    def constructor(num_classes: int, size: int = 0) -> nn.Module:
        cfg = timm.get_pretrained_cfg(name)
        fixed = {"img_size": size} if cfg.fixed_input_size and size else {}
        network = _build(f"timm:{name}", functools.partial(timm.create_model, name), num_classes=num_classes, **fixed)
        own = size or (cfg.input_size[-1] if cfg.fixed_input_size else 0)

        def fetch() -> dict[str, Tensor]:
            return timm.create_model(name, pretrained=True, **fixed).state_dict()

        return _finish(network, TimmNetwork, fetch, (cfg.mean, cfg.std), own, cfg.fixed_input_size)

    return constructor, default_checkpoint(f"timm:{name}")


@functools.cache
def _torchvision(name: str) -> tuple[Callable, str]:
    from torchvision import models

    _known("tv", name, [known for known in models.list_models(module=models) if known not in WITH_AUX])

    def constructor(num_classes: int, size: int = 0) -> nn.Module:
        weights = models.get_model_weights(name).DEFAULT
        preset = weights.transforms()
        word, own = FIXED.get(name.split("_")[0]), size
        if word:
            own = size or preset.crop_size[0]
        fixed = {word: (own, own) if word == "input_size" else own} if word else {}
        network = _build(f"tv:{name}", functools.partial(models.get_model, name), num_classes=num_classes, **fixed)

        def fetch() -> dict[str, Tensor]:
            return models.get_model(name, weights=weights).state_dict()

        return _finish(network, TorchvisionNetwork, fetch, (tuple(preset.mean), tuple(preset.std)), own, bool(word))

    return constructor, default_checkpoint(f"tv:{name}")


cifar_models.libraries |= {"timm": _timm, "tv": _torchvision}
