"""Names that files written for mdistiller import from its methods' modules, and that nothing here needs. Each becomes
a name of the module that it stands for.
"""

import importlib

import torch
from torch import Tensor, nn

from mdistiller.distillers.AT import at_loss
from mdistiller.distillers.CRD import CRD, Negatives, nce_loss, similarities
from mdistiller.distillers.NST import nst_loss
from mdistiller.distillers.OFD import ofd_loss
from mdistiller.distillers.RKD import pairwise_distance
from mdistiller.distillers.SP import sp_loss


def _get_gt_mask(logits: Tensor, target: Tensor) -> Tensor:
    """Return where each row of logits (B, K) has its label: (B, K), bool."""
    return torch.arange(logits.shape[1], device=logits.device) == target.reshape(-1, 1)


def _get_other_mask(logits: Tensor, target: Tensor) -> Tensor:
    """Return where each row of logits (B, K) has another class than its label: (B, K), bool."""
    return ~_get_gt_mask(logits, target)


def cat_mask(t: Tensor, mask1: Tensor, mask2: Tensor) -> Tensor:
    """Return the sums of the probabilities (B, K) under either mask: (B, 2)."""
    return torch.stack([(t * mask).sum(1) for mask in (mask1, mask2)], 1)


def normalize(logit: Tensor) -> Tensor:
    """Return the z-scores of logits (B, K), as LSKD's code has them: the deviation is over K - 1."""
    return (logit - logit.mean(-1, keepdim=True)) / (logit.std(-1, keepdim=True) + 1e-7)


def single_stage_at_loss(f_s: Tensor, f_t: Tensor, p: int) -> Tensor:
    """Return `at_loss` of one stage, maps (B, C, H, W)."""
    return at_loss([f_s], [f_t], p)


def single_stage_nst_loss(f_s: Tensor, f_t: Tensor) -> Tensor:
    """Return `nst_loss` of one stage, maps (B, C, H, W)."""
    return nst_loss([f_s], [f_t])


def similarity_loss(f_s: Tensor, f_t: Tensor) -> Tensor:
    """Return `sp_loss` of one stage, features (B, ...)."""
    return sp_loss(f_s, f_t)


def _pdist(e: Tensor, squared: bool, eps: float) -> Tensor:
    """Return `pairwise_distance` of features (B, C): (B, B)."""
    return pairwise_distance(e, eps, squared)


def feat_loss(source: Tensor, target: Tensor, margin: Tensor) -> Tensor:
    """Return `ofd_loss` of maps (B, C, H, W)."""
    return ofd_loss(source, target, margin)


class ContrastMemory(nn.Module):
    """CRD's two memories (output_size, input_size): `forward` returns exp(similarity) / Z of both sides and updates
    them. Z is set by the first batch.
    """

    def __init__(self, input_size: int, output_size: int, k: int, t: float = 0.07, momentum: float = 0.5):
        super().__init__()
        self.num_data, self.k, self.momentum, self.temperature = output_size, k, momentum, t
        self.negatives = Negatives(output_size, None)
        bound = (3 / input_size) ** 0.5
        for name in ("memory_v1", "memory_v2"):
            self.register_buffer(name, torch.empty(output_size, input_size).uniform_(-bound, bound))
        self.register_buffer("params", torch.tensor([float(k), t, -1.0, -1.0, momentum]))

    update = CRD.update

    def forward(self, v1: Tensor, v2: Tensor, y: Tensor, idx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (B, k + 1, 1) twice: of unit embeddings v1, v2 (B, input_size) of the samples y (B,), each among the
        other side's memory at `idx` (B, k + 1), first column y; without `idx` among k other samples.
        """
        idx = torch.cat([y[:, None], self.negatives(y, y, self.k)], 1) if idx is None else idx
        of_v1 = similarities(v1, self.memory_v2, idx, self.temperature)
        of_v2 = similarities(v2, self.memory_v1, idx, self.temperature)
        self.update(y, v1.detach(), v2.detach(), of_v1.detach(), of_v2.detach())
        return tuple((of_v.exp() / z)[..., None] for of_v, z in zip((of_v1, of_v2), self.params[2:4], strict=True))


class ContrastLoss(nn.Module):
    """`nce_loss` of what ContrastMemory gives, (B, k + 1, 1), the positive first."""

    def __init__(self, num_data: int):
        super().__init__()
        self.num_data = num_data

    def forward(self, x: Tensor) -> Tensor:
        return nce_loss(x.squeeze(-1).log(), torch.ones((), device=x.device), self.num_data)


MASKS = [_get_gt_mask, _get_other_mask, cat_mask]
NAMES = {  # module -> what it gets
    "_common": MASKS,
    "AT": [single_stage_at_loss],
    "CRD": [ContrastMemory, ContrastLoss],
    "DKD": [*MASKS, normalize],
    "KD": [normalize],
    "MLKD": [normalize],
    "NST": [single_stage_nst_loss],
    "OFD": [feat_loss],
    "RKD": [_pdist],
    "SP": [similarity_loss],
}
for _module, _items in NAMES.items():
    _names = {item.__name__: item for item in _items}
    vars(importlib.import_module(f"mdistiller.distillers.{_module}")).update(_names)
