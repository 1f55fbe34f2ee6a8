"""The contract of a method, the student alone, and the bases of the methods that need logits and features."""

import functools
from collections.abc import Callable, Container, Mapping, Sequence

import torch
from torch import Tensor, nn

from mdistiller.distillers._chunks import chunked
from mdistiller.distillers._divergences import build_divergence
from mdistiller.distillers._registry import register_distiller
from mdistiller.distillers.losses import Temperatures, bounded, ce_loss
from mdistiller.distillers.rules import FACTORS, build_rule
from mdistiller.errors import UserError
from mdistiller.models import frozen_norms


class Distiller(nn.Module):
    """A student, a teacher and the loss between them.

    A method overrides `forward_train(image, target, **kwargs)`, which returns (student logits (B, K), {name: scalar
    loss}); kwargs hold at least `epoch` (from 1) and `index` (B,), the samples' places in the training set. The sum of
    the losses is minimised. The class attributes below declare what a method needs and gives.
    """

    needs_teacher = True  # else it is built with None in the teacher's place
    needs: tuple[str, ...] = ()  # arguments beside (student, teacher, cfg): num_data, the training set's labels (N,)
    reads: tuple[str, ...] = ()  # what the names begin with of keys that it reads of other methods' sections
    needs_features: tuple[str, ...] = ()  # parts of the models' feature contract that it reads
    least_maps = 1  # that the models must give; 2 where it compares none but those after the stem
    takes_teacher_logits = False  # `forward_train` may be given logits_teacher (B, K) for the teacher's own pass
    rowwise = False  # each row's loss depends on that row alone, the loss is their mean: rows may be a text's tokens
    takes_strong_view = False  # `forward_train` may be given image_strong (B, 3, H, W), by SOLVER.TRAINER ours or aug
    gives_logits = True  # of a training batch; else None stands in their place
    chunk = 0  # rows of a text's logits that exist at a time; 0: all of a batch's. The engine sets it.
    has_parts = False  # whether TEMPERATURE.PART applies
    takes_divergence = False  # whether DIVERGENCE applies
    needs_batch = False  # it compares a batch's samples: its loss is no mean of theirs, and ranks see each other's
    rows: slice | None = None  # of a batch that is on several ranks: those whose images this one has; the engine's
    needs_labels = False  # more than `ce_loss` reads the labels, so that they cannot be mixed or smoothed
    capturable = True  # a step draws nothing and decides nothing on the host, so that it can be a CUDA graph
    refused = ""  # why it cannot be chosen, where it cannot
    task_losses: Container[str] = ("loss_ce",)  # names of the losses that learn from labels; the others distil

    def __init__(self, student: nn.Module, teacher: nn.Module | None, cfg=None):
        """`cfg`: the configuration, for a method that leaves out a constructor of its own and reads `self.cfg`."""
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.cfg = cfg

    def train(self, mode: bool = True) -> "Distiller":
        """Set the mode, but leave the teacher in eval mode, and the student's batch normalisations whose parameters do
        not learn: their statistics are part of what they know.
        """
        super().train(mode)
        for norm in frozen_norms(self.student):
            norm.eval()
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def get_learnable_parameters(self) -> list[nn.Parameter]:
        """Return what the optimizer gets: the student's parameters, and a method's own where it has some."""
        return list(self.student.parameters())

    def get_extra_parameters(self) -> int:
        """Return the number of parameters that the method adds to the student's."""
        return 0

    def forward_train(self, image: Tensor, target: Tensor, **kwargs) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the student's logits (B, K) and the losses of a training batch."""
        raise NotImplementedError  # the engine asks for it before it trains

    def in_chunks(
        self, losses: Callable, image: Tensor, others: Sequence[nn.Parameter] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the predicted classes (N,) and the losses on a text, `chunk` rows at a time; see `_chunks.chunked`."""
        return chunked(losses, self.student.head, self.student.hidden(image), self.chunk, others)

    def forward_test(self, image: Tensor) -> Tensor:
        """Return the student's logits (B, K)."""
        return self.student(image)[0]

    def forward(self, **kwargs):
        """Return `forward_train` of the arguments in training mode, `forward_test` of the image in eval mode."""
        if self.training:
            return self.forward_train(**kwargs)
        return self.forward_test(kwargs["image"])


@register_distiller("NONE")
class Vanilla(Distiller):
    """The student alone, by cross entropy."""

    needs_teacher = False
    rowwise = True
    task_losses = ("ce",)

    def __init__(self, student: nn.Module, teacher: None = None, cfg=None):
        super().__init__(student, None)

    def forward_train(self, image: Tensor, target: Tensor, **kwargs) -> tuple[Tensor, dict[str, Tensor]]:
        if self.chunk:
            return self.in_chunks(lambda logits, rows: {"ce": ce_loss(logits, target[rows])}, image)
        logits_student, _ = self.student(image)
        return logits_student, {"ce": ce_loss(logits_student, target)}


class LogitDistiller(Distiller):
    """A method that sees logits only: a temperature rule times a divergence.

    A rule maps student logits (B, K), teacher logits (B, K) and tau to `losses.Temperatures`; a divergence compares
    the softened outputs; the loss is the batch's mean of factor * divergence. A method overrides `losses`, which never
    sees a model: so it can be tested, reused and fed with stored teacher logits.
    """

    takes_teacher_logits = True

    def losses(self, logits_student: Tensor, logits_teacher: Tensor, target: Tensor, **kwargs) -> dict[str, Tensor]:
        """Return {name: scalar loss} of logits (B, K) and labels (B,); kwargs: epoch, index."""
        raise NotImplementedError

    def forward_train(
        self, image: Tensor, target: Tensor, logits_teacher: Tensor | None = None, **kwargs
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return student logits (B, K) and losses. `logits_teacher` (B, K), where it is given, stands for the teacher's
        forward pass on `image`. Under `chunk` the student's predicted classes (B,) come in its logits' place.
        """
        if self.chunk:
            return self.forward_chunks(image, target, logits_teacher, **kwargs)
        logits_student, _ = self.student(image)
        if logits_teacher is None:
            with torch.no_grad():
                logits_teacher, _ = self.teacher(image)
        return logits_student, self.losses(logits_student, logits_teacher, target, **kwargs)

    def forward_chunks(
        self, ids: Tensor, target: Tensor, logits_teacher: Tensor | None, index: Tensor, **kwargs
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return predicted classes (N,) and losses of a text, ids (B, S) with N = B S targets."""
        if logits_teacher is None:
            with torch.no_grad():
                hidden = self.teacher.hidden(ids)
        observer = getattr(self, "observer", None)

        def losses(logits: Tensor, rows: slice) -> dict[str, Tensor]:
            with torch.no_grad():
                teacher = self.teacher.head(hidden[rows]) if logits_teacher is None else logits_teacher[rows]
            if observer:  # it knows the places of all rows
                self.observer = functools.partial(observer.func, index[rows])
            given = bounded(logits.float()), bounded(teacher.float()), target[rows]
            return self.losses(*given, index=index[rows], **kwargs)

        of_student = {*self.student.parameters()}
        own = [p for p in self.get_learnable_parameters() if p not in of_student]
        try:
            return self.in_chunks(losses, ids, own)
        finally:
            if observer:
                self.observer = observer


class RuleDistiller(LogitDistiller):
    """A logit method under any temperature rule: TEMPERATURE.RULE, or the method's own, `own_rule`.

    A method calls `soften` for its temperatures. A rule that learns is trained along with the student.
    """

    own_rule = "fixed"

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg):
        super().__init__(student, teacher, cfg)
        self.rule = build_rule(cfg, self.own_rule, teacher)
        self.factor = cfg.TEMPERATURE.FACTOR
        self.divergence = build_divergence(cfg)
        self.part = cfg.TEMPERATURE.PART
        self.observer: Callable | None = None  # sees (logits_student, logits_teacher, temperatures) of every batch

    @property
    def needs_batch(self) -> bool:
        """Whether a row's factor or temperatures depend on the other rows: then chunks of a batch are other losses."""
        return self.factor == "mean" or getattr(self.rule, "needs_batch", False)

    def soften(
        self, logits_student: Tensor, logits_teacher: Tensor, tau: float, observe: bool = True, **kwargs
    ) -> Temperatures:
        """Return the rule's temperatures for logits (B, K), with the factor of TEMPERATURE.FACTOR; kwargs are those of
        `losses`. The observer sees them, unless `observe` is False: a method that softens a batch more than once shows
        it once.
        """
        temperatures = self.rule(logits_student, logits_teacher, tau, **kwargs)
        temperatures = temperatures._replace(factor=FACTORS[self.factor](temperatures.factor, tau))
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

    needs_features = ("feats",)

    def __init__(self, student: nn.Module, teacher: nn.Module, ce_weight: float = 1.0, feat_weight: float = 1.0):
        """`ce_weight` is the configuration where a method leaves out a constructor of its own: both weights are 1."""
        cfg, ce_weight = (ce_weight, 1.0) if isinstance(ce_weight, Mapping) else (None, ce_weight)
        super().__init__(student, teacher, cfg)
        self.ce_loss_weight, self.feat_loss_weight = ce_weight, feat_weight

    def own_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that are neither the student's nor the teacher's."""
        sides = ("student.", "teacher.")
        return [parameter for name, parameter in self.named_parameters() if not name.startswith(sides)]

    def get_learnable_parameters(self) -> list[nn.Parameter]:
        return super().get_learnable_parameters() + self.own_parameters()

    def get_extra_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.own_parameters())

    def feature_loss(self, feats_student: dict, feats_teacher: dict, **kwargs) -> Tensor:
        """Return a scalar from both models' features (feats, preact_feats, pooled_feat); kwargs: target (B,), epoch,
        index.
        """
        raise NotImplementedError

    def forward_train(self, image: Tensor, target: Tensor, **kwargs) -> tuple[Tensor, dict[str, Tensor]]:
        logits_student, feats_student = self.student(image)
        with torch.no_grad():
            _, feats_teacher = self.teacher(image)
        loss = self.feature_loss(feats_student, feats_teacher, target=target, **kwargs)
        if not isinstance(loss, Tensor):
            got = type(loss).__name__
            raise UserError(f"{type(self).__name__}: feature_loss must return the loss, a scalar tensor; got {got}")
        return logits_student, {
            "loss_ce": self.ce_loss_weight * ce_loss(logits_student, target),
            "loss_kd": self.feat_loss_weight * loss,
        }
