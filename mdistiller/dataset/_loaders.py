"""Loaders for code with a loop of its own: mdistiller's get_dataset and the tuples that its loaders yield.

A run of this package draws its batches from `Batches` alone; these are the same batches, on the CPU.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mdistiller import dataset, files
from mdistiller.config import TWO_VIEWS, Config
from mdistiller.dataset._images import Batch, Batches, ImageSet
from mdistiller.errors import UserError


class Contrast:
    """Draws what CRD contrasts a sample with: k places in the training set, with replacement; of other classes
    ("exact") or of all other samples ("relax").
    """

    def __init__(self, labels: Tensor, k: int, mode: str = "exact"):
        self.labels, self.k, self.exact = labels, k, mode == "exact"
        self.others = {int(c): (labels != c).nonzero().squeeze(1) for c in labels.unique()} if self.exact else {}

    def __call__(self, index: int, generator: torch.Generator | None = None) -> Tensor:
        """Return (k + 1,): `index` itself, and the places of its negatives."""
        others = self.others.get(int(self.labels[index]))
        count = len(self.labels) - 1 if others is None else len(others)
        place = torch.randint(count, (self.k,), generator=generator)
        place = place + (place >= index) if others is None else others[place]
        return torch.cat([torch.tensor([index]), place])


class Samples(Dataset):
    """A split as a torch Dataset. An item is an image (3, H, W), normalised and, of the training set, by a random crop
    and flip, with its target and, of the training set, its place; and its contrastive_index under `contrast`. `data`
    holds the images as they are, uint8 (N, H, W, 3), `targets` their labels.
    """

    def __init__(self, batches: Batches, contrast: Contrast | None = None):
        self.batches, self.contrast = batches, contrast

    @property
    def data(self) -> np.ndarray:
        return self.batches.images.numpy()

    @property
    def targets(self) -> list[int]:
        return self.batches.labels.tolist()

    def __len__(self) -> int:
        return self.batches.num_samples

    def __getitem__(self, place: int) -> tuple:
        place = range(len(self))[place]  # negative ones too; IndexError behind the end
        row = place * self.batches.views + torch.randint(self.batches.views, (1,))
        return tuple(values[0] for values in self.tuple_of(self.batches.batch(self.batches.plan_of(row))))

    def tuple_of(self, batch: Batch, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """Return mdistiller's tuple of `batch`."""
        parts = batch.image.contiguous(), batch.target, batch.index  # contiguous as any other loader's
        if self.batches.augment is None:
            return parts[:2]
        if self.contrast is None:
            return parts
        return *parts, torch.stack([self.contrast(place, generator) for place in batch.index.tolist()])


class Loader(DataLoader):
    """Batches of a split, as tuples. Each pass over a training set is its next epoch, from the first on, with the
    batches that a run of the same seed trains on in that epoch. `image_set` is the data set that it is a part of.
    """

    def __init__(self, samples: Samples, image_set: ImageSet):
        super().__init__(samples, samples.batches.batch_size, shuffle=samples.batches.augment is not None)
        self.image_set, self.epoch = image_set, 0

    def set_epoch(self, epoch: int) -> None:
        """Let the next pass be `epoch`, which counts from 1."""
        self.epoch = epoch - 1

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        batches, self.epoch = self.dataset.batches, self.epoch + 1
        generator = torch.Generator().manual_seed((1 << 60) + (batches.seed << 20) + self.epoch)  # none of the plan's
        for batch in batches if batches.augment is None else batches.epoch(self.epoch):
            yield self.dataset.tuple_of(batch, generator)


def loaders(
    data: ImageSet, batch_size: int, test_size: int, augment: str = "auto", seed: int = 0, contrast: tuple | None = None
) -> tuple[Loader, Loader]:
    """Return the loaders of `data`'s training and test images. `augment`: auto, crop_flip, crop or none; `contrast`:
    (k, mode) of Contrast, None for tuples without contrastive_index.
    """
    augment = data.augment if augment == "auto" else augment
    train = Batches(data.train_images, data.train_labels, data.mean, data.std, batch_size, augment, seed)
    test = Batches(data.test_images, data.test_labels, data.mean, data.std, test_size)
    drawn = None if contrast is None else Contrast(data.train_labels, *contrast)
    return Loader(Samples(train, drawn), data), Loader(Samples(test), data)


def get_dataset(cfg: Config) -> tuple[Loader, Loader, int, int]:
    """Return (train_loader, val_loader, number of training images, number of classes) of the data set that `cfg` names.

    Training batches are (image (B, 3, H, W), target (B,), index (B,)), and for CRD, or a trainer crd*,
    contrastive_index (B, CRD.NCE.K + 1) besides, its first column the index; test batches are (image, target). A
    relative DATASET.ROOT is also looked for in the folders above this one. Raises UserError for text and detection, and
    under the trainers ours and aug, whose two views only a run has.
    """
    if cfg.SOLVER.TRAINER in TWO_VIEWS:
        raise UserError(
            f"get_dataset: gives one view of each image, and SOLVER.TRAINER {cfg.SOLVER.TRAINER} trains on two; train "
            "with tools/train.py"
        )
    contrastive = cfg.DISTILLER.TYPE == "CRD" or cfg.SOLVER.TRAINER.startswith("crd")
    data = dataset.load_images(cfg.DATASET.TYPE, files.find_above(cfg.DATASET.ROOT), cfg.DATASET)
    given = data, cfg.SOLVER.BATCH_SIZE, cfg.DATASET.TEST.BATCH_SIZE, cfg.DATASET.AUGMENT, cfg.SEED
    train, test = loaders(*given, (cfg.CRD.NCE.K, cfg.CRD.MODE) if contrastive else None)
    return train, test, len(data.train_labels), data.num_classes
