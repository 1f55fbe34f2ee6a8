"""From a configuration to a run: data, teacher, student, method, trainer."""

import contextlib
import dataclasses
import inspect
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from yacs.config import CfgNode

from mdistiller import config
from mdistiller.bank.teacher import Shared
from mdistiller.config import Config
from mdistiller.dataset import Batch, Batches, ImageSet, load_dataset
from mdistiller.device import check_amp, has_bf16, prepare, resolve_device, seed_everything, set_determinism
from mdistiller.distillers import RuleDistiller, distiller_dict
from mdistiller.engine.cfg import describe, load
from mdistiller.engine.diagnose import describe_losses, first_bad_tensor
from mdistiller.engine.evaluator import images_together
from mdistiller.engine.solver import DOT, MultiStep, sgd
from mdistiller.engine.step import Step
from mdistiller.engine.stepmode import check_step, compiled_form, uses_graph
from mdistiller.engine.trainer import Trainer
from mdistiller.errors import DamagedFile, FolderInUse, Preempted, RunFailed, UserError
from mdistiller.files import expand, link
from mdistiller.models import cifar_model_dict, default_checkpoint
from mdistiller.runs import checkpoint
from mdistiller.runs.folder import RunFolder, check_writable, has_checkpoint, identity, in_use, resumable, run_folder
from mdistiller.runs.journal import INTERVAL, SHARE, Journal, place
from mdistiller.runs.recorder import Recorder, require_wandb, start_wandb
from mdistiller.runs.stop import Stop
from mdistiller.terminal import say


def train(cfg: Config, resume: bool | str = False) -> dict:
    """Run what `cfg` says, in the folder that it and its overrides name.

    `resume`: True goes on with that run, "auto" does so if there is one. Returns the result: last_acc, best_acc,
    best_epoch, epochs, and the folder. Raises UserError before anything is written if a part is missing, Preempted
    where a signal stopped the run, RunFailed where the machine or the loss let it down.
    """
    plan = RunPlan(cfg)
    plan.check(resume)
    common = Common(cfg)
    plan.find_teacher(resume)
    with failures(cfg), common.entered() as closing:
        run = Run(plan, resume, common, closing)
        return run.trainer.fit(run.start()) | {"folder": str(plan.path)}


class RunPlan:
    """A run that is to be made: its configuration, folder and teacher."""

    def __init__(self, cfg: Config, label: str = "", place: int = 0):
        self.cfg, self.label, self.place = cfg, label, place
        self.path = run_folder(cfg)
        self.teacher_file: Path | None = None

    def check(self, resume: bool | str) -> None:
        """Raises UserError where the machine or the folder cannot do it."""
        device = resolve_device(self.cfg.DEVICE)
        check_amp(self.cfg.SOLVER.AMP, device)
        check_step(self.cfg, device)
        refuse_unused(self.cfg)  # before a teacher is trained for it
        if self.cfg.LOG.WANDB:
            require_wandb()
        if resume is True and not resumable(self.path):
            raise UserError(
                f"--resume: there is no run in {self.path}; start it without --resume, or with --resume auto"
            )

    def find_teacher(self, resume: bool | str) -> None:
        """Find the teacher's checkpoint, or train it."""
        if self.cfg.DISTILLER.TYPE != "NONE":
            self.teacher_file = find_teacher(self.cfg, self.path, bool(resume))


class Common:
    """What the `students` runs of one process share: the device, the images on it, teachers and their banks."""

    def __init__(self, cfg: CfgNode, students: int = 1, data: ImageSet | None = None):
        self.device, self.students = resolve_device(cfg.DEVICE), students
        self.data = data or load_dataset(cfg.DATASET.TYPE, cfg.DATASET.ROOT)
        self.digest = self.data.digest()
        names = ("train_images", "train_labels", "test_images", "test_labels")
        self.local = dataclasses.replace(
            self.data, **{name: getattr(self.data, name).to(self.device) for name in names}
        )
        self.teachers = Shared()
        self.stop = Stop()

    @contextlib.contextmanager
    def entered(self) -> Iterator[contextlib.ExitStack]:
        """While the runs train: what they open is closed at the end, and their device is CUDA's current one."""
        with contextlib.ExitStack() as closing:
            if self.device.type == "cuda":
                closing.enter_context(torch.cuda.device(self.device))
            closing.callback(self.teachers.close)
            yield closing


