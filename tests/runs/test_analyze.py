"""From run folders to the report."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import called, refused, run, save_teacher, small_run
from PIL import Image
from studies import write_detector_run

from mdistiller.engine.detection_scores import NAMES
from mdistiller.errors import UserError
from mdistiller.runs.temperature import HEADER
from mdistiller.study.analyze import analyze


def rows_of(path):
    return list(csv.DictReader(path.open()))


def test_from_runs_to_report(tmp_path, recorded_runs):
    published = tmp_path / "published.json"
    published.write_text(json.dumps({"DTKD": {"resnet8/resnet8": 61.0}}))
    out = tmp_path / "out"
    runs = [recorded_runs / name for name in ("dtkd-0", "dtkd-1", "kd", "alone", "dtkd-0")]
    done = analyze(runs, out, published, latex=True, markdown=True)
    made = {path.name for path in (out / "figures").iterdir()}
    assert out.stat().st_mode == tmp_path.stat().st_mode | 0o055, "others may read it"
    dtkd = "01-dtkd-resnet8-to-resnet8-3-epochs"
    for name in (
        "curves", "temperature-epochs", "temperature-difficulty", "temperature-persistence", "temperature-classes",
        f"extremes-{dtkd}", "calibration", "agreement", f"correlation-{dtkd}", f"tsne-{dtkd}",
    ):  # fmt: skip
        assert {f"{name}.png", f"{name}.svg", f"{name}.csv"} <= made, name
    assert {path.name for path in out.iterdir()} == {
        "report.html", "figures", "results.csv", "results.tex", "results.md", "temperature.csv",
        "student-and-teacher.csv",
    }  # fmt: skip
    notes = "\n".join(done.notes)
    assert "only cifar100 has superclasses" in notes
    assert "temperature: no temperatures of samples; train with LOG.TEMPERATURE samples" in notes

    row = rows_of(out / "results.csv")[0]
    lasts = [json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["test_acc"] for run in runs[:2]]
    assert float(row["last (%)"]) == pytest.approx(np.mean(lasts), rel=1e-4)
    assert float(row["last (%) sd"]) == pytest.approx(np.std(lasts, ddof=1), rel=1e-4)
    samples = rows_of(out / "figures" / f"samples-{dtkd}.csv")
    assert len(samples) == 160 and {"loss", "margin", "forgetting_events", "t_teacher"} <= samples[0].keys()
    curves = rows_of(out / "figures" / "curves.csv")
    assert {r["panel"] for r in curves} == {"test accuracy", "training accuracy", "training loss"}
    assert (out / "report.html").read_text().count('class="plot') > 15


def test_one_epoch_and_images_that_are_all_alike(tmp_path):
    """What has nothing to draw is left out with a line."""
    opts = small_run(tmp_path)
    alike = {"train_images": np.full((40, 16, 16, 3), 7, np.uint8), "test_images": np.full((8, 16, 16, 3), 7, np.uint8)}
    labels = {"train_labels": np.zeros(40, int), "test_labels": np.zeros(8, int)}  # one class, beside one never met
    np.savez(tmp_path / "images.npz", **alike, **labels)
    save_teacher(tmp_path / "teacher", "resnet14", 2)
    runs = [run(opts, tmp_path / str(n), DISTILLER__TYPE="DTKD", SEED=n, SOLVER__EPOCHS=1) for n in (0, 1)]
    done = analyze(runs, tmp_path / "out")
    notes = "\n".join(done.notes)
    for says in ("which samples stay hot: only one epoch is recorded", "t-SNE: needs 10 test images or more"):
        assert says in notes
    made = {chart.name for chart in done.charts}
    assert {"curves", "temperature-epochs", "calibration", "agreement"} <= made
    assert "temperature-persistence" not in made
    assert not any("nan" in line.lower() for line in (tmp_path / "out" / "results.csv").read_text().splitlines())


def test_what_a_run_lacks_is_left_out_and_an_earlier_report_is_replaced(tmp_path, recorded_runs):
    """And nothing else."""
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(recorded_runs / "kd", run, ignore=shutil.ignore_patterns("student_*", "train.events"))
    notes = analyze([run], out).notes
    assert any("no student_latest or student_best" in note for note in notes)
    made = {path.name for path in (out / "figures").iterdir()}
    assert {"curves.png", "temperature-epochs.png"} <= made
    assert "agreement.png" not in made
    assert "student_latest" in (out / "report.html").read_text()

    shutil.copy(recorded_runs / "kd" / "student_latest", run)
    (out / "figures" / "curves-of-old.png").write_text("of an earlier report")
    done = called("analyze", run, "-o", out, "--opts", "DISTILLER.TEACHER_CKPT", "gone.pth", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    gone = "no checkpoint of the teacher resnet8 at gone.pth; point to it with --opts DISTILLER.TEACHER_CKPT"
    assert gone in done.stdout
    assert (out / "figures" / "calibration.png").exists() and not (out / "figures" / "curves-of-old.png").exists()

    (out / "report.html").write_text("mine")
    with pytest.raises(UserError, match="holds files that are no report"):
        analyze([run], out)


def test_what_cannot_work_writes_nothing(tmp_path, recorded_runs, monkeypatch):
    good = recorded_runs / "dtkd-0"
    for name in ("record", "weights", "count"):
        shutil.copytree(good, tmp_path / name, ignore=shutil.ignore_patterns("train.events", "epoch_*", "student_?"))
    record = (good / "temperatures.bin").read_bytes()
    (tmp_path / "record" / "temperatures.bin").write_bytes(b"junk")
    (tmp_path / "weights" / "student_latest").write_bytes(b"junk")
    other = record[:HEADER].replace(b'"samples": 160', b'"samples": 150') + record[HEADER:]
    (tmp_path / "count" / "temperatures.bin").write_bytes(other)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    before = sorted(path.name for path in tmp_path.iterdir())
    cases = [
        (tmp_path / "gone", {}, "is no run's folder"),
        (tmp_path / "empty", {}, "is no run's folder"),
        (tmp_path / "record", {}, "is no temperature record"),
        (tmp_path / "weights", {}, "is no checkpoint"),
        (tmp_path / "count", {}, "holds 150 samples"),
        (good, {"published": Path("gone.json")}, "gone.json: cannot be read"),
        (good, {"opts": ["DEVICE"]}, "DEVICE lacks its value"),
        (good, {"opts": ["SOLVER.LR", "1"]}, "'SOLVER.LR' is none of them"),
        (good, {"out": Path("file")}, "is a file"),
    ]
    monkeypatch.chdir(tmp_path)
    for folder, words, says in cases:
        with pytest.raises(UserError, match=re.escape(says)):
            analyze([folder], **{"out": tmp_path / "out"} | words)
        assert sorted(path.name for path in tmp_path.iterdir()) == before, says


def test_the_report_shows_runs_of_detectors(tmp_path):
    folder = write_detector_run(tmp_path, **dict.fromkeys(NAMES) | {"AP50": 30.0})
    assert not any(chart.pictures for chart in analyze([folder], tmp_path / "report").charts)
    Image.new("RGB", (500, 300), "red").save(folder / "detections.png")
    found = analyze([folder], tmp_path / "report")
    curves, picture = found.charts
    assert curves.panels[0].y_label == "AP (%)" and picture.pictures[0][1].shape == (1, 300, 500, 3)
    assert "average precision" in found.tables[0].caption and found.tables[0].rows[0][6].mean == 20
    assert "last AP50" in found.tables[0].head
    assert any("images with boxes" in note for note in found.notes)
    with Image.open(tmp_path / "report" / "figures" / f"{picture.name}.png") as drawn:
        assert drawn.width > 500 and (255, 0, 0) in {color for _, color in drawn.getcolors(2**24)}
    (folder / "detections.png").write_bytes(b"no picture")
    with refused("detections.png: is no picture"):
        analyze([folder], tmp_path / "report")
