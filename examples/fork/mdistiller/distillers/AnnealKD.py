"""KD whose temperature falls from T_START to T_END over the first EPOCHS epochs."""

import torch
import torch.nn.functional as F

from ._base import Distiller
from ._common import kd_loss


class AnnealKD(Distiller):
    def __init__(self, student, teacher, cfg):
        super(AnnealKD, self).__init__(student, teacher)
        self.cfg = cfg.ANNEALKD

    def forward_train(self, image, target, **kwargs):
        logits_student, _ = self.student(image)
        with torch.no_grad():
            logits_teacher, _ = self.teacher(image)
        share = min(kwargs["epoch"] / self.cfg.EPOCHS, 1.0)
        temperature = self.cfg.T_START + share * (self.cfg.T_END - self.cfg.T_START)
        return logits_student, {
            "loss_ce": self.cfg.CE_WEIGHT * F.cross_entropy(logits_student, target),
            "loss_kd": self.cfg.KD_WEIGHT * kd_loss(logits_student, logits_teacher, temperature),
        }
