"""tools/analyze.py from run folders to files; what it cannot work with is refused."""

import csv

import pytest
from helpers import digits_opts, tool


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    opts = digits_opts(
        DISTILLER__TYPE="DTKD", DISTILLER__TEACHER="resnet8", DISTILLER__TRAIN_TEACHER=True, SOLVER__EPOCHS=2,
        LOG__TEMPERATURE="samples", EXPERIMENT__PROJECT="p",
    )  # fmt: skip
    for seed in (0, 1):
        done = tool("train_ours", *opts, "SEED", seed, "EXPERIMENT.NAME", f"run{seed}", cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


def test_a_report_of_two_seeds(runs):
    words = ["output/p/run0", "output/p/run1", "-o", "report", "--latex", "--markdown"]
    done = tool("analyze", *words, cwd=runs)
    assert done.returncode == 0, done.stderr
    out = runs / "report"
    page = (out / "report.html").read_text()
    assert "DTKD" in page
    assert "<script src=" not in page, "the page loads nothing"
    for name in ("results.csv", "results.tex", "results.md"):
        assert (out / name).stat().st_size > 0
    (row,) = csv.DictReader((out / "results.csv").open())
    assert "0, 1" in row.values(), "two seeds, one row"
    figures = list((out / "figures").rglob("*"))
    stems = {path.stem for path in figures if path.suffix == ".png"}
    assert len(stems) >= 6
    assert stems <= {path.stem for path in figures if path.suffix == ".svg"}


def test_what_is_no_run_is_refused(tmp_path):
    done = tool("analyze", "gone", "-o", "report", cwd=tmp_path)
    assert done.returncode == 2
    assert "gone" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "report").exists()
