"""A trained student as a file to deploy: its forms, how far each is from the run's own, how fast and how large.

Every form takes RGB images in [0, 1], float32 (B, 3, H, W) of the training images' size, B as wanted, and gives logits
(B, K): what the images are normalised by is part of it.
"""

import importlib.util
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mdistiller.dataset import ImageSet
from mdistiller.errors import UserError
from mdistiller.files import check_folder
from mdistiller.runs import checkpoint
from mdistiller.runs.environment import device_name
from mdistiller.study.export_detector import ExportedDetector, export_detector
from mdistiller.study.networks import Missing, Networks
from mdistiller.study.runs import Run, read_run
from mdistiller.study.superclasses import class_names
from mdistiller.study.tables import Table, markdown, text_table
from mdistiller.terminal import columns, say

NEEDS = {
    "torch": (),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
    "int8": ("onnx", "onnxscript", "onnxruntime"),
}
BATCHES = (1, 64)  # whose latency is measured
COMPARED, CALIBRATED = 256, 256  # images whose logits are compared, and that INT8 is calibrated on
HEAD = ("network", "form", "top-1 (%)", "difference", "ms, 1", "p95", "ms, 64", "p95", "MB")
Infer = Callable[[np.ndarray], np.ndarray]  # images (B, 3, H, W) in [0, 1] -> logits (B, K)


class Deployed(nn.Module):
    """A network that takes pixels in [0, 1] and gives logits alone."""

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        output = self.network((image - self.mean) / self.std)
        return output if isinstance(output, Tensor) else output[0]


@dataclass
class Form:
    """A network in one form. `difference`: the largest one of its logits from the run's own; latencies in
    milliseconds, {batch: (median, 95th percentile)}.
    """

    network: str
    form: str
    top1: float
    difference: float
    latency: dict[int, tuple[float, float]]
    megabytes: float


@dataclass
class Exported:
    """What an export has come to. `parameters` and `flops` (of one image, a multiplication and addition are two) by
    network.
    """

    run: Run
    checkpoint: str
    folder: Path
    forms: list[Form] = field(default_factory=list)
    parameters: dict[str, int] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)

    @property
    def table(self) -> Table:
        rows = []
        for f in self.forms:
            times = [f"{value:.2f}" for batch in BATCHES for value in f.latency[batch]]
            rows.append([f.network, f.form, f"{f.top1:.2f}", f"{f.difference:.1e}", *times, f"{f.megabytes:.2f}"])
        return Table("export", "Export", "", HEAD, rows)


