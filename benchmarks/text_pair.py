"""A control for benchmarks/text_rules.py: the mean temperatures of DTKD's tokens, the same two for all of them."""

import torch
from torch import Tensor

from mdistiller.config import Key, at_least
from mdistiller.distillers.rules import register_rule
from mdistiller.losses import Temperatures


@register_rule("pair", defaults={"GAP": Key(0.18, "pair: how far T lies from tau, as a share of it.", at_least(0))})
def pair(logits_student: Tensor, logits_teacher: Tensor, tau: float, gap: float) -> Temperatures:
    """Return T_student = (1 - gap) tau, T_teacher = (1 + gap) tau and the factor T_student T_teacher, for every row."""
    column = torch.full_like(logits_student[:, :1], tau)
    student, teacher = (1 - gap) * column, (1 + gap) * column
    return Temperatures(student, teacher, student * teacher, torch.ones_like(column, dtype=torch.bool))
