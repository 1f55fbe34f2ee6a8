"""Tools work where the package is not installed, and say in a line what is missing."""

import shutil
import subprocess
import sys

from helpers import ROOT


def run(folder, *more):
    command = [sys.executable, *more, str(folder / "tools" / "train_ours.py"), "--version"]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", env={}, timeout=60)


def test_a_tool_takes_the_package_beside_it(tmp_path):
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    (tmp_path / "mdistiller").symlink_to(ROOT / "mdistiller")
    found = run(tmp_path)
    assert found.returncode == 0, found.stderr
    code = (tmp_path / "tools" / "_package.py").read_text()
    (tmp_path / "tools" / "_package.py").write_text(code.replace('"yacs"', '"yacs", "no_such_package"'))
    found = run(tmp_path)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == f"error: needs no_such_package; pip install -e {tmp_path}\n"
