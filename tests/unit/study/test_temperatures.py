"""What a temperature record says, without a network."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from mdistiller.engine.cfg import load
from mdistiller.errors import UserError
from mdistiller.runs.temperature import EpochBuffer, RecordFile
from mdistiller.study import temperatures
from mdistiller.study.networks import Networks
from mdistiller.study.runs import Group, Run


def run_in(folder: Path, rows: int = 4, **row: object) -> Run:
    """Return a DTKD run whose data are gone."""
    opts = ["DISTILLER.TYPE", "DTKD", "DISTILLER.STUDENT", "resnet8", "DISTILLER.TEACHER", "resnet20"]
    cfg = load(None, [*opts, "DATASET.TYPE", "npz", "DATASET.ROOT", "gone.npz", "SOLVER.EPOCHS", str(rows)])
    return Run(folder, cfg, [{"epoch": n, "test_acc": 1.0, "best_acc": 1.0} | row for n in range(1, rows + 1)])


def summary(t_student: float) -> dict:
    levels = dict.fromkeys(temperatures.LEVELS, t_student)
    more = {"fell_back": 0.25, "confidence_correlation_t_student": 0.5, "confidence_correlation_t_teacher": -0.5}
    return {"t_student": levels, "t_teacher": levels} | more


def record(folder: Path, temperatures_of, n: int = 40) -> None:
    """Write a record whose student's temperatures are temperatures_of(epoch), the teacher's 8 minus them."""
    file = RecordFile(folder / "temperatures.bin", n)
    for epoch in range(4):
        buffer = EpochBuffer(n, torch.device("cpu"))
        values = torch.as_tensor(temperatures_of(epoch), dtype=torch.float32)
        buffer.values[:2] = torch.stack([values, 8 - values])
        buffer.values[2:] = 1
        file.append(buffer)


def test_summaries_are_averaged_over_the_seeds_that_recorded_the_same_epochs(tmp_path):
    runs = [run_in(tmp_path, temperature=summary(t)) for t in (2.0, 4.0)]
    runs += [run_in(tmp_path), run_in(tmp_path, rows=2, temperature=summary(9.0))]
    found = temperatures.summaries_of(Group(runs))
    assert [*found.index] == [1, 2, 3, 4]
    assert found["t_student.q50"].tolist() == [3.0] * 4
    assert found["confidence_correlation_t_student"].tolist() == [0.5] * 4
    back = temperatures.epochs_chart([(Group(runs), found)]).panels[2]
    assert list(back.series[0].y) == [25.0] * 4 and back.y_range[0] == 0
    with pytest.raises(temperatures.Missing, match="LOG.TEMPERATURE summary"):
        temperatures.summaries_of(Group([run_in(tmp_path)]))
    with pytest.raises(UserError, match="another format"):
        temperatures.summaries_of(Group([run_in(tmp_path, temperature={"t_student": 3})]))


def test_a_record_alone_gives_hot_samples(tmp_path):
    record(tmp_path, lambda epoch: np.arange(40) / 10 + epoch)
    samples = temperatures.samples_of(Group([run_in(tmp_path)]), Networks())
    assert "DATASET.ROOT" in samples.notes[0]
    assert np.flatnonzero(samples.frame["hot_student"]).tolist() == [36, 37, 38, 39]
    assert samples.frame["hot_student"].max() == 1
    np.testing.assert_allclose(samples.frame["t_student"], np.arange(40) / 10 + 3, atol=5e-3)
    assert samples.stability.tolist() == pytest.approx([1, 1, 1, 1])
    assert samples.hottest_first["index"].iloc[0] == 39


def test_epochs_and_samples_without_a_record_are_filled_or_left_out(tmp_path):
    def of(epoch):
        values = np.full(40, 2.0 + epoch)
        values[0] = np.nan if epoch == 1 else 8  # its step was skipped
        return np.full(40, np.nan) if epoch == 2 else values

    record(tmp_path, of)
    values = temperatures.values_of(run_in(tmp_path), "t_student")
    assert values[:, 0].tolist() == [8, 8, 8] and values[:, 1].tolist() == [2, 3, 5]
    assert len(temperatures.values_of(run_in(tmp_path, rows=1), "t_student")) == 1, "of finished epochs alone"
    with pytest.raises(temperatures.Missing, match="LOG.TEMPERATURE samples"):
        temperatures.values_of(run_in(tmp_path / "other"), "t_student")


def test_hot_samples_are_ranked_against_difficulty(tmp_path):
    hard, run = np.arange(100.0), run_in(tmp_path, temperature=summary(4.0))
    columns = {"t_student": 4 + hard / 100, "t_teacher": 4 - hard / 100, "loss": hard, "margin": -hard}
    frame = pd.DataFrame(columns | {"hot_student": 0.0, "hot_teacher": 0.0})
    samples = temperatures.Samples(Group([run]), run, frame, np.ones(4))
    group = Group([run])
    table = temperatures.findings_table([(group, temperatures.summaries_of(group))], [samples])
    row = dict(zip(table.head, table.rows[0], strict=True))
    assert row["rank corr. with loss"] == pytest.approx(1)
    assert row["rank corr. with margin"] == pytest.approx(-1)
    assert row["rank corr. with forgetting"] is None
    student, teacher, *_ = temperatures.difficulty_chart([samples]).panels
    assert np.all(np.diff(student.series[0].y) > 0) and np.all(np.diff(teacher.series[0].y) < 0)
    np.testing.assert_allclose(student.series[0].x, np.arange(5, 100, 10))
