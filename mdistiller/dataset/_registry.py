"""How a data set is registered."""

from collections.abc import Callable
from pathlib import Path

from mdistiller.dataset._detection import DetectionSet
from mdistiller.dataset._images import ImageSet
from mdistiller.dataset._tokens import TokenSet
from mdistiller.registry import datasets

Data = ImageSet | TokenSet | DetectionSet


def register_dataset(name: str, task: str = "classification") -> Callable:
    """Enter the decorated `load(root: Path) -> ImageSet` into dataset_dict under `name`; as `load(root, options)` it is
    given the section DATASET as well. Of the `task` text it returns a TokenSet, of detection a DetectionSet. `load`
    raises UserError for bad files.
    """

    def register(load: Callable[[Path], Data]) -> Callable[[Path], Data]:
        if task != "classification":
            load.task = task
        datasets[name] = load
        return load

    return register
