"""The configuration: its keys, and how files and KEY VALUE pairs become a checked tree. Imports no torch."""

import inspect

from mdistiller.config.core import AUGMENTATIONS, DOT_TRAINERS, TWO_VIEWS
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
    get,
    image_size,
    leaves,
    needs_teacher,
    one_of,
    positive,
    role,
    teacher_names,
    used_names,
)
from mdistiller.config.loading import check, load, load_plugins, merge, misfit, read
from mdistiller.config.plugins import PLUGINS, Absent, activate, in_place_of_built_in, load_plugin, used_code
from mdistiller.config.reads import computed, unread

__all__ = [name for name, item in globals().items() if name[0] != "_" and not inspect.ismodule(item)]
