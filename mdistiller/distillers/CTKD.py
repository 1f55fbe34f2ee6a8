"""CTKD, Curriculum Temperature for Knowledge Distillation, Li et al. (AAAI 2023). https://arxiv.org/abs/2211.16231"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller.distillers._base import LogitDistiller
from mdistiller.distillers._common import Temperatures, bounded, ce_loss, full_precision, softened_kl
from mdistiller.distillers._registry import register_distiller
from mdistiller.errors import ConfigError


class Reverse(torch.autograd.Function):
    """The identity, whose gradient is multiplied by -strength (Ganin and Lempitsky, 2015)."""

    @staticmethod
    def forward(ctx, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradient, None


def curriculum(epoch: int, length: float, end: float) -> float:
    """lambda = end / 2 (1 - cos(pi min(epoch / length, 1))): from 0 at epoch 0 to `end` at epoch `length` (Eq. 11);
    `end` throughout if length is 0. It rises, as in the paper: the temperature's opposition grows.
    """
    return end * (1 - math.cos(math.pi * min(epoch / length, 1.0))) / 2 if length > 0 else end


def learned_temperature(theta: Tensor, start: float, span: float) -> Tensor:
    """T = start + span sigmoid(theta), of theta's shape, in [start, start + span] for every theta."""
    return start + span * theta.sigmoid()


def num_classes(model: nn.Module) -> int:
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1].out_features


class LearnedTemperature(nn.Module):
    """The temperature rule of CTKD: one T for student and teacher, learned against the student, and the factor T^2.

    Without `classes`, theta is one parameter for all samples (Global-T). With `classes`, K, a two-layer perceptron
    reads it off the two softmax outputs of each sample (Instance-T). It is fed detached probabilities: bounded for
    every logit, and only the temperature, never the student, sees the reversed gradient.
    """

    def __init__(self, start: float, span: float, classes: int | None = None):
        super().__init__()
        self.start, self.span = start, span
        if classes is None:
            self.theta = nn.Parameter(torch.ones(1))
        else:
            self.theta = nn.Sequential(nn.Linear(2 * classes, classes), nn.ReLU(), nn.Linear(classes, 1))

    def forward(self, logits_student: Tensor, logits_teacher: Tensor, strength: float) -> Temperatures:
        """Logits (B, K); the gradient that reaches theta is multiplied by -strength."""
        if isinstance(self.theta, Tensor):
            theta = self.theta.expand(len(logits_student), 1)
        else:
            outputs = [F.softmax(bounded(logits.detach()), dim=1) for logits in (logits_student, logits_teacher)]
            with full_precision(logits_student):
                theta = self.theta(torch.cat(outputs, dim=1).to(self.theta[0].weight.dtype))
        temperature = Reverse.apply(learned_temperature(theta, self.start, self.span), strength)  # (B, 1)
        return Temperatures(temperature, temperature, temperature**2, torch.ones_like(temperature, dtype=torch.bool))


@register_distiller(
    "CTKD",
    defaults={
        "MODE": "global",
        "T_START": 1.0,
        "T_SPAN": 20.0,
        "LAMBDA_MAX": 1.0,
        "LAMBDA_EPOCHS": 10,
        "LOSS": {"CE_WEIGHT": 0.1, "KD_WEIGHT": 0.9},
    },
)
class CTKD(LogitDistiller):
    """CE_WEIGHT * cross entropy + KD_WEIGHT * T^2 KL at one learned temperature T_START + T_SPAN sigmoid(theta).

    The student descends the loss and theta climbs it, at a pace that rises to LAMBDA_MAX over LAMBDA_EPOCHS epochs.
    MODE: "global", one theta, or "instance", one a sample.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg):
        super().__init__(student, teacher)
        if cfg.CTKD.MODE not in ("global", "instance"):
            raise ConfigError(f"CTKD.MODE: must be global or instance; got {cfg.CTKD.MODE!r}")
        classes = num_classes(teacher) if cfg.CTKD.MODE == "instance" else None
        self.temperature = LearnedTemperature(cfg.CTKD.T_START, cfg.CTKD.T_SPAN, classes)
        self.lambda_max = cfg.CTKD.LAMBDA_MAX
        self.lambda_epochs = cfg.CTKD.LAMBDA_EPOCHS
        self.ce_weight = cfg.CTKD.LOSS.CE_WEIGHT
        self.kd_weight = cfg.CTKD.LOSS.KD_WEIGHT
        self.logit_stand = cfg.EXPERIMENT.LOGIT_STAND

    def get_learnable_parameters(self) -> list[nn.Parameter]:
        return super().get_learnable_parameters() + list(self.temperature.parameters())

    def get_extra_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.temperature.parameters())

    def losses(
        self, logits_student: Tensor, logits_teacher: Tensor, target: Tensor, *, epoch: int, **kwargs
    ) -> dict[str, Tensor]:
        student, teacher = self.distilled(logits_student, logits_teacher)
        temperatures = self.temperature(student, teacher, curriculum(epoch, self.lambda_epochs, self.lambda_max))
        return {
            "loss_ce": self.ce_weight * ce_loss(logits_student, target),
            "loss_kd": self.kd_weight * softened_kl(student, teacher, temperatures),
        }
