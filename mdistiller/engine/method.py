"""The method of a configuration with its networks: built by name or copied from the caller's, with their weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from yacs.config import CfgNode

from mdistiller.dataset import ImageSet, TokenSet
from mdistiller.device import prepare
from mdistiller.distillers import RuleDistiller, check_method, check_rule, rule_name
from mdistiller.engine.tasks import TASKS
from mdistiller.errors import UserError, check_signature, users_code
from mdistiller.files import expand
from mdistiller.models import Ensemble, build_model, fit_inputs, freeze, give_features, given_parts
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
            raise UserError(
                f"layers: names layers of a module of yours, and the {side} is {network!r}, whose features are known; "
                "pass [] in its place"
            )
    return tuple(sides[1]), tuple(sides[0])


def build_distiller(
    cfg: CfgNode,
    data: ImageSet | TokenSet,
    teacher_file: Path | None,
    device: torch.device,
    networks: Networks = NO_NETWORKS,
    whole_teacher: bool = True,
) -> nn.Module:
    """Return the method on `device`, its student freshly initialised, its teacher too or loaded from `teacher_file`;
    without `whole_teacher` that stays in the host's memory.

    Raises UserError where a network does not fit the data, or lacks features that the method compares.
    """
    task, names = TASKS[data.task], cfg.DISTILLER
    cls = task.method(names.TYPE)
    check_method(names.TYPE, cls)
    if networks.student is not None and not any(part.requires_grad for part in networks.student.parameters()):
        raise UserError(f"student: {names.STUDENT} has no parameter that learns; student.requires_grad_() thaws all")
    student = task.network(cfg, data, "STUDENT", networks.student, networks.student_layers)
    teacher, new_head = None, names.NEW_HEAD if task.new_head else None  # None: not to be had
    if names.STUDENT_CKPT:
        source = expand(names.STUDENT_CKPT)
        checkpoint.load_weights(student, names.STUDENT, data.num_classes, source, new_head)
    freeze(student, cfg.SOLVER.FREEZE, names.STUDENT)
    if cls.needs_teacher:
        teacher = task.network(cfg, data, "TEACHER", networks.teacher, networks.teacher_layers)
        if teacher_file and networks.teacher is None:
            task.check_source(teacher, names.TEACHER, str(teacher_file))
            head = new_head and bool(cls.needs_features)  # logits of a new one are nothing to learn from
            checkpoint.load_weights(teacher, names.TEACHER, data.num_classes, teacher_file, head)
        if networks.teacher is None:
            teacher = join_teachers(cfg, teacher, data, loaded=teacher_file is not None)
    task.check_pair(names, student, teacher)
    offered = {"num_data": len(data.train_labels), "labels": data.train_labels}
    offered, what = {name: offered[name] for name in cls.needs}, f"the method {names.TYPE}"
    check_signature(cls, (student, teacher, cfg), offered, what, ", ".join(["(student, teacher, cfg", *offered]) + ")")
    with users_code(what), task.building(data):
        distiller = cls(student, teacher, cfg, **offered)
    task.finish(distiller, cfg)
    if isinstance(distiller, RuleDistiller):
        check_rule(distiller.rule, rule_name(cfg, distiller.own_rule), data.num_classes)
    return prepare_parts(distiller, device, whole_teacher)


def join_teachers(cfg: CfgNode, first: nn.Module, data: ImageSet, loaded: bool = True) -> nn.Module:
    """Return the teacher `first` together with those of DISTILLER.ENSEMBLE, `loaded` from their files or not."""
    if not cfg.DISTILLER.ENSEMBLE:
        return first
    networks, size, num_classes = [first], data.test_images.shape[1], data.num_classes
    for text in cfg.DISTILLER.ENSEMBLE:
        name, file = name_and_file(text)
        network = give_features(build_model(name, num_classes, cfg.DATASET.TYPE), False)
        fit_inputs(network, data.mean, data.std, size)
        given_parts(network, name, num_classes, size)
        if loaded:
            checkpoint.load_weights(network, name, num_classes, expand(file))
        networks.append(network)
    return Ensemble(networks, cfg.DISTILLER.ENSEMBLE_MEAN)


def prepare_parts(distiller: nn.Module, device: torch.device, whole: bool = True) -> nn.Module:
    """Return the method on `device`, its models in the form that trains fastest there; its teacher too if it is to be
    there as a `whole`.
    """
    teacher = distiller.teacher
    for part in (distiller.student, teacher if whole else None):
        if part is not None:
            prepare(part, device)
    if not whole:
        distiller.teacher = None
    distiller.to(device)
    distiller.teacher = teacher
    return distiller
