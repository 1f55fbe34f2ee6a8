"""A plug-in is a Python file of the user's that is imported as if it lay in mdistiller/distillers."""

import hashlib
import importlib.util
import sys
from pathlib import Path


def load_plugin(path: Path) -> None:
    """Import the Python file as a module of mdistiller.distillers, so that its relative imports work.

    The same file with the same content is imported once in a process.
    """
    path = path.resolve()
    digest = hashlib.sha256(str(path).encode() + path.read_bytes()).hexdigest()[:8]
    name = f"mdistiller.distillers._plugin_{path.stem}_{digest}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
