"""What the engine does otherwise for another kind of data; as it stands here, for images of one class each."""

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from torch import nn
from yacs.config import CfgNode

from mdistiller.config import Config, get
from mdistiller.dataset import Batches, ImageSet
from mdistiller.distillers import distiller_dict, part_of
from mdistiller.distillers.features import images_of
from mdistiller.engine.evaluator import ImageTest
from mdistiller.engine.ranks import Ranks
from mdistiller.errors import UserError
from mdistiller.models import build_model, check_parts, fit_inputs, give_features, given_parts, name_layers
from mdistiller.terminal import counted

FOR_IMAGES = (  # of one class each
    "DATASET.MIXUP", "DATASET.CUTMIX", "SOLVER.LABEL_SMOOTHING", "DISTILLER.ENSEMBLE", "DISTILLER.TEACHER_SIZE",
    "DISTILLER.STUDENT_SIZE", "DISTILLER.TEACHER_SHARD",
)  # fmt: skip


class Task:
    """What networks learn on a data set, `data.task`: how they are built, what trains and what tests them, and what
    cannot be asked for. Everything else of a run is the same for all.
    """

    eager = False  # whether steps run one operation at a time, neither compiled nor as graphs
    top_k = False  # whether a bank may keep the largest of a teacher's logits alone
    teacher_first = False  # whether a run says first what its teacher reaches on the test set
    new_head = True  # whether a network of other classes may get a new last layer

    def classes(self, num: int) -> str:
        """Return in words how many classes there are, where a network gives so many logits."""
        return counted(num, "class")

    def method(self, name: str) -> type:
        """Return the class of the method `name` that trains on such data."""
        return distiller_dict[name]

    def network(
        self, cfg: CfgNode, data: ImageSet, side: str, given: nn.Module | None = None, layers: Sequence[str] = ()
    ) -> nn.Module:
        """Return the network of `side`, STUDENT or TEACHER, freshly initialised, or a copy of one that the caller has
        `given`. Raises UserError where it does not fit the data, or lacks features that the method compares.
        """
        names, cls, size = cfg.DISTILLER, self.method(cfg.DISTILLER.TYPE), data.train_images.shape[1]
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

    def building(self, data: ImageSet) -> AbstractContextManager:
        """Return the context in which a method is built."""
        return images_of(tuple(data.train_images.shape[1:3]))

    def check_source(self, teacher: nn.Module, name: str, source: str) -> None:
        """Raise UserError where what is at `source` is no whole teacher."""

    def check_pair(self, names: CfgNode, student: nn.Module, teacher: nn.Module | None) -> None:
        """Raise UserError where the method of the section DISTILLER cannot compare the two."""

    def finish(self, distiller: nn.Module, cfg: CfgNode) -> None:
        """Set what the method has to know of the configuration beside its own section."""

    def tester(self, batches: Batches, data: ImageSet, cfg: CfgNode, teacher: nn.Module | None, ranks: Ranks):
        """Return what gives the scores of a network on `batches`: a callable of (network, batches)."""
        return ImageTest(batches, batches.images.device, cfg.SOLVER.AMP, ranks)

    def leave(self, distiller: nn.Module, data: ImageSet, cfg: CfgNode, folder: Path) -> None:
        """Write into the run's folder what a finished run leaves there beside its figures."""

    def refuse(self, cfg: Config, cls: type) -> None:
        """Raise UserError where the configuration asks for what cannot be on such data."""
        if self.eager and cfg.SOLVER.STEP not in ("auto", "eager"):
            raise UserError(f"SOLVER.STEP: on {cfg.DATASET.TYPE} steps run eagerly; set SOLVER.STEP auto")


def refuse_keys(cfg: Config, keys: Sequence[str], are_for: str, what: str) -> None:
    """Raise UserError where one of `keys` is set, which `are_for` other data than the configuration's, which is
    `what`.
    """
    for key in keys:
        if get(cfg, key):
            raise UserError(f"{key}: is for {are_for}, and {cfg.DATASET.TYPE} is {what}; leave it out")


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
