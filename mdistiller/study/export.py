"""A trained student as files to deploy: how far each form is from the run's own, how fast and how large."""

import importlib.util
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mdistiller.dataset import ImageSet, load_dataset
from mdistiller.engine.detection_scores import DetectionTest
from mdistiller.engine.evaluator import evaluation_batches
from mdistiller.errors import UserError
from mdistiller.files import check_folder
from mdistiller.models import build_model
from mdistiller.runs.checkpoint import load_weights
from mdistiller.study import export_card as cards
from mdistiller.study.export_card import BATCHES, COMPARED, DetectorForm, Exported, Form
from mdistiller.study.export_forms import (
    CALIBRATED,
    KINDS,
    Deployed,
    Infer,
    eager,
    parts,
    pixels,
    write_detector,
    write_weights,
)  # fmt: skip
from mdistiller.study.networks import Missing, Networks
from mdistiller.study.runs import read_run
from mdistiller.terminal import counted, say

STUDENTS = ("student_best", "student_latest", "student_ema")
TIMED = 20  # images by which a detector's latency is measured
Input = TypeVar("Input")


def export(file: Path, forms: Sequence[str], out: Path | None, plugins: Sequence[str] = (), root: str = "") -> Exported:
    """Write the student in `file`, RUN/student_best or so, in each of the `forms` of KINDS into `out`, RUN/export where
    it is None, with its weights as safetensors, export.json and a model card; and measure each form, a classifier's
    beside the teacher.

    Raises UserError where a package or the run's data are missing, `file` is no student's of a run, or a detector is
    to be written as something other than onnx.
    """
    lacking = {form: [name for name in KINDS[form].needs if importlib.util.find_spec(name) is None] for form in forms}
    if missing := " ".join(dict.fromkeys(name for names in lacking.values() for name in names)):
        asked = " ".join(form for form in forms if lacking[form])
        raise UserError(f"--to {asked}: needs {missing}; pip install {missing}")
    check_checkpoint(file)
    check_folder(out or file.parent / "export", "--out")
    run = read_run(file.parent, ["DATASET.ROOT", root] if root else [], plugins)
    found = Exported(run, file.name, out or file.parent / "export")
    report, card = export_detector(found, file, forms) if run.task == "detection" else export_images(found, file, forms)
    (found.folder / "export.json").write_text(json.dumps(report, indent=2) + "\n")
    (found.folder / "README.md").write_text(card)
    return found


def export_images(found: Exported, file: Path, forms: Sequence[str]) -> tuple[dict, str]:
    """Write and measure a classifier and its teacher. Return what export.json and the model card hold."""
    run, networks = found.run, Networks()
    try:
        data = networks.data(run)
        models = {"student": networks.network(run, "STUDENT", file)}
    except Missing as error:
        raise UserError(str(error).replace("--opts DATASET.ROOT", "--root")) from None
    if run.taught:
        try:
            theirs = networks.teacher_file(run)
            models["teacher"] = networks.network(run, "TEACHER", theirs, run.cfg.DISTILLER.ENSEMBLE)
        except (Missing, UserError) as error:  # what was asked for is the student
            say(f"without the teacher; {str(error).partition(';')[0]}")
    found.folder.mkdir(parents=True, exist_ok=True)
    calibrated = counted(min(CALIBRATED, len(data.train_labels)), "training image")
    for name, model in models.items():
        deployed = Deployed(model, data.mean, data.std).eval()
        found.parameters[name] = sum(p.numel() for p in model.parameters())
        found.flops[name] = flops_of(deployed, data.test_images.shape[1])
        found.weights[name] = cards.normalised_by(model, data)
        weights, written = found.folder / f"{name}.safetensors", {"eager": eager(deployed)}
        write_weights(model, weights)
        found.files[weights.name] = "the weights alone, for the network in PyTorch, which is `eager` below"
        sizes = {"eager": weights.stat().st_size}
        for form in forms:
            target = found.folder / f"{name}.{KINDS[form].suffix}"
            written[form] = KINDS[form].write(deployed, data, target)
            beside = [target, *([target.with_suffix(".bin")] if form == "openvino" else [])]  # its weights
            found.files |= {path.name: KINDS[form].what.format(calibrated=calibrated) for path in beside}
            sizes[form] = sum(path.stat().st_size for path in beside)
        images = pixels(data.test_images[:COMPARED])
        own = written["eager"](images)
        for form, infer in written.items():
            difference = float(np.abs(infer(images) - own).max())
            latency = {b: latency_of(infer, [np.resize(images[:b], (b, *images.shape[1:]))]) for b in BATCHES}
            found.forms.append(Form(name, form, accuracy_of(infer, data), difference, latency, sizes[form] / 1e6))
            say(f"{name}, {form}: {found.forms[-1].top1:.2f} %, largest difference {difference:.1e}")
    found.files["export.json"] = "what this page says and each figure in full"
    return cards.report(found, data), cards.card(found, data)


