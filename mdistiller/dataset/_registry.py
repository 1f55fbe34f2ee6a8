"""How a data set is registered."""

from collections.abc import Callable
from pathlib import Path

from mdistiller.dataset._images import ImageSet
from mdistiller.registry import datasets


def register_dataset(name: str) -> Callable:
    """Decorator: enters `load(root: Path) -> ImageSet` into dataset_dict, or `load(root, options)`, whose options are
    the section DATASET. `load` raises UserError for bad files.
    """

    def register(load: Callable[[Path], ImageSet]) -> Callable[[Path], ImageSet]:
        datasets[name] = load
        return load

    return register
