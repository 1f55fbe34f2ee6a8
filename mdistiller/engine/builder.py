"""From a configuration to a run: data, teacher, student, method, trainer."""

import inspect
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from yacs.config import CfgNode

from mdistiller.dataset import Batches, ImageSet, load_dataset
from mdistiller.distillers import RuleDistiller, distiller_dict
from mdistiller.engine import checkpoint
from mdistiller.engine.cfg import describe
from mdistiller.engine.device import check_amp, prepare, resolve_device, seed_everything
from mdistiller.engine.folder import RunFolder, run_folder
from mdistiller.engine.recorder import Recorder, start_wandb
from mdistiller.engine.solver import DOT, MultiStep, sgd
from mdistiller.engine.step import Step
from mdistiller.engine.trainer import Trainer
from mdistiller.errors import UserError
from mdistiller.models import cifar_model_dict, default_checkpoint


def train(cfg: CfgNode, opts: list[str] = (), resume: bool | str = False) -> dict:
    """Run what `cfg` says, in the folder that `cfg` and the overrides `opts` name.

    `resume`: True goes on with that run, "auto" does so if there is one. Returns the result: last_acc, best_acc,
    best_epoch, epochs, and the folder. Raises UserError before anything is written if a part is missing.
    """
    device = resolve_device(cfg.DEVICE)
    check_amp(cfg.SOLVER.AMP, device)
    path = run_folder(cfg, opts)
    resume = (path / "latest").exists() if resume == "auto" else bool(resume)
    if resume and not (path / "latest").exists():
        raise UserError(f"--resume: there is no run in {path}; start it without --resume")
    data = load_dataset(cfg.DATASET.TYPE, cfg.DATASET.ROOT)
    teacher_file = find_teacher(cfg) if cfg.DISTILLER.TYPE != "NONE" else None

    seed_everything(cfg.SEED)
    distiller = build_distiller(cfg, data, teacher_file, device)
    trainer = build_trainer(cfg, distiller, data, device, path)
    wandb_run = start_wandb(cfg.EXPERIMENT.PROJECT, path.name, cfg) if cfg.LOG.WANDB else None
    folder = RunFolder(path, resume)
    try:
        if resume:
            folder.check_config(cfg)
            trainer.load_state(checkpoint.load(path / "latest"), path / "latest")
            if trainer.epoch > trainer.epochs:
                raise UserError(f"--resume: {trainer.epoch} epochs are done, more than SOLVER.EPOCHS {trainer.epochs}")
        folder.write_config(cfg)
        folder.write_environment(device, cfg.SEED, resume)
        recorder = Recorder(path, cfg.SOLVER.EPOCHS, trainer.epoch, wandb_run)
        try:
            introduce(cfg, recorder, trainer, data, device)
            return trainer.fit(recorder) | {"folder": str(path)}
        finally:
            recorder.close()
    finally:
        folder.close()


def introduce(cfg: CfgNode, recorder: Recorder, trainer: Trainer, data: ImageSet, device: torch.device) -> None:
    if trainer.epoch:
        recorder.say(f"resumed after epoch {trainer.epoch} of {trainer.epochs}")
        return
    method, teacher = cfg.DISTILLER.TYPE, cfg.DISTILLER.TEACHER
    pair = cfg.DISTILLER.STUDENT if method == "NONE" else f"{teacher} -> {cfg.DISTILLER.STUDENT}"
    recorder.say(
        f"{method}: {pair} on {cfg.DATASET.TYPE} ({len(data.train_labels):,} + {len(data.test_labels):,} images, "
        f"{data.num_classes} classes), {device}, {cfg.SOLVER.AMP} autocast, seed {cfg.SEED}, in {trainer.folder}"
    )
    with open(trainer.folder / "worklog.txt", "a") as file:
        file.write(describe(cfg))


def build_distiller(cfg: CfgNode, data: ImageSet, teacher_file: Path | None, device: torch.device) -> nn.Module:
    """The method on `device`, its student freshly initialised, its teacher loaded from `teacher_file`."""
    student = build_model(cfg.DISTILLER.STUDENT, data.num_classes)
    if cfg.DISTILLER.TYPE == "NONE":
        return prepare_parts(distiller_dict["NONE"](student), device)
    teacher = build_model(cfg.DISTILLER.TEACHER, data.num_classes)
    checkpoint.load_weights(teacher, cfg.DISTILLER.TEACHER, data.num_classes, teacher_file)
    cls = distiller_dict[cfg.DISTILLER.TYPE]
    offered = {"num_data": len(data.train_labels), "labels": data.train_labels}
    wanted = inspect.signature(cls).parameters
    arguments = {name: value for name, value in offered.items() if name in wanted}
    distiller = cls(student, teacher, cfg, **arguments)
    refuse_unused(cfg, distiller)
    return prepare_parts(distiller, device)


