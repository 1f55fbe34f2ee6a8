"""A frozen teacher's logits on the blocks of a text, in the form in which a bank keeps them (topk.py)."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mdistiller.bank.teacher import TeacherLogits
from mdistiller.bank.topk import WORD, TopK
from mdistiller.dataset import TokenBatches
from mdistiller.device import autocast
from mdistiller.models import in_eval_mode

TOKENS = 4096  # that go through the teacher together, in whole blocks, at least one
ROWS = 1024  # whose logits exist at a time


class PackedRows(NamedTuple):
    """Logits of tokens, in the place of a tensor (N, V): `rows[a:b].float()` gives those of some of them, dense."""

    form: TopK
    words: Tensor  # (N, width)

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, rows: slice) -> "PackedRows":
        return PackedRows(self.form, self.words[rows])

    def float(self) -> Tensor:
        """Return the logits (N, V) in float32."""
        return self.form.unpack(self.words)


class TextLogits(TeacherLogits):
    """TeacherLogits of a text: called with a plan (1, n) of blocks it gives PackedRows of their n S tokens."""

    def __init__(
        self,
        batches: TokenBatches,
        teacher: nn.Module,
        amp: str,
        form: TopK,
        stream: torch.cuda.Stream | None = None,
    ):
        super().__init__(batches, None, WORD, None, stream)
        self.teacher, self.amp, self.form = teacher, amp, form
        self.block = batches.images.shape[1]
        self.width, self.chunk = self.block * form.width, max(1, TOKENS // self.block)

    @torch.no_grad()
    def run_teacher(self, rows: Tensor, check: Callable[[], None] = lambda: None) -> Iterator[Tensor]:
        """Yield the words of the blocks `rows` (n,), (n, width), in parts of `chunk`."""
        for part in rows.split(self.chunk):
            padded = torch.cat([part, part[-1:].expand(self.chunk - len(part))])
            ids = self.batches.batch(self.batches.plan_of(padded)).image
            with in_eval_mode(self.teacher), autocast(self.device, self.amp):
                hidden = self.teacher.hidden(ids)[: len(part) * self.block]
                words = [self.form.pack(self.teacher.head(some).float()) for some in hidden.split(ROWS)]
            yield torch.cat(words).view(len(part), -1)
            check()

    def given(self, values: Tensor) -> PackedRows:
        return PackedRows(self.form, values.view(-1, self.form.width))

    def dense(self, values: Tensor) -> Tensor:
        return self.given(values)[:ROWS].float()
