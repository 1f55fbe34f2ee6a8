"""The data sets, one a file: dataset_dict[NAME](root) -> ImageSet, and the batches that training draws from one."""
# ruff: noqa: F401 - what is imported here is what it offers

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from pathlib import Path

from mdistiller import files
from mdistiller.config import CFG
from mdistiller.dataset._arrays import image_set, normalised
from mdistiller.dataset._detection import Boxes, DetectionBatch, DetectionBatches, DetectionSet
from mdistiller.dataset._images import Batch, Batches, ImageSet, TwoViews, images_together
from mdistiller.dataset._loaders import Loader, get_dataset
from mdistiller.dataset._mixing import Mixing
from mdistiller.dataset._registry import Data, register_dataset
from mdistiller.dataset._tokens import TokenBatches, TokenSet, token_set
from mdistiller.errors import UserError, users_code
from mdistiller.registry import datasets as dataset_dict
from mdistiller.registry import task_of

KINDS = {  # what a data set is, by its task
    "classification": (ImageSet, "an ImageSet, which image_set makes"),
    "text": (TokenSet, "a TokenSet, which token_set makes"),
    "detection": (DetectionSet, "a DetectionSet, as scenes makes one"),
}

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")


def load_dataset(name: str, root: str | Path, options: Mapping | None = None) -> Data:
    """Return the data set `name`, read from `root`. `options`: the section DATASET of a configuration, its defaults
    where it is left out, for a loader with a parameter of that name. Raises UserError with one line where the files are
    missing or bad.
    """
    load = dataset_dict[name]
    given = (options or CFG.DATASET,) if "options" in inspect.signature(load).parameters else ()
    try:
        with users_code(f"the data set {name}"):
            data = load(files.expand(root), *given)
    except OSError as error:
        raise UserError(f"the data set {name}: {error}; set DATASET.ROOT to where its files are") from error
    kind, wanted = KINDS[task_of(name)]
    if not isinstance(data, kind):
        raise UserError(f"the data set {name} must be {wanted}; got {type(data).__name__}")
    return data


def load_images(name: str, root: str | Path, options: Mapping | None = None) -> ImageSet:
    """Return the data set `name` as `load_dataset` does. Raises UserError where it has no images of one class each."""
    if (task := task_of(name)) != "classification":
        raise UserError(
            f"the data set {name} is for {task}, here one for classification is needed; score a run on it "
            "with tools/eval.py"
        )
    return load_dataset(name, root, options)
