"""Runs that are stopped or killed, and go on to the same end, bit for bit."""

import os
import random
import re
import signal
import time

import numpy as np
import pytest
import torch
from helpers import GPU, KINDS, forked, killed, outcome, run, same, save_teacher, stopping_after

from mdistiller.engine import build
from mdistiller.errors import Preempted, UserError
from mdistiller.runs.keeper import Keeper
from mdistiller.runs.recorder import read_metrics
from mdistiller.runs.temperature import read_record

SOLVERS = [("CRD", "crd_dot"), ("VID", "dot"), ("MLKD", "ours")]


def assert_same_run(one, other):
    """The folders hold the same state, rows and record of temperatures."""
    assert same(outcome(one), outcome(other))
    if (one / "temperatures.bin").exists():
        assert (one / "temperatures.bin").read_bytes() == (other / "temperatures.bin").read_bytes()


@pytest.mark.parametrize(("method", "solver"), [*((name, "base") for name in KINDS), *SOLVERS])
def test_a_stopped_run_goes_on_at_the_very_step(small, undisturbed, tmp_path, interrupted, method, solver):
    opts = [*small, "DISTILLER.TYPE", method, "SOLVER.TRAINER", solver]
    whole = undisturbed(method, SOLVER__TRAINER=solver)
    items = 2, 2  # after step 2 of epoch 1; then in its evaluation, which comes again
    parts = interrupted(lambda resume: run(opts, tmp_path, resume), *items, says="SIGTERM in epoch 1")
    assert_same_run(whole, parts)
    log = (parts / "worklog.txt").read_text()
    assert [log.count(words) for words in ("stopped by", "resumed after", "epoch 1/2", "epoch 2/2")] == [2, 2, 1, 1]


@pytest.mark.parametrize("method", ["DTKD", "CRD", "MLKD"])
def test_kill_9_costs_the_steps_since_the_checkpoint_inside_the_epoch(
    small, undisturbed, tmp_path, monkeypatch, method
):
    """The child writes one after the first step of epoch 2, and dies while it handles the third."""
    opts = [*small, "DISTILLER.TYPE", method]
    whole, calls = undisturbed(method), iter(range(100))

    class Killed(stopping_after(7)):  # three steps and a test in epoch 1, three steps in epoch 2
        signal = property(lambda self: "", lambda self, name: name and os.kill(os.getpid(), signal.SIGKILL))

    with monkeypatch.context() as patched:
        patched.setattr(Keeper, "due", lambda self: next(calls) == 3)
        patched.setattr(build, "Stop", Killed)
        assert killed(forked(lambda: run(opts, tmp_path)))
    file = tmp_path / "distill" / "run" / "environment.json"
    threads = torch.get_num_threads()
    file.write_text(file.read_text().replace(f'"threads": {threads}', '"threads": 64'))
    folder, says = run(opts, tmp_path, resume="auto"), f"1 step into the next; threads {threads} in place of 64: "
    assert f"resumed after epoch 1 of 2, {says}" in (folder / "worklog.txt").read_text()
    assert_same_run(whole, folder)


@pytest.mark.parametrize("method", ["KD", "NONE"])
def test_another_teacher_or_other_data_are_refused(small, tmp_path, method):
    opts, others = [*small, "DISTILLER.TYPE", method], {"DATASET.ROOT": tmp_path / "other.npz"}
    folder = run(opts, tmp_path / "runs", SOLVER__EPOCHS=1)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    with np.load(small[small.index("DATASET.ROOT") + 1]) as file:
        arrays = dict(file)
    if method == "KD":
        arrays["train_images"][0, 0, 0] ^= 1
        others["DISTILLER.TEACHER_CKPT"] = save_teacher(tmp_path / "other", "resnet14", 10)
        state = torch.load(tmp_path / "other", weights_only=True)
        state["model"]["fc.bias"][0] += 1
        torch.save(state, tmp_path / "other")
    else:
        arrays["train_labels"][0] = arrays["train_labels"].max() + 1  # of a class more
    np.savez(tmp_path / "other.npz", **arrays)
    for key, path in others.items():
        with pytest.raises(UserError, match=f"in {key} is not what this run was started with"):
            run([*opts, key, str(path)], tmp_path / "runs", resume=True, SOLVER__EPOCHS=2)
    del before[".lock"]
    assert before == {p.name: p.stat().st_mtime_ns for p in folder.iterdir() if p.name != ".lock"}, "nothing is written"


