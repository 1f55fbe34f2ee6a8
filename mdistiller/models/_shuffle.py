"""The channel shuffle of both ShuffleNets."""

from torch import Tensor


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Move channel c of group g of x (B, C, H, W) to c * groups + g (Zhang et al., arXiv 1707.01083, figure 1)."""
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)