class Run:
    """The trainer of `plan`, ready or brought back to where it stopped, with its folder's lock. Nothing that an earlier
    run left is changed before `start`, unless it is set aside. `closing` gives back what is held.
    """

    def __init__(self, plan: RunPlan, resume: bool | str, common: Common, closing: contextlib.ExitStack):
        self.plan, self.common, self.closing = plan, common, closing
        cfg = plan.cfg
        set_determinism(cfg.DETERMINISTIC)
        seed_everything(cfg.SEED)
        distiller = build_distiller(cfg, common.data, plan.teacher_file, common.device)
        self.trainer, self.bank = build_trainer(cfg, distiller, common, plan.path, plan.teacher_file)
        self.folder = RunFolder(plan.path, resume)
        closing.callback(self.folder.close)
        closing.callback(self.trainer.journal.close)
        self.source = ""
        if self.folder.resumed:
            self.folder.check_config(cfg)
            self.source = restore(self.trainer, plan.path)

    def start(self) -> Recorder:
        """Write what the run is, and say it."""
        plan, cfg, trainer, common = self.plan, self.plan.cfg, self.trainer, self.common
        self.folder.write_config(cfg, plan.teacher_file)
        resumed, origin = self.folder.resumed, trainer.origin
        self.folder.write_environment(common.device, cfg.SEED, resumed, origin, common.students, trainer.epoch)
        wandb_run = start_wandb(cfg.EXPERIMENT.PROJECT, plan.path.name, cfg) if cfg.LOG.WANDB else None
        recorder = Recorder(
            plan.path, cfg.SOLVER.EPOCHS, trainer.epoch, trainer.log_bytes, wandb_run, plan.label, plan.place
        )
        self.closing.callback(recorder.close)
        introduce(cfg, recorder, trainer, common.data, common.device, plan.teacher_file, self.bank, self.source)
        if common.device.type == "cuda" and cfg.SOLVER.AMP == "fp16" and cfg.SOLVER.STEP != "eager":
            recorder.say("steps run one operation at a time, not as a graph: fp16's scaler looks at every one")
        return recorder


OUT_OF_MEMORY = "out of memory|CPUAllocator|STATUS_ALLOC_FAILED"


@contextlib.contextmanager
def failures(cfg: CfgNode) -> Iterator[None]:
    """What the machine refuses, in a line that says what to try."""
    try:
        yield
    except OSError as error:
        where = error.filename or Path(cfg.LOG.PREFIX)
        raise RunFailed(
            f"{where}: {error.strerror or error}; mend that, and --resume auto goes on with what is kept"
        ) from None
    except (MemoryError, RuntimeError) as error:
        text = str(error).split("\n")[0]
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or re.search(OUT_OF_MEMORY, text):
            sizes = f"SOLVER.BATCH_SIZE {cfg.SOLVER.BATCH_SIZE}, DATASET.TEST.BATCH_SIZE {cfg.DATASET.TEST.BATCH_SIZE}"
            raise RunFailed(f"out of memory on {cfg.DEVICE} with {sizes}; halve them, or set SOLVER.AMP bf16") from None
        if "deterministic" in text and cfg.DETERMINISTIC:
            raise RunFailed(f"{cfg.DISTILLER.TYPE} cannot run with DETERMINISTIC True here: {text}") from None
        raise


def restore(trainer: Trainer, path: Path) -> str:
    """Bring `trainer` to where the run in the folder `path` has come: to its journal's step, where that is ahead of the
    newest whole checkpoint, else to that. Returns words about the former.
    """
    kept, problem = trainer.journal.read()
    if has_checkpoint(path):
        load_checkpoint(trainer, path)
    elif kept is None or kept["epoch"] >= trainer.epochs:
        reason = problem or f"{path}: its journal is of an epoch behind SOLVER.EPOCHS {trainer.epochs}"
        raise UserError(f"--resume: {reason}, and there is no checkpoint; start a new run without --resume")
    if kept is None:
        if problem:
            say(f"warning: {problem}; going on from the last checkpoint")
        return ""
    if not (trainer.epoch, trainer.done) < place(kept) or kept["epoch"] >= trainer.epochs:
        return ""
    try:
        trainer.load_state(kept, trainer.journal.paths[0].with_suffix(""))
    except UserError as error:
        if not has_checkpoint(path):
            raise
        say(f"warning: {error.lines[0]}; going on from the last checkpoint")
        load_checkpoint(trainer, path)
        return ""
    return ", from the journal"


