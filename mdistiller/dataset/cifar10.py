"""CIFAR-10 (Krizhevsky, 2009): 50,000 + 10,000 images of 10 classes."""

from pathlib import Path

from mdistiller.dataset import _cifar
from mdistiller.dataset._images import ImageSet
from mdistiller.dataset._registry import register_dataset

TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
LAYOUT = _cifar.BinaryLayout("cifar-10-batches-bin", TRAIN, "test_batch.bin", 1, "cifar-10-batches-py")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@register_dataset("cifar10")
def cifar10(root: Path) -> ImageSet:
    return _cifar.load("CIFAR10", root, LAYOUT, 10, MEAN, STD)
