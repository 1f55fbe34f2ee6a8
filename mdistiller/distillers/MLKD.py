"""MLKD, Multi-level Logit Distillation, Jin et al. (CVPR 2023).
https://openaccess.thecvf.com/content/CVPR2023/html/Jin_Multi-Level_Logit_Distillation_CVPR_2023_paper.html
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller.config import Key, all_positive
from mdistiller.device import at_least_float32
from mdistiller.distillers import keys
from mdistiller.distillers._registry import register_distiller
from mdistiller.distillers.base import RuleDistiller
from mdistiller.distillers.losses import Temperatures, bounded, ce_loss, full_precision, softened_kl
from mdistiller.distillers.rules import fixed


def correlation_losses(
    logits_student: Tensor, logits_teacher: Tensor, t_student: Tensor | float, t_teacher: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Return the batch level, |p p^T - q q^T|^2 / B, and the class level, |p^T p - q^T q|^2 / K (Frobenius norms).

    q = softmax(v / T_student) and p = softmax(u / T_teacher) of student logits v and teacher logits u, (B, K),
    temperatures numbers or (B, 1). p p^T (B, B) holds how alike two samples are, p^T p (K, K) how often two classes are
    confused. Zero where p = q.
    """
    student = F.softmax(bounded(logits_student) / t_student, dim=1)
    teacher = F.softmax(bounded(logits_teacher) / t_teacher, dim=1)
    with full_precision(student):
        batch = teacher @ teacher.T - student @ student.T
        classes = teacher.T @ teacher - student.T @ student
    return batch.square().sum() / len(batch), classes.square().sum() / len(classes)


def level_losses(logits_student: Tensor, logits_teacher: Tensor, temperatures: Temperatures) -> Tensor:
    """Return the sum of the instance, batch and class level losses at one temperature: a scalar. Logits are (B, K).

    The instance level is Hinton's, the factor tau^2 included. Zero where the logits differ by a constant in each row.
    """
    correlation = correlation_losses(logits_student, logits_teacher, temperatures.student, temperatures.teacher)
    return softened_kl(logits_student, logits_teacher, temperatures) + sum(correlation)


def mlkd_loss(logits_student: Tensor, logits_teacher: Tensor, temperatures: Sequence[float]) -> Tensor:
    """Return the sum of `level_losses` over the temperatures: a scalar. Student and teacher logits are (B, K)."""
    return sum(
        level_losses(logits_student, logits_teacher, fixed(logits_student, logits_teacher, tau)) for tau in temperatures
    )


def below_median(values: Tensor) -> Tensor:
    """Return the share of `values` (n,) that are not above their median, the mean of the middle two for an even n."""
    return (values <= values.quantile(0.5)).float().mean()


