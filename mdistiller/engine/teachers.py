"""Where a run's teacher comes from: a checkpoint that is there, or one that is trained first."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from yacs.config import CfgNode

from mdistiller import config
from mdistiller.engine.ranks import here
from mdistiller.errors import FolderInUse, Preempted, UserError
from mdistiller.files import expand
from mdistiller.models import default_checkpoint, imagenet_model_dict
from mdistiller.models.detectors import WHOLE
from mdistiller.registry import name_and_file, task_of
from mdistiller.runs import checkpoint
from mdistiller.runs.folder import check_writable, in_use, resumable, run_folder
from mdistiller.terminal import counted, say

# keys of SOLVER that the names of all trained teachers tell; of those that came later, what is not at its default
FIRST = (
    "TRAINER", "DOT.DELTA", "BATCH_SIZE", "EPOCHS", "LR", "LR_DECAY_STAGES", "LR_DECAY_RATE", "WEIGHT_DECAY",
    "MOMENTUM", "TYPE", "AMP", "NAN_POLICY",
)  # fmt: skip


def find_teacher(
    cfg: CfgNode, path: Path, resume: bool, train: Callable[..., dict], rehearse: Callable[[], None]
) -> Path:
    """Return the teacher's checkpoint. Where it is missing and DISTILLER.TRAIN_TEACHER says so, it is trained first, by
    `train(cfg, resume="auto")`, unless `rehearse` raises.

    `path` is the student's run folder, which has to be writable before a teacher is trained for it, and which under
    `resume` may name the teacher that the run was started with. Raises UserError where there is no teacher.
    """
    published, trained = teacher_files(cfg)
    given, tuned = cfg.DISTILLER.TEACHER_CKPT, fine_tunes(cfg)
    if checkpoint.is_source(given) and not tuned:
        return Path(given)
    chosen = expand(given) if given and not tuned else None
    if chosen and os.path.isdir(chosen):
        raise UserError(f"DISTILLER.TEACHER_CKPT: {chosen} is a folder; name the checkpoint's file")
    train_it = cfg.DISTILLER.TRAIN_TEACHER
    files = [chosen] if chosen else [*([] if tuned else [published]), *([trained] if train_it else [])]
    if resume and resumable(path) and not chosen:
        before = config.leaves(config.read(path / "config.yaml")).get("DISTILLER.TEACHER_CKPT", "")
        files.insert(0, Path(before))
    found = here().from_first(lambda: next(filter(os.path.isfile, files), None))
    if found:
        return found
    own = is_torchvisions(cfg) or cfg.DISTILLER.TEACHER.startswith("hf:")  # which come with weights
    if own and not (chosen or train_it):
        return Path(checkpoint.PRETRAINED)
    if chosen or not train_it:
        raise _missing(cfg, chosen, published, trained)
    check_writable(path, "LOG.PREFIX")
    check_writable(trained, "DISTILLER.TEACHER_CKPT")
    rehearse()
    return train_teacher(teacher_config(cfg), trained, train)


def _missing(cfg: CfgNode, chosen: Path | None, published: Path, trained: Path) -> UserError:
    """Return what to raise where there is no teacher's checkpoint, neither the `chosen` one nor another."""
    name = cfg.DISTILLER.TEACHER
    if chosen and cfg.DISTILLER.TRAIN_TEACHER:
        return UserError(
            f"DISTILLER.TEACHER_CKPT: there is no file {chosen}; name one that is there, or leave it out: "
            f"DISTILLER.TRAIN_TEACHER stores the teacher at {trained}"
        )
    near = [] if chosen else sorted(str(file) for file in published.parent.glob("*.pth"))
    fetch = ["  download  python3 tools/download.py teachers   (mdistiller's released ones, for cifar100)"]
    detector = task_of(cfg.DATASET.TYPE) == "detection"
    if ":" in name or detector:
        fetch = ["  fetch     DISTILLER.TEACHER_CKPT pretrained   (the library's own weights)"]
    if detector and name.removeprefix("tv:") not in WHOLE:
        fetch = []
    return UserError(
        f"no checkpoint of the teacher {name} at {chosen or published}; do one of these:",
        *fetch,
        f"  point     DISTILLER.TEACHER_CKPT {near[0] if near else 'path/to/checkpoint.pth'}",
        "  train     DISTILLER.TRAIN_TEACHER True   (trains it first, by method NONE, and stores it)",
    )


