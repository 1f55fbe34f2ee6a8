"""A run from its first check to its result."""

import contextlib
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from yacs.config import CfgNode

from mdistiller.bank.pool import check_form
from mdistiller.config import Config, activate, check, in_place_of_built_in, needs_teacher, teacher_names, used_names
from mdistiller.dataset import load_dataset
from mdistiller.device import check_amp, has_bf16, seed_everything, set_determinism
from mdistiller.distillers import distiller_dict
from mdistiller.engine.build import Workspace, build_trainer, check_last_batch, rehearse
from mdistiller.engine.cfg import describe, unread_overrides
from mdistiller.engine.method import build_distiller, prepare_parts
from mdistiller.engine.ranks import here
from mdistiller.engine.refusals import refuse_unused
from mdistiller.engine.stepmode import check_step
from mdistiller.engine.tasks import TASKS
from mdistiller.engine.teachers import find_teachers
from mdistiller.errors import RunFailed, UserError
from mdistiller.registry import is_ours, name_and_file
from mdistiller.runs import checkpoint
from mdistiller.runs.folder import RunFolder, resumable, run_folder
from mdistiller.runs.recorder import Recorder, Unrecorded, require_wandb, start_wandb
from mdistiller.terminal import counted, silence


def train(cfg: Config, resume: bool | str = False, workspace: Workspace | None = None) -> dict:
    """Train what `cfg` says, in the folder that it and its overrides name.

    `resume`: True goes on with that run, "auto" does so if there is one. `workspace`: data and networks that the caller
    brings. Returns last_acc, best_acc, best_epoch, epochs, the folder, the rows of metrics.jsonl ("history"), the
    trained "student", and "mean" and "std" of the training images. Raises UserError before anything is written if a
    part is missing, Preempted where a signal stopped the run, RunFailed where the machine or the loss let it down.
    """
    with silence(not here().first):
        request = RunRequest(cfg)
        request.check(resume, workspace)
        workspace = workspace or open_workspace(cfg)
        request.find_teacher(resume, workspace)
        with failures(cfg, workspace.kept), entered(workspace) as closing:
            run = OpenRun(request, resume, workspace, closing)
            return run.trainer.fit(run.start()) | run.outcome()


class RunRequest:
    """A run that is asked for: its configuration, folder and teacher. `label` stands before its lines in the terminal,
    `bar_row` is its progress bar's, from 0, where several runs share a terminal.
    """

    def __init__(self, cfg: Config, label: str = "", bar_row: int = 0):
        activate(cfg.plugins)  # another configuration may have been loaded since
        self.cfg, self.label, self.bar_row = cfg, label, bar_row
        self.path = run_folder(cfg)
        self.teacher_file: Path | None = None

    def check(self, resume: bool | str, workspace: Workspace | None = None) -> None:
        """Raise UserError where the machine or the folder cannot do it. `workspace`: what the caller brings, whose
        networks and data have names that no configuration knows.
        """
        if not (isinstance(resume, bool) or resume == "auto"):
            raise UserError(f"resume: must be False, True or 'auto'; got {resume!r:.100}")
        if workspace is None:
            check(self.cfg)
        device = here().device(self.cfg.DEVICE)
        check_amp(self.cfg.SOLVER.AMP, device)
        check_step(self.cfg, device)
        refuse_unused(self.cfg)  # before a teacher is trained for it
        if self.cfg.LOG.WANDB:
            require_wandb()
        if resume is True and not here().from_first(lambda: resumable(self.path)):
            raise UserError(
                f"--resume: there is no run in {self.path}; start it without --resume, or with --resume auto"
            )

    def find_teacher(self, resume: bool | str, workspace: Workspace) -> None:
        """Find the teacher's checkpoint, or train it, unless the caller brings the teacher with its weights; those are
        kept as DISTILLER.TEACHER_CKPT when the run begins. Raises UserError before, where a batch cannot be trained on.
        """
        with failures(self.cfg):
            check_last_batch(self.cfg, workspace)
            rehearsal = functools.cache(functools.partial(rehearse, self.cfg, workspace))  # once is enough
            if not all(map(is_ours, distiller_dict[self.cfg.DISTILLER.TYPE].__mro__)):  # it may fail at its first step
                rehearsal()
            if not needs_teacher(self.cfg.DISTILLER.TYPE):
                return
            check_form(self.cfg, workspace.local.training_batches(self.cfg))
            if workspace.networks.teacher is not None:
                self.teacher_file = Path(self.cfg.DISTILLER.TEACHER_CKPT) if self.cfg.DISTILLER.TEACHER_CKPT else None
                return
            self.teacher_file, self.cfg = find_teachers(self.cfg, self.path, bool(resume), train, rehearsal)