def test_a_record_that_lacks_epochs_costs_no_run(small, tmp_path, capsys):
    """Those of another mode, of a file that is gone, and of one that is no record."""
    opts = [*small, "DISTILLER.TYPE", "DTKD"]
    folder = run(opts, tmp_path, SOLVER__EPOCHS=1, LOG__TEMPERATURE="summary")
    for epochs, file, lacks in ((2, None, 1), (3, None, 0), (4, "gone", 3), (5, b"junk" * 5000, 4), (6, None, 0)):
        if file == "gone":
            (folder / "temperatures.bin").unlink()
        elif file:
            (folder / "temperatures.bin").write_bytes(file)
        run(opts, tmp_path, resume=True, SOLVER__EPOCHS=epochs)
        said = re.findall(r"has nothing of (\d) finished epoch", capsys.readouterr().out)
        assert said == ([str(lacks)] if lacks else []), epochs
        values = read_record(folder / "temperatures.bin").values
        known = [not bool(np.isnan(epoch).all()) for epoch in values]
        assert known == [number >= {2: 1, 3: 1, 4: 3, 5: 4, 6: 4}[epochs] for number in range(epochs)]


def test_more_epochs_take_the_teacher_that_the_run_was_started_with(small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    place = small.index("DISTILLER.TEACHER_CKPT")
    opts = [*small[:place], *small[place + 2 :], "DISTILLER.TYPE", "KD", "DISTILLER.TRAIN_TEACHER", "True"]
    run(opts, tmp_path / "out", SOLVER__EPOCHS=1)
    folder = run(opts, tmp_path / "out", resume="auto", SOLVER__EPOCHS=2)
    assert len(read_metrics(folder)) == 2
    assert capsys.readouterr().out.count("comes first") == 1


def test_a_run_goes_on_with_the_kernels_of_another_device(small, tmp_path, stop_after, request):
    stop_after(2)
    with pytest.raises(Preempted):
        run(small, tmp_path)
    stop_after(0)
    request.getfixturevalue("fused_kernels")
    assert [row["epoch"] for row in read_metrics(run(small, tmp_path, resume=True))] == [1, 2]


# The same seed gives the same student, whatever looks on


def test_nothing_that_looks_on_changes_the_student(small, undisturbed, tmp_path, save_every_step):
    key, often = save_every_step
    expected = outcome(undisturbed("DTKD", LOG__TEMPERATURE="off", LOG__TENSORBOARD_FREQ=500))[0]
    changes = {
        "LOG__TEMPERATURE": "summary", "LOG__TENSORBOARD_FREQ": 1, "LOG__SAVE_CHECKPOINT_FREQ": 1, "LOG__PRINT_FREQ": 1,
        key: often, "DETERMINISTIC": True, "SOLVER__NAN_POLICY": "skip", "DATASET__TEST__BATCH_SIZE": 7,
    }  # fmt: skip
    try:
        together = run([*small, "DISTILLER.TYPE", "DTKD"], tmp_path, **changes)
    finally:
        torch.use_deterministic_algorithms(False)
    for folder in (together, undisturbed("DTKD")):  # the other one with the temperatures of all samples
        state = outcome(folder)[0]
        assert same(state["model"], expected["model"]) and same(state["optimizer"], expected["optimizer"])
    other = outcome(undisturbed("DTKD", SEED=1))[0]
    assert not same(other["model"], expected["model"])


def test_a_clock_that_jumps_changes_nothing(small, undisturbed, tmp_path, monkeypatch):
    expected, jumps = undisturbed("DTKD"), random.Random(0)
    monkeypatch.setattr(time, "time", lambda: jumps.uniform(0, 4e9))
    assert same(outcome(expected), outcome(run([*small, "DISTILLER.TYPE", "DTKD"], tmp_path)))


@pytest.mark.parametrize("method", [pytest.param(name, marks=GPU) for name in ("NONE", "DTKD", "CRD")])
def test_deterministic_runs_on_cuda_give_the_same_bits(small, tmp_path, method):
    opts = [*small, "DISTILLER.TYPE", method, "DEVICE", "cuda", "DETERMINISTIC", "True"]
    assert same(*(outcome(run(opts, tmp_path / name)) for name in "ab"))
    torch.use_deterministic_algorithms(False)
