"""The methods, one paper a file. Every module here without a leading underscore is imported and registers itself."""

import importlib
import inspect
import pkgutil

from mdistiller.config import load_plugin
from mdistiller.distillers._adapter import adapt
from mdistiller.distillers._contract import check_method, check_output, method_name, part_of
from mdistiller.distillers._registry import enter, register_distiller
from mdistiller.distillers.base import Distiller, FeatureDistiller, LogitDistiller, RuleDistiller, Vanilla
from mdistiller.distillers.rules import check_rule, register_rule, rule_name
from mdistiller.registry import distillers as distiller_dict

register_method = register_distiller

distiller_dict.accept = adapt

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")
importlib.import_module(f"{__name__}._upstream")

from mdistiller.distillers._detection import check_levels, on_detectors  # noqa: E402  (of what is registered)
from mdistiller.distillers._detection import takers as detection_takers  # noqa: E402

__all__ = [name for name, item in globals().items() if name[0] != "_" and not inspect.ismodule(item)]
