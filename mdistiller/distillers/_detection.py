"""Methods on detectors: their losses beside the detector's own, on the logits of its proposals or on its pyramid."""

import functools

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from mdistiller.device import at_least_float32
from mdistiller.distillers.base import Distiller, FeatureDistiller, LogitDistiller, Vanilla
from mdistiller.distillers.CWD import CWD
from mdistiller.distillers.features import ConvReg
from mdistiller.distillers.FitNet import FitNet, hint_loss
from mdistiller.distillers.losses import warmup
from mdistiller.distillers.PKD import PKD
from mdistiller.distillers.ReviewKD import ABF, ReviewKD, reviewed
from mdistiller.errors import UserError
from mdistiller.registry import distillers

CLASSES = ("loss_classifier", "classification")  # torchvision's names of the loss that CE_WEIGHT weighs
PRIMES = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9


class OnDetector(Distiller):
    """A method whose student is a detector (models/detectors.py). It returns None in the logits' place: the boxes of a
    training batch are not scored.
    """

    gives_logits = False
    takes_teacher_logits = False
    needs_batch = False  # each of several processes has the proposals and maps of its own images
    capturable = False  # what is drawn of an image's proposals is drawn on the host
    ce_loss_weight = 1.0
    seed = 0
    task_losses = ("loss_ce", *CLASSES, "loss_box_reg", "loss_objectness", "loss_rpn_box_reg", "bbox_regression")
    task_losses += ("bbox_ctrness",)

    def forward_train(
        self, image: list[Tensor], target: list[dict], *, index: Tensor, epoch: int, canvas: Tensor | None = None
    ) -> tuple[None, dict[str, Tensor]]:
        """Return None and the losses of B images and what they show. `index` (B,): their places in the set. `canvas`
        (B, 2): the height and width that the batch is padded to, in every row.
        """
        mix = self.seed * PRIMES[0] + int(epoch) * PRIMES[1]
        seeds = [(mix + place * PRIMES[2]) % 2**63 for place in index.tolist()]
        size = None if canvas is None else tuple(canvas[0].tolist())
        seen = self.student.train_on(image, target, seeds, size)
        losses = {n: self.ce_loss_weight * loss if n in CLASSES else loss for n, loss in seen.losses.items()}
        return None, losses | self.distillation(seen, losses, index=index, epoch=epoch)

    def distillation(self, seen, losses: dict[str, Tensor], **kwargs) -> dict[str, Tensor]:
        """Return what the method adds to the detector's own `losses` of a Pass, out of which it may take some."""
        return {}


class OnProposals(OnDetector):
    """A logit method on the classes of the student's sampled proposals, each a row, background class 0. The teacher's
    head sees the same boxes, in its own pyramid of the same images. The method's cross entropy, its mean over
    proposals, is the detector's classification loss.
    """

    def distillation(self, seen, losses: dict[str, Tensor], *, index: Tensor, epoch: int) -> dict[str, Tensor]:
        with torch.no_grad():
            levels = self.teacher.backbone(seen.images)
            logits_teacher = at_least_float32(self.teacher.class_logits(levels, seen.proposals, seen.sizes))
        counts = [len(boxes) for boxes in seen.proposals]
        first = torch.tensor([sum(counts[:place]) for place in range(len(counts))], device=seen.logits.device)
        observer, found = getattr(self, "observer", None), {}
        if observer:  # the record has a place for each image: that of its first proposal
            self.observer = lambda own, other, temperatures: observer(
                own[first], other[first], type(temperatures)(*(column[first] for column in temperatures))
            )
        try:
            rows = index.repeat_interleave(torch.tensor(counts, device=index.device))
            logits = at_least_float32(seen.logits)
            found = self.losses(logits, logits_teacher, seen.labels, index=rows, epoch=epoch)
        finally:
            if observer:
                self.observer = observer
        losses.pop(CLASSES[0])
        return found


class OnLevels(OnDetector):
    """A feature method on the levels of the pyramid. A method overrides `compare`."""

    def distillation(self, seen, losses: dict[str, Tensor], **kwargs) -> dict[str, Tensor]:
        with torch.no_grad():
            teacher = self.teacher.backbone(seen.images)
        loss = self.compare([*seen.levels.values()], [*teacher.values()], **kwargs)
        return {"loss_kd": self.feat_loss_weight * loss}


