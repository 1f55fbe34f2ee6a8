"""tools/train_ours.py: its exit status, signals, terminals and pipes. Commands run in forked children, where
nothing depends on a process of their own.
"""

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import sys
import termios

import pytest
from helpers import changed, forked, load_tool, outcome, same, status_of, unnamed, wait_for

from mdistiller.runs import checkpoint
from mdistiller.runs.recorder import read_metrics

main = load_tool("train_ours").main


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The run's, in the current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "output" / "distill" / "run"


def test_the_command_takes_lists_and_ranges_of_seeds(small, tmp_path, capsys):
    main(["--seeds", "5", "0-1", *changed(unnamed(small), tmp_path, DISTILLER__TYPE="NONE", SOLVER__EPOCHS=1)])
    assert len(list((tmp_path / "distill").glob("run*SEED:*/student_latest"))) == 3
    assert "mean ± sd" in capsys.readouterr().out


def endless(small, *words):
    """A command that goes on until it is stopped."""
    return lambda: main([*small, *words, "SOLVER.EPOCHS", "100000", "SOLVER.STEP", "eager"])


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_signal_ends_the_command_with_status_75(small, folder, name):
    child = forked(endless(small, "--resume", "auto"), "errors")
    wait_for((folder / "latest").exists)
    os.kill(child, getattr(signal, name))
    assert status_of(child) == 75
    with open("errors") as file:
        errors = file.read()
    assert f"stopped by {name} in epoch" in errors
    assert "--resume auto" in errors
    assert "Traceback" not in errors
    assert len(read_metrics(folder)) == checkpoint.load(folder / "latest")["epoch"]


def test_ctrl_c_after_a_signal_ends_it_at_once_with_status_130(small, folder):
    child = forked(endless(small), "errors")
    wait_for((folder / "latest").exists)
    os.kill(child, signal.SIGSTOP)  # both come before the next step is done
    os.kill(child, signal.SIGHUP)
    os.kill(child, signal.SIGINT)
    os.kill(child, signal.SIGCONT)
    assert status_of(child) == 130


def test_the_status_does_not_depend_on_who_listens(small, folder):
    """As in `train 2>&1 | tee log`, where Ctrl-C ends tee as well."""
    reader, writer = os.pipe()
    child = forked(endless(small), f"/dev/fd/{writer}")
    os.close(writer)
    wait_for((folder / "latest").exists)
    os.close(reader)
    os.kill(child, signal.SIGINT)
    assert status_of(child) == 75
    assert checkpoint.load(folder / "latest")["progress"]["done"] in (1, 2, 3)


def test_a_pipe_that_breaks_changes_nothing(small, undisturbed, folder):
    expected = undisturbed("NONE")
    reader, writer = os.pipe()

    def work():
        os.dup2(writer, sys.stdout.fileno())
        os.close(writer)
        os.close(reader)
        main([*small, "DISTILLER.TYPE", "NONE"])

    child = forked(work, "errors")
    os.close(writer)
    assert len(os.read(reader, 10)) == 10
    os.close(reader)
    assert status_of(child) == 0
    with open("errors") as file:
        assert file.read() == ""
    assert same(outcome(expected), outcome(folder))
    assert "result:" in (folder / "worklog.txt").read_text()


def test_a_terminal_with_its_bar_changes_nothing(small, undisturbed, folder):
    expected = undisturbed("NONE")
    main_side, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))

    def work():
        sys.stdout = os.fdopen(side, "w", buffering=1)
        main([*small, "DISTILLER.TYPE", "NONE"])

    child = forked(work)
    os.close(side)
    shown = b""
    with contextlib.suppress(OSError):  # the other side is closed
        while part := os.read(main_side, 4096):
            shown += part
    assert status_of(child) == 0
    assert b"epoch 1/2:" in shown
    lines = [re.sub(r"\x1b\[\w+", "", part) for part in re.split(r"[\r\n]+", shown.decode())]
    words = [line for line in lines if max(map(len, line.split()), default=0) < 78]  # a path is not broken
    assert max(map(len, words)) <= 80
    assert same(outcome(folder), outcome(expected))
