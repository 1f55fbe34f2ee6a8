"""A teacher's logits on views that never come twice in a run, as random resized crops: kept by epoch and place in the
set, for other runs of the same SEED, whose epochs have the same views.
"""

from pathlib import Path

import torch
from torch import Tensor

from mdistiller.bank.inference import Inference
from mdistiller.bank.segments import Segments
from mdistiller.bank.teacher import Bank, TeacherLogits
from mdistiller.dataset import Batches


class EpochLogits(TeacherLogits):
    """The logits of batches of streamed pictures, (B, K), whose rows lie in a folder for each epoch below `folder`.

    `description` says what they are of; `width` is K.
    """

    def __init__(
        self, batches: Batches, inference: Inference, dtype: torch.dtype, folder: Path, description: dict, width: int
    ):
        self.folder, self.description, self.epoch, self.classes = folder, description, 1, width
        super().__init__(batches, inference, dtype)
        self.bank = Bank(self.rows_of(1))

    def rows_of(self, epoch: int) -> Segments:
        """Return the rows of an epoch, one for each picture of the set."""
        description = self.description | {"epoch": epoch}
        return Segments(self.folder / f"epoch{epoch}", description, len(self.batches.images), self.classes, self.dtype)

    def of(self, images: Tensor, epoch: int = 0, places: Tensor | None = None) -> Tensor:
        """Return the logits of `images` (B, 3, H, W), float32, which are the pictures at `places` (B,), on the CPU, as
        `epoch` has them: those that are kept, and the teacher's own for the others.
        """
        bank = self.bank
        if epoch != self.epoch:
            bank.commit()
            bank.rows, self.epoch, bank.compared = self.rows_of(epoch), epoch, False
        held = bank.rows.holds(places)
        if held.any() and not bank.compared:
            some = held.nonzero()[: self.chunk, 0]
            self.check_same(self.read(places[some]), super().of(images[some.to(images.device)]))
        if held.all():
            return self.read(places).float()
        fresh, there = super().of(images[~held.to(images.device)]), held.to(self.device)
        bank.add(places[~held], fresh.to(self.dtype))
        logits = fresh.new_empty(len(places), fresh.shape[1])
        logits[~there] = fresh
        if held.any():
            logits[there] = self.read(places[held]).float()
        return logits

    def prepare(self, check: object) -> None:
        """Do nothing: rows are read as they are needed."""