def open_workspace(cfg: CfgNode, students: int = 1) -> Workspace:
    """Return what the runs of this process share, with the images that `cfg` names. Raises UserError without them."""
    ranks = here()
    with failures(cfg):
        data = ranks.after_first(lambda: load_dataset(cfg.DATASET.TYPE, cfg.DATASET.ROOT, cfg.DATASET))
    return Workspace(data, ranks.device(cfg.DEVICE), students)


@contextlib.contextmanager
def entered(workspace: Workspace) -> Iterator[contextlib.ExitStack]:
    """Make the runs' device CUDA's current one while they train, and close at the end what they open."""
    with contextlib.ExitStack() as closing:
        if workspace.device.type == "cuda":
            closing.enter_context(torch.cuda.device(workspace.device))
        closing.callback(workspace.teachers.close)
        yield closing


class OpenRun:
    """The trainer of `request`, ready or brought back to where it stopped, with its folder's lock. Nothing that an
    earlier run left is changed before `start`, unless it is set aside. `closing` gives back what is held. `distiller`:
    one that the caller brings, with its networks.
    """

    changed = ""  # of the machine, since the session before

    def __init__(
        self,
        request: RunRequest,
        resume: bool | str,
        workspace: Workspace,
        closing: contextlib.ExitStack,
        distiller: nn.Module | None = None,
    ):
        self.request, self.workspace, self.closing = request, workspace, closing
        cfg = request.cfg
        set_determinism(cfg.DETERMINISTIC)
        seed_everything(cfg.SEED)
        if distiller is None:
            given = cfg, workspace.data, request.teacher_file, workspace.device, workspace.networks
            distiller = build_distiller(*given, whole_teacher=not cfg.DISTILLER.TEACHER_SHARD)
        else:
            prepare_parts(distiller, workspace.device)
        self.trainer, self.bank = build_trainer(cfg, distiller, workspace, request.path, request.teacher_file)
        ranks = workspace.ranks
        self.resumed = ranks.from_first(lambda: self.open_folder(resume))
        if self.resumed:
            self.trainer.state.load(*ranks.from_first(self.trainer.keeper.restore))
            if self.trainer.state.epoch > cfg.SOLVER.EPOCHS:
                raise UserError(
                    f"--resume: {counted(self.trainer.state.epoch, 'epoch')} done, more than SOLVER.EPOCHS "
                    f"{cfg.SOLVER.EPOCHS}; set as many or more"
                )
        own = [value for name, value in distiller.named_parameters() if not name.startswith("teacher.")]
        ranks.broadcast([*own, *self.trainer.step.buffers()])

    def open_folder(self, resume: bool | str) -> bool:
        """Lock the run's folder. Return whether a run that is there goes on."""
        self.folder = RunFolder(self.request.path, resume)
        self.closing.callback(self.folder.close)
        if self.folder.resumed:
            self.folder.check_config(self.request.cfg)
        return self.folder.resumed

    def start(self) -> Recorder | Unrecorded:
        """Write what the run is, and say it. Return what its figures go to, on rank 0 alone to files."""
        recorder: list[Recorder] = []
        self.workspace.ranks.from_first(lambda: recorder.append(self.record()))
        result = recorder[0] if recorder else Unrecorded()
        self.rows = result.rows
        return result

    def record(self) -> Recorder:
        """Write what the run is, and say it. Return what writes down its figures."""
        request, cfg, state = self.request, self.request.cfg, self.trainer.state
        given, file = self.workspace.networks.teacher, request.teacher_file
        if given is not None and file is not None and not file.exists():
            checkpoint.save({"model": {key: value.detach().cpu() for key, value in given.state_dict().items()}}, file)
        self.folder.write_config(cfg, request.teacher_file)
        session = {"students": self.workspace.students, "epoch": state.epoch}
        session |= {"processes": self.workspace.ranks.world} if self.workspace.ranks.world > 1 else {}
        origin = self.trainer.keeper.origin
        self.changed = self.folder.write_environment(
            self.workspace.device, cfg.SEED, self.folder.resumed, origin, session
        )
        wandb_run = start_wandb(cfg.EXPERIMENT.PROJECT, request.path.name, cfg) if cfg.LOG.WANDB else None
        recorder = Recorder(request.path, cfg.SOLVER.EPOCHS, state.epoch, state.log_bytes, wandb_run)
        recorder.label, recorder.bar_row, recorder.kept = request.label, request.bar_row, self.workspace.kept
        recorder.unit = {"tokens": "token"}.get(self.workspace.data.unit, "img")
        self.closing.callback(recorder.close)
        self.introduce(recorder)
        return recorder

    def outcome(self) -> dict:
        """Let the task leave what it leaves of a finished run. Return the run's folder, the rows of its epochs, its
        student and what its images are normalised by.
        """
        student, data = self.trainer.distiller.student, self.workspace.data
        if self.workspace.kept and self.workspace.ranks.first:
            given = self.trainer.distiller, self.workspace.local, self.request.cfg, self.request.path
            TASKS[data.task].leave(*given)
        shown = {"folder": str(self.request.path), "history": self.rows}
        return shown | {"student": student, "mean": data.mean, "std": data.std}

    def introduce(self, recorder: Recorder) -> None:
        """Say what the run is, or where it goes on; what is true of all students of the process once."""
        cfg, state, step, data = self.request.cfg, self.trainer.state, self.trainer.step, self.workspace.data
        device, fresh = self.workspace.device, not (state.epoch or state.done)
        say_once = recorder.log if recorder.bar_row else recorder.say
        if fresh:
            names = cfg.DISTILLER
            pair = f"{'+'.join(teacher_names(cfg))} -> {names.STUDENT}" if needs_teacher(names.TYPE) else names.STUDENT
            classes = TASKS[data.task].classes(data.num_classes)
            recorder.say(
                f"{names.TYPE}: {pair} on {cfg.DATASET.TYPE} ({len(data.train_labels):,} + {len(data.test_labels):,} "
                f"{data.unit}, {classes}), {device}, {cfg.SOLVER.AMP} autocast, seed {cfg.SEED}"
                + (f", in {self.request.path}" if self.workspace.kept else "")
            )
            if (world := self.workspace.ranks.world) > 1:
                statistics = "a batch's over all of them" if cfg.SOLVER.SYNC_BN else "each one's own"
                say_once(f"{world} processes share each batch of {cfg.SOLVER.BATCH_SIZE}; BatchNorm: {statistics}")
            for line in data.doubts():
                say_once(line)
            if unread := unread_overrides(cfg):
                say_once(unread)
            if self.request.teacher_file and self.workspace.kept:
                others = [name_and_file(text)[1] for text in names.ENSEMBLE]
                say_once(f"teacher: {', '.join(filter(None, [str(self.request.teacher_file), *others]))}")
        else:
            inside = f", {counted(state.done, 'step')} into the next" if state.done else ""
            recorder.say(f"resumed after epoch {state.epoch} of {cfg.SOLVER.EPOCHS}{inside}{self.changed}")
        for line in in_place_of_built_in(cfg.plugins, used_names(cfg)):
            say_once(line)
        stages = cfg.SOLVER.LR_DECAY_STAGES if cfg.SOLVER.SCHEDULE == "multistep" else ()
        if stages and min(stages) >= cfg.SOLVER.EPOCHS:
            say_once(f"SOLVER.LR_DECAY_STAGES {list(stages)} all lie behind SOLVER.EPOCHS: the rate never falls")
        if cfg.SOLVER.WARMUP >= cfg.SOLVER.EPOCHS:
            say_once(f"SOLVER.WARMUP {cfg.SOLVER.WARMUP:g} is all of SOLVER.EPOCHS: the rate only rises")
        if cfg.SOLVER.AMP == "bf16" and not has_bf16(device):
            say_once(f"this {device.type} has no bfloat16 arithmetic: SOLVER.AMP none would be several times faster")
        if step.forward is not None:
            say_once(f"steps are compiled from epoch {step.compiled_from} on, which takes a minute or two there")
        if device.type == "cuda" and cfg.SOLVER.AMP == "fp16" and cfg.SOLVER.STEP != "eager":
            say_once("steps run one operation at a time, not as a graph: fp16's scaler looks at every one")
        if self.bank and state.epoch < cfg.SOLVER.EPOCHS:
            say_once(self.bank)
        if fresh:
            recorder.log(describe(cfg).rstrip())