def load_checkpoint(trainer: Trainer, path: Path) -> None:
    """Bring `trainer` to the newest checkpoint in the run folder `path` that is whole: `latest`, else `previous`."""
    try:
        trainer.load_state(checkpoint.load(path / "latest"), path / "latest")
    except UserError as error:
        damaged = isinstance(error, DamagedFile) or not (path / "latest").exists()
        if not (damaged and (path / "previous").exists()):
            raise
        reason = error.lines[0]
        trainer.load_state(checkpoint.load(path / "previous"), path / "previous")
        if (path / "latest").exists():
            os.replace(path / "latest", path / "latest.damaged")
        link(path / "previous", path / "latest")  # before it is rotated away
        say(f"warning: {reason}; going on from the checkpoint before it, after epoch {trainer.epoch}")
    if trainer.epoch > trainer.epochs:
        raise UserError(f"--resume: {trainer.epoch} epochs are done, more than SOLVER.EPOCHS {trainer.epochs}")


def introduce(
    cfg: CfgNode,
    recorder: Recorder,
    trainer: Trainer,
    data: ImageSet,
    device: torch.device,
    teacher_file: Path | None,
    bank: str,
    source: str = "",
) -> None:
    say_once = recorder.log if recorder.place else recorder.say  # what is true of all students of the process
    if trainer.epoch or trainer.done:
        inside = f", {trainer.done} steps into the next" * bool(trainer.done)
        recorder.say(f"resumed after epoch {trainer.epoch} of {trainer.epochs}{inside}{source}")
    else:
        method, teacher = cfg.DISTILLER.TYPE, cfg.DISTILLER.TEACHER
        pair = cfg.DISTILLER.STUDENT if method == "NONE" else f"{teacher} -> {cfg.DISTILLER.STUDENT}"
        recorder.say(
            f"{method}: {pair} on {cfg.DATASET.TYPE} ({len(data.train_labels):,} + {len(data.test_labels):,} images, "
            f"{data.num_classes} classes), {device}, {cfg.SOLVER.AMP} autocast, seed {cfg.SEED}, in {trainer.folder}"
        )
        if teacher_file:
            say_once(f"teacher: {teacher_file}")
    if cfg.SOLVER.AMP == "bf16" and not has_bf16(device):
        say_once(f"this {device.type} has no bfloat16 arithmetic: SOLVER.AMP none would be several times faster")
    if trainer.step.forward is not None:
        say_once(f"steps are compiled from epoch {trainer.step.compiled_from} on, which takes a minute or two there")
    if bank and trainer.epoch < trainer.epochs:
        say_once(bank)
    if not (trainer.epoch or trainer.done):
        recorder.log(describe(cfg).rstrip())


def replay(file: Path) -> tuple[str, str]:
    """The step that a stopped run kept in `file`, once more: (what goes bad first, empty if nothing; its losses)."""
    kept = checkpoint.load(file)
    try:
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as text:
            text.write(kept["config"])
            text.flush()
            cfg = load(text.name)  # plug-ins and all
        batch, epoch, model, rng = Batch(**kept["batch"]), kept["epoch"], kept["model"], kept["rng"]
        logits = kept.get("logits_teacher")
        device = resolve_device(cfg.DEVICE)
        data = load_dataset(cfg.DATASET.TYPE, cfg.DATASET.ROOT)
        distiller = build_distiller(cfg, data, None, device)
        distiller.load_state_dict(model)
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: is no batch that a stopped run has kept ({reason})") from None
    torch.set_rng_state(rng)
    batch = Batch(*(value.to(device) for value in batch))
    logits = None if logits is None else logits.to(device)
    bad, losses = first_bad_tensor(distiller.train(), batch, epoch, cfg.SOLVER.AMP, logits)
    return bad, describe_losses(losses)


