"""A trained detector as a file to deploy: ONNX, its average precision beside the run's own, how fast and how large.

It takes one RGB image in [0, 1], float32 (3, H, W) of any size, scales it as the run's tests do, and gives boxes (n, 4)
in its pixels, labels (n,) from 1 and scores (n,).
"""

import contextlib
import io
import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mdistiller.dataset import DetectionSet, load_dataset
from mdistiller.engine.detection_scores import DetectionTest
from mdistiller.engine.evaluator import evaluation_batches
from mdistiller.errors import UserError
from mdistiller.models import build_model
from mdistiller.runs.checkpoint import load_weights
from mdistiller.runs.environment import device_name
from mdistiller.study.export_forms import onnx_session, write_weights
from mdistiller.study.runs import Run
from mdistiller.study.tables import Table, markdown
from mdistiller.terminal import counted, say

OPSET = 17
TIMED = 20  # images by which a latency is measured
HEAD = ("network", "form", "AP", "AP50", "ms", "p95", "MB")


@dataclass
class DetectorForm:
    """The student in one form; latencies of one image in milliseconds, median and 95th percentile."""

    form: str
    ap: float
    ap50: float
    latency: tuple[float, float]
    megabytes: float


@dataclass
class ExportedDetector:
    """What an export of a detector has come to."""

    run: Run
    checkpoint: str
    folder: Path
    parameters: int = 0
    forms: list[DetectorForm] = field(default_factory=list)

    @property
    def table(self) -> Table:
        rows = [
            ["student", f.form, f"{f.ap:.2f}", f"{f.ap50:.2f}", *(f"{t:.1f}" for t in f.latency), f"{f.megabytes:.2f}"]
            for f in self.forms
        ]
        return Table("export", "Export", "", HEAD, rows)


class Session(nn.Module):
    """An ONNX file in a detector's place."""

    def __init__(self, file: Path):
        super().__init__()
        self.session = onnx_session(file)

    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        names = ("boxes", "labels", "scores")
        found = (self.session.run(names, {"image": image.numpy()}) for image in images)
        return [dict(zip(names, map(torch.from_numpy, values), strict=True)) for values in found]


class Alone(nn.Module):
    """A detector of one image, whose answer is a tuple."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (found,) = self.network([image])
        return found["boxes"], found["labels"], found["scores"]


def export_detector(run: Run, file: Path, forms: Sequence[str], folder: Path) -> ExportedDetector:
    """Write the detector in `file`, a student's of the `run`, into `folder` as ONNX, with its weights as safetensors,
    export.json and a model card. Raises UserError for other `forms`, or where the data are missing.
    """
    if other := [form for form in forms if form != "onnx"]:
        raise UserError(
            f"--to {other[0]}: a detector is exported as onnx alone, as torchvision supports it; set --to onnx"
        )
    section, name = run.cfg.DATASET, run.cfg.DISTILLER.STUDENT
    data = load_dataset(section.TYPE, section.ROOT, section)
    network = build_model(name, data.num_classes, section.TYPE)
    network.fit(data)
    load_weights(network, name, data.num_classes, file)
    network.eval()
    folder.mkdir(parents=True, exist_ok=True)
    found = ExportedDetector(run, file.name, folder, sum(p.numel() for p in network.parameters()))
    weights, target = folder / "student.safetensors", folder / "student.onnx"
    write_weights(network, weights)
    write_onnx(network, data, target)
    test = DetectionTest(evaluation_batches(data, 1), torch.device("cpu"))
    for form, deployed, where in (("eager", network, weights), ("onnx", Session(target), target)):
        scores = test(deployed)
        latency = latency_of(deployed, data)
        found.forms.append(DetectorForm(form, scores.ap, scores.ap50, latency, where.stat().st_size / 1e6))
        say(f"student, {form}: AP {scores.ap:.2f}")
    about = {"run": str(run.folder), "checkpoint": file.name, "method": run.cfg.DISTILLER.TYPE}
    about |= {
        "device": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    figures = {"parameters": found.parameters, "forms": [vars(form) for form in found.forms]}
    (folder / "export.json").write_text(json.dumps(about | figures, indent=2) + "\n")
    (folder / "README.md").write_text(card(found, data))
    return found


def write_onnx(network: nn.Module, data: DetectionSet, target: Path) -> None:
    """Write the detector for images of any size: traced, as torchvision's detectors are made for."""
    image, names = data.test.image(0).float() / 255, ("boxes", "labels", "scores")
    sizes = {"image": {1: "height", 2: "width"}} | {name: {0: "found"} for name in names}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Alone(network).eval(), (image,), str(target), dynamo=False, opset_version=OPSET, input_names=["image"],
            output_names=[*names], dynamic_axes=sizes,
        )  # fmt: skip


@torch.no_grad()
def latency_of(network: nn.Module, data: DetectionSet) -> tuple[float, float]:
    """Return median and 95th percentile of the milliseconds that an image takes, after two that do not count."""
    taken = []
    for place in range(TIMED + 2):
        image = data.test.image(place % len(data.test)).float() / 255
        begin = time.perf_counter()
        network([image])
        taken.append(1000 * (time.perf_counter() - begin))
    return float(np.median(taken[2:])), float(np.quantile(taken[2:], 0.95))


def card(found: ExportedDetector, data: DetectionSet) -> str:
    """Return the model card."""
    run, names = found.run, found.run.cfg.DISTILLER
    taught = f", distilled from {names.TEACHER} by {names.TYPE}" if run.taught else ""
    classes = ", ".join(f"{number} {name}" for number, name in enumerate(data.classes, 1))
    return "\n".join(
        [
            f"# {names.STUDENT} for {run.cfg.DATASET.TYPE}",
            "",
            f"A {names.STUDENT}{taught}, {counted(run.epochs, 'epoch')}, seed {run.seed}; `{found.checkpoint}` of the "
            f"run `{run.folder.name}`, {found.parameters:,} parameters.",
            "",
            "- **Input** `image`: RGB in [0, 1], float32 (3, H, W) of any size; the network scales it so that the "
            f"shorter side has {data.views.short} pixels, or less where the longer one would have more than "
            f"{data.views.long}. **Output** `boxes` (n, 4), left, top, right, bottom in the image's pixels, `labels` "
            "(n,), `scores` (n,).",
            f"- **Classes**: {classes}.",
            "- **Files**: `student.onnx`; `student.safetensors`, the weights alone, for the network in PyTorch, which "
            "is `eager` below and takes the same images; `export.json`, each figure in full.",
            "",
            markdown(found.table).strip(),
            "",
            f"AP: COCO's average precision on {len(data.test):,} test images, one at a time. Latency: median and 95th "
            f"percentile of one image, {device_name(torch.device('cpu'))}, "
            f"{counted(torch.get_num_threads(), 'thread')}.",
            "",
        ]
    )
