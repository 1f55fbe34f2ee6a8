"""--help comes at once."""

import subprocess
import sys

import pytest
from helpers import ROOT

TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py"))


@pytest.mark.parametrize("tool", TOOLS)
def test_help_imports_nothing_heavy(tool):
    """Torch and pandas take seconds to import."""
    code = f"""
import runpy, sys
sys.argv = ["{tool}.py", "--help"]
try:
    runpy.run_path("tools/{tool}.py", run_name="__main__")
finally:
    heavy = {{"torch", "pandas", "vl_convert", "sklearn", "tensorboardX"}} & sys.modules.keys()
    assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
