"""Targets that are no single label: smoothed ones, and those of images that are mixed (mixup, CutMix)."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

UNIT = 2**24  # a plan holds whole numbers: shares are counted in this
MIXUP, CUTMIX = 1, 2


class Mixing(NamedTuple):
    """How the images of a batch are mixed with those of the same batch in reverse order, and their targets with theirs.

    `mixup`: alpha of mixup (Zhang et al., ICLR 2018, arXiv 1710.09412), image <- lambda image + (1 - lambda) other with
    lambda from Beta(alpha, alpha), one for a batch; `cutmix`: that of CutMix (Yun et al., ICCV 2019, arXiv 1905.04899),
    a box of the share 1 - lambda from the other image. 0 for none; with both, each batch is mixed by one of them.
    `smoothing`: the share of a label that all `num_classes` have alike.
    """

    num_classes: int
    smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def draw(self, n: int, seed: int) -> Tensor:
        """Return the decisions of n places, of which a batch has its first's: kind, lambda, and the box's middle, int64
        (4, n); lambda and middle in 1 / UNIT.
        """
        generator = np.random.Generator(np.random.PCG64(seed))
        both = self.mixup > 0 and self.cutmix > 0
        kind = generator.integers(MIXUP, CUTMIX + 1, n) if both else np.full(n, MIXUP if self.mixup > 0 else CUTMIX)
        alpha = np.where(kind == MIXUP, self.mixup or 1.0, self.cutmix or 1.0)
        shares = np.stack([generator.beta(alpha, alpha), generator.random(n), generator.random(n)])
        return torch.from_numpy(np.concatenate([kind[None], np.rint(shares * UNIT).astype(np.int64)]))

    def __call__(
        self, image: Tensor, target: Tensor, plan: Tensor | None, others: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return images (B, 3, H, W) and targets (B, K) of images and labels (B,). `plan`: what `draw` gave the first
        place of the batch, (4, 1), on its device; None: nothing is mixed. `others`: the second half of the images is
        what the first half is mixed with, and only that comes back; else it is the batch in reverse order.
        """
        soft = F.one_hot(target, self.num_classes).float()
        soft = soft * (1 - self.smoothing) + self.smoothing / self.num_classes
        if plan is None:
            return image, soft
        kind, (share, row, column) = plan[0, 0], plan[1:, 0].float() / UNIT
        (image, other), (soft, soft_other) = (x.chunk(2) if others else (x, x.flip(0)) for x in (image, soft))
        height, width = image.shape[2:]
        side = (1 - share).sqrt()
        inside = [
            ((torch.arange(length, device=image.device) + 0.5) / length - middle).abs() < side / 2
            for length, middle in ((height, row), (width, column))
        ]
        box = inside[0][:, None] & inside[1]  # (H, W), cut off at the image's border
        cut = kind == CUTMIX
        mixed = torch.where(cut, torch.where(box, other, image), share * image + (1 - share) * other)
        kept = torch.where(cut, 1 - box.float().mean(), share)
        return mixed, kept * soft + (1 - kept) * soft_other
