"""CTKD, Curriculum Temperature for Knowledge Distillation, Li et al. (AAAI 2023). https://arxiv.org/abs/2211.16231"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller.config import Key, at_least, one_of, positive
from mdistiller.distillers import keys
from mdistiller.distillers._registry import register_distiller
from mdistiller.distillers.features import probe_logits
from mdistiller.distillers.KD import KD
from mdistiller.distillers.losses import Temperatures, bounded, full_precision, warmup
from mdistiller.distillers.rules import register_rule


class Reverse(torch.autograd.Function):
    """The identity, whose gradient is multiplied by -strength (Ganin and Lempitsky, 2015)."""

    @staticmethod
    def forward(ctx, x: Tensor, strength: float | Tensor) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradient, None


def curriculum(epoch: int | Tensor, length: float, end: float) -> float | Tensor:
    """Return lambda = end / 2 (1 - cos(pi min(epoch / length, 1))) (Eq. 11): 0 at epoch 0, `end` at epoch `length`, or
    throughout if length is 0. It rises, as in the paper: the temperature's opposition grows.
    """
    angle = math.pi * warmup(epoch, length)
    return end * (1 - (angle.cos() if isinstance(angle, Tensor) else math.cos(angle))) / 2 if length > 0 else end


def learned_temperature(theta: Tensor, start: float, span: float) -> Tensor:
    """Return T = start + span sigmoid(theta), of theta's shape, in [start, start + span] for every theta."""
    return start + span * theta.sigmoid()


def num_classes(model: nn.Module) -> int:
    """Return the model's `num_classes`, or the outputs of its last nn.Linear, or of a pass on one image."""
    if isinstance(getattr(model, "num_classes", None), int):  # a head that shares its weights is no nn.Linear
        return model.num_classes
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return linear[-1].out_features if linear else probe_logits(model).shape[1]


LEARNED = {
    "MODE": Key(
        "global",
        "learned: one temperature for all samples (global), or one each (instance).",
        one_of(("global", "instance")),
    ),
    "T_START": Key(1.0, "learned: the lowest temperature that can be learned.", positive),
    "T_SPAN": Key(20.0, "learned: the highest temperature less the lowest.", at_least(0)),
    "LAMBDA_MAX": Key(1.0, "learned: final strength lambda of the reversed gradient."),
    "LAMBDA_EPOCHS": Key(10, "learned: epochs over which lambda rises from 0; 0: LAMBDA_MAX at once.", at_least(0)),
}


@register_rule("learned", defaults=LEARNED)
class LearnedTemperature(nn.Module):
    """CTKD's rule (arXiv 2211.16231): one T for student and teacher, learned against the student, and the factor T^2.

    `mode` "global": theta is one parameter for all samples. "instance": a two-layer perceptron reads it off the two
    softmax outputs of each sample, K of the teacher's last layer each. It is fed detached probabilities: bounded for
    every logit, and only the temperature, never the student, sees the reversed gradient. The reference temperature has
    no part in it: T = t_start + t_span sigmoid(theta). Theta climbs the loss at a pace that rises to `lambda_max` over
    `lambda_epochs` epochs.
    """

    def __init__(
        self,
        teacher: nn.Module,
        mode: str = "global",
        t_start: float = 1.0,
        t_span: float = 20.0,
        lambda_max: float = 1.0,
        lambda_epochs: float = 10,
    ):
        super().__init__()
        self.start, self.span = t_start, t_span
        self.lambda_max, self.lambda_epochs = lambda_max, lambda_epochs
        if mode == "global":
            self.theta = nn.Parameter(torch.ones(1))
        else:
            classes = num_classes(teacher)
            self.theta = nn.Sequential(nn.Linear(2 * classes, classes), nn.ReLU(), nn.Linear(classes, 1))

    def forward(
        self, logits_student: Tensor, logits_teacher: Tensor, tau: float, *, epoch: int, **kwargs
    ) -> Temperatures:
        """Return the temperatures for logits (B, K). Theta's gradient is multiplied by -lambda of the epoch."""
        if isinstance(self.theta, Tensor):
            theta = self.theta.expand(len(logits_student), 1)
        else:
            outputs = [F.softmax(bounded(logits.detach()), dim=1) for logits in (logits_student, logits_teacher)]
            with full_precision(logits_student):
                theta = self.theta(torch.cat(outputs, dim=1).to(self.theta[0].weight.dtype))
        strength = curriculum(epoch, self.lambda_epochs, self.lambda_max)
        temperature = Reverse.apply(learned_temperature(theta, self.start, self.span), strength)  # (B, 1)
        return Temperatures(temperature, temperature, temperature**2, torch.ones_like(temperature, dtype=torch.bool))


@register_distiller("CTKD", defaults={"LOSS": keys.logit_weights(0.1, 0.9)})
class CTKD(KD):
    """CE_WEIGHT * cross entropy + KD_WEIGHT * T^2 KL at one learned temperature, the rule of TEMPERATURE.LEARNED.

    Another rule in its place takes KD.TEMPERATURE for its reference.
    """

    section = "CTKD"
    reads = ("KD.TEMPERATURE",)
    own_rule = "learned"
    has_parts = False
