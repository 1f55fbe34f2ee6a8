"""mdistiller's trainers, for code that makes or derives one. Where nothing is overridden they are a run like any other;
else a plain loop calls what is.
"""

import contextlib
import functools
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mdistiller.config import KEYS, Config, leaves
from mdistiller.dataset import Batch, Loader
from mdistiller.device import resolve_device, seed_everything
from mdistiller.engine.build import Workspace, build_optimizer
from mdistiller.engine.dot import DistillationOrientedTrainer
from mdistiller.engine.evaluator import scores_on_loader
from mdistiller.engine.run import OpenRun, RunRequest, entered, failures
from mdistiller.engine.solver import set_lr
from mdistiller.engine.state import RunState
from mdistiller.engine.step import Step
from mdistiller.engine.utils import AverageMeter, accuracy, adjust_learning_rate
from mdistiller.errors import TrainingDiverged, UserError
from mdistiller.models import freeze
from mdistiller.runs.folder import RunFolder, run_folder
from mdistiller.runs.keeper import Keeper
from mdistiller.runs.recorder import Recorder
from mdistiller.runs.stop import stops_early

PARTS = ("init_optimizer", "train_epoch", "train_iter", "log")  # what a subclass may override
# what the plain loop leaves to who overrides its parts
NOT_IN_THE_LOOP = (
    *(f"SOLVER.{name}" for name in ("CLIP", "EMA", "ACCUMULATE", "LABEL_SMOOTHING")),
    *(f"DATASET.{name}" for name in ("MIXUP", "CUTMIX")),
)
METERS = ("training_time", "data_time", "losses", "top1", "top5")


class ContrastiveBatch(NamedTuple):
    image: Tensor
    target: Tensor
    index: Tensor
    contrastive_index: Tensor  # (B, K + 1), first column the index