OUT_OF_MEMORY = "out of memory|CPUAllocator|STATUS_ALLOC_FAILED"


@contextlib.contextmanager
def failures(cfg: CfgNode, kept: bool = True) -> Iterator[None]:
    """Turn what the machine refuses into a line that says what to try. `kept`: whether the run's folder stays."""
    try:
        yield
    except OSError as error:
        where = error.filename or Path(cfg.LOG.PREFIX)
        goes_on = ", and --resume auto goes on with what is kept" if kept else " and start again"
        raise RunFailed(f"{where}: {error.strerror or error}; mend that{goes_on}") from None
    except (MemoryError, RuntimeError) as error:
        text = str(error).split("\n")[0]
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or re.search(OUT_OF_MEMORY, text):
            sizes = f"SOLVER.BATCH_SIZE {cfg.SOLVER.BATCH_SIZE}, DATASET.TEST.BATCH_SIZE {cfg.DATASET.TEST.BATCH_SIZE}"
            raise RunFailed(f"out of memory on {cfg.DEVICE} with {sizes}; halve them, or set SOLVER.AMP bf16") from None
        if "deterministic" in text and cfg.DETERMINISTIC:
            raise RunFailed(f"{cfg.DISTILLER.TYPE} cannot run with DETERMINISTIC True here: {text}") from None
        if lost := here().lost(error):
            raise lost from None
        raise
