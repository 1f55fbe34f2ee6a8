"""The 1,797 handwritten digits that scikit-learn carries (8 x 8, Alpaydin and Kaynak, 1998), as 32 x 32 RGB."""

from pathlib import Path

import numpy as np
import torch

from mdistiller.dataset._images import ImageSet, channel_statistics
from mdistiller.dataset._registry import register_dataset


@register_dataset("digits")
def digits(root: Path) -> ImageSet:
    """Return the digits. Nothing is read from `root`. Every fifth image of each class is for testing: fixed,
    stratified.
    """
    from sklearn.datasets import load_digits  # slow to import, and not needed for any other data

    data = load_digits()
    grey = np.kron(data.images, np.ones((4, 4))) * 255 / 16  # (N, 32, 32)
    images = torch.from_numpy(grey.astype(np.uint8)).unsqueeze(3).repeat(1, 1, 1, 3)
    labels = torch.from_numpy(data.target.astype(np.int64))
    place = torch.empty_like(labels)  # of an image within its class
    for label in range(10):
        place[labels == label] = torch.arange(int((labels == label).sum()))
    test = place % 5 == 4
    mean, std = channel_statistics(images[~test])
    # a mirrored 2 is not a 2: crops only
    return ImageSet(images[~test], labels[~test], images[test], labels[test], 10, mean, std, augment="crop")
