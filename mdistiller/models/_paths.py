"""The module paths that mdistiller's models have, for files that import from there: models.cifar.*, models.imagenet.*.

Each stands for a module of this package, with its names. VGG's constructors are called vgg8_bn and so on there, where
vgg8 is a network without BatchNorm, which is not here.
"""

import sys
from types import ModuleType

PACKAGE = "mdistiller.models"
PATHS = {
    "cifar.resnet": "resnet",
    "cifar.resnetv2": "resnetv2",
    "cifar.vgg": "vgg",
    "cifar.mobilenetv2": "mobilenetv2",
    "cifar.ShuffleNetv1": "shufflenetv1",
    "cifar.ShuffleNetv2": "shufflenetv2",
    "cifar.wrn": "wrn",
    "imagenet.resnet": "imagenet",
    "imagenet.mobilenetv1": "imagenet",
}
RENAMED = {
    "cifar.vgg": {f"vgg{depth}": f"vgg{depth}_bn" for depth in (8, 11, 13, 16, 19)},
    "cifar.mobilenetv2": {"MobileNetV2": "mobile_half"},
    "imagenet.resnet": {f"ResNet{depth}": f"resnet{depth}" for depth in (18, 34, 50, 101)},
}


def enter(**dictionaries: dict) -> None:
    """Make the paths importable, of models.cifar and models.imagenet with those `dictionaries` of models that stand
    there.
    """
    for parent in ("cifar", "imagenet"):
        package = sys.modules.setdefault(f"{PACKAGE}.{parent}", ModuleType(f"{PACKAGE}.{parent}"))
        setattr(sys.modules[PACKAGE], parent, package)
        for name, models in dictionaries.items():
            if (parent == "imagenet") == (name == "imagenet_model_dict"):
                setattr(package, name, models)
    for path, own in PATHS.items():
        module, renamed = ModuleType(f"{PACKAGE}.{path}"), RENAMED.get(path, {})
        for name, value in vars(sys.modules[f"{PACKAGE}.{own}"]).items():
            if not name.startswith("__"):
                setattr(module, renamed.get(name, name), value)
        parent, _, last = path.partition(".")
        sys.modules[module.__name__] = module
        setattr(sys.modules[f"{PACKAGE}.{parent}"], last, module)
