"""A hint at the middle stage, and KD."""

import torch
import torch.nn.functional as F

from mdistiller.distillers._base import Distiller
from mdistiller.distillers._common import kd_loss

from .regressor import Regressor


class HintKD(Distiller):
    def __init__(self, student, teacher, cfg):
        super(HintKD, self).__init__(student, teacher)
        self.cfg = cfg.HINTKD
        widths = [model.get_stage_channels()[cfg.HINTKD.STAGE] for model in (student, teacher)]
        self.regressor = Regressor(*widths)

    def get_learnable_parameters(self):
        return super().get_learnable_parameters() + list(self.regressor.parameters())

    def get_extra_parameters(self):
        return sum(p.numel() for p in self.regressor.parameters())

    def forward_train(self, image, target, **kwargs):
        logits_student, feature_student = self.student(image)
        with torch.no_grad():
            logits_teacher, feature_teacher = self.teacher(image)
        student, teacher = (f["feats"][self.cfg.STAGE] for f in (feature_student, feature_teacher))
        return logits_student, {
            "loss_ce": F.cross_entropy(logits_student, target),
            "loss_hint": self.cfg.HINT_WEIGHT * F.mse_loss(self.regressor(student), teacher),
            "loss_kd": self.cfg.KD_WEIGHT * kd_loss(logits_student, logits_teacher, 4.0),
        }
