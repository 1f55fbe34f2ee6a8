"""KDSVD, Lee, Kim and Song (ECCV 2018). https://arxiv.org/abs/1807.06819"""

import torch
from torch import Tensor, nn

from mdistiller.config import Key, at_least
from mdistiller.distillers import keys
from mdistiller.distillers._registry import register_distiller
from mdistiller.distillers.base import FeatureDistiller
from mdistiller.distillers.features import match_size, unit
from mdistiller.distillers.losses import in_float32

SPARE = 3  # more of the student's vectors than the teacher's, so that each of the teacher's finds its like


def leading_vectors(f: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` largest singular values (B, n) and right singular vectors (B, W, n) of maps (B, C, H, W).

    Each map is read as a matrix X of C H rows and W columns, scaled to unit norm; n = min(count, W). A vector's sign is
    chosen so that its components add up to 0 or more: a solver's own differs from build to build, and kdsvd_loss
    depends on it. The vectors carry perturbation theory's gradient, dv_j = sum_(i != j) v_i v_i' dA v_j / (l_j - l_i)
    with A = X' X and its eigenvalues l, the quotients bounded so that equal singular values leave it finite; the values
    carry none. The decomposition is the one step that waits for the device.
    """
    x = f.flatten(1, 2)
    x = x / x.detach().flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None]
    a = x.mT @ x  # (B, W, W), trace 1
    with torch.no_grad():
        finite = a.isfinite().all()  # eigh raises for NaN, which is the loss's to show
        square, basis = (part.flip(-1) for part in torch.linalg.eigh(torch.where(finite, a, 0.0)))
        basis = torch.where(finite, basis, torch.nan)
        basis = basis * torch.where(basis.sum(1, keepdim=True) < 0, -1.0, 1.0).to(a.dtype)
        leading, v = square[:, None, :count], basis[:, :, :count]
        gap = leading - square[:, :, None]  # (B, W, n)
        quotient = gap / (gap.square() + 1e-12)  # 0 for i = j
    moved = (a - a.detach()) @ v  # zero, with the gradient of A v
    return square[:, :count].clamp(min=0).sqrt(), v + basis @ (quotient * (basis.mT @ moved))


def aligned(v_s: Tensor, v_t: Tensor) -> Tensor:
    """Return for each of the teacher's vectors (B, W, n) the student's (B, W, m) most parallel one, turned to it."""
    cosine = v_s.mT @ v_t  # (B, m, n)
    best = cosine.abs().argmax(1, keepdim=True)  # (B, 1, n)
    sign = cosine.gather(1, best).sign()
    return v_s.gather(2, best.expand(-1, v_s.shape[1], -1)) * sign


def _relation(front: Tensor, back: Tensor) -> Tensor:
    """Return the RBF between the components of two stages' vectors (B, W, n) and (B, W', n): (B, W, W', n)."""
    n = min(front.shape[2], back.shape[2])
    return torch.exp(-(front[:, :, None, :n] - back[:, None, :, :n]).square() / 8)


@in_float32
def kdsvd_loss(feats_student: list[Tensor], feats_teacher: list[Tensor], k: int) -> Tensor:
    """Return a scalar, the squared difference of stage-to-stage relations, summed over all but the batch (section 3).

    Lists of (B, C_i, H_i, W_i); channels may differ, and the larger map is average-pooled to the smaller one's size. A
    stage is described by its k leading right singular vectors, weighted by the teacher's singular values (of unit
    length together); a relation joins a stage to the one before it, so a single stage gives 0. Zero for equal features.

    The paper reads a map as a matrix of H W rows and C columns. The published training code, whose figures these are,
    reads it as C H by W: its reshape was written for channels that come last.
    """
    loss = feats_student[0].new_zeros(())
    before = None
    for f_s, f_t in zip(feats_student, feats_teacher, strict=False):
        f_s, f_t = match_size(f_s, f_t)
        values, v_t = leading_vectors(f_t, k)
        v_s = aligned(leading_vectors(f_s, k + SPARE)[1], v_t)
        weight = unit(values, 1)[:, None]
        now = v_s * weight, v_t * weight
        if before is not None:
            relation_s, relation_t = (_relation(a, b) for a, b in zip(now, before, strict=True))
            loss = loss + (relation_s - relation_t).square().sum()
        before = now
    return loss / len(feats_student[0])


@register_distiller(
    "KDSVD",
    defaults={
        "K": Key(1, "Number k of leading singular vectors that are compared.", at_least(1)),
        "LOSS": keys.feature_weights(1.0),
    },
)
class KDSVD(FeatureDistiller):
    """CE_WEIGHT * cross entropy + FEAT_WEIGHT * kdsvd_loss over the stages after the stem that both models have."""

    least_maps = 2

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg):
        super().__init__(student, teacher, cfg.KDSVD.LOSS.CE_WEIGHT, cfg.KDSVD.LOSS.FEAT_WEIGHT)
        self.k = cfg.KDSVD.K

    def feature_loss(self, feats_student: dict, feats_teacher: dict, **kwargs) -> Tensor:
        return kdsvd_loss(feats_student["feats"][1:], feats_teacher["feats"][1:], self.k)
