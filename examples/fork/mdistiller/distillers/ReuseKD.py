"""The student learns features that the teacher's classifier understands, and is tested through it."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from ._base import Distiller


class ReuseKD(Distiller):
    def __init__(self, student, teacher, cfg):
        super(ReuseKD, self).__init__(student, teacher)
        widths = [model.get_stage_channels()[-1] for model in (student, teacher)]
        self.project = nn.Sequential(nn.Linear(*widths), nn.ReLU())

    def get_learnable_parameters(self):
        return super().get_learnable_parameters() + list(self.project.parameters())

    def forward_train(self, image, target, **kwargs):
        _, feature_student = self.student(image)
        with torch.no_grad():
            _, feature_teacher = self.teacher(image)
        feature = self.project(feature_student["pooled_feat"])
        logits = self.teacher.fc(feature)
        return logits, {"loss_kd": F.mse_loss(feature, feature_teacher["pooled_feat"]) + 0 * logits.sum()}

    def forward_test(self, image):
        return self.teacher.fc(self.project(self.student(image)[1]["pooled_feat"]))
