"""CRD, Tian et al. (ICLR 2020). https://arxiv.org/abs/1910.10699"""

import math
import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller.config import Key, between, one_of
from mdistiller.device import at_least_float32
from mdistiller.distillers import keys
from mdistiller.distillers._registry import register_distiller
from mdistiller.distillers.base import FeatureDistiller
from mdistiller.distillers.features import pooled_width, refuse, unit
from mdistiller.distillers.losses import in_float32

EPS = 1e-7
MODES = one_of(("exact", "relax"))
UNUSED_WIDTH = "Accepted for mdistiller's YAML files; the width is read from the model."


@in_float32
def similarities(anchor: Tensor, memory: Tensor, index: Tensor, temperature: float) -> Tensor:
    """Return g' g / tau of unit anchors (B, D) with the rows `index` (B, K + 1) of the memory (N, D): (B, K + 1).

    One product with the whole memory, of which entries are picked: the rows themselves, (B, K + 1, D), would not fit.
    """
    # the memory is updated before the backward pass, which needs what the product saw
    return (anchor @ memory.mT.clone() / temperature).gather(1, index)


@in_float32
def nce_loss(similarity: Tensor, z: Tensor, num_data: int) -> Tensor:
    """Return the noise-contrastive estimation loss of the first column among the others: a scalar (section 3).

    Similarities (B, K + 1), the positive first; exp(similarity) / z is the model's likelihood under z > 0, 1 / num_data
    the noise's. Logistic in the log-likelihoods, so that no exponential overflows.
    """
    noise = (similarity.shape[1] - 1) / num_data
    log_odds = similarity - z.log() - math.log(noise + EPS)  # (B, K + 1)
    miss = F.softplus(-log_odds[:, 0])  # -log(p / (p + noise))
    false = F.softplus(log_odds[:, 1:]) - math.log(noise / (noise + EPS))  # -log(noise / (p + noise))
    return (miss + false.sum(1)).mean()


class Embed(nn.Module):
    """Pooled features (B, C) -> unit vectors (B, D)."""

    def __init__(self, in_features: int, dim: int):
        super().__init__()
        self.linear = nn.Linear(in_features, dim)

    def forward(self, x: Tensor) -> Tensor:
        return unit(at_least_float32(self.linear(x)), 1)


class Negatives(nn.Module):
    """Draws the places of negatives in the training set, uniformly and with replacement, on the device.

    With `labels` (N,): among the samples of all classes but the sample's. The samples are sorted by class once; a draw
    skips the block of the sample's class, so that each is exact and none is repeated. Without: among all other samples.
    """

    def __init__(self, num_data: int, labels: Tensor | None):
        super().__init__()
        self.num_data, self.by_class = num_data, labels is not None
        if labels is not None:
            count = torch.bincount(labels)
            for name, tensor in (("order", labels.argsort()), ("count", count), ("start", count.cumsum(0) - count)):
                self.register_buffer(name, tensor, persistent=False)  # the data set knows them

    def forward(self, index: Tensor, target: Tensor, draws: int) -> Tensor:
        """Return the places (B, draws) of negatives for the samples at `index` (B,) with labels `target` (B,)."""
        start, count = (self.start[target], self.count[target]) if self.by_class else (index, torch.ones_like(index))
        # a remainder of so wide a range is uniform to one part in 2^40
        draw = torch.randint(2**62, (len(index), draws), device=index.device) % (self.num_data - count)[:, None]
        place = draw + count[:, None] * (draw >= start[:, None])
        return self.order[place] if self.by_class else place


