"""What a run's networks say: logits and pooled features of its student and its teacher, from checkpoints."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mdistiller import files
from mdistiller.analysis.runs import Run
from mdistiller.dataset import Batches, ImageSet, dataset_dict, load_dataset
from mdistiller.device import prepare, resolve_device
from mdistiller.engine.build import build_model
from mdistiller.engine.teachers import teacher_files
from mdistiller.errors import UserError
from mdistiller.models import cifar_model_dict
from mdistiller.runs.checkpoint import load_weights

BATCH = 256
MOST_CHECKPOINTS = 20


@dataclass
class Sight:
    """A network's view of images: logits (N, K) float32, pooled features (N, C) float32."""

    logits: np.ndarray
    features: np.ndarray


class Missing(Exception):
    """A part that a view needs is not there; the text says what to set."""


@torch.no_grad()
def look(network: nn.Module, images: Tensor, labels: Tensor, data: ImageSet, device: torch.device) -> Sight:
    """The network in eval mode on uint8 images (N, H, W, 3), as they are, not augmented."""
    parts = []
    for image, _, _ in Batches(images.to(device), labels.to(device), data.mean, data.std, BATCH):
        logits, feats = network(image)
        parts.append((logits.float().cpu().numpy(), feats["pooled_feat"].flatten(1).float().cpu().numpy()))
    return Sight(*(np.concatenate(part) for part in zip(*parts, strict=True)))


@dataclass
class Networks:
    """Reads data sets once and teachers once, whatever number of runs shares them. Raises Missing where a run lacks a
    part, UserError where a part is there and cannot be used.
    """

    say: Callable[[str], None] = lambda _text: None
    _data: dict = field(default_factory=dict)
    _teachers: dict = field(default_factory=dict)

    def data(self, run: Run) -> ImageSet:
        kind, root = run.cfg.DATASET.TYPE, run.cfg.DATASET.ROOT
        if kind not in dataset_dict:
            raise Missing(f"data set '{kind}' is not known here")
        if (kind, root) not in self._data:
            if kind != "digits" and not files.expand(root).exists():
                raise Missing(f"no data set {kind} at {root}; point to it with --opts DATASET.ROOT PATH")
            try:
                self._data[kind, root] = load_dataset(kind, root)
            except UserError as error:
                raise Missing(f"{error.lines[0]}; point to it with --opts DATASET.ROOT PATH") from None
        return self._data[kind, root]

    def student_file(self, run: Run) -> Path:
        for name in ("student_latest", "student_best"):
            if (run.folder / name).is_file():
                return run.folder / name
        raise Missing("no student_latest or student_best in its folder")

    def teacher_file(self, run: Run) -> Path:
        """Where the training command would look: the named file, the released one, the one that it trained."""
        cfg = run.cfg
        if cfg.DISTILLER.TYPE == "NONE":
            raise Missing("it has no teacher")
        name, named = cfg.DISTILLER.TEACHER, cfg.DISTILLER.TEACHER_CKPT
        candidates = [named] if named else teacher_files(cfg)
        for file in map(files.expand, candidates):
            if file.is_file():
                return file
        raise Missing(
            f"no checkpoint of the teacher {name} at {candidates[0]}; point to it with --opts "
            "DISTILLER.TEACHER_CKPT FILE, or work in the folder that training was started in"
        )

    def network(self, run: Run, name: str, file: Path) -> nn.Module:
        if name not in cifar_model_dict:
            raise Missing(f"model '{name}' is not known here")
        classes = self.data(run).num_classes
        model = build_model(name, classes)
        load_weights(model, name, classes, file)
        return prepare(model, resolve_device(run.cfg.DEVICE)).eval()

    def see(self, run: Run, network: nn.Module, split: str) -> Sight:
        data = self.data(run)
        images, labels = getattr(data, f"{split}_images"), getattr(data, f"{split}_labels")
        return look(network, images, labels, data, resolve_device(run.cfg.DEVICE))

    def student(self, run: Run, split: str) -> Sight:
        """`split`: train or test."""
        self.say(f"{run.name}: the student on the {split} set")
        return self.see(run, self.network(run, run.cfg.DISTILLER.STUDENT, self.student_file(run)), split)

    def teacher(self, run: Run, split: str) -> Sight:
        file, name = self.teacher_file(run), run.cfg.DISTILLER.TEACHER
        key = (str(file), name, run.cfg.DATASET.TYPE, run.cfg.DATASET.ROOT, split)
        if key not in self._teachers:
            self.say(f"{run.name}: the teacher {name} on the {split} set")
            self._teachers[key] = self.see(run, self.network(run, name, file), split)
        return self._teachers[key]

    def history(self, run: Run) -> tuple[list[int], np.ndarray]:
        """(epochs, right (E, N_train) bool): the training set as the checkpoints student_N judge it, not augmented; of
        more than MOST_CHECKPOINTS, that many at even distances.
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
            network = self.network(run, run.cfg.DISTILLER.STUDENT, found[epoch])
            right.append(self.see(run, network, "train").logits.argmax(1) == labels)
        return epochs, np.stack(right)
