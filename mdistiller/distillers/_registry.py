"""How a method enters the house: one decorator fills distiller_dict and the configuration; plug-ins join by path."""

import hashlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from mdistiller import config, registry


def register_distiller(name: str, defaults: Mapping | None = None) -> Callable[[type], type]:
    """Class decorator: enters the class into distiller_dict as `name` and declares CFG.<name> with `defaults`.

    The first line of the module's docstring becomes the section's title in docs/config.md.
    """

    def register(cls: type) -> type:
        registry.distillers[name] = cls
        if defaults:
            text = sys.modules[cls.__module__].__doc__ or cls.__doc__ or ""
            config.add_section(name, defaults, text.strip().split("\n")[0])
        return cls

    return register


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
