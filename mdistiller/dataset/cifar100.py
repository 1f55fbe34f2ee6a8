"""CIFAR-100 (Krizhevsky, 2009): 50,000 + 10,000 images of 100 classes."""

from pathlib import Path

from mdistiller.dataset import _cifar
from mdistiller.dataset._images import ImageSet
from mdistiller.dataset._registry import register_dataset

LAYOUT = _cifar.BinaryLayout("cifar-100-binary", ("train.bin",), "test.bin", 2, "cifar-100-python")
MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)  # the published protocol's


@register_dataset("cifar100")
def cifar100(root: Path) -> ImageSet:
    return _cifar.load("CIFAR100", root, LAYOUT, 100, MEAN, STD)