class LevelsFitNet(OnLevels, FeatureDistiller):
    """FEAT_WEIGHT * the mean over all levels of hint_loss, the student's level through a 1 x 1 convolution."""

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg):
        FeatureDistiller.__init__(self, student, teacher, cfg.FITNET.LOSS.CE_WEIGHT, cfg.FITNET.LOSS.FEAT_WEIGHT)
        shapes = zip(student.level_shapes().values(), teacher.level_shapes().values(), strict=True)
        self.regressors = nn.ModuleList(ConvReg((1, *own), (1, *other), use_relu=False) for own, other in shapes)

    def compare(self, maps_student: list[Tensor], maps_teacher: list[Tensor], **kwargs) -> Tensor:
        pairs = zip(self.regressors, maps_student, maps_teacher, strict=True)
        return torch.stack([hint_loss(regressor(f_s), f_t) for regressor, f_s, f_t in pairs]).mean()


class LevelsReviewKD(OnLevels, FeatureDistiller):
    """REVIEWKD_WEIGHT * min(epoch / WARMUP_EPOCHS, 1) * hcl_loss of the reviewed levels, the deepest first."""

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg):
        cfg = cfg.REVIEWKD
        FeatureDistiller.__init__(self, student, teacher, cfg.CE_WEIGHT, cfg.REVIEWKD_WEIGHT)
        self.warmup = cfg.WARMUP_EPOCHS
        widths = [[shape[0] for shape in net.level_shapes().values()][::-1] for net in (student, teacher)]
        mid = min(cfg.MAX_MID_CHANNEL, widths[0][0])
        self.abfs = nn.ModuleList(ABF(s, mid, t, fuse=i > 0) for i, (s, t) in enumerate(zip(*widths, strict=True)))

    def compare(self, maps_student: list[Tensor], maps_teacher: list[Tensor], *, epoch: int, **kwargs) -> Tensor:
        return warmup(epoch, self.warmup) * reviewed(self.abfs, maps_student[::-1], maps_teacher[::-1])


ON_LEVELS = {FitNet: LevelsFitNet, ReviewKD: LevelsReviewKD, CWD: None, PKD: None}


@functools.cache
def on_detectors(cls: type) -> type | None:
    """Return the form of the method `cls` that trains detectors, None where it has none."""
    if issubclass(cls, OnDetector):
        return cls
    if cls in ON_LEVELS:
        return ON_LEVELS[cls] or _mixed(OnLevels, cls)
    if cls is Vanilla:
        return _mixed(OnDetector, cls)
    own = cls.rowwise and issubclass(cls, LogitDistiller) and cls.forward_train is LogitDistiller.forward_train
    return _mixed(OnProposals, cls) if own else None


def _mixed(form: type, cls: type) -> type:
    return type(cls.__name__, (form, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def takers(proposals: bool) -> list[str]:
    """Return the names of the methods on detectors: all, or those alone that need no logits of proposals."""
    forms = {name: on_detectors(cls) for name, cls in distillers.active.items()}
    return sorted(name for name, form in forms.items() if form and (proposals or not issubclass(form, OnProposals)))


def check_levels(names: CfgNode, cls: type, student: nn.Module, teacher: nn.Module | None) -> None:
    """Raise UserError where the method `cls` compares the pyramids of the two networks that the section DISTILLER,
    `names`, has, and their levels differ.
    """
    if not issubclass(cls, OnLevels):
        return
    own, other = (network.level_shapes() for network in (student, teacher))
    if [shape[1:] for shape in own.values()] != [shape[1:] for shape in other.values()]:
        sides = [", ".join(f"{h} x {w}" for _, h, w in shapes.values()) for shapes in (own, other)]
        instead = "KD, DKD or DTKD" if student.softmax and teacher.softmax else "networks with the same levels"
        raise UserError(
            f"{names.TYPE}: {names.TEACHER} -> {names.STUDENT}: the student's pyramid has levels of {sides[0]} for "
            f"256 x 256 pixels, the teacher's of {sides[1]}; take {instead}"
        )
