"""The zoo. cifar_model_dict[NAME] -> (constructor(num_classes=...), default teacher checkpoint path);
imagenet_model_dict[NAME] -> constructor(num_classes=...).
"""

import importlib
import pkgutil

from mdistiller.models._common import default_checkpoint, register_model
from mdistiller.models._contract import given_parts, in_eval_mode
from mdistiller.models._layers import name_layers
from mdistiller.registry import cifar_models as cifar_model_dict
from mdistiller.registry import imagenet_models as imagenet_model_dict

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "cifar_model_dict",
    "default_checkpoint",
    "given_parts",
    "imagenet_model_dict",
    "in_eval_mode",
    "name_layers",
    "register_model",
]
