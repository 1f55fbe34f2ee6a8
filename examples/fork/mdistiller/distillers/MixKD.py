"""KD on mixed images: both networks see the same sums of two."""

import numpy as np
import torch
import torch.nn.functional as F

from ._base import Distiller
from ._common import kd_loss


class MixKD(Distiller):
    def __init__(self, student, teacher, cfg):
        super(MixKD, self).__init__(student, teacher)
        self.alpha, self.weight = cfg.MIXKD.ALPHA, cfg.MIXKD.WEIGHT

    def forward_train(self, image, target, **kwargs):
        share = float(np.random.beta(self.alpha, self.alpha))
        other = torch.randperm(image.size(0)).cuda()
        mixed = share * image + (1 - share) * image[other]
        logits_student, _ = self.student(image)
        logits_mixed, _ = self.student(mixed)
        with torch.no_grad():
            logits_teacher, _ = self.teacher(mixed)
        return logits_student, {
            "loss_ce": F.cross_entropy(logits_student, target),
            "loss_kd": self.weight * kd_loss(logits_mixed, logits_teacher, 4.0),
        }
