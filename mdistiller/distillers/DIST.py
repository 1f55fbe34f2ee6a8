"""DIST, Huang et al. (NeurIPS 2022). https://arxiv.org/abs/2205.10536"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller.config import Key
from mdistiller.distillers import keys
from mdistiller.distillers._registry import register_distiller
from mdistiller.distillers.base import RuleDistiller
from mdistiller.distillers.losses import Temperatures, bounded, ce_loss
from mdistiller.distillers.rules import fixed

MIN_NORM = 1e-12  # of a centred vector: below it, what is divided by the norm leaves float32


def centred_unit(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return x less its mean along `dim`, at norm 1, and where it is defined; 0 where x is constant up to rounding."""
    centred = x - x.mean(dim, keepdim=True)
    square = centred.square().sum(dim, keepdim=True)
    rounding = 16 * torch.finfo(x.dtype).eps * x.detach().norm(dim=dim, keepdim=True)
    sound = ~(square <= rounding.clamp(min=MIN_NORM).square())  # NaN is not constant: it must show
    # chosen before the root: its gradient at 0 is infinite even where it is not used
    norm = torch.where(sound, square, 1.0).sqrt()
    return torch.where(sound, centred / norm, 0.0), sound


def pearson(x: Tensor, y: Tensor, dim: int) -> Tensor:
    """Return Pearson's correlation of x and y (B, K) along `dim`: (B,) for dim 1, (K,) for dim 0.

    Where one side is constant it is 0, where both are it is 1: neither then gives a gradient, and equal inputs
    correlate fully.
    """
    (unit_x, sound_x), (unit_y, sound_y) = centred_unit(x, dim), centred_unit(y, dim)
    return torch.where(sound_x | sound_y, (unit_x * unit_y).sum(dim, keepdim=True), 1.0).squeeze(dim)


def dist_loss(
    logits_student: Tensor, logits_teacher: Tensor, temperature: float, beta: float = 1.0, gamma: float = 1.0
) -> Tensor:
    """Return tau^2 (beta (1 - mean_i rho(p_i, q_i)) + gamma (1 - mean_k rho(p_k, q_k))): a scalar.

    q = softmax(v / tau) and p = softmax(u / tau) of student logits v and teacher logits u, (B, K); rho is Pearson's
    correlation, over the classes of sample i (inter-class) and over the samples for class k (intra-class). The factor
    tau^2 is the released code's; the paper's equations and its appendix A.1 have none (divide the weight by tau^2 to
    have it their way). Zero for identical logits. A batch of one has no intra-class relation: that term is then 0.
    """
    rule = fixed(logits_student, logits_teacher, temperature)
    return softened_dist(logits_student, logits_teacher, rule, beta, gamma)


def softened_dist(
    logits_student: Tensor, logits_teacher: Tensor, temperatures: Temperatures, beta: float, gamma: float
) -> Tensor:
    """Return `dist_loss` at the temperatures of any rule. Each sample's factor weights its inter-class term, their mean
    the intra-class term, which belongs to no one sample.
    """
    student = F.softmax(bounded(logits_student) / temperatures.student, dim=1)
    teacher = F.softmax(bounded(logits_teacher) / temperatures.teacher, dim=1)
    inter = (temperatures.factor.squeeze(1) * (1 - pearson(student, teacher, dim=1))).mean()
    intra = temperatures.factor.mean() * (1 - pearson(student, teacher, dim=0)).mean()
    return beta * inter + gamma * intra


@register_distiller(
    "DIST",
    defaults={
        "BETA": Key(1.0, "Weight beta of the relations between classes, within each sample."),
        "GAMMA": Key(1.0, "Weight gamma of the relations between samples, within each class."),
        "TEMPERATURE": keys.temperature(4.0),
        "LOSS": keys.logit_weights(1.0, 2.0),
    },
)
class DIST(RuleDistiller):
    """CE_WEIGHT * cross entropy + KD_WEIGHT * dist_loss at TEMPERATURE, BETA and GAMMA, or under any rule."""

    needs_batch = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg):
        super().__init__(student, teacher, cfg)
        self.temperature = cfg.DIST.TEMPERATURE
        self.beta = cfg.DIST.BETA
        self.gamma = cfg.DIST.GAMMA
        self.ce_loss_weight = cfg.DIST.LOSS.CE_WEIGHT
        self.kd_loss_weight = cfg.DIST.LOSS.KD_WEIGHT

    def losses(self, logits_student: Tensor, logits_teacher: Tensor, target: Tensor, **kwargs) -> dict[str, Tensor]:
        temperatures = self.soften(logits_student, logits_teacher, self.temperature, **kwargs)
        dist = softened_dist(logits_student, logits_teacher, temperatures, self.beta, self.gamma)
        return {"loss_ce": self.ce_loss_weight * ce_loss(logits_student, target), "loss_kd": self.kd_loss_weight * dist}
