"""How a method enters the house: one decorator fills distiller_dict and the configuration."""

import sys
from collections.abc import Callable, Mapping

from mdistiller import config, registry


def register_distiller(name: str, defaults: Mapping | None = None) -> Callable[[type], type]:
    """Enter the decorated class into distiller_dict as `name` and declare CFG.<name>, of Keys or plain defaults.

    The first line of the module's docstring becomes the section's title in docs/config.md.
    """

    def register(cls: type) -> type:
        registry.distillers[name] = cls
        if defaults:
            text = sys.modules[cls.__module__].__doc__ or cls.__doc__ or ""
            config.add_section(name, defaults, text.strip().split("\n")[0])
        return cls

    return register
