"""The contract of a method, the student alone, and the bases of the methods that need logits and features."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mdistiller.distillers._registry import register_distiller
from mdistiller.distillers.losses import Temperatures, ce_loss
from mdistiller.distillers.rules import build_rule


class Distiller(nn.Module):
    """A student, a teacher and the loss between them.

    A method overrides `forward_train(image, target, **kwargs)`, which returns (student logits (B, K), {name: scalar
    loss}); kwargs hold at least `epoch` (from 1) and `index` (B,), the samples' places in the training set. The sum of
    the losses is minimised.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module):
        super().__init__()
        self.student = student
        self.teacher = teacher

    def train(self, mode: bool = True) -> "Distiller":
        """The teacher stays in eval mode: its BatchNorm statistics are part of what it knows."""
        super().train(mode)
        self.teacher.eval()
        return self

    def get_learnable_parameters(self) -> list[nn.Parameter]:
        """What the optimizer gets: the student's parameters, and a method's own where it has some."""
        return list(self.student.parameters())

    def get_extra_parameters(self) -> int:
        """Number of parameters that the method adds to the student's."""
        return 0

    def forward_train(self, image: Tensor, target: Tensor, **kwargs) -> tuple[Tensor, dict[str, Tensor]]:
        raise NotImplementedError

    def forward_test(self, image: Tensor) -> Tensor:
        return self.student(image)[0]

    def forward(self, **kwargs):
        if self.training:
            return self.forward_train(**kwargs)
        return self.forward_test(kwargs["image"])


@register_distiller("NONE")
class Vanilla(nn.Module):
    """The student alone, by cross entropy."""

    def __init__(self, student: nn.Module):
        super().__init__()
        self.student = student

    get_learnable_parameters = Distiller.get_learnable_parameters
    get_extra_parameters = Distiller.get_extra_parameters
    forward_test = Distiller.forward_test
    forward = Distiller.forward

    def forward_train(self, image: Tensor, target: Tensor, **kwargs) -> tuple[Tensor, dict[str, Tensor]]:
        logits_student, _ = self.student(image)
        return logits_student, {"ce": ce_loss(logits_student, target)}


class LogitDistiller(Distiller):
    """A method that sees logits only: a temperature rule times a divergence.

    A rule maps student logits (B, K), teacher logits (B, K) and tau to `losses.Temperatures`; a divergence compares
    the softened outputs; the loss is the batch's mean of factor * divergence. A method overrides `losses`, which never
    sees a model: so it can be tested, reused and fed with stored teacher logits.
    """

    def losses(self, logits_student: Tensor, logits_teacher: Tensor, target: Tensor, **kwargs) -> dict[str, Tensor]:
        raise NotImplementedError

    def forward_train(
        self, image: Tensor, target: Tensor, logits_teacher: Tensor | None = None, **kwargs
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`logits_teacher` (B, K), where it is given, stands for the teacher's forward pass on `image`."""
        logits_student, _ = self.student(image)
        if logits_teacher is None:
            with torch.no_grad():
                logits_teacher, _ = self.teacher(image)
        return logits_student, self.losses(logits_student, logits_teacher, target, **kwargs)


class RuleDistiller(LogitDistiller):
    """A logit method under any temperature rule: TEMPERATURE.RULE, or the method's own, `own_rule`.

    A method calls `soften` for its temperatures. A rule that learns is trained along with the student.
    """

    own_rule = "fixed"
    has_parts = False  # whether TEMPERATURE.PART applies

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg):
        super().__init__(student, teacher)
        self.rule = build_rule(cfg, self.own_rule, teacher)
        self.part = cfg.TEMPERATURE.PART
        self.observer: Callable | None = None  # sees (logits_student, logits_teacher, temperatures) of every batch

    def soften(
        self, logits_student: Tensor, logits_teacher: Tensor, tau: float, observe: bool = True, **kwargs
    ) -> Temperatures:
        """The rule's temperatures for logits (B, K); kwargs are those of `losses`. The observer sees them, unless
        `observe` is False: a method that softens a batch more than once shows it once.
        """
        temperatures = self.rule(logits_student, logits_teacher, tau, **kwargs)
        if observe and self.observer:
            self.observer(logits_student, logits_teacher, temperatures)
        return temperatures

    def get_learnable_parameters(self) -> list[nn.Parameter]:
        return super().get_learnable_parameters() + list(self.rule.parameters())

    def get_extra_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.rule.parameters())


class FeatureDistiller(Distiller):
    """A method that compares features: ce_weight * cross entropy + feat_weight * feature_loss.

    A method overrides `feature_loss`. Its own modules and parameters (regressors, embeddings) are trained along with
    the student, and counted as extra.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, ce_weight: float, feat_weight: float):
        super().__init__(student, teacher)
        self.ce_weight, self.feat_weight = ce_weight, feat_weight

    def own_parameters(self) -> list[nn.Parameter]:
        sides = ("student.", "teacher.")
        return [parameter for name, parameter in self.named_parameters() if not name.startswith(sides)]

    def get_learnable_parameters(self) -> list[nn.Parameter]:
        return super().get_learnable_parameters() + self.own_parameters()

    def get_extra_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.own_parameters())

    def feature_loss(self, feats_student: dict, feats_teacher: dict, **kwargs) -> Tensor:
        """A scalar from both models' features (feats, preact_feats, pooled_feat); kwargs: target (B,), epoch, index."""
        raise NotImplementedError

    def forward_train(self, image: Tensor, target: Tensor, **kwargs) -> tuple[Tensor, dict[str, Tensor]]:
        logits_student, feats_student = self.student(image)
        with torch.no_grad():
            _, feats_teacher = self.teacher(image)
        loss = self.feature_loss(feats_student, feats_teacher, target=target, **kwargs)
        return logits_student, {
            "loss_ce": self.ce_weight * ce_loss(logits_student, target),
            "loss_kd": self.feat_weight * loss,
        }