def published_masks(logits_teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the masks of the public code come to, two scalars: the share of samples whose largest probability,
    and of classes whose probability summed over the batch, is not above the median.

    That code multiplies a batch's mean, not each sample's loss, by the mask and takes the mean of that: the loss is
    weighted by the mask's share, 1/2 for an even number without ties, and no sample or class is left out.
    """
    probabilities = F.softmax(bounded(logits_teacher), dim=1)
    return below_median(probabilities.amax(1)), below_median(probabilities.sum(0))


@torch.no_grad()
def strong_view(image: Tensor, own: slice | None = None, whole: int = 0) -> Tensor:
    """Return a second, harder view of normalised images (B, 3, H, W), each by its own draw: rotated by up to 30
    degrees, sheared by up to 0.3 and shifted by up to a quarter of the side, contrast changed by up to a half, each
    channel shifted by up to a half of its deviation, a square of half the side set to 0, the data set's mean pixel.
    Where the images are the places `own` of a batch of `whole`, numbers are drawn for all of it.
    """
    image = at_least_float32(image)
    batch, height, width = len(image), *image.shape[-2:]

    def uniform(limit: float, *shape: int) -> Tensor:
        return limit * (2 * torch.rand(whole or batch, *shape, device=image.device)[own or slice(None)] - 1)

    angle, shear, shift = uniform(math.pi / 6), uniform(0.3), uniform(0.5, 2)  # the grid spans [-1, 1]
    cos, sin = angle.cos(), angle.sin()
    rows = [cos, shear * cos - sin, shift[:, 0], sin, shear * sin + cos, shift[:, 1]]
    grid = F.affine_grid(torch.stack(rows, 1).view(batch, 2, 3).to(image.dtype), list(image.shape), align_corners=False)
    view = F.grid_sample(image, grid, align_corners=False)
    mean = view.mean((1, 2, 3), keepdim=True)
    view = mean + (view - mean) * (1 + uniform(0.5, 1, 1, 1)) + uniform(0.5, 3, 1, 1)
    top, left = ((uniform(1) + 1) / 2 * side for side in (height, width))  # the square's centre; it may overhang
    rows, columns = torch.arange(height, device=image.device), torch.arange(width, device=image.device)
    outside_rows = (rows - top[:, None]).abs() > height / 4  # (B, H)
    outside_columns = (columns - left[:, None]).abs() > width / 4  # (B, W)
    view = view * (outside_rows[:, None, :, None] | outside_columns[:, None, None, :])
    return view.contiguous(memory_format=torch.channels_last)


@register_distiller(
    "MLKD",
    defaults={
        "TEMPERATURES": Key([2.0, 3.0, 4.0, 5.0, 6.0], "Temperatures that the loss is summed over.", all_positive),
        "LOSS": keys.logit_weights(0.1, 0.9),
    },
)
class MLKD(RuleDistiller):
    """CE_WEIGHT * cross entropy + KD_WEIGHT * a loss of several levels over TEMPERATURES, on a weak and a strong view.

    Where the loader gives a strong view, `image_strong` (B, 3, H, W), as SOLVER.TRAINER ours does, it is the loss of
    the public code, see `two_views`. Else the strong view is `strong_view` of the image, and mlkd_loss is taken of
    both. Under a rule each of TEMPERATURES is its reference in turn; the record holds the first of them, on the weak
    view.
    """

    takes_strong_view = True
    needs_batch = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg):
        super().__init__(student, teacher, cfg)
        self.temperatures = cfg.MLKD.TEMPERATURES
        self.ce_loss_weight = cfg.MLKD.LOSS.CE_WEIGHT
        self.kd_loss_weight = cfg.MLKD.LOSS.KD_WEIGHT

    def losses(
        self, logits_student: Tensor, logits_teacher: Tensor, target: Tensor, observe: bool = True, **kwargs
    ) -> dict[str, Tensor]:
        """Return the losses of one view, weak or strong."""
        mlkd = 0.0
        for tau in self.temperatures:
            softened = self.soften(logits_student, logits_teacher, tau, observe=observe, **kwargs)
            mlkd = mlkd + level_losses(logits_student, logits_teacher, softened)
            observe = False
        return {"loss_ce": self.ce_loss_weight * ce_loss(logits_student, target), "loss_kd": self.kd_loss_weight * mlkd}

    def forward_train(
        self,
        image: Tensor,
        target: Tensor,
        image_strong: Tensor | None = None,
        logits_teacher: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the student's logits on the weak view, and the losses of both. `logits_teacher` (B, K), where it is
        given, stands for the teacher's forward pass on the weak view.
        """
        if image_strong is not None:
            return self.two_views(image, image_strong, target, logits_teacher, **kwargs)
        strong = strong_view(image) if self.rows is None else strong_view(image, self.rows, len(kwargs["index"]))
        logits_student, weak_losses = super().forward_train(image, target, logits_teacher, **kwargs)
        _, strong_losses = super().forward_train(strong, target, observe=False, **kwargs)
        return logits_student, {name: weak_losses[name] + strong_losses[name] for name in weak_losses}

    def two_views(
        self, image: Tensor, image_strong: Tensor, target: Tensor, logits_teacher: Tensor | None, **kwargs
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the student's logits on the weak view, and the losses as the public code has them.

        Cross entropy of both views; the instance level of the weak view at every temperature, weighted by the samples'
        share of `published_masks`, and once more in full, of the strong view, or of the weak one at the first and the
        last temperature; the batch and class level of the weak view alone, each weighted by its share, at the plain
        temperatures whatever the rule.
        """
        weak, strong = self.student(image)[0], self.student(image_strong)[0]
        with torch.no_grad():
            teacher_weak = self.teacher(image)[0] if logits_teacher is None else logits_teacher
            teacher_strong = self.teacher(image_strong)[0]
        samples, classes = published_masks(teacher_weak)
        loss, last = 0.0, len(self.temperatures) - 1
        for place, tau in enumerate(self.temperatures):
            softened = self.soften(weak, teacher_weak, tau, observe=place == 0, **kwargs)
            instance = softened_kl(weak, teacher_weak, softened)
            again = instance
            if 0 < place < last:
                again = softened_kl(
                    strong, teacher_strong, self.soften(strong, teacher_strong, tau, observe=False, **kwargs)
                )
            batch_level, class_level = correlation_losses(weak, teacher_weak, tau, tau)
            loss = loss + samples * (instance + batch_level) + again + classes * class_level
        ce = ce_loss(weak, target) + ce_loss(strong, target)
        return weak, {"loss_ce": self.ce_loss_weight * ce, "loss_kd": self.kd_loss_weight * loss}
