"""A trained student as files to deploy: how far each form is from the run's own, how fast and how large."""

import importlib.util
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mdistiller.dataset import ImageSet
from mdistiller.errors import UserError
from mdistiller.files import check_folder
from mdistiller.study.export_card import BATCHES, COMPARED, Exported, Form, card, normalised_by, report
from mdistiller.study.export_detector import ExportedDetector, export_detector
from mdistiller.study.export_forms import (
    NEEDS,
    SUFFIXES,
    WRITERS,
    Deployed,
    Infer,
    eager,
    parts,
    pixels,
    write_weights,
)
from mdistiller.study.networks import Missing, Networks
from mdistiller.study.runs import read_run
from mdistiller.study.tables import text_table
from mdistiller.terminal import columns, say

STUDENTS = ("student_best", "student_latest", "student_ema")


def export(
    file: Path, forms: Sequence[str], out: Path | None, plugins: Sequence[str] = (), root: str = ""
) -> Exported | ExportedDetector:
    """Write the student in `file`, RUN/student_best or so, in each of the `forms` of NEEDS into `out`, RUN/export where
    it is None, with its weights as safetensors, export.json and a model card; and measure each beside the teacher.

    Raises UserError where a package or the run's data are missing, or `file` is no student's of a run.
    """
    lacking = {form: [name for name in NEEDS[form] if importlib.util.find_spec(name) is None] for form in forms}
    if missing := " ".join(dict.fromkeys(name for names in lacking.values() for name in names)):
        asked = " ".join(form for form in forms if lacking[form])
        raise UserError(f"--to {asked}: needs {missing}; pip install {missing}")
    check_checkpoint(file)
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
        except (Missing, UserError) as error:  # what was asked for is the student
            say(f"without the teacher; {str(error).partition(';')[0]}")
    found = Exported(run, file.name, out or file.parent / "export")
    found.folder.mkdir(parents=True, exist_ok=True)
    for name, model in models.items():
        deployed = Deployed(model, data.mean, data.std).eval()
        found.parameters[name] = sum(p.numel() for p in model.parameters())
        found.flops[name] = flops_of(deployed, data.test_images.shape[1])
        found.weights[name] = normalised_by(model, data)
        weights, written = found.folder / f"{name}.safetensors", {"eager": eager(deployed)}
        write_weights(model, weights)
        found.files[weights.name], sizes = "safetensors", {"eager": weights.stat().st_size}
        for form in forms:
            target = found.folder / f"{name}.{SUFFIXES[form]}"
            written[form] = WRITERS[form](deployed, data, target)
            beside = [target, *([target.with_suffix(".bin")] if form == "openvino" else [])]  # its weights
            found.files |= {path.name: form for path in beside}
            sizes[form] = sum(path.stat().st_size for path in beside)
        own = written["eager"](pixels(data.test_images[:COMPARED]))
        for form, infer in written.items():
            difference = float(np.abs(infer(pixels(data.test_images[:COMPARED])) - own).max())
            latency = {batch: latency_of(infer, data, batch) for batch in BATCHES}
            found.forms.append(Form(name, form, accuracy_of(infer, data), difference, latency, sizes[form] / 1e6))
            say(f"{name}, {form}: {found.forms[-1].top1:.2f} %, largest difference {difference:.1e}")
    found.files["export.json"] = "figures"
    (found.folder / "export.json").write_text(json.dumps(report(found, data), indent=2) + "\n")
    (found.folder / "README.md").write_text(card(found, data))
    return found


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


def text_of(found: Exported | ExportedDetector) -> str:
    """Return the table for the terminal."""
    return text_table(found.table, columns())
