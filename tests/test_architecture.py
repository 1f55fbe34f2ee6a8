"""The house rules that code can check: one-way imports, a light configuration module, documents that are current."""

import ast
import subprocess
import sys

import pytest
from helpers import ROOT

PACKAGE = ROOT / "mdistiller"
BELOW = ["errors", "registry", "files", "terminal"]  # what every room may use
ROOMS = ["config", "models", "distillers", "dataset", "device", "runs", "bank", "engine"]
ROOMS += ["study", "analysis", "campaign"]
MAY_IMPORT = {room: {*BELOW, *ROOMS[:place]} for place, room in enumerate(ROOMS)} | {
    "errors": set(),
    "registry": set(),
    "files": {"errors"},
    "terminal": {"errors"},
    "unpack": {"errors", "files"},
    "download": {"errors", "files", "unpack"},
    "dataset": {*BELOW, "config", "download"},
    "device": {"errors"},
    "losses": {"distillers"},
}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__init__":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom) and node.module == "mdistiller":
            names = [f"mdistiller.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "mdistiller" and len(parts) > 1 and parts[1] != "__version__":
                assert parts[1] == room or parts[1] in MAY_IMPORT[room], f"{path} imports {name}"


def test_config_imports_light():
    heavy = "('torch', 'torchvision', 'tensorboardX', 'sklearn', 'matplotlib')"
    code = f"import sys, mdistiller.config; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("page", ["config.md", "methods.md"])
def test_generated_pages_are_current(tmp_path, page):
    subprocess.run([sys.executable, ROOT / "tools" / "document.py", tmp_path], check=True, cwd=ROOT)
    assert (tmp_path / page).read_text() == (ROOT / "docs" / page).read_text(), "run: make docs"