def export(
    file: Path, forms: Sequence[str], out: Path | None, plugins: Sequence[str] = (), root: str = ""
) -> Exported | ExportedDetector:
    """Write the student in `file`, RUN/student_best or so, in each of the `forms` of NEEDS into `out`, RUN/export where
    it is None, with its weights as safetensors, export.json and a model card; and measure each beside the teacher.

    Raises UserError where a package or the run's data are missing, or `file` is no student's of a run.
    """
    if missing := [name for form in forms for name in NEEDS[form] if importlib.util.find_spec(name) is None]:
        raise UserError(f"--to {forms[0]}: needs {' '.join(missing)}; pip install {' '.join(dict.fromkeys(missing))}")
    if not file.is_file() or not (file.parent / "config.yaml").is_file():
        there = sorted(path.name for path in file.parent.glob("student_*"))
        found = f"there {'are' if there else 'is'} {', '.join(there) or 'none'} beside it"
        raise UserError(f"{file}: is no checkpoint in a run's folder ({found}); name RUN/student_best")
    check_folder(out or file.parent / "export", "--out")
    run, networks = read_run(file.parent, ["DATASET.ROOT", root] if root else [], plugins), Networks()
    if run.task == "detection":
        return export_detector(run, file, forms, out or file.parent / "export")
    try:
        data = networks.data(run)
        models = {"student": networks.network(run, "STUDENT", file)}
    except Missing as error:
        raise UserError(str(error).replace("--opts DATASET.ROOT", "--root")) from None
    if run.taught:
        try:
            theirs = networks.teacher_file(run)
            models["teacher"] = networks.network(run, "TEACHER", theirs, run.cfg.DISTILLER.ENSEMBLE)
        except Missing as error:
            say(f"without the teacher: {str(error).partition(';')[0]}")
    found = Exported(run, file.name, out or file.parent / "export")
    found.folder.mkdir(parents=True, exist_ok=True)
    for name, model in models.items():
        deployed = Deployed(model, data.mean, data.std).eval()
        found.parameters[name] = sum(p.numel() for p in model.parameters())
        found.flops[name] = flops_of(deployed, data.test_images.shape[1])
        written = {"eager": _eager(deployed)}
        weights = found.folder / f"{name}.safetensors"
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, weights)
        sizes = {"eager": weights.stat().st_size}
        for form in forms:
            target = found.folder / f"{name}.{SUFFIXES[form]}"
            written[form] = WRITERS[form](deployed, data, target)
            beside = target.with_suffix(".bin")  # an OpenVINO file's weights
            sizes[form] = target.stat().st_size + (beside.stat().st_size if form == "openvino" else 0)
        own = written["eager"](pixels(data.test_images[:COMPARED]))
        for form, infer in written.items():
            difference = float(np.abs(infer(pixels(data.test_images[:COMPARED])) - own).max())
            latency = {batch: latency_of(infer, data, batch) for batch in BATCHES}
            found.forms.append(Form(name, form, accuracy_of(infer, data), difference, latency, sizes[form] / 1e6))
            say(f"{name}, {form}: {found.forms[-1].top1:.2f} %, largest difference {difference:.1e}")
    (found.folder / "export.json").write_text(json.dumps(report(found), indent=2) + "\n")
    (found.folder / "README.md").write_text(card(found, data))
    return found


def pixels(images: Tensor) -> np.ndarray:
    """Return uint8 images (B, H, W, 3) as a form takes them, float32 (B, 3, H, W) in [0, 1]."""
    return np.ascontiguousarray(images.permute(0, 3, 1, 2).numpy(), dtype=np.float32) / np.float32(255)


def parts(images: Tensor, size: int = 64) -> Iterator[np.ndarray]:
    """Yield images, also those of files, in batches as a form takes them."""
    for start in range(0, len(images), size):
        yield pixels(images[start : min(start + size, len(images))])


def accuracy_of(infer: Infer, data: ImageSet) -> float:
    """Return the accuracy on all test images in percent."""
    answers = np.concatenate([infer(part).argmax(1) for part in parts(data.test_images)])
    return 100 * float((answers == data.test_labels.numpy()).mean())


def latency_of(infer: Infer, data: ImageSet, batch: int, seconds: float = 1.0) -> tuple[float, float]:
    """Return median and 95th percentile of the milliseconds that a batch takes, over about so many `seconds`, after
    two passes that do not count.
    """
    image = np.resize(pixels(data.test_images[:batch]), (batch, 3, *data.test_images.shape[1:3]))
    taken, end = [], time.perf_counter() + seconds
    while len(taken) < 12 or time.perf_counter() < end:
        begin = time.perf_counter()
        infer(image)
        taken.append(1000 * (time.perf_counter() - begin))
    return float(np.median(taken[2:])), float(np.quantile(taken[2:], 0.95))