def build_distiller(cfg: CfgNode, data: ImageSet, teacher_file: Path | None, device: torch.device) -> nn.Module:
    """The method on `device`, its student freshly initialised, its teacher too or loaded from `teacher_file`."""
    student = build_model(cfg.DISTILLER.STUDENT, data.num_classes)
    if cfg.DISTILLER.TYPE == "NONE":
        return prepare_parts(distiller_dict["NONE"](student), device)
    teacher = build_model(cfg.DISTILLER.TEACHER, data.num_classes)
    if teacher_file:
        checkpoint.load_weights(teacher, cfg.DISTILLER.TEACHER, data.num_classes, teacher_file)
    cls = distiller_dict[cfg.DISTILLER.TYPE]
    offered = {"num_data": len(data.train_labels), "labels": data.train_labels}
    wanted = inspect.signature(cls).parameters
    arguments = {name: value for name, value in offered.items() if name in wanted}
    refuse_unused(cfg)
    distiller = cls(student, teacher, cfg, **arguments)
    return prepare_parts(distiller, device)


def refuse_unused(cfg: CfgNode) -> None:
    """Raises UserError where the configuration asks of the method what it does not do. (NONE may be a teacher's, with
    its student's settings.)
    """
    method = cfg.DISTILLER.TYPE
    if method == "NONE":
        return
    cls = distiller_dict[method]
    rule = "EXPERIMENT.LOGIT_STAND" if cfg.EXPERIMENT.LOGIT_STAND else "TEMPERATURE.RULE"
    if (cfg.TEMPERATURE.RULE or cfg.EXPERIMENT.LOGIT_STAND) and not issubclass(cls, RuleDistiller):
        takers = [name for name, taker in distiller_dict.items() if issubclass(taker, RuleDistiller)]
        raise UserError(f"{rule}: {method} takes no temperature rule; leave it out, or use {', '.join(sorted(takers))}")
    if cfg.TEMPERATURE.PART != "all" and not getattr(cls, "has_parts", False):
        raise UserError(f"TEMPERATURE.PART: {method} has no parts; leave it out, or use KD, DTKD or DKD")


def prepare_parts(distiller: nn.Module, device: torch.device) -> nn.Module:
    for part in (distiller.student, getattr(distiller, "teacher", None)):
        if part is not None:
            prepare(part, device)
    return distiller.to(device)


def build_model(name: str, num_classes: int) -> nn.Module:
    return cifar_model_dict[name][0](num_classes=num_classes)


def build_trainer(
    cfg: CfgNode, distiller: nn.Module, common: Common, folder: Path, teacher_file: Path | None = None
) -> tuple[Trainer, str]:
    """The trainer, and a line about its teacher's bank."""
    solver, teacher, data, device = cfg.SOLVER, getattr(distiller, "teacher", None), common.local, common.device
    augment = data.augment if cfg.DATASET.AUGMENT == "auto" else cfg.DATASET.AUGMENT
    statistics = data.mean, data.std
    train_batches = Batches(
        data.train_images, data.train_labels, *statistics, solver.BATCH_SIZE, device, augment, cfg.SEED
    )
    together = images_together(cfg.DATASET.TEST.BATCH_SIZE, data.test_images.shape[1], device)
    test_batches = Batches(data.test_images, data.test_labels, *statistics, together, device)
    parameters = distiller.get_learnable_parameters()
    if solver.TRAINER == "dot":
        optimizer = DOT(parameters, solver.MOMENTUM, solver.WEIGHT_DECAY, solver.DOT.DELTA)
    else:
        optimizer = sgd(parameters, solver.MOMENTUM, solver.WEIGHT_DECAY)
    origin = {"data": common.digest, "teacher": checkpoint.digest(teacher.state_dict()) if teacher is not None else ""}
    logits, bank = common.teachers.logits_of(
        cfg, distiller, train_batches, teacher_file, origin, solver.EPOCHS, data.num_classes
    )
    forward, refusal = compiled_form(cfg, distiller, device, solver.EPOCHS * len(train_batches))
    later = 2 if solver.STEP == "auto" else 1  # a run's first step comes at once
    step = Step(distiller, optimizer, device, solver.AMP, solver.NAN_POLICY, forward, later)
    step.refusal = refusal
    trainer = Trainer(
        distiller,
        step,
        MultiStep(solver.LR, tuple(solver.LR_DECAY_STAGES), solver.LR_DECAY_RATE),
        train_batches,
        test_batches,
        solver.EPOCHS,
        folder,
        cfg.LOG.SAVE_CHECKPOINT_FREQ,
        cfg.LOG.TENSORBOARD_FREQ,
        cfg.LOG.TEMPERATURE,
        origin,
        cfg.dump(),
        logits,
        uses_graph(cfg, device),
        common.students == 1,
        common.stop,
        Journal(folder, identity(cfg), SHARE / common.students, 0.0 if device.type == "cpu" else INTERVAL),
    )
    return trainer, bank


