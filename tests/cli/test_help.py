"""--help comes at once, and the pages that a command writes are current."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT, tool

TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("[!_]*.py"))


@pytest.mark.parametrize("name", TOOLS)
def test_help_imports_nothing_heavy(name):
    """Torch and pandas take seconds to import."""
    code = f"""
import runpy, sys
sys.argv = ["{name}.py", "--help"]
sys.path.insert(0, "tools")
try:
    runpy.run_path("tools/{name}.py", run_name="__main__")
finally:
    heavy = {{"torch", "pandas", "vl_convert", "sklearn", "tensorboardX"}} & sys.modules.keys()
    assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=os.environ | {"COLUMNS": "80"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_the_generated_pages_are_current(tmp_path):
    done = tool("document", tmp_path, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for page in ("api.md", "config.md", "methods.md"):
        assert (tmp_path / page).read_text() == (ROOT / "docs" / page).read_text(), "run: make docs"
