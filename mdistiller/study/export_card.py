"""What an export has come to: its figures, as export.json and as a model card."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from mdistiller.dataset import DetectionSet, ImageSet
from mdistiller.dataset.imagefolder import CROPS
from mdistiller.models.libraries import LibraryNetwork
from mdistiller.runs import checkpoint
from mdistiller.runs.environment import device_name
from mdistiller.study.export_forms import CALIBRATED
from mdistiller.study.runs import Run
from mdistiller.study.superclasses import class_names
from mdistiller.study.tables import Table, markdown
from mdistiller.terminal import counted

BATCHES = (1, 64)  # whose latency is measured
COMPARED = 256  # test images whose logits are compared, at most


@dataclass
class Form:
    """A network in one form. `difference`: the largest one of its logits from the run's own; latencies in
    milliseconds, {batch: (median, 95th percentile)}.
    """

    head: ClassVar = ("network", "form", "top-1 (%)", "difference", "ms, 1", "p95", "ms, 64", "p95", "MB")

    network: str
    form: str
    top1: float
    difference: float
    latency: dict[int, tuple[float, float]]
    megabytes: float

    @property
    def cells(self) -> list[str]:
        times = [f"{value:.2f}" for batch in BATCHES for value in self.latency[batch]]
        return [self.network, self.form, f"{self.top1:.2f}", f"{self.difference:.1e}", *times, f"{self.megabytes:.2f}"]


@dataclass
class DetectorForm:
    """A detector in one form; latencies of one image in milliseconds, median and 95th percentile."""

    head: ClassVar = ("network", "form", "AP", "AP50", "ms", "p95", "MB")

    form: str
    ap: float
    ap50: float
    latency: tuple[float, float]
    megabytes: float

    @property
    def cells(self) -> list[str]:
        times = [f"{value:.1f}" for value in self.latency]
        return ["student", self.form, f"{self.ap:.2f}", f"{self.ap50:.2f}", *times, f"{self.megabytes:.2f}"]


@dataclass
class Exported:
    """What an export has come to. `parameters` and `flops` (of one image, a multiplication and addition are two) by
    network; `weights`: by network what its safetensors' images are normalised by; `files`: {name: what it is}.
    """

    run: Run
    checkpoint: str
    folder: Path
    forms: list[Form] | list[DetectorForm] = field(default_factory=list)
    parameters: dict[str, int] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)
    weights: dict[str, dict] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    @property
    def table(self) -> Table:
        return Table("export", "Export", "", self.forms[0].head, [form.cells for form in self.forms])


def normalised_by(network: nn.Module, data: ImageSet) -> dict:
    """Return mean and std of the images in [0, 1] that a network takes where no form does that for it: a library's
    network, in the library's own hands, those of its weights, at its own `size` where the data have another.
    """
    own = isinstance(network, LibraryNetwork)
    mean, std = (network.mean, network.std) if own else (data.mean, data.std)
    return {"mean": [*mean], "std": [*std]} | ({"size": network.own_size} if own and network.resized else {})


def preparation(run: Run, data: ImageSet) -> dict:
    """Return how the test images are made: their size and, where they are picture files, how those are scaled and cut
    (`dataset/_pictures.py`).
    """
    height, width = data.test_images.shape[1:3]
    section, found = run.cfg.DATASET, {"size": [height, width], "divided_by": 255}
    if section.TYPE not in CROPS:
        return found
    short = max(height, round(height / (section.CROP or CROPS[section.TYPE])))
    scaled = {"shorter_side": short, "interpolation": "bilinear, antialiased", "center_crop": [height, width]}
    return found | scaled | {"background": [*section.BACKGROUND], "exif_orientation": True}


def about(found: Exported) -> dict:
    """Return what was exported, and where its figures were measured."""
    made = {"run": str(found.run.folder), "checkpoint": found.checkpoint, "method": found.run.cfg.DISTILLER.TYPE}
    device = device_name(torch.device("cpu"))
    return made | {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}


def report(found: Exported, data: ImageSet) -> dict:
    """Return all figures as JSON holds them."""
    made = about(found) | {"files": found.files, "preprocessing": preparation(found.run, data)}
    made |= {"safetensors_normalised_by": found.weights, "images_compared": min(COMPARED, len(data.test_labels))}
    if any(form.form == "int8" for form in found.forms):
        made |= {"int8_calibrated_on": {"split": "train", "images": min(CALIBRATED, len(data.train_labels))}}
    counts = {"parameters": found.parameters, "flops": found.flops}
    return made | counts | {"forms": [asdict(form) for form in found.forms]}


def detector_report(found: Exported) -> dict:
    return about(found) | {"parameters": found.parameters["student"], "forms": [asdict(form) for form in found.forms]}


def _card(found: Exported, digest: str, said: list[str], figures: str) -> str:
    """Return a model card: a heading with a `digest` of the network, what is `said` of it, its table, and the words on
    that table's `figures`.
    """
    run, names = found.run, found.run.cfg.DISTILLER
    taught = f", distilled from {names.TEACHER} by {names.TYPE}" if run.taught else ""
    made = f"`{found.checkpoint}` of the run `{run.folder.name}`, {digest}"
    where = f"{device_name(torch.device('cpu'))}, {counted(torch.get_num_threads(), 'thread')}"
    return f"""# {names.STUDENT} for {run.cfg.DATASET.TYPE}

