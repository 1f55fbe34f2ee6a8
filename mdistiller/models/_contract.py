"""How a network is built by its name, and what it gives of the feature contract, found out by one image."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from mdistiller.errors import UserError, check_signature, users_code
from mdistiller.registry import cifar_models, constructor


def build_model(name: str, num_classes: int, dataset: str = "", size: int = 0) -> nn.Module:
    """Return the model `name` as DATASET.TYPE `dataset` knows it, freshly initialised. `size`: to which a library's
    network brings its images, 0 for as they are. Raises UserError where that fails.
    """
    build, what = constructor(name, dataset), f"the model {name}"
    given = {"num_classes": num_classes}
    if name.partition(":")[0] in cifar_models.libraries:
        given["size"] = size
    elif size:
        raise UserError(
            f"{what}: sees images as the data are; TEACHER_SIZE and STUDENT_SIZE are for timm: and tv: names"
        )
    check_signature(build, (), given, what, f"{name}(num_classes=...)")
    with users_code(what):
        model = build(**given)
    if not isinstance(model, nn.Module):
        raise UserError(f"{what}: its constructor must give an nn.Module; it gives {type(model).__name__}")
    return model


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Put `model` into eval mode, and every one of its modules back into its own mode at the end."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield model.eval()
    finally:
        for module, mode in modes:
            module.training = mode


def check_text_network(network: nn.Module, name: str, num_classes: int, block: int = 0) -> None:
    """Raise UserError where what `network` makes of four tokens is not what a network of text gives (gpt.py), or where
    it cannot see `block` tokens at once.
    """
    positions = getattr(network, "positions", None)
    if positions and block > positions:
        raise UserError(f"the model {name} has {positions} positions; set DATASET.TEXT.BLOCK {positions}")
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with torch.random.fork_rng(devices=[]), in_eval_mode(network), torch.no_grad(), users_code(f"the model {name}"):
        logits, _ = network(ids)
        both = logits, network.head(network.hidden(ids))
    if any(tuple(part.shape) != (4, num_classes) for part in both):
        raise UserError(
            f"the model {name} must give logits (4, {num_classes}) for four tokens; it gives {_shape(both)}"
        )


def given_parts(network: nn.Module, name: str, num_classes: int, size: int) -> set[str]:
    """Return the parts of the feature contract that `network` gives: names of features, get_stage_channels.

    It sees one black image of `size` x `size` pixels in eval mode, which leaves no trace. Raises UserError where it
    fails, or where its logits are not (1, num_classes).
    """
    logits, feats = _of_one_image(network, name, size)
    if not (isinstance(logits, Tensor) and logits.shape == (1, num_classes)):
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(f"the model {name} must give logits (1, {num_classes}) for one image; it gives {got}")
    if not isinstance(feats, Mapping):
        raise UserError(f"the model {name} must give (logits, feats), feats a dict; it gives {type(feats).__name__}")
    return {*feats} | ({"get_stage_channels"} if hasattr(network, "get_stage_channels") else set())


def check_parts(network: nn.Module, name: str, size: int, needed: Iterable[str], least: int = 1) -> None:
    """Raise UserError where the `needed` parts, which `network` gives, are not as the contract has them, for one
    image as in `given_parts`. `least`: maps that it must give, the stem's included.
    """
    _, feats = _of_one_image(network, name, size)
    if "get_stage_channels" in needed:
        what = f"get_stage_channels() of the model {name}"
        check_signature(network.get_stage_channels, (), {}, what, "get_stage_channels()")
        with users_code(what):
            channels = network.get_stage_channels()
    for part in needed:
        value, wanted = feats.get(part), ""
        if part == "pooled_feat" and not (isinstance(value, Tensor) and value.ndim == 2):
            wanted = "features (B, C)"
        elif part in ("feats", "preact_feats"):
            maps = value if isinstance(value, (list, tuple)) else []
            if len(maps) < least or not all(isinstance(one, Tensor) and one.ndim == 4 for one in maps):
                wanted = f"a list of {least} or more maps (B, C, H, W), the stem's first"
            elif "get_stage_channels" in needed:
                widths = [one.shape[1] for one in maps]
                if not isinstance(channels, (list, tuple)) or [*channels[1:]] != widths[1:]:
                    raise UserError(f"{what} must give {widths}, as its '{part}' have; it gives {channels!r:.100}")
        if wanted:
            raise UserError(f"the model {name}: '{part}' must be {wanted}; for one image it gives {_shape(value)}")


@torch.no_grad()
def _of_one_image(network: nn.Module, name: str, size: int) -> tuple[object, object]:
    """Return (logits, feats) of one black image, feats empty where it gives logits alone. It leaves no trace."""
    try:
        with torch.random.fork_rng(devices=[]), in_eval_mode(network):
            output = network(torch.zeros(1, 3, size, size))
    except Exception as error:  # whatever a forward() of the user's raises
        reason = str(error).split("\n")[0]
        raise UserError(f"the model {name} fails on an image of shape (1, 3, {size}, {size}): {reason}") from None
    return output if isinstance(output, tuple) and len(output) == 2 else (output, {})


def _shape(value: object) -> str:
    """Return the shape of a tensor, or of those in a list; the type of anything else."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_shape, value[:4]))}{', ...' if len(value) > 4 else ''}]"
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
