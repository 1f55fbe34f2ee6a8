"""What a run's networks say: logits and pooled features of its student and its teacher, from checkpoints."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mdistiller import config, files
from mdistiller.dataset import Batches, ImageSet, dataset_dict, load_dataset
from mdistiller.device import prepare, resolve_device
from mdistiller.engine.evaluator import CLASSES
from mdistiller.engine.method import join_teachers
from mdistiller.engine.teachers import teacher_files
from mdistiller.errors import OtherNetwork, UserError
from mdistiller.models import build_model, cifar_model_dict, fit_inputs
from mdistiller.registry import model_refusal, task_of
from mdistiller.runs.checkpoint import is_source, load_weights
from mdistiller.study.runs import Run

BATCH = 256
MOST_CHECKPOINTS = 20


class Predictions(NamedTuple):
    """What a network says of N images: logits (N, K) and, where it gives them, pooled features (N, C), both float32."""

    logits: np.ndarray
    features: np.ndarray | None


class Missing(Exception):
    """A part that a view needs is not there; the text says what to set."""


@torch.no_grad()
def predict(network: nn.Module, images: Tensor, labels: Tensor, data: ImageSet, device: torch.device) -> Predictions:
    """Run the network in eval mode on uint8 images (N, H, W, 3) as they are, not augmented."""
    parts, pooled = [], []
    for image, _, _ in Batches(images.to(device), labels.to(device), data.mean, data.std, BATCH):
        logits, feats = network(image)
        parts.append(logits.float().cpu().numpy())
        if "pooled_feat" in feats:
            pooled.append(feats["pooled_feat"].flatten(1).float().cpu().numpy())
    return Predictions(np.concatenate(parts), np.concatenate(pooled) if pooled else None)


@dataclass
class Networks:
    """Reads data sets once and teachers once, whatever number of runs shares them; `say` hears of slow steps.

    Its methods raise Missing where a run lacks a part, UserError where a part is there and cannot be used.
    """

    say: Callable[[str], None] = lambda _text: None
    _data: dict = field(default_factory=dict)
    _teachers: dict = field(default_factory=dict)

    def data(self, run: Run) -> ImageSet:
        kind, root = run.cfg.DATASET.TYPE, run.cfg.DATASET.ROOT
        config.activate(run.plugins)  # another run's may bear the same names
        if what := {"text": "text", "detection": "of images with boxes"}.get(task_of(kind)):
            raise Missing(
                f"{kind} is {what}, and this is for images of one class each; tools/eval.py -r {run.folder} scores its "
                "networks"
            )
        if kind not in dataset_dict:
            raise Missing(f"data set '{kind}' is not known here; name its plug-in with --plugins FILE")
        key = images_of(run)
        if key not in self._data:
            try:
                if kind in CLASSES and not files.expand(root).exists():  # which would be fetched
                    raise UserError(f"no data set {kind} at {root}")
                self._data[key] = load_dataset(kind, root, run.cfg.DATASET)
            except UserError as error:
                raise Missing(f"{error.lines[0]}; point to it with --opts DATASET.ROOT PATH") from None
        return self._data[key]

    def student(self, run: Run, split: str) -> Predictions:
        """Return what the last student says of a split: train or test."""
        file = next((f for f in (run.folder / "student_latest", run.folder / "student_best") if f.is_file()), None)
        if file is None:
            raise Missing("no student_latest or student_best in its folder")
        self.say(f"{run.name}: the student on the {split} set")
        return self._predict(run, "STUDENT", file, split)

    def teacher(self, run: Run, split: str) -> Predictions:
        """Return what the teacher says of a split: train or test."""
        file, name, names = self.teacher_file(run), run.teacher_name, run.cfg.DISTILLER
        own = names.TEACHER, names.TEACHER_SIZE, names.ENSEMBLE_MEAN, *names.ENSEMBLE
        key = (split, str(file), *own, *images_of(run))
        if key not in self._teachers:
            self.say(f"{run.name}: the teacher {name} on the {split} set")
            self._teachers[key] = self._predict(run, "TEACHER", file, split, names.ENSEMBLE)
        return self._teachers[key]

    def history(self, run: Run) -> np.ndarray:
        """Return whether each checkpoint student_N is right on each training image, not augmented: (E, N) bool. Of more
        than MOST_CHECKPOINTS, that many at even distances are asked.
        """
        found = {int(m[1]): path for path in run.folder.iterdir() if (m := re.fullmatch(r"student_(\d+)", path.name))}
        epochs = sorted(epoch for epoch in found if epoch <= run.epochs)
        if len(epochs) < 3:
            raise Missing("forgetting needs three checkpoints student_N or more; set LOG.SAVE_CHECKPOINT_FREQ lower")
        if len(epochs) > MOST_CHECKPOINTS:
            epochs = [epochs[i] for i in np.linspace(0, len(epochs) - 1, MOST_CHECKPOINTS).round().astype(int)]
        labels = self.data(run).train_labels.numpy()
        right = []
        for epoch in epochs:
            self.say(f"{run.name}: the student of epoch {epoch} on the train set")
            logits = self._predict(run, "STUDENT", found[epoch], "train").logits
            right.append(logits.argmax(1) == labels)
        return np.stack(right)

    def teacher_file(self, run: Run) -> Path:
        """Return the file that training would use: the named one, the released one, or the one that it trained."""
        names = run.cfg.DISTILLER
        candidates = [names.TEACHER_CKPT] if names.TEACHER_CKPT else teacher_files(run.cfg)
        for file in map(files.expand, candidates):
            if file.is_file() or is_source(file):
                return file
        raise Missing(
            f"no checkpoint of the teacher {names.TEACHER} at {candidates[0]}; point to it with --opts "
            "DISTILLER.TEACHER_CKPT FILE, or work in the folder that training was started in"
        )

    def network(self, run: Run, side: str, file: Path, beside: Sequence[str] = ()) -> nn.Module:
        """Return the run's STUDENT or TEACHER with the weights of `file`; an ensemble has more `beside` the first."""
        name, size, data = run.cfg.DISTILLER[side], run.cfg.DISTILLER[f"{side}_SIZE"], self.data(run)
        if refusal := model_refusal(name, run.cfg.DATASET.TYPE):  # now that the run's plug-ins are known
            library = name.partition(":")[0] in cifar_model_dict.libraries
            raise Missing(
                refusal if library else f"model '{name}' is not known here; name its plug-in with --plugins FILE"
            )
        model = build_model(name, data.num_classes, run.cfg.DATASET.TYPE, size)
        fit_inputs(model, data.mean, data.std, data.test_images.shape[1])
        try:
            load_weights(model, name, data.num_classes, file)
            return join_teachers(run.cfg, model, data) if beside else model
        except OtherNetwork:
            if side == "TEACHER" and run.cfg.DISTILLER.NEW_HEAD:
                raise Missing(headless(run)) from None
            raise

    def _predict(self, run: Run, side: str, file: Path, split: str, beside: Sequence[str] = ()) -> Predictions:
        data, device = self.data(run), resolve_device(run.cfg.DEVICE)
        model = self.network(run, side, file, beside)
        images, labels = getattr(data, f"{split}_images"), getattr(data, f"{split}_labels")
        return predict(prepare(model, device).eval(), images, labels, data, device)


def headless(run: Run) -> str:
    """Return a line on a teacher whose file is for other classes, which DISTILLER.NEW_HEAD allows where a method
    compares features alone.
    """
    name = run.cfg.DISTILLER.TEACHER
    return f"the teacher {name} has no last layer for these classes: DISTILLER.NEW_HEAD gave it a new, untrained one"


def images_of(run: Run) -> tuple:
    """Return what tells the images of a run from those of another one."""
    return str(run.cfg.DATASET), run.plugins
