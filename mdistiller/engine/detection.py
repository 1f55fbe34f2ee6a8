"""What the engine does otherwise for detection."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from yacs.config import CfgNode

from mdistiller.config import TWO_VIEWS, Config
from mdistiller.dataset import DetectionBatches, DetectionSet
from mdistiller.device import autocast
from mdistiller.distillers import check_levels, detection_takers, distiller_dict, on_detectors
from mdistiller.engine.detection_scores import DetectionTest
from mdistiller.engine.ranks import Ranks
from mdistiller.engine.task import FOR_IMAGES, Task, refuse_keys
from mdistiller.errors import UserError
from mdistiller.files import write_atomic
from mdistiller.models import build_model, in_eval_mode
from mdistiller.runs.checkpoint import TRUNK
from mdistiller.runs.detections import draw_detections, png
from mdistiller.terminal import counted

SHOWN = 6  # test images in the picture that a run leaves


class Detection(Task):
    """Images with boxes around objects of several classes."""

    eager = True  # proposals are as many as there are, and drawn on the host
    teacher_first = True

    def classes(self, num: int) -> str:
        return f"{counted(num - 1, 'class')} and background"

    def method(self, name: str) -> type:
        return on_detectors(distiller_dict[name])

    def network(
        self, cfg: CfgNode, data: DetectionSet, side: str, given: nn.Module | None = None, layers: Sequence[str] = ()
    ) -> nn.Module:
        name, method = cfg.DISTILLER[side], cfg.DISTILLER.TYPE
        if given is not None:
            raise UserError(f"{side.lower()}: a detector is built by its name; pass one, such as fasterrcnn_resnet8")
        model = build_model(name, data.num_classes, cfg.DATASET.TYPE)
        model.fit(data)
        if method not in detection_takers(proposals=model.softmax):
            raise UserError(
                f"DISTILLER.{side}: {name} has a sigmoid for each class, and {method} compares softmax outputs; take a "
                f"fasterrcnn_, or use {', '.join(detection_takers(proposals=False))}"
            )
        return model

    def building(self, data: DetectionSet) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def finish(self, distiller: nn.Module, cfg: CfgNode) -> None:
        distiller.seed = cfg.SEED

    def check_source(self, teacher: nn.Module, name: str, source: str) -> None:
        if source == TRUNK:
            raise UserError(
                f"DISTILLER.TEACHER_CKPT: trunk is no whole {name}; set DISTILLER.TRAIN_TEACHER True to train one from "
                "it, or name a checkpoint"
            )

    def check_pair(self, names: CfgNode, student: nn.Module, teacher: nn.Module | None) -> None:
        check_levels(names, self.method(names.TYPE), student, teacher)

    def tester(
        self, batches: DetectionBatches, data: DetectionSet, cfg: CfgNode, teacher: nn.Module | None, ranks: Ranks
    ) -> DetectionTest:
        return DetectionTest(batches, data.test.device, cfg.SOLVER.AMP, ranks)

    def leave(self, distiller: nn.Module, data: DetectionSet, cfg: CfgNode, folder: Path) -> None:
        """Write detections.png: what the networks find in the first test images, beside what there is."""
        count = min(SHOWN, len(data.test))
        images = [data.test.image(place) for place in range(count)]
        rows = {"truth": [data.test.target(place) for place in range(count)]}
        for side, network in (("teacher", distiller.teacher), ("student", distiller.student)):
            if network is not None:
                with torch.no_grad(), in_eval_mode(network), autocast(data.test.device, cfg.SOLVER.AMP):
                    found = network([image.float() / 255 for image in images])
                rows[f"{side}: {cfg.DISTILLER[side.upper()]}"] = found
        write_atomic(folder / "detections.png", png(draw_detections(images, rows, data.classes)))

    def refuse(self, cfg: Config, cls: type) -> None:
        """Raise UserError where the method cannot train detectors, or where what is asked for is for images of one
        class each.
        """
        super().refuse(cfg, cls)
        names = detection_takers(proposals=True)
        if cfg.DISTILLER.TYPE not in names:
            raise UserError(
                f"DISTILLER.TYPE: {cfg.DISTILLER.TYPE} has no form for detectors, which {cfg.DATASET.TYPE} trains; use "
                f"{', '.join(names)}"
            )
        refuse_keys(cfg, (*FOR_IMAGES, "TEACHER_BANK_TOP_K"), "images of one class each", "detection")
        if cfg.SOLVER.TRAINER in TWO_VIEWS:
            raise UserError(f"SOLVER.TRAINER: {cfg.SOLVER.TRAINER} is for images of one class; set SOLVER.TRAINER base")
        if cls.needs_teacher and cfg.TEMPERATURE.RULE and "fasterrcnn_" not in cfg.DISTILLER.STUDENT:
            raise UserError(
                f"TEMPERATURE.RULE: {cfg.DISTILLER.STUDENT} has a sigmoid for each class, which no temperature softens;"
                " leave it out"
            )
        if cls.needs_teacher and cfg.TEACHER_BANK in ("lazy", "full"):
            raise UserError(
                f"TEACHER_BANK: {cfg.TEACHER_BANK} keeps logits of whole images, and a teacher's are of the student's "
                "proposals; set TEACHER_BANK auto"
            )