def export_detector(found: Exported, file: Path, forms: Sequence[str]) -> tuple[dict, str]:
    """Write and measure a detector. Return what export.json and the model card hold."""
    if other := [form for form in forms if form != "onnx"]:
        raise UserError(
            f"--to {other[0]}: a detector is exported as onnx alone, as torchvision supports it; set --to onnx"
        )
    section, name = found.run.cfg.DATASET, found.run.cfg.DISTILLER.STUDENT
    data = load_dataset(section.TYPE, section.ROOT, section)
    network = build_model(name, data.num_classes, section.TYPE)
    network.fit(data)
    load_weights(network, name, data.num_classes, file)
    network.eval()
    found.folder.mkdir(parents=True, exist_ok=True)
    found.parameters["student"] = sum(p.numel() for p in network.parameters())
    weights, target = found.folder / "student.safetensors", found.folder / "student.onnx"
    write_weights(network, weights)
    images = [data.test.image(place).float() / 255 for place in range(min(TIMED, len(data.test)))]
    onnx = write_detector(network, images[0], target)
    test = DetectionTest(evaluation_batches(data, 1), torch.device("cpu"))
    for form, deployed, where in (("eager", network, weights), ("onnx", onnx, target)):
        scores = test(deployed)
        latency = latency_of(lambda image, deployed=deployed: deployed([image]), images)
        found.forms.append(DetectorForm(form, scores.ap, scores.ap50, latency, where.stat().st_size / 1e6))
        say(f"student, {form}: AP {scores.ap:.2f}")
    return cards.detector_report(found), cards.detector_card(found, data)


def check_checkpoint(file: Path) -> None:
    """Raise UserError that says what to name where `file` is no checkpoint in a run's folder."""
    if (file / "config.yaml").is_file():
        there = next((file / name for name in STUDENTS if (file / name).is_file()), None)
        advice = f"name a student in it, {there}" if there else "and holds no student yet; train it first"
        raise UserError(f"{file}: is a run's folder{';' if there else ''} {advice}")
    if not file.is_file() or not (file.parent / "config.yaml").is_file():
        there = sorted(path.name for path in file.parent.glob("student_*"))
        found = f"there {'are' if there else 'is'} {', '.join(there) or 'none'} beside it"
        raise UserError(f"{file}: is no checkpoint in a run's folder ({found}); name RUN/student_best")


def accuracy_of(infer: Infer, data: ImageSet) -> float:
    """Return the accuracy on all test images in percent."""
    answers = np.concatenate([infer(part).argmax(1) for part in parts(data.test_images)])
    return 100 * float((answers == data.test_labels.numpy()).mean())


@torch.no_grad()
def latency_of(infer: Callable[[Input], object], inputs: Sequence[Input], seconds: float = 1.0) -> tuple[float, float]:
    """Return median and 95th percentile of the milliseconds that one of the `inputs` takes, which take their turns over
    about so many `seconds`, after two passes that do not count.
    """
    taken, end = [], time.perf_counter() + seconds
    while len(taken) < 12 or time.perf_counter() < end:
        begin = time.perf_counter()
        infer(inputs[len(taken) % len(inputs)])
        taken.append(1000 * (time.perf_counter() - begin))
    return float(np.median(taken[2:])), float(np.quantile(taken[2:], 0.95))


def flops_of(deployed: nn.Module, size: int) -> int:
    """Return the floating-point operations of one image; a multiplication with its addition counts as two.

    Attention is run as the products that it consists of: torch counts nothing of its fused kernels on a CPU.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            deployed(torch.zeros(1, 3, size, size))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops()
