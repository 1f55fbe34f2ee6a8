"""Label smoothing: no teacher at all."""

import torch.nn.functional as F

from ._base import Distiller


class Smooth(Distiller):
    def __init__(self, student, cfg):
        super(Smooth, self).__init__(student, None)
        self.smoothing = cfg.SMOOTH.EPS

    def forward_train(self, image, target, **kwargs):
        logits, _ = self.student(image)
        return logits, {"loss_ce": F.cross_entropy(logits, target, label_smoothing=self.smoothing)}
