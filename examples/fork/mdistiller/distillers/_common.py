import torch.nn.functional as F


def kd_loss(logits_student, logits_teacher, temperature):
    log_student = F.log_softmax(logits_student / temperature, dim=1)
    teacher = F.softmax(logits_teacher / temperature, dim=1)
    return F.kl_div(log_student, teacher, reduction="batchmean") * temperature**2
