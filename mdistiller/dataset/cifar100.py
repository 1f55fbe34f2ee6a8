"""CIFAR-100 (Krizhevsky, 2009): 50,000 + 10,000 images of 100 classes."""

from pathlib import Path

from mdistiller import files
from mdistiller.dataset import _cifar
from mdistiller.dataset._images import ImageSet
from mdistiller.dataset._loaders import Loader, loaders
from mdistiller.dataset._registry import register_dataset

LAYOUT = _cifar.BinaryLayout("cifar-100-binary", ("train.bin",), "test.bin", 2, "cifar-100-python")
MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)  # the published protocol's


@register_dataset("cifar100")
def cifar100(root: Path) -> ImageSet:
    return _cifar.load("CIFAR100", root, LAYOUT, 100, MEAN, STD)


def get_data_folder() -> str:
    """Return DATASET.ROOT's default, where CIFAR-100 is looked for."""
    return "./data"


def get_cifar100_dataloaders(
    batch_size: int, val_batch_size: int, num_workers: int = 0, contrast: tuple[int, str] | None = None
) -> tuple[Loader, Loader, int]:
    """Return mdistiller's (train_loader, val_loader, number of training images). Images are in memory and need no
    workers.
    """
    train, test = loaders(cifar100(files.find_above(get_data_folder())), batch_size, val_batch_size, contrast=contrast)
    return train, test, len(train.dataset)


def get_cifar100_dataloaders_sample(
    batch_size: int, val_batch_size: int, num_workers: int, k: int, mode: str = "exact"
) -> tuple[Loader, Loader, int]:
    """Return the same, with CRD's contrastive_index (B, k + 1) in the training set's tuples."""
    return get_cifar100_dataloaders(batch_size, val_batch_size, num_workers, (k, mode))
