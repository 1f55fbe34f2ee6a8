"""The squared difference of the logits, without any temperature."""

import torch
import torch.nn.functional as F

from ._base import Distiller


class LogitMSE(Distiller):
    def __init__(self, student, teacher, cfg):
        super(LogitMSE, self).__init__(student, teacher)
        self.weight = cfg.LOGITMSE.WEIGHT

    def forward_train(self, image, target, **kwargs):
        logits_student, _ = self.student(image)
        with torch.no_grad():
            logits_teacher, _ = self.teacher(image)
        return logits_student, {
            "loss_ce": F.cross_entropy(logits_student, target),
            "loss_kd": self.weight * F.mse_loss(logits_student, logits_teacher),
        }