@register_distiller(
    "CRD",
    defaults={
        "MODE": Key("exact", "Negatives come from other classes (exact), or from all other samples (relax).", MODES),
        "FEAT": {
            "DIM": Key(128, "Dimension of the embeddings.", between(1, 2**16)),
            "STUDENT_DIM": Key(256, UNUSED_WIDTH, effect=lambda v: 0 if v == 256 else v),
            "TEACHER_DIM": Key(256, UNUSED_WIDTH, effect=lambda v: 0 if v == 256 else v),
        },
        "LOSS": keys.feature_weights(0.8),
        "NCE": {
            "K": Key(16384, "Number N of negatives for each sample.", between(1, 2**20)),
            "MOMENTUM": Key(0.5, "Share of an old entry of the memory that an update keeps.", between(0, 1)),
            "TEMPERATURE": keys.temperature(0.07, "Temperature tau of the similarities."),
        },
    },
)
class CRD(FeatureDistiller):
    """CE_WEIGHT * cross entropy + FEAT_WEIGHT * (nce_loss of the student's embedding + of the teacher's).

    Either embedding is contrasted with the other's memory bank (num_data, FEAT.DIM), whose entries follow the
    embeddings with NCE.MOMENTUM. NCE.K negatives a sample are drawn on the device: MODE "exact" from other classes by
    the training set's `labels` (num_data,), MODE "relax" from all other samples; exact without labels draws as relax,
    with a warning. A passed contrastive_index (B, K + 1), first column the sample itself, is used instead. The
    constants Z of both sides are set by the first batch (-1: not set yet). FEAT.STUDENT_DIM and TEACHER_DIM are
    accepted for mdistiller's YAML files; the widths are the models'.
    """

    needs = ("num_data", "labels")
    needs_labels = True
    needs_features = ("pooled_feat",)
    needs_batch = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg, num_data: int, labels: Tensor | None = None):
        cfg = cfg.CRD
        super().__init__(student, teacher, cfg.LOSS.CE_WEIGHT, cfg.LOSS.FEAT_WEIGHT)
        self.num_data, self.mode, self.k = num_data, cfg.MODE, cfg.NCE.K
        self.momentum, self.temperature = cfg.NCE.MOMENTUM, cfg.NCE.TEMPERATURE
        if num_data < 2 or (labels is not None and self.mode == "exact" and labels.min() == labels.max()):
            refuse("CRD", student, teacher, "there is nothing to contrast with in this training set")
        self.embed_s = Embed(pooled_width(student), cfg.FEAT.DIM)
        self.embed_t = Embed(pooled_width(teacher), cfg.FEAT.DIM)
        self.negatives = Negatives(num_data, labels if self.mode == "exact" else None)
        bound = math.sqrt(3 / cfg.FEAT.DIM)  # unit length on average
        for name in ("memory_v1", "memory_v2"):  # of the student's and the teacher's embeddings
            self.register_buffer(name, torch.empty(num_data, cfg.FEAT.DIM).uniform_(-bound, bound))
        # as published: K, temperature, Z of the student's and of the teacher's side, momentum
        constants = [float(self.k), self.temperature, -1.0, -1.0, self.momentum]
        self.register_buffer("params", torch.tensor(constants))

    def get_extra_parameters(self) -> int:
        """Count the embeddings' parameters and, as published, the memory banks and constants."""
        buffers = (self.memory_v1, self.memory_v2, self.params)
        return super().get_extra_parameters() + sum(buffer.numel() for buffer in buffers)

    def feature_loss(
        self,
        feats_student: dict,
        feats_teacher: dict,
        *,
        target: Tensor,
        index: Tensor,
        contrastive_index: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        if contrastive_index is None:
            contrastive_index = torch.cat([index[:, None], self.draw(index, target)], 1)
        v1 = self.embed_s(feats_student["pooled_feat"])
        v2 = self.embed_t(feats_teacher["pooled_feat"])
        of_v1 = similarities(v1, self.memory_v2, contrastive_index, self.temperature)
        of_v2 = similarities(v2, self.memory_v1, contrastive_index, self.temperature)
        self.update(index, v1.detach(), v2.detach(), of_v1.detach(), of_v2.detach())
        z1, z2 = self.params[2:4].clone()
        return nce_loss(of_v1, z1, self.num_data) + nce_loss(of_v2, z2, self.num_data)

    def draw(self, index: Tensor, target: Tensor) -> Tensor:
        """Return the places (B, NCE.K) of each sample's negatives."""
        if self.mode == "exact" and not self.negatives.by_class:
            warnings.warn("CRD: MODE exact without the training set's labels draws as relax", stacklevel=2)
        return self.negatives(index, target, self.k)

    @torch.no_grad()
    def update(self, index: Tensor, v1: Tensor, v2: Tensor, of_v1: Tensor, of_v2: Tensor) -> None:
        """Set the constants where they are unset, and move the batch's memories towards their embeddings (B, D)."""
        z = torch.stack([similarity.exp().mean() for similarity in (of_v1, of_v2)]) * self.num_data
        self.params[2:4] = torch.where(self.params[2:4] < 0, z, self.params[2:4])
        for memory, v in ((self.memory_v1, v1), (self.memory_v2, v2)):
            moved = self.momentum * memory[index] + (1 - self.momentum) * v
            memory.index_copy_(0, index, unit(moved, 1))
