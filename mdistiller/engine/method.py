"""The method of a configuration with its networks: built by name or copied from the caller's, with their weights."""

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from yacs.config import CfgNode

from mdistiller.dataset import ImageSet, TokenSet
from mdistiller.device import prepare
from mdistiller.distillers import (
    Distiller,
    LogitDistiller,
    RuleDistiller,
    Vanilla,
    check_method,
    check_rule,
    distiller_dict,
    part_of,
    rule_name,
)
from mdistiller.distillers.features import images_of
from mdistiller.errors import UserError, check_signature, users_code
from mdistiller.files import expand
from mdistiller.models import (
    Ensemble,
    build_model,
    check_parts,
    check_text_network,
    fit_inputs,
    freeze,
    give_features,
    given_parts,
    name_layers,
)
from mdistiller.registry import name_and_file
from mdistiller.runs import checkpoint


class Networks(NamedTuple):
    """Networks that the caller brings, in place of those that the configuration names. They are copied, not touched.
    `*_layers`: names of the layers whose outputs are the features of one that returns logits alone.
    """

    student: nn.Module | None = None
    teacher: nn.Module | None = None
    student_layers: tuple[str, ...] = ()
    teacher_layers: tuple[str, ...] = ()


NO_NETWORKS = Networks()


def check_network(name: str, network: object) -> None:
    """Raise UserError where `network` is neither a name nor a module nor None."""
    if isinstance(network, (str, nn.Module, type(None))):
        return
    if isinstance(network, type):
        raise UserError(f"{name}: is the class {network.__name__}; pass an object of it, {network.__name__}(...)")
    raise UserError(
        f"{name}: must be a name of cifar_model_dict, timm:NAME, tv:NAME or an nn.Module; got {type(network).__name__}"
    )