def refuse_unused(cfg: CfgNode, distiller: nn.Module) -> None:
    """Raises UserError where the configuration asks of the method what it does not do."""
    method = cfg.DISTILLER.TYPE
    rule = "EXPERIMENT.LOGIT_STAND" if cfg.EXPERIMENT.LOGIT_STAND else "TEMPERATURE.RULE"
    if (cfg.TEMPERATURE.RULE or cfg.EXPERIMENT.LOGIT_STAND) and not isinstance(distiller, RuleDistiller):
        takers = [name for name, cls in distiller_dict.items() if issubclass(cls, RuleDistiller)]
        raise UserError(f"{rule}: {method} takes no temperature rule; leave it out, or use {', '.join(sorted(takers))}")
    if cfg.TEMPERATURE.PART != "all" and not getattr(distiller, "has_parts", False):
        raise UserError(f"TEMPERATURE.PART: {method} has no parts; leave it out, or use KD, DTKD or DKD")


def prepare_parts(distiller: nn.Module, device: torch.device) -> nn.Module:
    for part in (distiller.student, getattr(distiller, "teacher", None)):
        if part is not None:
            prepare(part, device)
    return distiller.to(device)


def build_model(name: str, num_classes: int) -> nn.Module:
    return cifar_model_dict[name][0](num_classes=num_classes)


def build_trainer(cfg: CfgNode, distiller: nn.Module, data: ImageSet, device: torch.device, folder: Path) -> Trainer:
    solver = cfg.SOLVER
    augment = data.augment if cfg.DATASET.AUGMENT == "auto" else cfg.DATASET.AUGMENT
    statistics = data.mean, data.std
    train_batches = Batches(
        data.train_images, data.train_labels, *statistics, solver.BATCH_SIZE, device, augment, cfg.SEED
    )
    test_batches = Batches(data.test_images, data.test_labels, *statistics, cfg.DATASET.TEST.BATCH_SIZE, device)
    parameters = distiller.get_learnable_parameters()
    if solver.TRAINER == "dot":
        optimizer = DOT(parameters, solver.MOMENTUM, solver.WEIGHT_DECAY, solver.DOT.DELTA)
    else:
        optimizer = sgd(parameters, solver.MOMENTUM, solver.WEIGHT_DECAY)
    return Trainer(
        distiller,
        Step(distiller, optimizer, device, solver.AMP),
        MultiStep(solver.LR, tuple(solver.LR_DECAY_STAGES), solver.LR_DECAY_RATE),
        train_batches,
        test_batches,
        solver.EPOCHS,
        folder,
        cfg.LOG.SAVE_CHECKPOINT_FREQ,
        cfg.LOG.TENSORBOARD_FREQ,
        cfg.LOG.TEMPERATURE,
    )


def find_teacher(cfg: CfgNode) -> Path:
    """The teacher's checkpoint; trained first if it is missing and DISTILLER.TRAIN_TEACHER says so."""
    name, dataset, epochs = cfg.DISTILLER.TEACHER, cfg.DATASET.TYPE, cfg.SOLVER.EPOCHS
    published = Path(default_checkpoint(name, dataset))
    trained = Path(default_checkpoint(name, dataset, epochs))
    chosen = Path(cfg.DISTILLER.TEACHER_CKPT).expanduser() if cfg.DISTILLER.TEACHER_CKPT else None
    if chosen and chosen.is_dir():
        raise UserError(f"DISTILLER.TEACHER_CKPT: {chosen} is a folder; name the checkpoint's file")
    train_it = cfg.DISTILLER.TRAIN_TEACHER
    for file in [chosen] if chosen else [published, *([trained] if train_it else [])]:
        if file.is_file():
            return file
    target = chosen or trained
    if not train_it:
        near = sorted(str(file) for file in published.parent.glob("*.pth")) if not chosen else []
        raise UserError(
            f"no checkpoint of the teacher {name} at {chosen or published}; do one of these:",
            "  download  python3 tools/download.py teachers   (mdistiller's released ones, for cifar100)",
            f"  point     DISTILLER.TEACHER_CKPT {near[0] if near else 'path/to/checkpoint.pth'}",
            "  train     DISTILLER.TRAIN_TEACHER True   (trains it first, by method NONE, and stores it)",
        )
    return train_teacher(cfg, target)


def train_teacher(cfg: CfgNode, target: Path) -> Path:
    """Train the teacher alone with this configuration's SOLVER and data, and store its last epoch at `target`.

    An interrupted training goes on where it stopped.
    """
    alone = cfg.clone()
    alone.defrost()
    alone.DISTILLER.TYPE, alone.DISTILLER.STUDENT = "NONE", cfg.DISTILLER.TEACHER
    alone.SOLVER.TRAINER = "base"  # dot has nothing to separate without a teacher
    tag = f"none,{cfg.DISTILLER.TEACHER},{cfg.DATASET.TYPE},{cfg.SOLVER.EPOCHS}-epochs,seed{cfg.SEED}"
    alone.EXPERIMENT.NAME = alone.EXPERIMENT.TAG = tag
    alone.freeze()
    tqdm.write(f"the teacher {cfg.DISTILLER.TEACHER} comes first, for {cfg.SOLVER.EPOCHS} epochs, by method NONE")
    result = train(alone, resume="auto")
    target.parent.mkdir(parents=True, exist_ok=True)
    state = checkpoint.load(Path(result["folder"]) / "student_latest")
    checkpoint.save(state | {"best_acc": result["best_acc"]}, target)
    tqdm.write(f"stored the teacher's last epoch at {target}")
    return target
