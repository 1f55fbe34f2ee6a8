"""The rules of the code that a test can check: one-way imports, short modules, few parameters."""

import ast
import functools

from helpers import ROOT

PACKAGE = ROOT / "mdistiller"
BELOW = ["errors", "registry", "files", "terminal", "device"]  # what every package may use
PACKAGES = ["config", "models", "distillers", "dataset", "runs", "bank", "engine", "study"]
MAY_IMPORT = {package: {*BELOW, *PACKAGES[:place]} for place, package in enumerate(PACKAGES)} | {
    "errors": set(),
    "registry": {"errors"},
    "files": {"errors"},
    "terminal": {"errors"},
    "download": {"errors", "files", "terminal"},
    "dataset": {*BELOW, "config", "download"},
    "device": {"errors"},
    "api": {*BELOW, *PACKAGES},
    "losses": {"distillers"},
    "integrations": {"errors", "registry", "distillers"},
}


MODULES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES, MOST_PARAMETERS = 350, 8


@functools.cache
def nodes(path):
    """Those of the module at `path` that its rules are about."""
    kinds = ast.Import, ast.ImportFrom, ast.FunctionDef
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]


def imported(path):
    """The packages that the module at `path` imports."""
    for node in nodes(path):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom) and node.module == "mdistiller":
            names = [f"mdistiller.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("mdistiller."))


def test_imports_go_one_way():
    wrong = []
    for path in MODULES:
        package = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        allowed = MAY_IMPORT.get(package, set()) | {package, "__version__"}
        wrong += [f"{path.relative_to(PACKAGE)} imports {name}" for name in imported(path) if name not in allowed]
    assert not wrong


def test_no_module_is_long_and_no_function_takes_many_parameters():
    wrong = []
    for path in MODULES:
        text = path.read_text()
        if text.count("\n") > MOST_LINES:
            wrong.append(f"{path.relative_to(PACKAGE)} has {text.count(chr(10))} lines")
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef):
                names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                count = len([name for name in names if name not in ("self", "cls")])
                if count > MOST_PARAMETERS and (path.name, node.name) != ("api.py", "distill"):
                    wrong.append(f"{path.relative_to(PACKAGE)}: {node.name} takes {count} parameters")
    assert not wrong