class Wrapped(nn.Module):
    """A distiller as the attribute `module` of another one, as under DataParallel."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, **kwargs):
        return self.module(**kwargs)


class BaseTrainer:
    """Trains `distiller`, bare or under DataParallel, in the folder LOG.PREFIX/`experiment_name`.

    A subclass may override `init_optimizer`, `train_iter`, `train_epoch` and `log`: they are then called by a plain
    loop on the batches of `train_loader`, whatever these are, with a checkpoint after each epoch.
    """

    trainer = "base"  # the optimizer's name in SOLVER.TRAINER

    def __init__(
        self,
        experiment_name: str,
        distiller: nn.Module,
        train_loader: DataLoader,
        val_loader: DataLoader,
        cfg: Config,
    ):
        self.cfg, self.train_loader, self.val_loader = cfg, train_loader, val_loader
        self.distiller = distiller if hasattr(distiller, "module") else Wrapped(distiller)
        freeze(self.distiller.module.student, cfg.SOLVER.FREEZE, cfg.DISTILLER.STUDENT)
        self.run_cfg = cfg.clone()
        self.run_cfg.defrost()
        self.run_cfg.EXPERIMENT.PROJECT, self.run_cfg.EXPERIMENT.NAME = os.path.split(experiment_name)
        self.run_cfg.overrides[:] = [("EXPERIMENT.NAME", self.run_cfg.EXPERIMENT.NAME)]
        self.run_cfg.SOLVER.TRAINER = self.trainer
        self.log_path = str(run_folder(self.run_cfg))
        self.best_acc = -1.0
        self.began, self.kept = time.monotonic(), 0  # the epoch's start; the last epoch that is kept
        self.optimizer = self.init_optimizer(cfg)

    def init_optimizer(self, cfg: Config) -> torch.optim.Optimizer:
        """Return the optimizer of the section SOLVER, at its first rate."""
        solver, parameters = cfg.SOLVER, self.distiller.module.get_learnable_parameters()
        if self.trainer == "dot":
            momenta = solver.MOMENTUM - solver.DOT.DELTA, solver.MOMENTUM + solver.DOT.DELTA
            return DistillationOrientedTrainer(parameters, solver.LR, *momenta, solver.WEIGHT_DECAY)
        optimizer = build_optimizer(solver, parameters)
        set_lr(optimizer, solver.LR)
        return optimizer

    def train(self, resume: bool = False) -> dict:
        """Train until the last epoch; `resume`: go on with the run in the folder. Return last_acc, best_acc,
        best_epoch and epochs.
        """
        own = [name for name in PARTS if getattr(type(self), name) is not getattr(BaseTrainer, name)]
        if not all(isinstance(loader, Loader) for loader in (self.train_loader, self.val_loader)):
            own.append("loaders of its own")
        elif self.train_loader.dataset.contrast is not None:  # a run would draw others
            own.append("contrastive_index")
        result = self._loop(resume, ", ".join(own)) if own else self._run(resume)
        self.best_acc = result["best_acc"]
        return result

    def _run(self, resume: bool) -> dict:
        """Train as tools/train_ours.py does, on the images and by the batches of the loaders."""
        cfg, batches = self.run_cfg, self.train_loader.dataset.batches
        cfg.SOLVER.BATCH_SIZE, cfg.DATASET.TEST.BATCH_SIZE = batches.batch_size, self.val_loader.batch_size
        cfg.DATASET.AUGMENT, cfg.SEED = batches.augment, batches.seed
        cfg.freeze()
        request = RunRequest(cfg)
        request.check(resume)
        workspace = Workspace(self.train_loader.image_set, resolve_device(cfg.DEVICE))
        with failures(cfg), entered(workspace) as closing:
            run = OpenRun(request, resume, workspace, closing, self.distiller.module)
            return run.trainer.fit(run.start()) | run.outcome()

    def _loop(self, resume: bool, own: str) -> dict:
        """Call `train_epoch` for each epoch. `own`: what is not this package's, for the line that says so."""
        cfg, solver = self.run_cfg, self.run_cfg.SOLVER
        cfg.freeze()
        RunRequest(cfg).check(resume)
        if unread := [f"{key} {value}" for key in NOT_IN_THE_LOOP if (value := leaves(cfg)[key]) != KEYS[key].default]:
            raise UserError(
                f"{type(self).__name__} brings {own}: its plain loop does not read {', '.join(unread)}; leave "
                f"{'it' if len(unread) == 1 else 'them'} out, or bring nothing"
            )
        with failures(cfg), contextlib.ExitStack() as closing:
            seed_everything(cfg.SEED)
            folder = RunFolder(Path(self.log_path), resume)
            closing.callback(folder.close)
            if folder.resumed:
                folder.check_config(cfg)
                self.state.load(*self.keeper.restore())
                self.best_acc = self.state.best_acc
            folder.write_config(cfg, None)
            session = {"students": 1, "epoch": self.state.epoch}
            folder.write_environment(self.step.device, cfg.SEED, folder.resumed, {}, session)
            closing.callback(self.recorder.close)
            self.recorder.say(
                f"{type(self).__name__} brings {own}: a plain loop, without the bank of the teacher's logits, compiled "
                "steps and checkpoints inside an epoch"
            )
            while (epoch := self.state.epoch) < solver.EPOCHS:
                if stops_early(solver.EARLY_STOP, epoch, self.state.best_epoch):
                    break
                self.train_epoch(epoch + 1)
                self._end(epoch + 1)  # of an overridden one; else it is done already
            self.recorder.finish(self.state.result() | {"stopped_early": epoch < solver.EPOCHS})
        return self.state.result()

    def _end(self, epoch: int) -> None:
        """Keep what the epoch leaves, once."""
        if self.kept == epoch:
            return
        self.kept = self.state.epoch = epoch
        self.state.start_epoch()
        self.recorder.events.flush()
        self.state.log_bytes = self.recorder.size
        self.keeper.save_epoch(epoch, self.state.best_epoch == epoch, self.state.dump(), self.state.student())
        self.began = time.monotonic()

    @functools.cached_property
    def step(self) -> Step:
        """The training step, of the optimizer that is there at its first use."""
        device = next(self.distiller.parameters()).device
        solver = self.cfg.SOLVER
        return Step(self.distiller.module, self.optimizer, device, solver.AMP, solver.NAN_POLICY)

    @functools.cached_property
    def state(self) -> RunState:
        return RunState(self.step)

    @functools.cached_property
    def keeper(self) -> Keeper:
        return Keeper(Path(self.log_path), every_epochs=self.cfg.LOG.SAVE_CHECKPOINT_FREQ)

    @functools.cached_property
    def recorder(self) -> Recorder:
        """The recorder that figures go to. It is opened at its first use, which may be a subclass's own `train`."""
        Path(self.log_path).mkdir(parents=True, exist_ok=True)
        return Recorder(Path(self.log_path), self.cfg.SOLVER.EPOCHS, self.state.epoch, self.state.log_bytes)

    @functools.cached_property
    def tf_writer(self) -> object:
        """A TensorBoard writer for figures of one's own."""
        from tensorboardX import SummaryWriter

        return SummaryWriter(os.path.join(self.log_path, "train.events"))

    def train_epoch(self, epoch: int) -> None:
        """Train on every batch, test, log, and keep checkpoints."""
        lr = adjust_learning_rate(epoch, self.cfg, self.optimizer)
        meters = {name: AverageMeter() for name in METERS}
        self.distiller.train()
        if isinstance(self.train_loader, Loader):
            self.train_loader.set_epoch(epoch)
        for data in self.train_loader:
            self.train_iter(data, epoch, meters)
        scores = scores_on_loader(self.val_loader, self.distiller)
        if not math.isfinite(scores.loss):
            raise TrainingDiverged(f"epoch {epoch}: the test loss is {scores.loss}; lower SOLVER.LR")
        train = {"train_acc": meters["top1"].avg, "train_loss": meters["losses"].avg}
        test = {"test_acc": scores.top1, "test_acc_top5": scores.top5, "test_loss": scores.loss}
        self._count(epoch, scores.top1)
        self.log(lr, epoch, train | test)
        self._end(epoch)

    def train_iter(self, data: Sequence[Tensor], epoch: int, train_meters: Mapping[str, AverageMeter]) -> str:
        """Train on one batch, (image, target, index) or CRD's four, and add its figures to `train_meters`. Return a
        line about them.
        """
        if not (len(data) in (3, 4) and all(isinstance(part, Tensor) for part in data)):
            raise UserError(
                "train_iter: takes (image, target, index[, contrastive_index]); override it for other batches"
            )
        begin, step, logits = time.monotonic(), self.step, []
        batch = (Batch if len(data) == 3 else ContrastiveBatch)(*(part.to(step.device) for part in data))
        step.meter.reset()
        hook = step.distiller.register_forward_hook(lambda _module, _inputs, output: logits.append(output[0].detach()))
        try:
            step(batch, epoch)
        finally:
            hook.remove()
        loss, size = step.meter.read()["loss"], len(batch.target)
        if step.bad_step() >= 0:
            raise TrainingDiverged(f"epoch {epoch}: the loss or its gradient is not finite; lower SOLVER.LR")
        top1, top5 = (float(value) for value in accuracy(logits[0], batch.target, (1, 5)))
        if math.isfinite(loss):  # NaN: a step that is left out
            for name, value in (("losses", loss), ("top1", top1), ("top5", top5)):
                train_meters[name].update(value, size)
        train_meters["training_time"].update(time.monotonic() - begin)
        return f"epoch {epoch}  loss {train_meters['losses'].avg:.4f}  top-1 {train_meters['top1'].avg:.2f}"

    def log(self, lr: float, epoch: int, log_dict: Mapping[str, float]) -> None:
        """Record an epoch: train_acc, train_loss, test_acc, test_acc_top5, test_loss, and what else there is."""
        figures = {name: float(value) for name, value in log_dict.items() if value is not None}
        self._count(epoch, figures["test_acc"])
        seconds = time.monotonic() - self.began
        best = {"best_acc": self.state.best_acc, "best_epoch": self.state.best_epoch}
        speed = {"images_per_second": len(self.train_loader.dataset) / seconds, "epoch_seconds": seconds}
        row = {"epoch": epoch, "lr": float(lr), "train_losses": {}, **figures, **best, **speed}
        self.recorder.end_epoch(row, (self.cfg.SOLVER.EPOCHS - epoch) * seconds)

    def _count(self, epoch: int, accuracy: float) -> None:
        """Count the epoch with its test accuracy, once."""
        if self.state.epoch < epoch:
            self.state.end_epoch(float(accuracy))
            self.best_acc = self.state.best_acc


class CRDTrainer(BaseTrainer):
    """BaseTrainer: a batch may have CRD's contrastive_index besides."""


class DOT(BaseTrainer):
    """BaseTrainer by DOT's optimizer."""

    trainer = "dot"


class CRDDOT(DOT):
    """DOT on CRD's batches."""


trainer_dict = {"base": BaseTrainer, "crd": CRDTrainer, "dot": DOT, "crd_dot": CRDDOT}
