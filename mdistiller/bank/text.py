"""A teacher's logits on blocks of text: the largest of each token, packed until a part of a loss needs them."""

import torch
from torch import Tensor, nn

from mdistiller.bank.teacher import Bank, TeacherLogits
from mdistiller.bank.topk import WORD, TopK
from mdistiller.dataset import TokenBatches
from mdistiller.device import autocast
from mdistiller.models import in_eval_mode

# Tokens of a teacher's pass. On a CPU a block goes alone: a row's bits may depend on its place among others.
LARGE_PASS = 2**14


class Rows:
    """Packed rows in the place of logits (N, V): a slice is packed as well, `float` makes the tensor."""

    def __init__(self, words: Tensor, form: TopK):
        self.words, self.form = words, form

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, rows: slice) -> "Rows":
        return Rows(self.words[rows], self.form)

    def float(self) -> Tensor:
        """Return the dense rows, (N, V) float32."""
        return self.form.unpack(self.words)


class TextTeacher:
    """`network` of text for inference alone, in the precision `amp`: ids (B, S) -> words (B, S * form.width)."""

    def __init__(self, network: nn.Module, form: TopK, amp: str):
        self.network, self.form, self.amp = network, form, amp

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        with in_eval_mode(self.network):
            with autocast(ids.device, self.amp):
                blocks = self.network.hidden(ids).split(ids.shape[1])
            words = []
            for block in blocks:  # whose logits never exist together
                with autocast(ids.device, self.amp):
                    logits = self.network.head(block)
                words.append(self.form.pack(logits).flatten())
        return torch.stack(words)


class TextLogits(TeacherLogits):
    """Called with a plan (1, n) of blocks of S tokens: the teacher's logits on them, as `Rows` of n S tokens.

    They are packed whether or not a bank keeps them, so that a bank, whose rows are blocks, changes no number.
    """

    sample, unit = "a block", "block"

    def __init__(
        self,
        batches: TokenBatches,
        inference: TextTeacher,
        bank: Bank | None = None,
        stream: torch.cuda.Stream | None = None,
    ):
        super().__init__(batches, inference, WORD, bank, stream)
        self.form, size = inference.form, batches.images.shape[1]
        self.width = size * self.form.width
        self.chunk = 1 if self.device.type == "cpu" else max(1, LARGE_PASS // size)

    def given(self, kept: Tensor) -> Rows:
        return Rows(kept.view(-1, self.form.width), self.form)