def fine_tunes(cfg: CfgNode) -> bool:
    """Return whether the teacher is trained from weights that TEACHER_CKPT names."""
    names = cfg.DISTILLER
    given = checkpoint.is_source(names.TEACHER_CKPT) or (names.NEW_HEAD and names.TEACHER_CKPT)
    return bool(names.TRAIN_TEACHER and given)


def is_torchvisions(cfg: CfgNode) -> bool:
    """Return whether the teacher is an ImageNet ResNet, of which mdistiller takes torchvision's weights."""
    name = cfg.DISTILLER.TEACHER
    return cfg.DATASET.TYPE == "imagenet" and name.startswith("ResNet") and name in imagenet_model_dict


def find_teachers(
    cfg: CfgNode, path: Path, resume: bool, train: Callable[..., dict], rehearse: Callable[[], None]
) -> tuple[Path, CfgNode]:
    """Return the teacher's checkpoint, and `cfg` with the checkpoint of each of DISTILLER.ENSEMBLE beside its name: the
    one that is written there, under `resume` the one that the run in `path` was started with, else what `find_teacher`
    finds for that teacher. Raises as that does.
    """
    before = config.leaves(config.read(path / "config.yaml")) if resume and resumable(path) else {}
    started, places = before.get("DISTILLER.ENSEMBLE", []), []
    for number, text in enumerate(cfg.DISTILLER.ENSEMBLE):
        name, file = name_and_file(text)
        if not file and started[number : number + 1]:
            name, file = name_and_file(started[number])
        own = cfg.clone()
        own.defrost()
        own.DISTILLER.TEACHER, own.DISTILLER.TEACHER_CKPT, own.DISTILLER.ENSEMBLE = name, file, []
        own.freeze()
        files = [expand(file)] if file else teacher_files(own)
        if (file or not cfg.DISTILLER.TRAIN_TEACHER) and not (
            os.path.isfile(files[0]) or checkpoint.is_source(files[0])
        ):
            raise UserError(
                f"DISTILLER.ENSEMBLE: no checkpoint of the teacher {name} at {files[0]}; write "
                f"{name}:path/to/checkpoint.pth{'' if file else ', or set DISTILLER.TRAIN_TEACHER True'}"
            )
        places.append((name, own))
    first, found = find_teacher(cfg, path, resume, train, rehearse), cfg.clone()
    found.defrost()
    found.DISTILLER.ENSEMBLE = [f"{name}:{find_teacher(own, path, False, train, rehearse)}" for name, own in places]
    found.freeze()
    return first, found


def teacher_files(cfg: CfgNode) -> tuple[Path, Path]:
    """Return where a teacher lies that no TEACHER_CKPT names: the published one; the one that TRAIN_TEACHER trains."""
    published = Path(default_checkpoint(cfg.DISTILLER.TEACHER, cfg.DATASET.TYPE))
    return published, published.with_name(f"{teacher_config(cfg).EXPERIMENT.NAME}.pth")


