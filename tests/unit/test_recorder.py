"""A run's folder, in which one process at a time trains; its rows and lines; and the signals that stop it."""

import json
import os
import signal

import pytest

from mdistiller.engine.cfg import load
from mdistiller.errors import FolderInUse, UserError
from mdistiller.runs.folder import RunFolder, in_use, run_folder
from mdistiller.runs.recorder import Recorder, line_of, read_metrics
from mdistiller.runs.stop import Stop


def test_columns_align():
    row = dict.fromkeys(["train_loss", "train_acc", "test_acc", "test_acc_top5", "best_acc", "epoch_seconds"], 7.0)
    row |= {"images_per_second": 10.0, "lr": 0.05, "epoch": 9, "best_epoch": 9}
    late = row | {"epoch": 210, "best_epoch": 109, "test_acc": 71.25, "lr": 5e-4}
    lines = [line_of(one, 240, 5) for one in (row, late)]
    assert len({line.index("top-5") for line in lines}) == len({line.index("img/s") for line in lines}) == 1
    skipped = late | {"skipped_steps": 1, "test_acc": 100.0, "train_loss": 999.0}
    for label in (0, len("seed 4294967295  ")):
        short = [line_of(one, 240, 90_000, 80 - label) for one in (row, late, skipped)]
        assert max(map(len, short)) <= 80 - label, "a line of a terminal"
        for part in ("epoch 210/240", "test 100.00", "best   7.00 @ 109", "skipped 1 step"):
            assert part in short[-1]
    assert "train" in line_of(row | {"epoch": 6, "best_epoch": 6}, 6, 5, 80)
    assert "top-5" not in line_of({**row, "test_acc_top5": None}, 240, 5), "of five classes or fewer"


def test_what_a_crash_left_behind_is_removed(tmp_path):
    rows = [{"epoch": 1, "x": 1}, {"epoch": 2, "x": 2}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + '{"epoch": 3, "x"')
    (tmp_path / "worklog.txt").write_text("head\n  indented\nepoch 1/3  a\nepoch 2/3  b\nepoch 3")
    Recorder(tmp_path, 3, done=1, log=len("head\n  indented\nepoch 1/3  a\n")).close()
    assert read_metrics(tmp_path) == rows[:1]
    assert (tmp_path / "worklog.txt").read_text() == "head\n  indented\nepoch 1/3  a\n"


def test_a_student_that_loses_its_scale_is_told_once(tmp_path, capsys):
    recorder = Recorder(tmp_path, 5)
    figures = {"std": 0.0, "min": 0.0, "q05": 0.0, "q25": 0.0, "q50": 0.0, "q75": 0.0, "q95": 0.0, "max": 0.0}
    said = []
    for epoch, student in enumerate((0.1, 0.3, 0.1, 0.05, 4.0), 1):  # beside a strong teacher all begin so low
        sides = {"student": student, "teacher": 8 - student}
        record = {
            f"{name}_{side}": figures | {"mean": mean} for side, mean in sides.items() for name in ("t", "sharpness")
        }
        record |= {"fell_back": 0.0} | {f"confidence_correlation_t_{side}": 0.0 for side in sides}
        row = dict.fromkeys(["train_loss", "train_acc", "test_acc", "best_acc", "epoch_seconds", "lr"], 7.0)
        row |= {"epoch": epoch, "best_epoch": 1, "images_per_second": 10.0, "train_losses": {}, "temperature": record}
        recorder.end_epoch(row, 0.0)
        said.append("lose their scale" in capsys.readouterr().out)
    assert said == [False, False, True, False, False]


def test_a_second_ctrl_c_stops_at_once():
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal == ""
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    "opts", [["EXPERIMENT.NAME", "."], ["EXPERIMENT.NAME", " "], ["EXPERIMENT.TAG", ".."], ["EXPERIMENT.NAME", "a\nb"]]
)
def test_a_name_that_is_no_folder_is_refused(opts):
    with pytest.raises(UserError, match=r"EXPERIMENT\.NAME"):
        run_folder(load(None, opts))


def test_a_folder_in_use_is_refused(tmp_path):
    assert not in_use(tmp_path / "run")
    held = RunFolder(tmp_path / "run")
    assert in_use(tmp_path / "run")
    with pytest.raises(FolderInUse, match=f"process {os.getpid()} on"):
        RunFolder(tmp_path / "run")
    held.close()
    RunFolder(tmp_path / "run").close()


def test_a_run_is_named_by_what_was_typed():
    """Spaces included: else `my run` and `myrun` were one folder, and a project's spaces alone stayed."""
    for words, folder in (
        (
            ["SOLVER.LR=0.1", "LOG.PREFIX=out", "EXPERIMENT.TAG=x", "SOLVER.LR_DECAY_STAGES", "[1, 2]"],
            "out/distill/x+SOLVER.LR:0.1,SOLVER.LR_DECAY_STAGES:[1,2]",
        ),
        (["SEED=3", "EXPERIMENT.NAME=y"], "output/distill/y"),
        (["EXPERIMENT.NAME", " my first  run ", "EXPERIMENT.PROJECT", "my pairs"], "output/my pairs/my first  run"),
        (["EXPERIMENT.TAG", "dtkd, res20, res8", "SEED=3"], "output/distill/dtkd, res20, res8+SEED:3"),
    ):
        assert str(run_folder(load(None, words))) == folder


def test_a_name_too_long_for_a_folder_ends_in_a_hash_of_it():
    names = {run_folder(load(None, ["EXPERIMENT.TAG", "é" * 99 + end])).name for end in ("xyz", "xyzw", "xyw")}
    assert len(names) == 3 and all(len(name.encode()) <= 200 and name.startswith("é" * 95 + "..") for name in names)
