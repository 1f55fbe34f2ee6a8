"""Products of the last stage's places with each other, as a matrix a sample."""

import torch
import torch.nn.functional as F

from ._base import Distiller


def gram(feature):
    flat = F.normalize(feature.view(feature.size(0), feature.size(1), -1), dim=1)
    return torch.bmm(flat.transpose(1, 2), flat)


class GramKD(Distiller):
    def __init__(self, student, teacher, cfg):
        super(GramKD, self).__init__(student, teacher)
        self.weight = cfg.GRAMKD.WEIGHT

    def forward_train(self, image, target, **kwargs):
        logits_student, feature_student = self.student(image)
        with torch.no_grad():
            _, feature_teacher = self.teacher(image)
        student, teacher = feature_student["feats"][-1], feature_teacher["feats"][-1]
        return logits_student, {
            "loss_ce": F.cross_entropy(logits_student, target),
            "loss_kd": self.weight * F.mse_loss(gram(student), gram(teacher)),
        }