A {names.STUDENT}{taught}, {counted(run.epochs, "epoch")}, seed {run.seed}; {made}.

{chr(10).join(said)}

{markdown(found.table).strip()}

{figures}, {where}.
"""


def card(found: Exported, data: ImageSet) -> str:
    """Return the model card of a classifier."""
    run, (height, width) = found.run, data.test_images.shape[1:3]
    classes = ", ".join(class_names(run.cfg.DATASET.TYPE, data.num_classes, data.class_names))
    last = run.rows[-1]
    figures = f"last {last['test_acc']:.2f}, best {last['best_acc']:.2f} (epoch {last['best_epoch']})"
    sizes = ", ".join(
        f"{name} {found.parameters[name]:,} parameters and {flops / 1e6:,.1f} MFLOPs"
        for name, flops in found.flops.items()
    )
    digest = checkpoint.digest(checkpoint.load(run.folder / found.checkpoint)["model"])
    files: dict[str, list[str]] = {}
    for name, what in found.files.items():
        files.setdefault(what, []).append(f"`{name}`")
    compared = counted(min(COMPARED, len(data.test_labels)), "test image")
    said = [
        f"- **Input** `image`: RGB in [0, 1], float32 (B, 3, {height}, {width}), any B. **Output** `logits` "
        f"(B, {data.num_classes}).",
        *_pictures(preparation(run, data)),
        f"- **Normalisation** is part of every form but the safetensors, which take {_normalised(found.weights)}.",
        f"- **Classes**: {classes}.",
        f"- **Test accuracy of the run** ({len(data.test_labels):,} images): {figures}. The best epoch is chosen "
        "on the test set, which flatters it.",
        f"- **Size**: {sizes} for an image (a multiplication and an addition are two).",
        "\nThe files:\n",
        *(f"- {', '.join(names)}: {what}." for what, names in files.items()),
    ]
    return _card(
        found, f"SHA-256 of its weights {digest[:16]}", said,
        f"Difference: the largest one of the logits of {compared} from the eager ones. Latency: median and 95th "
        "percentile in milliseconds for 1 and 64 images",
    )  # fmt: skip


def detector_card(found: Exported, data: DetectionSet) -> str:
    """Return the model card of a detector."""
    classes = ", ".join(f"{number} {name}" for number, name in enumerate(data.classes, 1))
    said = [
        "- **Input** `image`: RGB in [0, 1], float32 (3, H, W) of any size; the network scales it so that the "
        f"shorter side has {data.views.short} pixels, or less where the longer one would have more than "
        f"{data.views.long}. **Output** `boxes` (n, 4), left, top, right, bottom in the image's pixels, `labels` "
        "(n,), `scores` (n,).",
        f"- **Classes**: {classes}.",
        "- **Files**: `student.onnx`; `student.safetensors`, the weights alone, for the network in PyTorch, which "
        "is `eager` below and takes the same images; `export.json`, each figure in full.",
    ]
    return _card(
        found, f"{found.parameters['student']:,} parameters", said,
        f"AP: COCO's average precision on {len(data.test):,} test images, one at a time. Latency: median and 95th "
        "percentile of one image",
    )  # fmt: skip


def _pictures(made: dict) -> list[str]:
    """Return the card's line on how an image is made of a picture file; none where the data are none."""
    if "shorter_side" not in made:
        return []
    side = made["size"][0]
    return [
        "- **From a picture file**: turned as its EXIF data say, RGB, transparent parts over "
        f"{tuple(made['background'])}; the shorter side scaled to {made['shorter_side']} pixels "
        f"({made['interpolation']}, as Pillow's BILINEAR), the middle {side} x {side} cut out, divided by "
        f"{made['divided_by']}."
    ]


def _normalised(weights: dict[str, dict]) -> str:
    """Return the card's words on what each network's safetensors take."""
    said = {}
    for name, given in weights.items():
        mean, std = (", ".join(f"{value:.4g}" for value in given[key]) for key in ("mean", "std"))
        size = f", scaled to {given['size']} pixels a side" if "size" in given else ""
        said.setdefault(f"mean ({mean}), std ({std}){size}", []).append(name)
    return "; ".join(["(image - mean) / std", *(f"{' and '.join(names)}: {what}" for what, names in said.items())])
