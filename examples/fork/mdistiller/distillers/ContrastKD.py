"""A sample's features are to be nearer to the teacher's of the same sample than to those of samples drawn at random."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from ._base import Distiller


class ContrastKD(Distiller):
    def __init__(self, student, teacher, cfg, num_data):
        super(ContrastKD, self).__init__(student, teacher)
        self.weight, self.temperature = cfg.CONTRASTKD.WEIGHT, cfg.CONTRASTKD.T
        widths = [model.get_stage_channels()[-1] for model in (student, teacher)]
        self.project = nn.Linear(*widths)
        self.register_buffer("memory", F.normalize(torch.randn(num_data, widths[1])).cuda())

    def get_learnable_parameters(self):
        return super().get_learnable_parameters() + list(self.project.parameters())

    def forward_train(self, image, target, index, contrastive_index, **kwargs):
        logits_student, feature_student = self.student(image)
        with torch.no_grad():
            _, feature_teacher = self.teacher(image)
        anchor = F.normalize(self.project(feature_student["pooled_feat"]))
        self.memory[index] = F.normalize(feature_teacher["pooled_feat"])
        keys = self.memory[contrastive_index.view(-1)].view(*contrastive_index.shape, -1)
        similarity = torch.einsum("bd,bkd->bk", anchor, keys) / self.temperature
        first = torch.zeros(len(target), dtype=torch.long).cuda()
        return logits_student, {
            "loss_ce": F.cross_entropy(logits_student, target),
            "loss_kd": self.weight * F.cross_entropy(similarity, first),
        }
