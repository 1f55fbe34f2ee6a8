"""From a configuration to a trainer: data, optimizer, the teacher's logits, the step."""

import functools
from pathlib import Path

import torch
from torch import nn
from yacs.config import CfgNode

from mdistiller.bank.pool import TeacherPool
from mdistiller.config import DOT_TRAINERS, used_code, used_names
from mdistiller.dataset import ImageSet, TokenSet, dataset_dict
from mdistiller.engine.cfg import describe
from mdistiller.engine.evaluator import evaluation_batches
from mdistiller.engine.feed import Feed
from mdistiller.engine.method import NO_NETWORKS, Networks, build_distiller
from mdistiller.engine.norms import synchronise
from mdistiller.engine.ranks import Ranks, here, parts_of
from mdistiller.engine.shard import shard
from mdistiller.engine.solver import DOT, Schedule, adamw, by_decay, sgd
from mdistiller.engine.step import Step
from mdistiller.engine.stepmode import RunStep, compiled_form, uses_graph
from mdistiller.engine.tasks import TASKS
from mdistiller.engine.trainer import Options, Trainer
from mdistiller.errors import UserError
from mdistiller.runs import checkpoint
from mdistiller.runs.keeper import Keeper
from mdistiller.runs.stop import Stop


def check_last_batch(cfg: CfgNode, workspace: "Workspace") -> None:
    """Raise UserError where an epoch has no batch, or where its last one is a single image that the networks cannot
    train on, as batch normalisation cannot where one image has one value of a channel.
    """
    images, solver, ranks = len(workspace.data.train_images), cfg.SOLVER, workspace.ranks
    what = workspace.data.samples
    if solver.DROP_LAST and images < solver.BATCH_SIZE:
        raise UserError(
            f"SOLVER.DROP_LAST: {images} training {what} fill no batch of SOLVER.BATCH_SIZE {solver.BATCH_SIZE}; take "
            "smaller batches, or DROP_LAST False"
        )
    left, several = smallest_share(solver, images, ranks), ranks.world > 1
    alone = "a process" if several else "a part of a batch" if solver.ACCUMULATE > 1 else "the last batch"
    if several:
        tested = len(workspace.data.test_images)
        if left < 1 or tested < ranks.world:
            enough = min(solver.BATCH_SIZE // solver.ACCUMULATE, tested) >= ranks.world
            or_drop = ", or set SOLVER.DROP_LAST True" if enough and not solver.DROP_LAST else ""
            raise UserError(
                f"SOLVER.BATCH_SIZE {solver.BATCH_SIZE} leaves one of {ranks.world} processes without any of {images} "
                f"training or {tested} test {what}; start fewer of them{or_drop}"
            )
    if left > 1 or several and solver.BATCH_SIZE > 1 and solver.SYNC_BN:
        return
    try:
        rehearse(cfg, workspace, 1)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        instead = "take a larger one" if solver.BATCH_SIZE == 1 else "set SOLVER.DROP_LAST True, or take another"
        if solver.ACCUMULATE > 1:
            instead = f"lower SOLVER.ACCUMULATE {solver.ACCUMULATE}, or take another"
        raise UserError(
            f"SOLVER.BATCH_SIZE {solver.BATCH_SIZE} leaves one of {images} images to {alone}, and batch "
            f"normalisation cannot train on one alone in {cfg.DISTILLER.STUDENT} by {cfg.DISTILLER.TYPE}; {instead}"
        ) from None


def smallest_share(solver: CfgNode, images: int, ranks: Ranks) -> int:
    """Return how many of a batch of an epoch of so many `images`, or of a part of it, a rank has at least."""
    whole = min(solver.BATCH_SIZE, images)
    left = whole if solver.DROP_LAST else images % whole or whole
    parts = [part for size in (whole, left) for part in parts_of(size, solver.ACCUMULATE)]
    return min(size for part in parts for size in ranks.sizes(len(part)))


def rehearse(cfg: CfgNode, workspace: "Workspace", images: int = 8) -> None:
    """Train for one step on `images`, at most a batch, with a teacher that has learned nothing, and throw it away.
    Raises UserError for what a run would be refused for, so that no teacher is trained for it.
    """
    data, solver = workspace.local, cfg.SOLVER
    distiller = build_distiller(cfg, workspace.data, None, workspace.device, workspace.networks).train()
    optimizer = build_optimizer(solver, distiller.get_learnable_parameters())
    batches = data.training_batches(cfg)
    plan = batches.plan(1)[:, : min(images, solver.BATCH_SIZE)].to(workspace.device)
    Step(distiller, optimizer, workspace.device, solver.AMP)(batches.batch(plan), 1)


class Workspace:
    """What the runs of one process share: the device, the images on it, teachers and their banks. `students` train
    there in turn. `networks`: those that the caller brings. `kept`: whether the runs' folders stay, which is for
    nobody to see where they do not.
    """

    def __init__(
        self,
        data: ImageSet | TokenSet,
        device: torch.device,
        students: int = 1,
        networks: Networks = NO_NETWORKS,
        kept: bool = True,
    ):
        self.data, self.digest, self.networks = data, data.digest(), networks
        self.device, self.students, self.kept = device, students, kept
        self.local = data.to(device)
        self.teachers = TeacherPool(data.num_classes, self.digest, kept)
        self.ranks = here()
        self.stop = Stop(shared=True) if self.ranks.world > 1 else Stop()


def build_trainer(
    cfg: CfgNode, distiller: nn.Module, workspace: Workspace, folder: Path, teacher_file: Path | None = None
) -> tuple[Trainer, str]:
    """Return the trainer of a run in `folder`, and a line about the bank of its teacher's logits."""
    solver, teacher, data, device = cfg.SOLVER, distiller.teacher, workspace.local, workspace.device
    ranks = workspace.ranks
    train = data.training_batches(cfg)
    if ranks.world > 1:
        train.own = functools.partial(ranks.rows, parts=solver.ACCUMULATE)
    test = evaluation_batches(data, cfg.DATASET.TEST.BATCH_SIZE, ranks)
    origin = {"data": workspace.digest, "teacher": checkpoint.digest(teacher.state_dict()) if teacher else ""}
    origin["plugins"] = used_code(cfg.plugins, used_names(cfg))
    if solver.SYNC_BN:
        synchronise(distiller, ranks, device)
    if teacher is not None and cfg.DISTILLER.TEACHER_SHARD:
        shard(teacher, ranks, device)
    logits, bank = workspace.teachers.logits_of(cfg, distiller, train, teacher_file, origin["teacher"])
    task = TASKS[data.task]
    exchanges = ranks.world > 1 and (solver.SYNC_BN or distiller.needs_batch)
    forward, refusal = compiled_form(cfg, distiller, device, 0 if task.eager else solver.EPOCHS * len(train), exchanges)
    later = 2 if solver.STEP == "auto" else 1  # a run's first step comes at once
    optimizer = build_optimizer(solver, distiller.get_learnable_parameters())
    step = Step(distiller, optimizer, device, solver.AMP, solver.NAN_POLICY, forward, later)
    step.refusal, step.clip, step.parts, step.ranks = refusal, solver.CLIP, solver.ACCUMULATE, ranks
    # for pictures that are decoded, or other processes: no graph could
    waits = train.streamed or task.eager or ranks.world > 1
    graph = uses_graph(cfg, device, distiller.capturable) and not waits
    known = cfg.DATASET.TYPE in dataset_dict and workspace.networks[:2] == (None, None)
    log = cfg.LOG
    options = Options(
        solver.EPOCHS, log.TENSORBOARD_FREQ, log.TEMPERATURE, describe(cfg), workspace.kept, known,
        print_every=log.PRINT_FREQ, patience=solver.EARLY_STOP, average=solver.EMA,
        unit=data.unit, teacher_first=task.teacher_first or workspace.networks.teacher is not None,
    )  # fmt: skip
    trainer = Trainer(
        RunStep(step, train, graph, workspace.students == 1, logits if train.streamed else None),
        Feed(train, logits),
        test,
        schedule_of(solver),
        Keeper(folder, origin, log.SAVE_CHECKPOINT_FREQ, log.SAVE_EVERY_SECONDS, workspace.students),
        options,
        workspace.stop,
        task.tester(test, data, cfg, teacher, ranks),
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
