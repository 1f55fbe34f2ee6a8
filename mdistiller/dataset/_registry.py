"""How a data set is registered."""

from collections.abc import Callable
from pathlib import Path

from mdistiller.dataset._detection import DetectionSet
from mdistiller.dataset._images import ImageSet
from mdistiller.dataset._tokens import TokenSet
from mdistiller.registry import datasets, tasks

Data = ImageSet | TokenSet | DetectionSet


def register_dataset(name: str, task: str = "classification") -> Callable:
    """Decorator: enters `load(root: Path) -> ImageSet` into dataset_dict, or `load(root, options)`, whose options are
    the section DATASET; of the `task` text it gives a TokenSet, of
    detection a DetectionSet. `load` raises UserError for bad files.
    """

    def register(load: Callable[[Path], Data]) -> Callable[[Path], Data]:
        datasets[name] = load
        if task != "classification":
            tasks[name] = task
        return load

    return register
