"""A teacher's logits on pictures that are streamed: no view comes twice in a run, but later runs draw the same ones."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mdistiller.bank.inference import Inference
from mdistiller.bank.segments import Segments
from mdistiller.bank.teacher import Bank, TeacherLogits
from mdistiller.bank.topk import WORD, TopK, rounded
from mdistiller.dataset import Batch, Batches


class EpochBanks:
    """The banks of one teacher below `folder`, one for each epoch of one SEED: row i is the view of picture i there.

    `views` says what the rows are, `rows` how many pictures there are. Only the latest epoch's bank is open: 4 bytes of
    memory for each picture.
    """

    def __init__(self, folder: Path, views: dict[str, object], rows: int, width: int, dtype: torch.dtype):
        self.folder, self.form = folder, (rows, width, dtype)
        self.views, self.epoch, self.open = views, 0, None

    @property
    def row_bytes(self) -> int:
        """The bytes of a row's numbers."""
        return self.form[1] * self.form[2].itemsize

    def of(self, epoch: int) -> Bank:
        """Return the bank of `epoch`; what another one has gathered is written."""
        if epoch != self.epoch:
            self.commit()
            self.epoch = epoch
            self.open = Bank(Segments(self.folder / f"epoch_{epoch}", {**self.views, "epoch": epoch}, *self.form))
        return self.open

    def begun(self, epochs: int) -> int:
        """Return of how many epochs, up to `epochs`, there are rows."""
        return sum(any((self.folder / f"epoch_{epoch}").glob("*.safetensors")) for epoch in range(1, epochs + 1))

    def commit(self) -> None:
        """Write what the open bank has gathered to the disk."""
        if self.open is not None:
            self.open.commit()


class StreamedLogits(TeacherLogits):
    """The teacher's logits on the batch that a step trains on, as `of` gives them.

    `form` packs the largest of a row; None: whole rows. They are packed whether or not `banks` keep them.
    """

    def __init__(
        self,
        batches: Batches,
        inference: Inference,
        dtype: torch.dtype,
        form: TopK | None = None,
        stream: "torch.cuda.Stream | None" = None,
    ):
        super().__init__(batches, inference, WORD if form else dtype, None, stream)
        own = batches.own(batches.batch_size)  # the teacher's passes are of a step's images, whose bits they decide
        self.chunk = batches.batch_size if own is None else len(own)
        self.form = form
        self.banks: EpochBanks | None = None
        self.compared = False
        self.width = form.width if form else 0

    def prepare(self, check: Callable[[], None]) -> None:
        pass  # nothing is there before a batch is

    def of(self, batch: Batch, epoch: int) -> Tensor:
        """Return the teacher's logits (B, K) float32 on `batch` of `epoch`, from its bank where that holds them."""
        if self.banks is None:
            return self.given(self.computed(batch.image))
        self.bank = self.banks.of(epoch)
        rows = batch.index.cpu()
        held = self.bank.rows.holds(rows)
        if held.any() and not self.compared:  # once a run
            self.check_same(self.read(rows[held]), self.computed(batch.image[held.to(self.device)]))
            self.compared = True
        own = self.look_up(rows, lambda missing: self.computed(batch.image[missing.to(self.device)]))
        return self.given(own)

    def computed(self, images: Tensor) -> Tensor:
        """Return the teacher's own logits of `images` (B, 3, H, W) as a bank keeps them, (B, width)."""
        logits = self.passes(images)
        return self.form.pack(logits) if self.form else rounded(logits, self.dtype)

    @torch.no_grad()
    def passes(self, images: Tensor) -> Tensor:
        """Return the teacher's logits of `images`, in parts of `chunk`, (B, K)."""
        parts = []
        for part in images.split(self.chunk):
            padded = torch.cat([part, part[-1:].expand(self.chunk - len(part), -1, -1, -1)])
            parts.append(self.inference(padded)[: len(part)])
        return torch.cat(parts)
