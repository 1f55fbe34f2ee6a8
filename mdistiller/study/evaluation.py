"""tools/eval.py: what a checkpoint, or each network that a run has left, says of a test set."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from mdistiller import config
from mdistiller.dataset import ImageSet
from mdistiller.engine.detection_scores import NAMES, DetectionReport, evaluate_detectors
from mdistiller.engine.evaluator import Report, evaluate_checkpoint
from mdistiller.engine.method import join_teachers
from mdistiller.engine.text_scores import TextReport, evaluate_text
from mdistiller.errors import OtherNetwork, UserError
from mdistiller.registry import task_of
from mdistiller.study import statistics as st
from mdistiller.study.charts import Chart, Panel, write_table
from mdistiller.study.drawing import save
from mdistiller.study.networks import Missing, Networks, headless
from mdistiller.study.runs import Run, lacking_plugins, read_run
from mdistiller.study.superclasses import class_names
from mdistiller.study.tables import Table

OF_TEXT = {  # figures of text: their heads, and how they are written
    "bits_per_byte": ("bits/byte", "{:.4f}"), "loss_calibrated": ("calibrated loss", "{:.4f}"),
    "ece": ("ECE (%)", "{:.2f}"), "teacher_kl": ("KL to teacher", "{:.4f}"),
}  # fmt: skip
OTHERS = {"text": evaluate_text, "detection": evaluate_detectors}  # what scores networks, by task
HEAD = ("network", "top-1 (%)", "top-5 (%)", "loss", "ECE (%)", "parameters", "images/s")


def run_to_evaluate(folder: Path, opts: Sequence[str], plugins: Sequence[str]) -> Run:
    """Return the run in `folder`, with the KEY VALUE pairs `opts` in place of its own. Raises UserError where it is no
    run's, or a plug-in is missing.
    """
    run = read_run(folder, opts, plugins)
    if notes := lacking_plugins([run]):
        raise UserError(*notes)
    config.activate(run.plugins)
    return run


def evaluate_run(
    run: Run, batch_size: int, device: torch.device, amp: str
) -> tuple[dict[str, Report | TextReport | DetectionReport], list[str]]:
    """Return the reports on the run's last student, its best one, its average of weights and its teacher; and lines on
    what is not there. Raises UserError where its folder holds no student.
    """
    names, data, folder, notes = run.cfg.DISTILLER, run.cfg.DATASET, run.folder, []
    students = {"student, last": folder / "student_latest", "student, best": folder / "student_best"}
    students["student, average"] = folder / "student_ema"  # of SOLVER.EMA
    asked = {what: ("STUDENT", file) for what, file in students.items() if file.is_file()}
    if not asked:
        raise UserError(f"{folder}: holds no student_latest or student_best; is it a run's folder?")
    if run.taught:
        try:
            asked["teacher"] = "TEACHER", Networks().teacher_file(run)
        except Missing:
            notes.append(f"the teacher {names.TEACHER} is not there any more; name its file with -m and -c")

    if evaluate := OTHERS.get(task_of(data.TYPE)):
        named = {what: (names[side], str(file)) for what, (side, file) in asked.items()}
        try:
            return evaluate(named, data, batch_size, device, amp), notes
        except OtherNetwork:
            if not names.NEW_HEAD or not named.pop("teacher", None):
                raise
            return evaluate(named, data, batch_size, device, amp), [*notes, headless(run)]

    def join(teacher: nn.Module, images: ImageSet) -> nn.Module:
        return join_teachers(run.cfg, teacher, images)

    reports = {}
    for what, (side, file) in asked.items():
        network, joined = (names[side], names[f"{side}_SIZE"]), [join] if what == "teacher" else []
        try:
            reports[what] = evaluate_checkpoint(network, str(file), data, batch_size, device, amp, *joined)
        except OtherNetwork:
            if what != "teacher" or not names.NEW_HEAD:
                raise
            notes.append(headless(run))
    return reports, notes


def figures(report: Report | TextReport | DetectionReport) -> dict[str, float | int | None]:
    """Return the figures of a report: accuracies and the expected calibration error (15 bins) in percent."""
    if isinstance(report, TextReport):
        own = {"top1": report.scores.top1, "top5": report.scores.top5, "loss": report.scores.loss} | report.scores.more
        return own | {"parameters": report.parameters, "tokens_per_second": report.tokens_per_second}
    if isinstance(report, DetectionReport):
        own = {name: value for name, value in report.scores.figures.items() if name != "test_acc"}
        return own | {"parameters": report.parameters, "images_per_second": report.images_per_second}
    ece = 100 * st.calibration(report.logits, report.labels).ece
    scores = {"top1": report.scores.top1, "top5": report.scores.top5, "loss": report.scores.loss, "ece": ece}
    return scores | {"parameters": report.parameters, "images_per_second": report.images_per_second}


def evaluation_table(reports: Mapping[str, Report]) -> Table:
    """Return a row of figures for each network; top-5 where there are more than five classes."""
    if any(isinstance(report, TextReport) for report in reports.values()):
        return text_evaluation_table(reports)
    if all(isinstance(report, DetectionReport) for report in reports.values()):
        return detection_evaluation_table(reports)
    rows, head = [], [name for name in HEAD if "top-5" not in name or any(r.scores.top5 for r in reports.values())]
    for name, report in reports.items():
        found = figures(report)
        top5 = [] if found["top5"] is None else [f"{found['top5']:.2f}"]
        texts = (f"{found['loss']:.4f}", f"{found['ece']:.2f}", f"{found['parameters']:,}")
        rows.append([name, f"{found['top1']:.2f}", *top5, *texts, f"{found['images_per_second']:,.0f}"])
    return Table("evaluation", "Evaluation", "", head, rows)


def detection_evaluation_table(reports: Mapping[str, DetectionReport]) -> Table:
    """Return a row of average precisions for each detector."""
    rows = []
    for name, report in reports.items():
        aps = ["–" if value is None else f"{value:.2f}" for value in report.scores]
        rows.append([name, *aps, f"{report.parameters:,}", f"{report.images_per_second:,.0f}"])
    return Table("evaluation", "Evaluation", "", ("network", *NAMES, "parameters", "images/s"), rows)


def text_evaluation_table(reports: Mapping[str, TextReport]) -> Table:
    """Return a row of figures for each network of text; the divergence from a teacher where there is one."""
    rows, found = [], {name: figures(report) for name, report in reports.items()}
    keys = [key for key in OF_TEXT if any(key in own for own in found.values())]
    for name, own in found.items():
        texts = [OF_TEXT[key][1].format(own[key]) if key in own else None for key in keys]
        speed = (f"{own['parameters']:,}", f"{own['tokens_per_second']:,.0f}")
        rows.append([name, f"{own['top1']:.2f}", f"{own['loss']:.4f}", *texts, *speed])
    head = ["network", "top-1 (%)", "loss", *(OF_TEXT[key][0] for key in keys), "parameters", "tokens/s"]
    return Table("evaluation", "Evaluation", "", head, rows)


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
