"""The configuration: its keys, and how files and KEY VALUE pairs become a checked tree. Imports no torch."""

from mdistiller.config import core  # noqa: F401  (enters the keys)
from mdistiller.config.keys import (
    CFG,
    KEYS,
    SECTIONS,
    Check,
    Config,
    Key,
    add_keys,
    add_section,
    all_positive,
    at_least,
    below,
    between,
    computed,
    get,
    image_size,
    leaves,
    needs_teacher,
    one_of,
    positive,
    role,
)
from mdistiller.config.loading import load, misfit, read
from mdistiller.config.plugins import load_plugin

__all__ = [
    "CFG",
    "KEYS",
    "SECTIONS",
    "Check",
    "Config",
    "Key",
    "add_keys",
    "add_section",
    "all_positive",
    "at_least",
    "below",
    "between",
    "computed",
    "get",
    "image_size",
    "leaves",
    "load",
    "load_plugin",
    "misfit",
    "needs_teacher",
    "one_of",
    "positive",
    "read",
    "role",
]
