"""mdistiller's thirteen methods as method files of its interface, in our own words: a plug-in that is no test itself.

Constructors (student, teacher, cfg[, num_data]), forward_train(image, target, **kwargs), sections read as cfg.NAME with
the published keys, maps flattened by `view`, helpers imported from _base and _common; none registers itself.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from ._base import Distiller
from ._common import ConvReg, get_feat_shapes


class Pair(Distiller):
    """Both passes and the two losses, of which a method writes the second."""

    def __init__(self, student, teacher, cfg, weights):
        super(Pair, self).__init__(student, teacher)
        self.ce_loss_weight, self.loss_weight = weights

    def learnt(self):
        return []

    def get_learnable_parameters(self):
        return super().get_learnable_parameters() + [p for module in self.learnt() for p in module.parameters()]

    def forward_train(self, image, target, **kwargs):
        logits_student, feature_student = self.student(image)
        with torch.no_grad():
            logits_teacher, feature_teacher = self.teacher(image)
        self.logits, self.target, self.kwargs = (logits_student, logits_teacher), target, kwargs
        loss = self.loss_weight * self.compare(feature_student, feature_teacher)
        return logits_student, {
            "loss_ce": self.ce_loss_weight * F.cross_entropy(logits_student, target),
            "loss_kd": loss,
        }


def of_section(section):
    return section.LOSS.CE_WEIGHT, section.LOSS.FEAT_WEIGHT


class KD(Pair):
    def __init__(self, student, teacher, cfg):
        super(KD, self).__init__(student, teacher, cfg, (cfg.KD.LOSS.CE_WEIGHT, cfg.KD.LOSS.KD_WEIGHT))
        self.temperature = cfg.KD.TEMPERATURE

    def compare(self, student, teacher):
        v, u = (logits / self.temperature for logits in self.logits)
        return F.kl_div(F.log_softmax(v, 1), F.softmax(u, 1), reduction="none").sum(1).mean() * self.temperature**2


class DKD(Pair):
    def __init__(self, student, teacher, cfg):
        super(DKD, self).__init__(student, teacher, cfg, (cfg.DKD.CE_WEIGHT, 1.0))
        self.cfg = cfg.DKD

    def compare(self, student, teacher):
        t, mask = self.cfg.T, F.one_hot(self.target, self.logits[0].size(1)).bool()
        binary = []
        for logits in self.logits:
            p = F.softmax(logits / t, 1)
            binary.append(torch.stack([p[mask], 1 - p[mask]], 1))
        tckd = F.kl_div(torch.log(binary[0]), binary[1], reduction="batchmean") * t**2
        others = [logits[~mask].view(len(logits), -1) / t for logits in self.logits]
        nckd = F.kl_div(F.log_softmax(others[0], 1), F.softmax(others[1], 1), reduction="batchmean") * t**2
        return min(self.kwargs["epoch"] / self.cfg.WARMUP, 1.0) * (self.cfg.ALPHA * tckd + self.cfg.BETA * nckd)


class AT(Pair):
    def __init__(self, student, teacher, cfg):
        super(AT, self).__init__(student, teacher, cfg, of_section(cfg.AT))
        self.p = cfg.AT.P

    def attention(self, f):
        return F.normalize(f.pow(self.p).mean(1).view(f.size(0), -1))

    def compare(self, student, teacher):
        stages = zip(student["feats"][1:], teacher["feats"][1:])
        return sum((self.attention(s) - self.attention(t)).pow(2).mean() for s, t in stages)


class NST(Pair):
    def __init__(self, student, teacher, cfg):
        super(NST, self).__init__(student, teacher, cfg, of_section(cfg.NST))

    def compare(self, student, teacher):
        loss = 0
        for s, t in zip(student["feats"][1:], teacher["feats"][1:]):
            s, t = (F.normalize(f.view(f.size(0), f.size(1), -1), dim=2) for f in (s, t))
            square = [(a @ b.transpose(1, 2)).pow(2).mean() for a, b in ((t, t), (s, s), (s, t))]
            loss = loss + square[0] + square[1] - 2 * square[2]
        return loss


class PKT(Pair):
    def __init__(self, student, teacher, cfg):
        super(PKT, self).__init__(student, teacher, cfg, of_section(cfg.PKT))

    def compare(self, student, teacher, eps=1e-7):
        p = []
        for f in (student["pooled_feat"], teacher["pooled_feat"]):
            f = F.normalize(f, eps=eps)
            similarity = (f @ f.t() + 1) / 2
            p.append(similarity / similarity.sum(1, keepdim=True))
        return (p[1] * torch.log((p[1] + eps) / (p[0] + eps))).mean()


class RKD(Pair):
    def __init__(self, student, teacher, cfg):
        super(RKD, self).__init__(student, teacher, cfg, of_section(cfg.RKD))
        self.cfg = cfg.RKD

    def compare(self, student, teacher):
        s, t = (f["pooled_feat"].view(len(self.target), -1) for f in (student, teacher))
        distances, angles = [], []
        for f in (s, t):
            d = torch.cdist(f, f, compute_mode="donot_use_mm_for_euclid_dist")
            distances.append(d / d[d > 0].mean())
            unit = F.normalize(f.unsqueeze(0) - f.unsqueeze(1), dim=2)
            angles.append(torch.bmm(unit, unit.transpose(1, 2)).view(-1))
        losses = [F.smooth_l1_loss(*pair) for pair in (distances, angles)]
        return self.cfg.DISTANCE_WEIGHT * losses[0] + self.cfg.ANGLE_WEIGHT * losses[1]


class SP(Pair):
    def __init__(self, student, teacher, cfg):
        super(SP, self).__init__(student, teacher, cfg, of_section(cfg.SP))

    def compare(self, student, teacher):
        grams = []
        for f in (student["feats"][-1], teacher["feats"][-1]):
            flat = f.view(f.size(0), -1)
            grams.append(F.normalize(flat @ flat.t()))
        return (grams[1] - grams[0]).pow(2).mean()


class FitNet(Pair):
    def __init__(self, student, teacher, cfg):
        super(FitNet, self).__init__(student, teacher, cfg, of_section(cfg.FITNET))
        self.layer = cfg.FITNET.HINT_LAYER
        shapes = get_feat_shapes(student, teacher, cfg.FITNET.INPUT_SIZE)
        self.conv_reg = ConvReg(shapes[0][self.layer], shapes[1][self.layer])

    def learnt(self):
        return [self.conv_reg]

    def compare(self, student, teacher):
        return F.mse_loss(self.conv_reg(student["feats"][self.layer]), teacher["feats"][self.layer])


class VID(Pair):
    def __init__(self, student, teacher, cfg):
        super(VID, self).__init__(student, teacher, cfg, of_section(cfg.VID))
        shapes = get_feat_shapes(student, teacher, cfg.VID.INPUT_SIZE)
        self.regressors = nn.ModuleList(nn.Conv2d(s[1], t[1], 1) for s, t in zip(shapes[0][1:], shapes[1][1:]))
        self.eps, self.scale = cfg.VID.EPS, torch.full((1,), float(cfg.VID.INIT_PRED_VAR)).log().cuda()

    def learnt(self):
        return self.regressors

    def compare(self, student, teacher):
        variance = F.softplus(self.scale) + self.eps
        stages = zip(self.regressors, student["feats"][1:], teacher["feats"][1:])
        return sum((((predict(s) - t) ** 2 / variance + variance.log()) / 2).mean() for predict, s, t in stages)


class OFD(Pair):
    def __init__(self, student, teacher, cfg):
        super(OFD, self).__init__(student, teacher, cfg, of_section(cfg.OFD))
        widths = zip(student.get_stage_channels()[1:], teacher.get_stage_channels()[1:])
        self.connectors = nn.ModuleList(nn.Conv2d(s, t, 1, bias=False) for s, t in widths)
        self.margins = [-bn.weight.detach().abs()[None, :, None, None] for bn in teacher.get_bn_before_relu()]

    def learnt(self):
        return self.connectors

    def compare(self, student, teacher):
        loss = 0
        for i, connect in enumerate(self.connectors):
            s = connect(student["preact_feats"][i + 1])
            t = torch.max(teacher["preact_feats"][i + 1], self.margins[i])
            loss = loss + (s - t).pow(2).view(s.size(0), -1).mean() / 2 ** (len(self.connectors) - i - 1)
        return loss


class KDSVD(Pair):
    def __init__(self, student, teacher, cfg):
        super(KDSVD, self).__init__(student, teacher, cfg, of_section(cfg.KDSVD))
        self.k = cfg.KDSVD.K

    def compare(self, student, teacher):
        loss = 0
        for s, t in zip(student["feats"][1:], teacher["feats"][1:]):
            values = [torch.linalg.svdvals(f.view(f.size(0), -1, f.size(1)))[:, : self.k] for f in (s, t)]
            loss = loss + F.mse_loss(*values)
        return loss


class CRD(Distiller):
    def __init__(self, student, teacher, cfg, num_data):
        super(CRD, self).__init__(student, teacher)
        self.embed = nn.ModuleList(nn.Linear(w, cfg.CRD.FEAT.DIM) for w in (self.width(student), self.width(teacher)))
        self.momentum, self.weights, self.tau = cfg.CRD.NCE.MOMENTUM, of_section(cfg.CRD), cfg.CRD.NCE.TEMPERATURE
        self.wanted = 256, cfg.CRD.FEAT.STUDENT_DIM, cfg.CRD.FEAT.TEACHER_DIM
        self.register_buffer("memory", F.normalize(torch.randn(num_data, cfg.CRD.FEAT.DIM)))

    def width(self, model):
        return model.get_stage_channels()[-1]

    def get_learnable_parameters(self):
        return super().get_learnable_parameters() + list(self.embed.parameters())

    def forward_train(self, image, target, index, contrastive_index, **kwargs):
        logits, student = self.student(image)
        with torch.no_grad():
            _, teacher = self.teacher(image)
        s, t = (F.normalize(e(f["pooled_feat"])) for e, f in zip(self.embed, (student, teacher)))
        negatives = torch.index_select(self.memory, 0, contrastive_index.view(-1)).view(len(s), -1, s.size(1))
        logits_nce = torch.bmm(negatives, s.unsqueeze(2)).squeeze(2) / self.tau
        logits_nce[:, 0] = (s * t).sum(1) / self.tau
        self.memory[index] = self.momentum * self.memory[index] + (1 - self.momentum) * t.detach()
        first = torch.zeros(len(s), dtype=torch.long).cuda()
        loss_ce = self.weights[0] * F.cross_entropy(logits, target)
        return logits, {"loss_ce": loss_ce, "loss_kd": self.weights[1] * F.cross_entropy(logits_nce, first)}


class ReviewKD(Pair):
    def __init__(self, student, teacher, cfg):
        section = cfg.REVIEWKD
        super(ReviewKD, self).__init__(student, teacher, cfg, (section.CE_WEIGHT, section.REVIEWKD_WEIGHT))
        self.shapes, self.warmup = section.SHAPES, section.WARMUP_EPOCHS
        self.convs = nn.ModuleList(nn.Conv2d(s, t, 1) for s, t in zip(section.IN_CHANNELS, section.OUT_CHANNELS))

    def learnt(self):
        return self.convs

    def compare(self, student, teacher):
        own = student["feats"][1:] + [student["pooled_feat"].unsqueeze(-1).unsqueeze(-1)]
        goal = teacher["preact_feats"][1:] + [teacher["pooled_feat"].unsqueeze(-1).unsqueeze(-1)]
        loss = 0
        for conv, s, t, size in zip(self.convs, own, goal, self.shapes[::-1]):
            loss = loss + F.mse_loss(conv(s), F.interpolate(t, (size, size)))
        return min(self.kwargs["epoch"] / self.warmup, 1.0) * loss
