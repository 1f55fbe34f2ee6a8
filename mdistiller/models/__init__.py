"""The zoo. cifar_model_dict[NAME] -> (constructor(num_classes=...), default teacher checkpoint path);
imagenet_model_dict[NAME], text_model_dict[NAME] -> constructor(num_classes=...); tiny_imagenet_model_dict: as the
first, for 64 x 64 images.
"""
# ruff: noqa: F401 - what is imported here is what it offers

import importlib
import pkgutil

from mdistiller.models import _paths
from mdistiller.models._common import default_checkpoint, register_model
from mdistiller.models._contract import build_model, check_parts, check_text_network, given_parts, in_eval_mode
from mdistiller.models._ensemble import Ensemble
from mdistiller.models._frozen import freeze, frozen_norms
from mdistiller.models._layers import name_layers
from mdistiller.models.libraries import fit_inputs, give_features, library_weights
from mdistiller.registry import cifar_models as cifar_model_dict
from mdistiller.registry import imagenet_models as imagenet_model_dict
from mdistiller.registry import text_models as text_model_dict

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")

tiny_imagenet_model_dict = {
    name: (constructor, default_checkpoint(name, "tiny_imagenet"))
    for name, (constructor, _) in cifar_model_dict.items()
}
_paths.enter(
    cifar_model_dict=cifar_model_dict,
    tiny_imagenet_model_dict=tiny_imagenet_model_dict,
    imagenet_model_dict=imagenet_model_dict,
)
