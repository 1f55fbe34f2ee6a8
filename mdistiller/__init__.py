"""Knowledge distillation of image classifiers: exact, fast, reproducible.

    import mdistiller as md

    result = md.train("configs/digits/dtkd/res20_res8.yaml", {"SOLVER.EPOCHS": 6}, seeds=range(3))
    result = md.distill(teacher=my_teacher, student=my_student, train=(images, labels), test=(images, labels))

docs/api.md has all of it.
"""

import importlib

__version__ = "0.2.0"

# name -> where it is defined; imported at its first use, so that what needs no torch starts without it
_PUBLIC = {
    "Result": "api",
    "Results": "api",
    "distill": "api",
    "evaluate": "api",
    "load_config": "api",
    "train": "api",
    "ImageSet": "dataset",
    "image_set": "dataset",
    "register_dataset": "dataset",
    "register_model": "models",
    "register_method": "distillers",
    "register_rule": "distillers",
    "UserError": "errors",
    "Key": "config",
    "Check": "config",
    "at_least": "config",
    "below": "config",
    "between": "config",
    "one_of": "config",
    "positive": "config",
}
__all__ = [*sorted(_PUBLIC), "losses"]


def __getattr__(name: str) -> object:
    if name == "losses":
        return importlib.import_module("mdistiller.losses")
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"mdistiller.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'mdistiller' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
