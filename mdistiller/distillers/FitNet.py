"""FitNet, Romero et al. (ICLR 2015). https://arxiv.org/abs/1412.6550"""

from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller.config import Key, at_least
from mdistiller.distillers import keys
from mdistiller.distillers._registry import register_distiller
from mdistiller.distillers.base import FeatureDistiller
from mdistiller.distillers.features import ConvReg, get_feat_shapes, refuse
from mdistiller.distillers.losses import in_float32


@in_float32
def hint_loss(guided: Tensor, hint: Tensor) -> Tensor:
    """Return the mean squared difference of the regressed student map and the teacher's, both (B, C, H, W) (Eq. 3)."""
    return F.mse_loss(guided, hint)


@register_distiller(
    "FITNET",
    defaults={
        "HINT_LAYER": Key(2, "Stage whose maps are compared; 0 is the stem.", at_least(0)),
        "INPUT_SIZE": keys.input_size(),
        "LOSS": keys.feature_weights(100.0),
    },
)
class FitNet(FeatureDistiller):
    """CE_WEIGHT * cross entropy + FEAT_WEIGHT * hint_loss at feats[HINT_LAYER], both terms from the first epoch on.

    The regressor is built for the images' size. A pair whose student's map is smaller than the teacher's by
    another factor than 2 has no regressor and is refused.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg):
        super().__init__(student, teacher, cfg.FITNET.LOSS.CE_WEIGHT, cfg.FITNET.LOSS.FEAT_WEIGHT)
        self.hint_layer = cfg.FITNET.HINT_LAYER
        student_shapes, teacher_shapes = get_feat_shapes(student, teacher, cfg.FITNET.INPUT_SIZE)
        stages = min(len(student_shapes), len(teacher_shapes))
        if not 0 <= self.hint_layer < stages:
            refuse("FITNET", student, teacher, f"FITNET.HINT_LAYER {self.hint_layer} must be 0 to {stages - 1}")
        try:
            self.conv_reg = ConvReg(student_shapes[self.hint_layer], teacher_shapes[self.hint_layer])
        except NotImplementedError as error:
            refuse("FITNET", student, teacher, f"{error} at FITNET.HINT_LAYER {self.hint_layer}")

    def feature_loss(self, feats_student: dict, feats_teacher: dict, **kwargs) -> Tensor:
        return hint_loss(
            self.conv_reg(feats_student["feats"][self.hint_layer]), feats_teacher["feats"][self.hint_layer]
        )
