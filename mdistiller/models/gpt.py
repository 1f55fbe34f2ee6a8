"""A small GPT: pre-norm transformer decoders with rotary positions (arXiv 2104.09864) and a tied last layer.

The contract of networks of text (text_models): ids (B, S) -> (logits (B S, V), feats), one row a position, of the
token that follows it; and in two parts, so that no more than some rows of logits exist at a time, `hidden(ids)` ->
(B S, C) and `head`, (N, C) -> logits (N, V). `feats` has `pooled_feat`, what enters the last layer.
"""

import functools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller.registry import text_models

SIZES = (
    (1, 32), (2, 64), (2, 128), (4, 64), (4, 128), (4, 192), (4, 256), (6, 128), (6, 256), (6, 384), (8, 512),
    (12, 768),
)  # fmt: skip


class Block(nn.Module):
    """Causal attention and an MLP of four times the width, each behind a LayerNorm and beside a shortcut."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = width // (64 if width >= 512 else 32)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, S, d)
        mixed = F.scaled_dot_product_attention(rotate(q, turn), rotate(k, turn), v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def rotations(length: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (length, width / 2) of each position's angles."""
    rates = 10_000.0 ** (-torch.arange(0, width, 2, device=device) / width)
    angles = torch.arange(length, device=device)[:, None] * rates
    return angles.cos(), angles.sin()


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (x_i, x_{i + d/2}) of x (B, heads, S, d) by the angles of their positions."""
    cos, sin = (part.to(x.dtype) for part in turn)
    first, second = x.chunk(2, 3)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], 3)


class GPT(nn.Module):
    """A network of text, see above, for a vocabulary of `num_classes` and blocks of any length."""

    def __init__(self, num_classes: int, layers: int, width: int):
        super().__init__()
        self.embedding = nn.Embedding(num_classes, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes, bias=False)
        self.head.weight = self.embedding.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:  # as GPT-2: what adds to the shortcut is smaller by their number
                scale = math.sqrt(2 * layers) if name.endswith(("out.weight", "down.weight")) else 1.0
                nn.init.normal_(parameter, 0.0, 0.02 / scale)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def hidden(self, ids: Tensor) -> Tensor:
        """Return what enters the last layer, for ids (B, S): (B S, width)."""
        x = self.embedding(ids)
        turn = rotations(ids.shape[1], x.shape[2] // self.blocks[0].heads, ids.device)
        for block in self.blocks:
            x = block(x, turn)
        return self.norm(x).flatten(0, 1)

    def forward(self, ids: Tensor) -> tuple[Tensor, dict]:
        hidden = self.hidden(ids)
        return self.head(hidden), {"pooled_feat": hidden}


for _layers, _width in SIZES:
    text_models[f"gpt{_layers}x{_width}"] = functools.partial(GPT, layers=_layers, width=_width)
