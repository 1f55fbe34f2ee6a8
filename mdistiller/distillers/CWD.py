"""CWD, Shu et al. (ICCV 2021). https://arxiv.org/abs/2011.13256"""

from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller.distillers import keys
from mdistiller.distillers._registry import register_distiller
from mdistiller.distillers._stages import StageDistiller
from mdistiller.distillers.losses import in_float32


@in_float32
def cwd_loss(f_student: Tensor, f_teacher: Tensor, temperature: float) -> Tensor:
    """Return tau^2 times the KL divergence between where each channel is active, mean over channels and batch: a scalar
    (Eq. 5 over the number of channels).

    Maps (B, C, H, W) of equal shapes; of each channel the softmax over all places of its values over tau. Zero for maps
    that differ by a constant in each channel; a map of one place has nothing to compare.
    """
    own, other = (F.log_softmax(f.flatten(2) / temperature, 2) for f in (f_student, f_teacher))  # (B, C, H W)
    return temperature**2 * F.kl_div(own, other, reduction="none", log_target=True).sum(2).mean()


@register_distiller("CWD", defaults={"TEMPERATURE": keys.temperature(1.0), "LOSS": keys.feature_weights(10.0)})
class CWD(StageDistiller):
    """CE_WEIGHT * cross entropy + FEAT_WEIGHT * the mean of cwd_loss over stages or levels (StageDistiller)."""

    section = "CWD"

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg):
        super().__init__(student, teacher, cfg)
        self.temperature = cfg.CWD.TEMPERATURE

    def map_loss(self, f_student: Tensor, f_teacher: Tensor) -> Tensor:
        return cwd_loss(f_student, f_teacher, self.temperature)
