"""From a configuration to a trainer: models, method, optimizer, data, teacher's logits."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from yacs.config import CfgNode

from mdistiller.bank.pool import TeacherPool
from mdistiller.config import DOT_TRAINERS, PLUGINS, TWO_VIEWS, Config, get, used_code, used_names
from mdistiller.dataset import Batches, ImageSet, Mixing, dataset_dict
from mdistiller.device import prepare
from mdistiller.distillers import RuleDistiller, check_method, check_rule, distiller_dict, part_of, rule_name
from mdistiller.distillers.features import images_of
from mdistiller.engine.cfg import describe
from mdistiller.engine.evaluator import evaluation_batches
from mdistiller.engine.feed import Feed
from mdistiller.engine.solver import DOT, Schedule, adamw, by_decay, sgd
from mdistiller.engine.step import Step
from mdistiller.engine.stepmode import RunStep, compiled_form, uses_graph
from mdistiller.engine.trainer import Options, Trainer
from mdistiller.errors import UserError, check_signature, users_code
from mdistiller.files import expand
from mdistiller.models import (
    Ensemble,
    build_model,
    check_parts,
    fit_inputs,
    freeze,
    give_features,
    given_parts,
    name_layers,
)
from mdistiller.registry import name_and_file
from mdistiller.runs import checkpoint
from mdistiller.runs.keeper import Keeper
from mdistiller.runs.stop import Stop


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
    cfg: CfgNode, data: ImageSet, teacher_file: Path | None, device: torch.device, networks: Networks = NO_NETWORKS
) -> nn.Module:
    """Return the method on `device`, its student freshly initialised, its teacher too or loaded from `teacher_file`.

    Raises UserError where a network does not fit the data, or lacks features that the method compares.
    """
    cls, names, size = distiller_dict[cfg.DISTILLER.TYPE], cfg.DISTILLER, data.train_images.shape[1]
    check_method(names.TYPE, cls)

    def network(side: str, given: nn.Module | None, layers: Sequence[str]) -> nn.Module:
        name = names[side]
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
    if names.STUDENT_CKPT:
        source, head = expand(names.STUDENT_CKPT), names.NEW_HEAD
        checkpoint.load_weights(student, names.STUDENT, data.num_classes, source, head)
    freeze(student, cfg.SOLVER.FREEZE, names.STUDENT)
    if cls.needs_teacher:
        teacher = network("TEACHER", networks.teacher, networks.teacher_layers)
        if teacher_file and networks.teacher is None:
            head = names.NEW_HEAD and bool(cls.needs_features)  # logits of a new one are nothing to learn from
            checkpoint.load_weights(teacher, names.TEACHER, data.num_classes, teacher_file, head)
        if networks.teacher is None:
            teacher = join_teachers(cfg, teacher, data, loaded=teacher_file is not None)
    offered = {"num_data": len(data.train_labels), "labels": data.train_labels}
    offered, what = {name: offered[name] for name in cls.needs}, f"the method {names.TYPE}"
    check_signature(cls, (student, teacher, cfg), offered, what, ", ".join(["(student, teacher, cfg", *offered]) + ")")
    with users_code(what), images_of(tuple(data.train_images.shape[1:3])):
        distiller = cls(student, teacher, cfg, **offered)
    if isinstance(distiller, RuleDistiller):
        check_rule(distiller.rule, rule_name(cfg, distiller.own_rule), data.num_classes)
    return prepare_parts(distiller, device)


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


def check_last_batch(cfg: CfgNode, workspace: "Workspace") -> None:
    """Raise UserError where an epoch has no batch, or where its last one is a single image that the networks cannot
    train on, as batch normalisation cannot where one image has one value of a channel.
    """
    images, solver = len(workspace.data.train_labels), cfg.SOLVER
    if solver.DROP_LAST and images < solver.BATCH_SIZE:
        raise UserError(
            f"SOLVER.DROP_LAST: {images} training images fill no batch of SOLVER.BATCH_SIZE {solver.BATCH_SIZE}; take "
            "smaller batches, or DROP_LAST False"
        )
    left = images % solver.BATCH_SIZE or solver.BATCH_SIZE
    if left > 1 or (solver.DROP_LAST and solver.BATCH_SIZE > 1):
        return
    try:
        rehearse(cfg, workspace, 1)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        instead = "take a larger one" if solver.BATCH_SIZE == 1 else "set SOLVER.DROP_LAST True, or take another"
        raise UserError(
            f"SOLVER.BATCH_SIZE {solver.BATCH_SIZE} leaves one of {images} images to the last batch, and batch "
            f"normalisation cannot train on one alone in {cfg.DISTILLER.STUDENT} by {cfg.DISTILLER.TYPE}; {instead}"
        ) from None


def rehearse(cfg: CfgNode, workspace: "Workspace", images: int = 8) -> None:
    """Train for one step on `images`, at most a batch, with a teacher that has learned nothing, and throw it away.
    Raises UserError for what a run would be refused for, so that no teacher is trained for it.
    """
    data, solver = workspace.local, cfg.SOLVER
    distiller = build_distiller(cfg, workspace.data, None, workspace.device, workspace.networks).train()
    optimizer = build_optimizer(solver, distiller.get_learnable_parameters())
    batches = training_batches(cfg, data)
    plan = batches.plan(1)[:, : min(images, solver.BATCH_SIZE)].to(workspace.device)
    Step(distiller, optimizer, workspace.device, solver.AMP)(batches.batch(plan), 1)


def refuse_unused(cfg: Config) -> None:
    """Raise UserError where the configuration asks of the method what it does not do. (NONE may train a teacher, with
    its student's settings.)
    """
    method, cls = cfg.DISTILLER.TYPE, distiller_dict[cfg.DISTILLER.TYPE]
    if cfg.SOLVER.TRAINER in TWO_VIEWS and not cls.takes_strong_view:
        takers = [name for name, taker in distiller_dict.items() if taker.takes_strong_view]
        raise UserError(
            f"SOLVER.TRAINER: {cfg.SOLVER.TRAINER} gives a second, strong view, which {method} does not take; set "
            f"SOLVER.TRAINER base, or use {', '.join(sorted(takers))}"
        )
    refuse_soft_labels(cfg, cls)
    if not cls.needs_teacher:
        return
    if cfg.DISTILLER.ENSEMBLE and cls.needs_features:
        raise UserError(
            f"DISTILLER.ENSEMBLE: {method} compares features, of which several teachers have no mean; name one, or "
            "take a method that compares logits, such as KD"
        )
    stand = cfg.EXPERIMENT.LOGIT_STAND
    if stand and distiller_dict.own.get(method) is not cls:  # a method file may read the key itself, as LSKD's do
        stand = not any("LOGIT_STAND" in PLUGINS[digest].text for digest in cfg.plugins)
    rule = "EXPERIMENT.LOGIT_STAND" if stand else "TEMPERATURE.RULE"
    if (cfg.TEMPERATURE.RULE or stand) and not issubclass(cls, RuleDistiller):
        takers = [name for name, taker in distiller_dict.items() if issubclass(taker, RuleDistiller)]
        raise UserError(f"{rule}: {method} takes no temperature rule; leave it out, or use {', '.join(sorted(takers))}")
    if cfg.TEMPERATURE.PART != "all" and not cls.has_parts:
        raise UserError(f"TEMPERATURE.PART: {method} has no parts; leave it out, or use KD, DTKD or DKD")


def refuse_soft_labels(cfg: Config, cls: type) -> None:
    """Raise UserError where labels are to be smoothed or images mixed, and the method or trainer cannot have that."""
    soft = [key for key in ("DATASET.MIXUP", "DATASET.CUTMIX", "SOLVER.LABEL_SMOOTHING") if get(cfg, key)]
    if soft and (cls.needs_labels or cfg.TEMPERATURE.PART != "all"):
        what = cfg.DISTILLER.TYPE if cls.needs_labels else f"TEMPERATURE.PART {cfg.TEMPERATURE.PART}"
        raise UserError(f"{soft[0]}: {what} needs the one label of each image, which is none then; leave it out")
    if cfg.SOLVER.TRAINER in TWO_VIEWS and (cfg.DATASET.MIXUP or cfg.DATASET.CUTMIX):
        raise UserError(
            f"{soft[0]}: SOLVER.TRAINER {cfg.SOLVER.TRAINER} has two views of each image, which are not mixed"
        )


def prepare_parts(distiller: nn.Module, device: torch.device) -> nn.Module:
    """Return the method on `device`, its models in the form that trains fastest there."""
    for part in (distiller.student, distiller.teacher):
        if part is not None:
            prepare(part, device)
    return distiller.to(device)


class Workspace:
    """What the runs of one process share: the device, the images on it, teachers and their banks. `students` train
    there in turn. `networks`: those that the caller brings. `kept`: whether the runs' folders stay, which is for
    nobody to see where they do not.
    """

    def __init__(
        self,
        data: ImageSet,
        device: torch.device,
        students: int = 1,
        networks: Networks = NO_NETWORKS,
        kept: bool = True,
    ):
        self.data, self.digest, self.networks = data, data.digest(), networks
        self.device, self.students, self.kept = device, students, kept
        self.local = data.to(device)
        self.teachers = TeacherPool(data.num_classes, self.digest, kept)
        self.stop = Stop()


def training_batches(cfg: CfgNode, data: ImageSet) -> Batches:
    """Return the batches of training images that `cfg` asks for."""
    augment = data.augment if cfg.DATASET.AUGMENT == "auto" else cfg.DATASET.AUGMENT
    given = data.train_images, data.train_labels, data.mean, data.std, cfg.SOLVER.BATCH_SIZE, augment, cfg.SEED
    batches = Batches(*given, two_views=cfg.SOLVER.TRAINER in TWO_VIEWS)
    batches.drop_last = cfg.SOLVER.DROP_LAST
    soft = cfg.SOLVER.LABEL_SMOOTHING, cfg.DATASET.MIXUP, cfg.DATASET.CUTMIX
    batches.mixing = Mixing(data.num_classes, *soft) if any(soft) else None
    return batches


def build_trainer(
    cfg: CfgNode, distiller: nn.Module, workspace: Workspace, folder: Path, teacher_file: Path | None = None
) -> tuple[Trainer, str]:
    """Return the trainer of a run in `folder`, and a line about the bank of its teacher's logits."""
    solver, teacher, data, device = cfg.SOLVER, distiller.teacher, workspace.local, workspace.device
    train = training_batches(cfg, data)
    test = evaluation_batches(data, cfg.DATASET.TEST.BATCH_SIZE)
    origin = {"data": workspace.digest, "teacher": checkpoint.digest(teacher.state_dict()) if teacher else ""}
    origin["plugins"] = used_code(cfg.plugins, used_names(cfg))
    logits, bank = workspace.teachers.logits_of(cfg, distiller, train, teacher_file, origin["teacher"])
    forward, refusal = compiled_form(cfg, distiller, device, solver.EPOCHS * len(train))
    later = 2 if solver.STEP == "auto" else 1  # a run's first step comes at once
    optimizer = build_optimizer(solver, distiller.get_learnable_parameters())
    step = Step(distiller, optimizer, device, solver.AMP, solver.NAN_POLICY, forward, later)
    step.refusal, step.clip, step.parts = refusal, solver.CLIP, solver.ACCUMULATE
    graph = uses_graph(cfg, device, distiller.capturable) and not train.streamed  # which no graph could wait for
    known = cfg.DATASET.TYPE in dataset_dict and workspace.networks[:2] == (None, None)
    log = cfg.LOG
    options = Options(
        solver.EPOCHS, log.TENSORBOARD_FREQ, log.TEMPERATURE, describe(cfg), workspace.kept, known,
        print_every=log.PRINT_FREQ, patience=solver.EARLY_STOP, average=solver.EMA,
    )  # fmt: skip
    trainer = Trainer(
        RunStep(step, train, graph, workspace.students == 1, logits if train.streamed else None),
        Feed(train, logits),
        test,
        schedule_of(solver),
        Keeper(folder, origin, log.SAVE_CHECKPOINT_FREQ, log.SAVE_EVERY_SECONDS, workspace.students),
        options,
        workspace.stop,
    )
    return trainer, bank


def build_optimizer(solver: CfgNode, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimizer of the section SOLVER. The trainer sets its rate."""
    if solver.FREEZE:
        parameters = [parameter for parameter in parameters if parameter.requires_grad]
    groups = by_decay(parameters, solver.DECAY_NORMS)
    if solver.TRAINER in DOT_TRAINERS:
        return DOT(groups, solver.MOMENTUM, solver.WEIGHT_DECAY, solver.DOT.DELTA)
    if solver.TYPE == "AdamW":
        return adamw(groups, solver.WEIGHT_DECAY)
    return sgd(groups, solver.MOMENTUM, solver.WEIGHT_DECAY)


def schedule_of(solver: CfgNode) -> Schedule:
    """Return the learning rate that the section SOLVER describes."""
    falls = tuple(solver.LR_DECAY_STAGES), solver.LR_DECAY_RATE
    return Schedule(solver.LR, *falls, solver.SCHEDULE, solver.EPOCHS, solver.WARMUP)