def teacher_config(cfg: CfgNode) -> CfgNode:
    """Return the configuration that trains the teacher by method NONE with this SOLVER, data and seed. Its name tells
    all of them apart, so a teacher that was trained otherwise is never taken for it.
    """
    own = cfg.clone()
    own.defrost()
    own.overrides.clear()
    own.DISTILLER.TYPE, own.DISTILLER.STUDENT = "NONE", cfg.DISTILLER.TEACHER
    names = cfg.DISTILLER
    start = names.TEACHER_CKPT if fine_tunes(cfg) else ""
    own.DISTILLER.STUDENT_CKPT, own.DISTILLER.ENSEMBLE = start, []
    own.SOLVER.FREEZE = []  # of the student's names
    own.DISTILLER.STUDENT_SIZE = names.TEACHER_SIZE
    own.SOLVER.LR = names.TEACHER_LR or own.SOLVER.LR
    if names.TEACHER_EPOCHS:
        own.SOLVER.EPOCHS, share = names.TEACHER_EPOCHS, names.TEACHER_EPOCHS / cfg.SOLVER.EPOCHS
        own.SOLVER.LR_DECAY_STAGES = sorted({max(1, round(epoch * share)) for epoch in cfg.SOLVER.LR_DECAY_STAGES})
    own.SOLVER.TRAINER = "base"  # dot has nothing to separate without a teacher
    root = cfg.DATASET.ROOT if cfg.DATASET.TYPE in ("npz", "imagefolder", "text", "coco", "voc", "scenes") else ""
    solver = config.leaves(own.SOLVER)
    solver = {name: value for name, value in solver.items() if name in FIRST or _is_set(f"SOLVER.{name}", value)}
    code = config.used_code(cfg.plugins, {"model": [cfg.DISTILLER.TEACHER], "dataset": [cfg.DATASET.TYPE]})
    parts = [solver, root, cfg.DATASET.AUGMENT, code, _younger(cfg, start)]
    key = checkpoint.digest(parts[:3] + list(filter(None, parts[3:])))[:8]
    network = names.TEACHER.replace("/", "-")[-60:]  # hf:PATH
    tag = f"none,{network},{cfg.DATASET.TYPE},{own.SOLVER.EPOCHS}-epochs,seed{cfg.SEED},{key}"
    own.EXPERIMENT.NAME = own.EXPERIMENT.TAG = tag
    own.freeze()
    return own


def _younger(cfg: CfgNode, start: str) -> dict[str, object]:
    """Return what decides of a teacher, is younger than the names of trained ones and is not at its default."""
    younger = config.KEYS.keys() - {"DATASET.TYPE", "DATASET.AUGMENT"}
    values = config.leaves(cfg.DATASET, "DATASET.")
    found = {name: value for name, value in values.items() if name in younger and _is_set(name, value)}
    begins = {"start": start, "size": cfg.DISTILLER.TEACHER_SIZE}
    return found | {name: value for name, value in begins.items() if value}


def _is_set(name: str, value: object) -> bool:
    """Return whether the key decides what is computed and is not at its default."""
    return config.role(name) == "computes" and (name not in config.KEYS or value != config.KEYS[name].default)


def train_teacher(cfg: CfgNode, target: Path, train: Callable[..., dict]) -> Path:
    """Train the teacher that `cfg` describes and store its last epoch at `target`, which is returned. An interrupted
    training goes on where it stopped; one that another process is at is waited for.
    """
    say(
        f"the teacher {cfg.DISTILLER.STUDENT} comes first, for {counted(cfg.SOLVER.EPOCHS, 'epoch')}, by method NONE"
        + (f", from {cfg.DISTILLER.STUDENT_CKPT}" if cfg.DISTILLER.STUDENT_CKPT else "")
    )
    while True:
        try:
            result = train(cfg, resume="auto")
            break
        except FolderInUse as error:
            say(f"{error.lines[0].split(';')[0]}; waiting for that teacher")
            here().from_first(lambda: _wait_for_others(run_folder(cfg)))
    if result["signal"]:
        line = f"stopped by {result['signal']} after the teacher's training; --resume auto goes on there"
        raise here().said(Preempted(line))

    def store() -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        state = checkpoint.load(Path(result["folder"]) / "student_latest")
        checkpoint.save(state | {"best_acc": result["best_acc"]}, target)

    here().from_first(store)
    say(f"stored the teacher's last epoch at {target}")
    return target


def _wait_for_others(folder: Path) -> None:
    while in_use(folder):
        time.sleep(1)
