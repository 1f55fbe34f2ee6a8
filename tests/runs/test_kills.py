"""kill -9, again and again: whatever it strikes, the run ends as the undisturbed one. `make test-long` runs these.

A fresh process each time would spend its life importing torch, so children are forked.
"""

import contextlib
import functools
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from helpers import changed, forked, killed, outcome, run, same

from mdistiller import config
from mdistiller.engine.run import train
from mdistiller.engine.seeds import train_seeds
from mdistiller.runs.recorder import read_metrics

KILLS = int(os.environ.get("KILLS", "12"))  # of each kind
pytestmark = pytest.mark.slow


@pytest.fixture
def opts(small, save_every_step):
    """Of a run whose checkpoints come at every step."""
    return [*small, *save_every_step, "DISTILLER.TYPE", "DTKD", "SOLVER.EPOCHS", "4", "LOG.SAVE_CHECKPOINT_FREQ", "2"]


def assert_whole(folder: Path) -> None:
    """Nobody who reads the folder finds half a line or an epoch twice."""
    if not ((folder / "metrics.jsonl").exists() and (folder / "worklog.txt").exists()):
        return
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        json.loads(line)
    epochs = [row["epoch"] for row in read_metrics(folder)]
    assert epochs == list(range(1, len(epochs) + 1))
    text = (folder / "worklog.txt").read_text()
    assert text == "" or text.endswith("\n")


def assert_undisturbed(folder: Path, expected: Path) -> None:
    assert same(outcome(folder), outcome(expected))
    assert (folder / "temperatures.bin").read_bytes() == (expected / "temperatures.bin").read_bytes()
    assert not list(folder.glob(".*.tmp")) + list(folder.parent.glob("run~*"))


@pytest.mark.parametrize("students", [1, 2])
def test_kill_9_at_random_moments_changes_nothing(opts, tmp_path, students):
    """Children are started and killed until one comes to its end."""

    def work(prefix, resume=False):
        words = changed(opts, prefix, TEACHER_BANK="lazy", TEACHER_BANK_FOLDER=prefix / "bank")
        if students > 1:
            train_seeds(config.load(None, words), range(students), resume)
        else:
            train(config.load(None, words), resume)

    work(tmp_path / "whole")
    begin = time.monotonic()
    assert not killed(forked(lambda: work(tmp_path / "timed")))
    seconds, draw, kills, runs = time.monotonic() - begin, random.Random(0), 0, 0
    names = [path.parent.name for path in (tmp_path / "whole" / "distill").glob("*/latest")]
    assert len(names) == students
    while kills < KILLS // students**2:
        runs, alive, before = runs + 1, True, kills
        folders = [tmp_path / str(runs) / "distill" / name for name in names]
        while alive:
            child = forked(functools.partial(work, tmp_path / str(runs), resume="auto"))
            time.sleep(draw.uniform(0, seconds) * (1 + (kills - before) / 10))  # even where the machine becomes slow
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            alive = killed(child)
            kills += alive
            for folder in folders:
                assert_whole(folder)
        for folder in folders:
            assert_undisturbed(folder, tmp_path / "whole" / "distill" / folder.name)
        shutil.rmtree(tmp_path / str(runs))
    print(f"{kills} kills, {runs} runs of {students}, 0 differences")


def test_a_kill_at_any_file_operation_changes_nothing(opts, tmp_path):
    """A child dies at its nth file operation, for n over all that a run of two epochs has; the next one goes on."""
    opts = [*opts, "SOLVER.EPOCHS", "2"]
    expected = run(opts, tmp_path / "whole")
    folder = tmp_path / "hurt" / "distill" / "run"

    def dies_at(number):
        count = 0

        def dying(function):
            def call(*arguments, **keywords):
                nonlocal count
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **keywords)

            return call

        for name in ("fsync", "replace", "link", "truncate", "unlink"):
            setattr(os, name, dying(getattr(os, name)))  # in the child alone
        run(opts, tmp_path / "hurt", resume="auto")

    number, kills = 1, 0
    while killed(forked(functools.partial(dies_at, number))):
        kills += 1
        assert_whole(folder)
        assert not killed(forked(lambda: run(opts, tmp_path / "hurt", resume="auto")))
        assert_undisturbed(folder, expected)
        shutil.rmtree(tmp_path / "hurt")
        number += max(1, 150 // KILLS)  # every one of them for KILLS 150 and more
    assert kills > 10
    print(f"{kills} kills at file operations, of {number} in a run, 0 differences")