def flops_of(deployed: nn.Module, size: int) -> int:
    """Return the floating-point operations of one image; a multiplication with its addition counts as two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        deployed(torch.zeros(1, 3, size, size))
    return counter.get_total_flops()


def _eager(deployed: nn.Module) -> Infer:
    def infer(image: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return deployed(torch.from_numpy(image)).numpy()

    return infer


def _program(deployed: nn.Module, data: ImageSet) -> torch.export.ExportedProgram:
    """Return the network as torch.export has it, for any number of images."""
    example = torch.zeros(2, 3, *data.test_images.shape[1:3])
    with torch.no_grad():
        return torch.export.export(deployed, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def write_torch(deployed: nn.Module, data: ImageSet, target: Path) -> Infer:
    torch.export.save(_program(deployed, data), target)
    return _eager(torch.export.load(target).module())


def write_onnx(deployed: nn.Module, data: ImageSet, target: Path) -> Infer:
    names = {"input_names": ["image"], "output_names": ["logits"]}
    torch.onnx.export(_program(deployed, data), f=str(target), external_data=False, verbose=False, **names)
    return _session(target)


def _session(file: Path) -> Infer:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {"image": image})[0]


def write_openvino(deployed: nn.Module, data: ImageSet, target: Path) -> Infer:
    import openvino

    model = openvino.convert_model(_program(deployed, data))
    openvino.save_model(model, target, compress_to_fp16=False)
    compiled = openvino.compile_model(target, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda image: compiled(image)[0]


def write_int8(deployed: nn.Module, data: ImageSet, target: Path) -> Infer:
    """Write the ONNX form with 8-bit weights and activations, whose ranges are those on training images."""
    from onnxruntime import quantization

    plain = target.with_suffix(".float.onnx")
    write_onnx(deployed, data, plain)
    places = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(0))[:CALIBRATED]

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self.images = ({"image": part} for part in parts(data.train_images[places]))

        def get_next(self) -> dict | None:
            return next(self.images, None)

    prepared = target.with_suffix(".prepared.onnx")
    quantization.shape_inference.quant_pre_process(str(plain), str(prepared))
    quantization.quantize_static(str(prepared), str(target), Reader(), per_channel=True)
    plain.unlink()
    prepared.unlink()
    return _session(target)


WRITERS = {"torch": write_torch, "onnx": write_onnx, "openvino": write_openvino, "int8": write_int8}
SUFFIXES = {"torch": "pt2", "onnx": "onnx", "openvino": "xml", "int8": "int8.onnx"}


def text_of(found: Exported | ExportedDetector) -> str:
    """Return the table for the terminal."""
    return text_table(found.table, columns())


def report(found: Exported) -> dict:
    """Return all figures as JSON holds them."""
    run, device = found.run, torch.device("cpu")
    about = {"run": str(run.folder), "checkpoint": found.checkpoint, "method": run.cfg.DISTILLER.TYPE}
    about |= {"device": device_name(device), "threads": torch.get_num_threads(), "torch": torch.__version__}
    counts = {"parameters": found.parameters, "flops": found.flops}
    return about | counts | {"forms": [asdict(form) for form in found.forms]}


def card(found: Exported, data: ImageSet) -> str:
    """Return the model card."""
    run, names = found.run, found.run.cfg.DISTILLER
    taught = f", distilled from {names.TEACHER} by {names.TYPE}" if run.taught else ""
    height, width = data.test_images.shape[1:3]
    classes = ", ".join(class_names(run.cfg.DATASET.TYPE, data.num_classes, data.class_names))
    last = run.rows[-1] if run.rows else {}
    figures = (
        f"last {last['test_acc']:.2f}, best {last['best_acc']:.2f} (epoch {last['best_epoch']})" if last else "unknown"
    )
    counted = ", ".join(
        f"{name} {found.parameters[name]:,} parameters and {flops / 1e6:,.1f} MFLOPs"
        for name, flops in found.flops.items()
    )
    digest = checkpoint.digest(checkpoint.load(run.folder / found.checkpoint)["model"])
    return "\n".join(
        [
            f"# {names.STUDENT} for {run.cfg.DATASET.TYPE}",
            "",
            f"A {names.STUDENT}{taught}, {run.epochs} epochs, seed {run.seed}; `{found.checkpoint}` of the run "
            f"`{run.folder.name}`, SHA-256 of its weights {digest[:16]}.",
            "",
            f"- **Input** `image`: RGB in [0, 1], float32 (B, 3, {height}, {width}), any B. **Output** `logits` "
            f"(B, {data.num_classes}).",
            f"- **Classes**: {classes}.",
            f"- **Test accuracy of the run** ({len(data.test_labels):,} images): {figures}. The best epoch is chosen "
            "on the test set, which flatters it.",
            f"- **Size**: {counted} for an image.",
            "",
            markdown(found.table).strip(),
            "",
            f"Difference: the largest one of {COMPARED} test images' logits from the eager ones. Latency: median and "
            f"95th percentile in milliseconds for 1 and 64 images, {device_name(torch.device('cpu'))}, "
            f"{torch.get_num_threads()} threads.",
            "",
        ]
    )
