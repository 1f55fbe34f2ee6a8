"""SOLVER.EARLY_STOP: a run ends after so many epochs without a new best, for good, and everything says so."""

import json
import re
from pathlib import Path

import pytest
from helpers import changed, outcome, run, same
from notebook import nets, quick
from studies import CURVES, write_run

from mdistiller import config
from mdistiller.engine.seeds import train_seeds
from mdistiller.engine.trainer import Trainer
from mdistiller.errors import Preempted
from mdistiller.study.comparison import curves_chart
from mdistiller.study.groups import group_runs
from mdistiller.study.runs import read_run
from mdistiller.study.tables import compared, results_table

STOP = ["DISTILLER.TYPE", "NONE", "SOLVER.EPOCHS", "8", "SOLVER.EARLY_STOP", "3"]


def test_a_run_stops_for_good_and_says_so_wherever_it_was_interrupted(small, tmp_path, curves, capsys, monkeypatch):
    """The signal comes in epoch 4, whose steps are done again by the rest of the run."""
    opts, real = [*small, *STOP], Trainer.save
    folder = run(opts, tmp_path)
    said = "result: test top-1 45.00 last (epoch 5), 50.00 best (epoch 2), stopped early at epoch 5 of 8, in "
    assert said in capsys.readouterr().out and said in (folder / "worklog.txt").read_text()
    before = outcome(folder)
    assert [row["epoch"] for row in before[1]] == [1, 2, 3, 4, 5]
    for more in ({}, {"SOLVER__EPOCHS": 9}):
        assert same(outcome(run(opts, tmp_path, resume=True, **more)), before), "it is finished"
    assert len(outcome(run(opts, tmp_path / "off", SOLVER__EARLY_STOP=0, SOLVER__EPOCHS=6))[1]) == 6, "the default"

    def save(self, recorder):
        self.stop.signal = "SIGTERM" if self.state.epoch == 3 else ""
        real(self, recorder)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "save", save)
        with pytest.raises(Preempted, match="in epoch 4"):
            run(opts, tmp_path / "parts")
    assert same(outcome(run(opts, tmp_path / "parts", resume="auto")), before)


def test_each_seed_stops_for_itself(small, tmp_path, curves, capsys):
    cfg = config.load(None, changed(small, tmp_path) + STOP)
    summary = train_seeds(cfg, [0, 1, 2])
    assert [(one["epochs"], one["stopped_early"]) for one in summary["runs"]] == [(5, True), (8, False), (8, False)]
    assert summary["last"]["n"] == 3
    lines = capsys.readouterr().out.splitlines()
    assert re.search(r"^0 +45\.00 +50\.00 +2  stopped early at epoch 5$", "\n".join(lines), re.M)
    assert sum("stopped early" in line for line in lines) == 2, "its result, and its line of the table"
    before = [outcome(Path(one["folder"])) for one in summary["runs"]]
    again = train_seeds(cfg, [0, 1, 2], resume=True)
    assert same([outcome(Path(one["folder"])) for one in again["runs"]], before)
    file = next(path for path in (tmp_path / "distill").glob("*.json"))
    assert json.loads(file.read_text())["runs"][0]["stopped_early"] is True


def test_the_library(curves):
    result = quick(*nets(), epochs=8, SOLVER__EARLY_STOP=3)
    assert result.stopped_early and len(result.history) == 5
    assert "in epoch 2 of 5, stopped early" in repr(result)
    assert not quick(*nets(), epochs=4, SOLVER__EARLY_STOP=3).stopped_early


def test_tables_average_seeds_that_stopped_at_other_epochs_and_say_it(tmp_path):
    folders = [
        write_run(tmp_path, f"s{seed}", curve, seed, finished=5 if seed == 0 else None, SOLVER__EARLY_STOP=3)
        for seed, curve in CURVES.items()
    ]
    folders.append(write_run(tmp_path, "half", CURVES[2], 3, finished=4, SOLVER__EARLY_STOP=3))
    runs = [read_run(folder) for folder in folders]
    assert [one.stopped_early for one in runs] == [True, False, False, False]
    assert [one.finished for one in runs] == [True, True, True, False]
    groups, notes = group_runs(runs)
    assert [group.schedule for group in groups] == ["stopped early at epochs 5, 8 of 8", "4 of 8 epochs"]
    assert not notes and groups[0].last == (pytest.approx((45 + 32 + 8) / 3), pytest.approx(18.77, abs=0.01), 3)
    assert "stopped early at epochs 5, 8 of 8" in results_table(groups, {}).rows[0]
    assert "stopped early at epochs" in groups[0].label
    assert [row[5] for row in compared(runs).rows] == ["5/8, stopped early", "8/8", "8/8", "4/8"]
    (panel, *_) = curves_chart(groups).panels
    assert [len(series.y) for series in panel.series] == [5, 4]
