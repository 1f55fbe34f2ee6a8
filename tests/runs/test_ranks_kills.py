"""kill -9 of a random process of three under torchrun, again and again: the run ends as the undisturbed one."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, changed, outcome, same

from mdistiller.runs.recorder import read_metrics

KILLS = int(os.environ.get("RANK_KILLS", "3"))
pytestmark = pytest.mark.slow


def started(opts, prefix, world=3):
    """Start `opts` below `prefix` under torchrun, as many times as it takes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    command += ["--max-restarts", "1000", str(ROOT / "tools" / "train_ours.py"), "--resume", "auto"]
    log = open(f"{prefix}.log", "w")  # noqa: SIM115
    return subprocess.Popen([*command, *changed(opts, prefix)], stdout=log, stderr=log)


def until(condition):
    """Return as soon as `condition()` is true, which must not take five minutes: torch is imported three times."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def workers(torchrun):
    found = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(torchrun.pid)], capture_output=True, text=True)
    return [int(line.split()[0]) for line in found.stdout.splitlines() if "train_ours" in line]


def test_kill_9_of_a_random_process_changes_nothing(small, tmp_path):
    opts = [*small, "DISTILLER.TYPE", "DTKD", "SOLVER.EPOCHS", str(2 * KILLS + 2), "SOLVER.SYNC_BN", "True"]
    opts += ["LOG.SAVE_EVERY_SECONDS", "0.01"]
    assert started(opts, tmp_path / "whole").wait() == 0
    draw, folder, kills = random.Random(0), tmp_path / "hurt" / "distill" / "run", 0
    torchrun = started(opts, tmp_path / "hurt")
    while kills < KILLS:
        before = len(read_metrics(folder))
        if draw.random() < 0.75:  # while it trains; else it may strike at its start
            until(lambda before=before: len(read_metrics(folder)) > before or torchrun.poll() is not None)
        time.sleep(draw.uniform(0, 0.4))
        assert torchrun.poll() is None, Path(f"{tmp_path / 'hurt'}.log").read_text()[-2000:]
        alive = workers(torchrun)
        if alive:
            os.kill(draw.choice(alive), signal.SIGKILL)
            kills += 1
            until(lambda alive=alive: not set(alive) & set(workers(torchrun)))
    assert torchrun.wait() == 0
    assert same(outcome(folder), outcome(tmp_path / "whole" / "distill" / "run"))
    assert (folder / "temperatures.bin").read_bytes() == (
        tmp_path / "whole" / "distill" / "run" / "temperatures.bin"
    ).read_bytes()
    sessions = json.loads((folder / "environment.json").read_text())["sessions"]
    assert {session["processes"] for session in sessions} == {3}
    print(f"{kills} kills, {len(sessions)} sessions, 0 differences")