def find_teacher(cfg: CfgNode, path: Path, resume: bool) -> Path:
    """The teacher's checkpoint; trained first if it is missing and DISTILLER.TRAIN_TEACHER says so. `path`: the
    student's run folder, which has to be writable before a teacher is trained for it, and which under `resume` may
    name the teacher that it was started with.
    """
    name = cfg.DISTILLER.TEACHER
    published, trained = teacher_files(cfg)
    chosen = expand(cfg.DISTILLER.TEACHER_CKPT) if cfg.DISTILLER.TEACHER_CKPT else None
    if chosen and os.path.isdir(chosen):
        raise UserError(f"DISTILLER.TEACHER_CKPT: {chosen} is a folder; name the checkpoint's file")
    train_it = cfg.DISTILLER.TRAIN_TEACHER
    before = []
    if resume and resumable(path):
        before = [Path(config.leaves(config.read(path / "config.yaml")).get("DISTILLER.TEACHER_CKPT", ""))]
    for file in [chosen] if chosen else [*before, published, *([trained] if train_it else [])]:
        if os.path.isfile(file):
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
    check_writable(path, "LOG.PREFIX")
    check_writable(target, "DISTILLER.TEACHER_CKPT")
    return train_teacher(teacher_config(cfg), target)


def teacher_files(cfg: CfgNode) -> tuple[Path, Path]:
    """Where a teacher lies that no TEACHER_CKPT names: the published one; the one that TRAIN_TEACHER trains."""
    published = Path(default_checkpoint(cfg.DISTILLER.TEACHER, cfg.DATASET.TYPE))
    return published, published.with_name(f"{teacher_config(cfg).EXPERIMENT.NAME}.pth")


def teacher_config(cfg: CfgNode) -> CfgNode:
    """Of the teacher trained alone with this configuration's SOLVER, data and seed. Its name tells all of them apart,
    so a teacher that was trained otherwise is never taken for it.
    """
    alone = cfg.clone()
    alone.defrost()
    alone.overrides.clear()
    alone.DISTILLER.TYPE, alone.DISTILLER.STUDENT = "NONE", cfg.DISTILLER.TEACHER
    alone.SOLVER.TRAINER = "base"  # dot has nothing to separate without a teacher
    root = cfg.DATASET.ROOT if cfg.DATASET.TYPE == "npz" else ""
    solver = {key: value for key, value in config.leaves(alone.SOLVER).items() if key != "STEP"}
    key = checkpoint.digest([solver, root, cfg.DATASET.AUGMENT])[:8]
    tag = f"none,{cfg.DISTILLER.TEACHER},{cfg.DATASET.TYPE},{cfg.SOLVER.EPOCHS}-epochs,seed{cfg.SEED},{key}"
    alone.EXPERIMENT.NAME = alone.EXPERIMENT.TAG = tag
    alone.freeze()
    return alone


def train_teacher(alone: CfgNode, target: Path) -> Path:
    """Train the teacher and store its last epoch at `target`. An interrupted training goes on where it stopped; one
    that another process is at is waited for.
    """
    name = alone.DISTILLER.STUDENT
    say(f"the teacher {name} comes first, for {alone.SOLVER.EPOCHS} epochs, by method NONE")
    while True:
        try:
            result = train(alone, resume="auto")
            break
        except FolderInUse as error:
            say(f"{error.lines[0].split(';')[0]}; waiting for that teacher")
            while os.path.exists(run_folder(alone)) and in_use(run_folder(alone)):
                time.sleep(1)
        if target.is_file():
            return target
    if result["signal"]:
        raise Preempted(f"stopped by {result['signal']} after the teacher's training; --resume auto goes on there")
    target.parent.mkdir(parents=True, exist_ok=True)
    state = checkpoint.load(Path(result["folder"]) / "student_latest")
    checkpoint.save(state | {"best_acc": result["best_acc"]}, target)
    say(f"stored the teacher's last epoch at {target}")
    return target
