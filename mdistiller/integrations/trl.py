"""Temperature rules and divergences in TRL's trainer of language models: LoRA, several devices and on-policy data stay
TRL's. Tested with trl 1.16.0: pip install "mdistiller[trl]".
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mdistiller.distillers._divergences import DIVERGENCES
from mdistiller.distillers.rules import Rule, check_rule
from mdistiller.errors import UserError
from mdistiller.registry import temperature_rules, unknown

try:
    from trl.experimental.gkd import GKDTrainer
except ImportError as error:
    raise UserError(
        f'mdistiller.integrations.trl needs trl 1.16 or newer ({error}): pip install "mdistiller[trl]"'
    ) from None

IGNORED = -100  # the label of a token that does not count: prompt or padding


class RuleDistillationTrainer(GKDTrainer):
    """TRL's GKDTrainer, whose loss is the mean over the tokens that count of factor * divergence.

    Takes GKDTrainer's arguments, and by name: `rule`, a name of the temperature rules or a function like them, with its
    `options` and under `detach` without a gradient through the temperatures; `divergence`, a name of DIVERGENCES or a
    function of (student logits (N, K), teacher logits (N, K), T_student (N, 1), T_teacher (N, 1)) that gives (N,);
    `tau`, the reference temperature; `chunk`, how many tokens are softened at once, which changes nothing but memory
    and rounding. Of GKDConfig, `lmbda`, `seq_kd` and what concerns sampling keep their meaning; `beta` is not read.

    A token counts where its label is not -100. The factor of a rule is part of the loss, as everywhere in this package:
    under `fixed` it is tau^2, which TRL's own loss leaves out. Columns of logits beyond the tokenizer's vocabulary,
    which pad it to a round number, are left out. The log has the means over the tokens of `temperature_student`,
    `temperature_teacher` and `fell_back`, the share for which the rule was undefined.

    Raises UserError for an unknown name, options that the rule does not take, and a rule that learns.
    """

    def __init__(
        self,
        *args,
        rule: str | Callable = "centred",
        divergence: str | Callable = "forward",
        tau: float = 1.0,
        options: Mapping | None = None,
        detach: bool = False,
        chunk: int = 256,
        **kwargs,
    ):
        function, name = (
            (rule, getattr(rule, "__name__", "given")) if callable(rule) else (temperature_rules[rule], rule)
        )
        if isinstance(function, type | torch.nn.Module):
            raise UserError(f"rule={name}: learns parameters, which this trainer would not train; take another rule")
        if not callable(divergence) and divergence not in DIVERGENCES:
            raise UserError(unknown("divergence", divergence, DIVERGENCES))
        if not (tau > 0 and chunk >= 1):
            raise UserError(f"tau={tau}, chunk={chunk}: tau must be positive and chunk at least 1")
        self.rule = Rule(function, dict(options or {}), detach)
        check_rule(self.rule, name, 10)
        self.divergence = divergence if callable(divergence) else DIVERGENCES[divergence]
        self.tau, self.chunk = tau, chunk
        self.seen = {}  # training or not -> sums over the tokens since the last log, (4,)
        super().__init__(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the loss of a batch, a scalar; with the student's outputs under `return_outputs`."""
        given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        outputs = model(**given, use_cache=False)
        self.teacher_model.eval()
        with torch.no_grad():
            teacher = self.teacher_model(**given, use_cache=False).logits
        tokens = len(getattr(self.processing_class, "tokenizer", self.processing_class))
        student, teacher = (logits.flatten(0, 1)[:, :tokens] for logits in (outputs.logits, teacher))
        counts = torch.zeros_like(inputs["labels"], dtype=torch.bool)
        counts[:, :-1] = inputs["labels"][:, 1:] != IGNORED  # a token's logits lie one place before it
        rows = counts.flatten().nonzero().squeeze(1)
        chunk = max(len(rows), 1) if self.rule.needs_batch else self.chunk
        total, seen = _ChunkedSum.apply(student, teacher, rows, self._softened, chunk)
        training = self.model.training
        self.seen[training] = self.seen.get(training, 0) + seen
        if num_items_in_batch is None:
            loss = total / max(len(rows), 1)
        else:  # of all batches that make one step, on all devices, whose gradients are averaged
            loss = total / num_items_in_batch
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, start_time=None):
        """Add what was seen of the temperatures since the last log to TRL's figures."""
        seen = self.seen.pop(self.model.training, None)
        if seen is not None:
            count, *sums = self.accelerator.reduce(seen, "sum").tolist()
            prefix = "" if self.model.training else "eval_"
            names = ("temperature_student", "temperature_teacher", "fell_back")
            logs = logs | {prefix + name: value / max(count, 1) for name, value in zip(names, sums, strict=True)}
        super().log(logs, start_time)

    def _softened(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum of factor * divergence over rows (n, K), and of 1, T_student, T_teacher and unsound: (4,)."""
        temperatures = self.rule(student, teacher, self.tau)
        t_student, t_teacher, factor, sound = (part.squeeze(1) for part in temperatures)
        divergence = self.divergence(student, teacher, temperatures.student, temperatures.teacher)
        seen = torch.stack([torch.ones_like(t_student), t_student, t_teacher, 1.0 - sound.float()]).detach()
        return (factor * divergence).sum(), seen.sum(1)


class _ChunkedSum(torch.autograd.Function):
    """The sum of a row-wise loss over chosen rows of logits (N, K), whose gradient is taken chunk by chunk in the
    forward pass: of the arrays in between only a chunk's exist at a time, and nothing is computed twice.
    """

    @staticmethod
    def forward(ctx, student, teacher, rows, loss, chunk):
        # float16 would lose what is small before the loss is scaled
        kept = torch.float32 if student.dtype == torch.float16 else student.dtype
        gradient = torch.zeros_like(student, dtype=kept) if ctx.needs_input_grad[0] else None
        total, seen = torch.zeros((), device=student.device), torch.zeros(4, device=student.device)
        for part in rows.split(chunk):
            v = student[part].requires_grad_(gradient is not None)
            with torch.set_grad_enabled(gradient is not None):
                value, of_part = loss(v, teacher[part])
            if gradient is not None:
                gradient[part] = torch.autograd.grad(value, v)[0].to(kept)
            total, seen = total + value.detach(), seen + of_part
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(seen)
        return total, seen

    @staticmethod
    @once_differentiable
    def backward(ctx, of_total, _):
        (gradient,) = ctx.saved_tensors
        return (gradient * of_total), None, None, None, None