def layer_names(
    layers: tuple[Sequence[str], Sequence[str]] | None, teacher: object, student: object
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the student's layers and of the teacher's. Raises UserError for what are none."""
    sides = ((), ()) if layers is None else layers
    pair = isinstance(sides, (tuple, list)) and len(sides) == 2
    if not (pair and all(isinstance(s, (tuple, list)) and all(isinstance(n, str) for n in s) for s in sides)):
        raise UserError(
            f'layers: must be two lists of names, the teacher\'s first, such as (["stem"], ["stem"]); got {layers!r}'
        )
    for side, names, network in zip(("teacher", "student"), sides, (teacher, student), strict=True):
        if names and not isinstance(network, nn.Module):
            raise UserError(f"layers: are for a module of yours, and the {side} is {network!r}; pass [] for its names")
    return tuple(sides[1]), tuple(sides[0])


def copy_model(given: nn.Module, layers: Sequence[str], size: int) -> nn.Module:
    """Return a copy of `given` on the CPU; with `layers`, one that returns their outputs on images `size` pixels high
    as well.
    """
    model = copy.deepcopy(given).cpu()
    return name_layers(model, layers, size) if layers else model


def reads_features(cls: type) -> bool:
    """Return whether the method `cls` may read features; one from outside may, unless its base says no."""
    built_in = cls.__module__.startswith("mdistiller.")
    return bool(cls.needs_features) or not (built_in or part_of(cls) == "losses")


def build_distiller(
    cfg: CfgNode,
    data: ImageSet | TokenSet,
    teacher_file: Path | None,
    device: torch.device,
    networks: Networks = NO_NETWORKS,
) -> nn.Module:
    """Return the method on `device`, its student freshly initialised, its teacher too or loaded from `teacher_file`.

    Raises UserError where a network does not fit the data, or lacks features that the method compares.
    """
    cls, names, size = distiller_dict[cfg.DISTILLER.TYPE], cfg.DISTILLER, data.train_images.shape[1]
    check_method(names.TYPE, cls)

    def network(side: str, given: nn.Module | None, layers: Sequence[str]) -> nn.Module:
        name = names[side]
        if isinstance(data, TokenSet):
            model = build_model(name, data.num_classes, cfg.DATASET.TYPE)
            check_text_network(model, name, data.num_classes, size)
            check_tokenizer(model, name, data)
            return model
        if given is None:
            model = build_model(name, data.num_classes, cfg.DATASET.TYPE, names[f"{side}_SIZE"])
            fit_inputs(give_features(model, reads_features(cls)), data.mean, data.std, size)
        else:
            model = copy_model(given, layers, size)
        parts = given_parts(model, name, data.num_classes, size)
        missing = [part for part in cls.needs_features if part not in parts]
        if missing:
            named = given is not None and "preact_feats" not in missing
            layers_help = ", or name its layers, layers=([the teacher's], [the student's])" if named else ""
            raise UserError(
                f"{names.TYPE} compares features, and the model {name} does not give {', '.join(missing)}; take a "
                f"method that compares logits, such as KD, or let the model give them (docs/plugins.md){layers_help}"
            )
        if cls.__module__.startswith("mdistiller."):  # others may have a contract of their own
            check_parts(model, name, size, cls.needs_features, cls.least_maps)
        return model

    if networks.student is not None and not any(part.requires_grad for part in networks.student.parameters()):
        raise UserError(f"student: {names.STUDENT} has no parameter that learns; student.requires_grad_() thaws all")
    student, teacher = network("STUDENT", networks.student, networks.student_layers), None
    new_head = None if isinstance(data, TokenSet) else names.NEW_HEAD  # None: not to be had
    if names.STUDENT_CKPT:
        source = expand(names.STUDENT_CKPT)
        checkpoint.load_weights(student, names.STUDENT, data.num_classes, source, new_head)
    freeze(student, cfg.SOLVER.FREEZE, names.STUDENT)
    if cls.needs_teacher:
        teacher = network("TEACHER", networks.teacher, networks.teacher_layers)
        if teacher_file and networks.teacher is None:
            head = new_head and bool(cls.needs_features)  # logits of a new one are nothing to learn from
            checkpoint.load_weights(teacher, names.TEACHER, data.num_classes, teacher_file, head)
        if networks.teacher is None:
            teacher = join_teachers(cfg, teacher, data, loaded=teacher_file is not None)
    offered = {"num_data": len(data.train_labels), "labels": data.train_labels}
    offered, what = {name: offered[name] for name in cls.needs}, f"the method {names.TYPE}"
    check_signature(cls, (student, teacher, cfg), offered, what, ", ".join(["(student, teacher, cfg", *offered]) + ")")
    with users_code(what), images_of(tuple(data.train_images.shape[1:3])):
        distiller = cls(student, teacher, cfg, **offered)
    if isinstance(data, TokenSet):
        set_chunk(distiller, cfg)
    if isinstance(distiller, RuleDistiller):
        check_rule(distiller.rule, rule_name(cfg, distiller.own_rule), data.num_classes)
    return prepare_parts(distiller, device)


def check_tokenizer(network: nn.Module, name: str, data: TokenSet) -> None:
    """Raise UserError where a network begins with weights that a folder has for another tokenizer than the text's."""
    file = Path(getattr(network, "path", "")) / "tokenizer.json"
    if not (getattr(network, "loaded", False) and data.tokenizer and file.is_file()):
        return
    if hashlib.sha256(file.read_bytes()).hexdigest() != data.tokenizer:
        raise UserError(
            f"{name}: begins with weights for another tokenizer than the text's; "
            f"set DATASET.TEXT.TOKENIZER {file.parent}"
        )


def set_chunk(distiller: Distiller, cfg: CfgNode) -> None:
    """Let the method see SOLVER.CHUNK tokens at a time, where its step is one that can. Raises UserError where it is
    asked to and needs all of a batch.
    """
    size = cfg.SOLVER.CHUNK
    if type(distiller).forward_train in (Vanilla.forward_train, LogitDistiller.forward_train):
        if distiller.needs_batch and (size or cfg.SOLVER.ACCUMULATE > 1):
            what = "FACTOR mean" if distiller.factor == "mean" else f"RULE {rule_name(cfg, distiller.own_rule)}"
            raise UserError(
                f"TEMPERATURE.{what} looks at all tokens of a batch; set SOLVER.CHUNK 0 and SOLVER.ACCUMULATE 1"
            )
        distiller.chunk = size


def join_teachers(cfg: CfgNode, first: nn.Module, data: ImageSet, loaded: bool = True) -> nn.Module:
    """Return the teacher `first` together with those of DISTILLER.ENSEMBLE, `loaded` from their files or not."""
    networks, size, num_classes = [first], data.test_images.shape[1], data.num_classes
    for text in cfg.DISTILLER.ENSEMBLE:
        name, file = name_and_file(text)
        network = give_features(build_model(name, num_classes, cfg.DATASET.TYPE), False)
        fit_inputs(network, data.mean, data.std, size)
        given_parts(network, name, num_classes, size)
        if loaded:
            checkpoint.load_weights(network, name, num_classes, expand(file))
        networks.append(network)
    return Ensemble(networks, cfg.DISTILLER.ENSEMBLE_MEAN) if len(networks) > 1 else first


def prepare_parts(distiller: nn.Module, device: torch.device) -> nn.Module:
    """Return the method on `device`, its models in the form that trains fastest there."""
    for part in (distiller.student, distiller.teacher):
        if part is not None:
            prepare(part, device)
    return distiller.to(device)
