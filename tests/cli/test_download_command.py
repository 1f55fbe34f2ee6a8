"""tools/download.py as users type it."""

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios

import pytest
from helpers import ROOT, tree, wait_for
from webserver import FILES, NAME, TEACHERS


def start(root, server, **options):
    command = [sys.executable, str(ROOT / "tools" / "download.py"), "teachers", "--to", root, "--mirror", server.url]
    return subprocess.Popen(command, **options)


def test_offline_is_one_line_that_says_what_to_type(tmp_path):
    env = os.environ | {"HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "NO_PROXY": ""}
    command = [sys.executable, str(ROOT / "tools" / "download.py"), "cifar100"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    for words in ("error: https://www.cs.toronto.edu/", "Connection refused", "HTTPS_PROXY", "--mirror", "--from"):
        assert words in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_download_goes_on(tmp_path, server, number):
    server.plan = [{"pace": 10_000}]
    victim = start(tmp_path, server, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    part = tmp_path / f"{NAME}.part" / "archive"
    wait_for(lambda: part.exists() and part.stat().st_size)
    victim.send_signal(number)
    _, errors = victim.communicate()
    if number == signal.SIGINT:
        assert victim.returncode == 130
        assert "goes on from there" in errors and errors.count("\n") == 1
    have = part.stat().st_size
    assert 0 < have < len(TEACHERS)
    again = start(tmp_path, server, stdout=subprocess.PIPE)
    assert b"\r" not in again.communicate()[0], "no bar where nobody looks"
    assert again.returncode == 0
    assert server.sent[-1] == len(TEACHERS) - have
    found = tree(tmp_path)
    assert {name: found[name] for name in FILES} == FILES
    assert not any(".part" in name or ".lock" in name for name in found)


def test_a_bar_with_the_time_left_on_a_terminal(tmp_path, server):
    server.plan = [{"pace": 20_000}]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = start(tmp_path, server, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # the terminal's end
        while data := os.read(ours, 4096):
            seen += data
    os.close(ours)
    assert process.wait() == 0
    assert re.search(rb"\d+%.*\[\d\d:\d\d<\d\d:\d\d,", seen), "time gone < time left"
