"""Text as tokens in memory, and the batches made of it: a sample is a block of tokens, a target the next token."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from mdistiller.dataset._images import Batch, Batches
from mdistiller.errors import UserError


@dataclass(frozen=True)
class TokenSet:
    """A text as plain tensors, with the face of an ImageSet: ids int32 (n, S) in blocks of S tokens in the images'
    place, and as labels int64 (n S,) the token that follows each.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int  # entries of the vocabulary
    source: str  # digest of the text, its tokenizer and the blocks
    bytes_a_token: float  # of the part that is tested on
    tokenizer: str = ""  # digest of its file; "bytes"; empty: not known
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    augment: str = "none"
    class_names: tuple[str, ...] = ()
    task: ClassVar[str] = "text"
    unit: ClassVar[str] = "tokens"
    samples: ClassVar[str] = "blocks"

    def doubts(self) -> list[str]:
        """Return a line where the test has so few tokens that its figures say little."""
        few = len(self.test_labels) < 10_000
        return [f"warning: {len(self.test_labels):,} tokens to test on are few"] if few else []

    def to(self, device: torch.device) -> "TokenSet":
        """Return the set with its tokens on `device`."""
        names = ("train_images", "train_labels", "test_images", "test_labels")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def training_batches(self, cfg: Mapping) -> "TokenBatches":
        """Return the batches of blocks to train on that the configuration `cfg` asks for."""
        batches = TokenBatches(self.train_images, self.train_labels, cfg.SOLVER.BATCH_SIZE, cfg.SEED, shuffle=True)
        batches.drop_last = cfg.SOLVER.DROP_LAST
        return batches

    def test_batches(self, wanted: int) -> "TokenBatches":
        """Return the blocks to test on, `wanted` of them a batch."""
        return TokenBatches(self.test_images, self.test_labels, wanted)

    def digest(self) -> str:
        """Return the digest of the text as it was cut into blocks."""
        return self.source


def token_set(
    train: Tensor,
    test: Tensor,
    block: int,
    num_classes: int,
    source: str,
    bytes_a_token: float = 1.0,
    tokenizer: str = "",
) -> TokenSet:
    """Return the set of two streams of ids (N,), cut into blocks of `block` tokens; what fills none at the end goes.

    `bytes_a_token`: of the text that `test` stands for, which bits a byte are counted by. Raises UserError where a
    stream is shorter than a block, or holds an id that is not below `num_classes`.
    """
    parts = []
    for name, stream in (("training", train), ("test", test)):
        count = (len(stream) - 1) // block
        if count < 1:
            raise UserError(
                f"the {name} part has {len(stream):,} tokens, less than one block and the token after it; take more "
                f"text, or DATASET.TEXT.BLOCK below {block}"
            )
        if int(stream.min()) < 0 or int(stream.max()) >= num_classes:
            raise UserError(f"the {name} part: ids must be 0 to {num_classes - 1}; got {int(stream.max())}")
        ids = stream[: count * block].to(torch.int32).view(count, block)
        parts += [ids, stream[1 : count * block + 1].long()]
    return TokenSet(*parts, num_classes, source, bytes_a_token, tokenizer)


class TokenBatches(Batches):
    """Batches of blocks: image is ids (B, S) int64; target and index, one a token, are (B S,).

    Training (`shuffle`): each epoch has an order of its own, a function of (seed, epoch) alone.
    """

    views = 1

    def __init__(self, ids: Tensor, labels: Tensor, batch_size: int, seed: int = 0, shuffle: bool = False):
        self.images, self.labels, self.batch_size, self.seed = ids, labels, batch_size, seed
        self.shuffle, self.augment, self.reader, self.strong = shuffle, None, None, None
        self.places = torch.arange(ids.shape[1], device=ids.device)

    def plan(self, epoch: int) -> Tensor:
        """Return the order of the epoch's blocks on the CPU, (1, n) int64."""
        generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
        n = self.num_samples
        return (torch.randperm(n, generator=generator) if self.shuffle else torch.arange(n))[None]

    def row_numbers(self, plan: Tensor) -> Tensor:
        return plan[0]

    def plan_of(self, rows: Tensor) -> Tensor:
        return rows[None]

    def batch(self, plan: Tensor, rows: Tensor | None = None) -> Batch:
        """Return what `plan` (1, B) says, or its places `rows` (m,)."""
        index = self._wanted(plan, rows)[0].to(self.images.device)
        size = self.images.shape[1]
        tokens = (index[:, None] * size + self.places).flatten()
        return Batch(self.images[index].long(), self.labels[tokens], tokens)

    def __iter__(self) -> Iterator[Batch]:
        first, step = self.tester
        for rows in torch.arange(first, self.num_samples, step).split(self.batch_size):
            yield self.batch(rows[None])
