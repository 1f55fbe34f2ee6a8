"""tools/eval.py: what a checkpoint, or each network that a run has left, says of a test set."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from yacs.config import CfgNode

from mdistiller import config
from mdistiller.dataset import ImageSet
from mdistiller.engine.detection_scores import NAMES, DetectionReport, evaluate_detectors
from mdistiller.engine.evaluator import Report, evaluate_checkpoint
from mdistiller.engine.method import join_teachers
from mdistiller.engine.text_scores import TextReport, evaluate_text
from mdistiller.errors import OtherNetwork, UserError
from mdistiller.registry import task_of
from mdistiller.study.charts import Chart, Panel, write_table
from mdistiller.study.drawing import save
from mdistiller.study.networks import Missing, Networks, headless
from mdistiller.study.runs import Run, lacking_plugins, read_run
from mdistiller.study.statistics import calibration
from mdistiller.study.superclasses import class_names
from mdistiller.study.tables import Table, written

WRITTEN = {  # figures in the order of a table: their heads, and how they are written
    "top1": ("top-1 (%)", "{:.2f}"), "top5": ("top-5 (%)", "{:.2f}"), "loss": ("loss", "{:.4f}"),
    "bits_per_byte": ("bits/byte", "{:.4f}"), "loss_calibrated": ("calibrated loss", "{:.4f}"),
    "ece": ("ECE (%)", "{:.2f}"), "teacher_kl": ("KL to teacher", "{:.4f}"),
    **{name: (name, "{:.2f}") for name in NAMES}, "parameters": ("parameters", "{:,}"),
    "images_per_second": ("images/s", "{:,.0f}"), "tokens_per_second": ("tokens/s", "{:,.0f}"),
}  # fmt: skip
OTHERS = {"text": evaluate_text, "detection": evaluate_detectors}  # what scores networks, by task
AnyReport = Report | TextReport | DetectionReport


def run_to_evaluate(folder: Path, opts: Sequence[str], plugins: Sequence[str]) -> Run:
    """Return the run in `folder`, with the KEY VALUE pairs `opts` in place of its own. Raises UserError where it is no
    run's, or a plug-in is missing.
    """
    run = read_run(folder, opts, plugins)
    if notes := lacking_plugins([run]):
        raise UserError(*notes)
    config.activate(run.plugins)
    return run


def evaluate(
    networks: Mapping[str, tuple[str, int, str]], section: CfgNode, batch_size: int, device: torch.device, amp: str,
    join: Callable[[nn.Module, ImageSet], nn.Module] | None = None,
) -> dict[str, AnyReport]:  # fmt: skip
    """Return the reports on `networks`, {what: (model, size, file or another source of weights)}, on the test part of
    `section`, DATASET. `join` makes of the one that is called "teacher" what is to be scored of images.
    """
    if other := OTHERS.get(task_of(section.TYPE)):
        named = {what: (model, file) for what, (model, _, file) in networks.items()}
        return other(named, section, batch_size, device, amp)
    reports = {}
    for what in sorted(networks, key=lambda what: what != "teacher"):  # first, as it may be for other classes
        *model, file = networks[what]
        joined = [join] if join and what == "teacher" else []
        reports[what] = evaluate_checkpoint(tuple(model), file, section, batch_size, device, amp, *joined)
    return {what: reports[what] for what in networks}


def evaluate_run(run: Run, batch_size: int, device: torch.device, amp: str) -> tuple[dict[str, AnyReport], list[str]]:
    """Return the reports on the run's last student, its best one, its average of weights and its teacher; and lines on
    what is not there. Raises UserError where its folder holds no student.
    """
    names, folder, notes = run.cfg.DISTILLER, run.folder, []
    students = {"student, last": folder / "student_latest", "student, best": folder / "student_best"}
    students["student, average"] = folder / "student_ema"  # of SOLVER.EMA
    asked = {what: (names.STUDENT, names.STUDENT_SIZE, str(f)) for what, f in students.items() if f.is_file()}
    if not asked:
        raise UserError(f"{folder}: holds no student_latest or student_best; is it a run's folder?")
    if run.taught:
        try:
            asked["teacher"] = names.TEACHER, names.TEACHER_SIZE, str(Networks().teacher_file(run))
        except Missing:
            notes.append(f"the teacher {names.TEACHER} is not there any more; name its file with -m and -c")
    how = run.cfg.DATASET, batch_size, device, amp, partial(join_teachers, run.cfg)
    try:
        return evaluate(asked, *how), notes
    except OtherNetwork:
        if not names.NEW_HEAD or not asked.pop("teacher", None):
            raise
        return evaluate(asked, *how), [*notes, headless(run)]


def figures(report: AnyReport) -> dict[str, float | int | None]:
    """Return the figures of a report: accuracies and the expected calibration error (15 bins) in percent."""
    scores = report.scores
    if isinstance(report, DetectionReport):
        own = dict(zip(NAMES, scores, strict=True))
    else:
        own = {"top1": scores.top1, "top5": scores.top5, "loss": scores.loss} | getattr(scores, "more", {})
    if isinstance(report, Report):
        own["ece"] = 100 * calibration(report.logits, report.labels).ece
    speed = "tokens_per_second" if isinstance(report, TextReport) else "images_per_second"
    return own | {"parameters": report.parameters, speed: getattr(report, speed)}


def evaluation_table(reports: Mapping[str, AnyReport]) -> Table:
    """Return a row of figures for each network; top-5 of images of more than five classes."""
    found = {name: figures(report) for name, report in reports.items()}
    keys = [key for key in WRITTEN if any(key in own for own in found.values())]
    if any("tokens_per_second" in own or own.get("top5", 0) is None for own in found.values()):
        keys.remove("top5")
    rows = [[name, *(written(own.get(key), WRITTEN[key][1]) for key in keys)] for name, own in found.items()]
    return Table("evaluation", "Evaluation", "", ["network", *(WRITTEN[key][0] for key in keys)], rows)


def write_evaluation(folder: Path, reports: Mapping[str, Report], dataset: str) -> None:
    """Write into `folder` for each network: classes,NAME.csv (accuracy, precision and number of images of each class),
    confusion,NAME.csv (a row for each label, a column for each class that is named) and confusion,NAME.png; and
    scores.json with the figures of all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scores = {name: figures(report) for name, report in reports.items()}
    (folder / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    for name, report in reports.items():
        tag, count = name.replace(", ", "_").replace(" ", "_"), report.logits.shape[1]
        classes = class_names(dataset, count, report.classes)
        found = confusion(report.logits, report.labels)
        frame = pd.DataFrame(found, columns=classes)
        frame.insert(0, "label", classes)
        write_table(folder / f"confusion,{tag}.csv", frame)
        images, named, right = found.sum(1), found.sum(0), np.diag(found)
        with np.errstate(invalid="ignore"):
            parts = {"accuracy": 100 * right / images, "precision": 100 * right / named}
        write_table(folder / f"classes,{tag}.csv", pd.DataFrame({"class": classes} | parts | {"images": images}))
        shares = found / np.maximum(images, 1)[:, None]
        caption = "Each row is a label: the share of its images that each class is named for."
        panel = Panel("label (rows), class that is named (columns)", matrix=shares, ticks=classes)
        save(Chart(f"confusion,{tag}", "Evaluation", f"Confusion matrix: {name}", caption, [panel]), folder)


def confusion(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return how many images of each label (rows) each class (columns) is named for, (K, K)."""
    count = logits.shape[1]
    return np.bincount(labels * count + logits.argmax(1), minlength=count**2).reshape(count, count)
