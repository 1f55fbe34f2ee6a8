"""What several methods use: finite logits, cross entropy, the KL divergence, feature shapes and the regressor."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Softmax needs no logit beyond this; with it, no product in a loss or in its gradient leaves float32's range.
LOGIT_LIMIT = 1e15
# A row of logits that spreads less is taken for a constant one: what is divided by its spread would leave float32.
MIN_DEVIATION = 1e-5


def bounded(logits: Tensor) -> Tensor:
    """(B, K) in float32 (float64 stays), each row scaled into [-LOGIT_LIMIT, LOGIT_LIMIT].

    A row that lies inside comes back bit for bit. Scaling, not clamping: a row with inf or NaN becomes NaN, so that a
    loss never hides one.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    peak = logits.detach().abs().amax(1, keepdim=True)  # (B, 1)
    return logits * (LOGIT_LIMIT / peak.clamp(min=LOGIT_LIMIT))


def ce_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross entropy of logits (B, K) and labels (B,), in float32, finite for every finite logit."""
    return F.cross_entropy(bounded(logits), target)


def kl_divergence(
    logits_student: Tensor, logits_teacher: Tensor, t_student: Tensor | float, t_teacher: Tensor | float
) -> Tensor:
    """KL(softmax(u / T_teacher) || softmax(v / T_student)) of each sample: (B,).

    Logits (B, K), temperatures (B, 1) or numbers. From log-probabilities on both sides, so that a probability that
    underflows contributes its limit, 0, and a finite gradient.
    """
    log_student = F.log_softmax(bounded(logits_student) / t_student, dim=1)
    log_teacher = F.log_softmax(bounded(logits_teacher) / t_teacher, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(1)


def full_precision(tensor: Tensor) -> torch.autocast:
    """A context without autocast on the tensor's device: what multiplies matrices in a loss does so in float32."""
    return torch.autocast(tensor.device.type, enabled=False)


def deviation(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviation (over K, not K - 1) of each row of logits (B, K), and where it is above MIN_DEVIATION: (B, 1)
    each. Elsewhere the deviation given is 1, so that it may stand in a denominator.
    """
    variance = bounded(logits).var(1, correction=0, keepdim=True)
    sound = variance > MIN_DEVIATION**2
    # chosen before the root: its gradient at 0 is infinite even where it is not used
    return torch.where(sound, variance, 1.0).sqrt(), sound


def standardise(logits: Tensor) -> Tensor:
    """(x - mean(x)) / std(x) of each row of logits (B, K): the z-score of LSKD (Sun et al., CVPR 2024,
    https://arxiv.org/abs/2403.01427, Algorithm 1), to be divided by a base temperature.

    Each row has mean 0, deviation 1 and lies in [-sqrt(K - 1), sqrt(K - 1)]; a constant row becomes 0.
    """
    logits = bounded(logits)
    return (logits - logits.mean(1, keepdim=True)) / deviation(logits)[0]


class Temperatures(NamedTuple):
    """What a temperature rule makes of student logits (B, K), teacher logits (B, K) and the reference tau."""

    student: Tensor  # (B, 1), positive
    teacher: Tensor  # (B, 1), positive
    factor: Tensor  # (B, 1): scales the divergence, so that its gradient does not shrink with the temperatures
    sound: Tensor  # (B, 1), bool: False where the rule is undefined and fell back to tau


def standard_deviation(logits_student: Tensor, logits_teacher: Tensor, tau: float) -> Temperatures:
    """LSKD as a temperature rule (https://arxiv.org/abs/2403.01427, section 4.3): T = tau std(logits) on each side and
    the factor tau^2. With KL it equals tau^2 KL of the standardised logits at tau, as softmax is blind to the mean.

    A side whose row is constant falls back to tau. Gradients flow through the student's deviation.
    """
    (std_student, sound_student), (std_teacher, sound_teacher) = map(deviation, (logits_student, logits_teacher))
    factor = torch.full_like(std_student, tau**2)
    return Temperatures(tau * std_student, tau * std_teacher, factor, sound_student & sound_teacher)


def softened_kl(logits_student: Tensor, logits_teacher: Tensor, temperatures: Temperatures) -> Tensor:
    """Mean over the batch of factor * KL at the temperatures: a scalar."""
    divergence = kl_divergence(logits_student, logits_teacher, temperatures.student, temperatures.teacher)  # (B,)
    return (temperatures.factor.squeeze(1) * divergence).mean()


def warmup(epoch: int, length: float) -> float:
    """min(epoch / length, 1): the weight of a loss that is raised over the first `length` epochs; 1 if length is 0."""
    return min(epoch / length, 1.0) if length > 0 else 1.0


@torch.no_grad()
def get_feat_shapes(
    student: nn.Module, teacher: nn.Module, input_size: tuple[int, int]
) -> tuple[list[torch.Size], list[torch.Size]]:
    """Shapes of feats["feats"] of student and teacher for one image (3, *input_size). Leaves no trace: the probe
    runs in eval mode, so that it does not shift BatchNorm statistics, and draws no random numbers.
    """
    shapes = []
    for model in (student, teacher):
        parameter = next(model.parameters())
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        _, feats = model(parameter.new_zeros(1, 3, *input_size))
        for module, mode in modes:
            module.training = mode
        shapes.append([f.shape for f in feats["feats"]])
    return shapes[0], shapes[1]


class ConvReg(nn.Module):
    """Regressor from a student's feature map to a teacher's (FitNets, arXiv 1412.6550, section 2.2).

    Shapes (B, C, H, W). Halves, doubles or crops the map to the teacher's size; raises NotImplementedError where the
    student's map is smaller than the teacher's by another factor than 2.
    """

    def __init__(self, s_shape: torch.Size, t_shape: torch.Size, use_relu: bool = True):
        super().__init__()
        _, s_c, s_h, s_w = s_shape
        _, t_c, t_h, t_w = t_shape
        if s_h == 2 * t_h:
            self.conv = nn.Conv2d(s_c, t_c, 3, stride=2, padding=1)
        elif s_h * 2 == t_h:
            self.conv = nn.ConvTranspose2d(s_c, t_c, 4, stride=2, padding=1)
        elif s_h >= t_h:
            self.conv = nn.Conv2d(s_c, t_c, (1 + s_h - t_h, 1 + s_w - t_w))
        else:
            raise NotImplementedError(f"no regressor from a {s_h} x {s_w} map to {t_h} x {t_w}")
        self.use_relu = use_relu
        self.bn = nn.BatchNorm2d(t_c)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return F.relu(x) if self.use_relu else x
