"""How a method is registered: one decorator fills distiller_dict and the configuration."""

import sys
from collections.abc import Callable, Mapping

from mdistiller import config, registry


def register_distiller(name: str, defaults: Mapping | None = None) -> Callable[[type], type]:
    """Enter the decorated class into distiller_dict as `name` and declare CFG.<name>, of Keys or plain defaults.

    The first line of the module's docstring becomes the section's title in docs/config.md.
    """

    def register(cls: type) -> type:
        again = registry.same_definition(registry.distillers.own.get(name), cls)
        cls.declared = cls  # it says by Distiller's attributes what it needs; a class derived from it may not
        registry.distillers[name] = cls
        if defaults:
            text = sys.modules[cls.__module__].__doc__ or cls.__doc__ or ""
            config.add_section(name, defaults, text.strip().split("\n")[0], again=again)
        return cls

    return register


def enter(cls: type) -> str:
    """Return the name that the class of a method has in distiller_dict. One without any is entered under its own."""
    name = registry.distillers.name_of(cls)
    if name is None:
        register_distiller(cls.__name__)(cls)
    return name or cls.__name__
