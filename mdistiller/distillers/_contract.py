"""What the engine asks of a method's class, and of what its first step returns."""

import inspect
from collections.abc import Mapping

from torch import Tensor, nn

from mdistiller.distillers._adapter import ON_REQUEST
from mdistiller.distillers.base import Distiller, FeatureDistiller, LogitDistiller
from mdistiller.errors import UserError, check_signature
from mdistiller.registry import distillers

# what a step calls: of which base, with how many arguments by place, with which by name; how it is written
PARTS = {
    "forward_train": (
        Distiller, 0, ("image", "target", "index", "epoch"), "forward_train(self, image, target, **kwargs)",
        'the student\'s logits (B, K) and the losses: logits_student, {"loss_ce": ..., "loss_kd": ...}',
    ),
    "losses": (
        LogitDistiller, 3, ("index", "epoch"), "losses(self, logits_student, logits_teacher, target, **kwargs)",
        'the losses by name: {"loss_ce": ..., "loss_kd": ...}',
    ),
    "feature_loss": (
        FeatureDistiller, 2, ("target", "index", "epoch"), "feature_loss(self, feats_student, feats_teacher, **kwargs)",
        "the loss, a scalar tensor",
    ),
}  # fmt: skip


def part_of(cls: type) -> str:
    """Return which of PARTS the author of `cls` writes: `forward_train`, unless a base's calls another one."""
    inherited = (
        name for name, (base, *_) in PARTS.items() if getattr(cls, "forward_train", None) is base.forward_train
    )
    return next(inherited, "forward_train")


def check_method(name: str, cls: type) -> None:
    """Raise UserError where the method `name` lacks what a step calls, or where that cannot be called so."""
    part = part_of(cls)
    base, by_place, by_name, head, wanted = PARTS[part]
    function = getattr(cls, part)
    if function is getattr(base, part, None):
        raise UserError(f"the method {name}: {part} is not written; write {head}, which returns {wanted}")
    named = [*inspect.signature(function).parameters][1 + by_place :]
    given = dict.fromkeys((*by_name, *(word for word in named if word in (*ON_REQUEST, "idx"))))
    check_signature(function, (None,) * (1 + by_place), given, f"the method {name}: {part}", head)


def check_output(distiller: nn.Module, output: object, samples: int) -> None:
    """Raise UserError where `output`, of a step on `samples` images, is not what `forward_train` has to return."""
    name, part = method_name(distiller), part_of(type(distiller))
    wanted = f"the method {name}: {part} must return {PARTS[part][-1]}"
    if not (isinstance(output, tuple) and len(output) == 2):
        raise UserError(f"{wanted}; got {_shape(output)}")
    logits, losses = output
    wants = 1 if getattr(distiller, "chunk", 0) else 2  # of chunks the predicted classes
    right = logits is None and not getattr(distiller, "gives_logits", True)
    if not right and not (isinstance(logits, Tensor) and logits.ndim == wants and len(logits) == samples):
        raise UserError(f"{wanted}; got logits {_shape(logits)} for {samples} images")
    if not (isinstance(losses, Mapping) and losses):
        raise UserError(f"{wanted}; got {_shape(losses)}" if losses != {} else f"{wanted}; got no loss")
    for key, loss in losses.items():
        if not (isinstance(key, str) and isinstance(loss, Tensor)):
            raise UserError(f"{wanted}; got {key!r}: {_shape(loss)}")
    if not any(loss.requires_grad for loss in losses.values()):
        raise UserError(f"the method {name}: no loss has a gradient; compute one from the student's logits or features")


def method_name(distiller: nn.Module) -> str:
    """Return the name that the class of `distiller` is registered by, or its own."""
    return distillers.name_of(type(distiller)) or type(distiller).__name__


def _shape(value: object) -> str:
    if isinstance(value, tuple):
        return f"{len(value)} values"
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
