"""Several networks as one teacher."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Ensemble(nn.Module):
    """The mean of several networks: images (B, 3, H, W) -> (logits (B, K), {}), without features.

    `mean`: of their "logits", or of their "probabilities", softmax at temperature 1. The logarithm of the latter stands
    for logits, which softmax leaves open by a constant: those of a sample have the mean 0.
    """

    def __init__(self, networks: Sequence[nn.Module], mean: str = "logits"):
        super().__init__()
        self.networks, self.mean = nn.ModuleList(networks), mean

    def forward(self, image: Tensor) -> tuple[Tensor, dict]:
        outputs = [network(image) for network in self.networks]
        logits = torch.stack([(out[0] if isinstance(out, tuple) else out).float() for out in outputs])  # (N, B, K)
        if self.mean == "logits":
            return logits.mean(0), {}
        logits = F.log_softmax(logits, 2).logsumexp(0) - math.log(len(outputs))
        return logits - logits.mean(1, keepdim=True), {}
