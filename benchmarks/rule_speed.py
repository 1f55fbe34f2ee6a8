"""What a temperature rule and a divergence cost on the tokens of a language model, as a share of a training step.

python3 benchmarks/rule_speed.py [--tokens 4096] [--classes 2048] [--chunk 1024] [--rounds 7] [--threads 2]

A step: gpt4x128, its logits, cross entropy and KD's loss, backward pass and AdamW; float32 on the CPU. KD's loss is the
mean of factor * divergence, DTKD's is that and KD at a fixed temperature. Each is timed alone, forward and backward,
`--chunk` rows at a time (0: all at once) as steps on text take it; the share of a rule is what KD's loss takes longer
with it than with `fixed`, over the step with `fixed`. The least of the rounds, which take turns.
"""

import argparse
import functools
import os
import platform
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import mdistiller.losses as L
from mdistiller.distillers._chunks import chunked
from mdistiller.distillers.losses import bounded
from mdistiller.errors import run_command
from mdistiller.models.gpt import GPT

RULES = ("fixed", "max_logit", "centred", "centred_sharpness", "std", "norm", "adakd", "erratum", "sharpness")
DIVERGENCES = ("kl_divergence", "reverse_kl", "jensen_shannon", "skewed_kl", "skewed_reverse_kl", "total_variation")
BLOCK = 256  # tokens of a text that see each other


def kd(rule: str, divergence: str = "kl_divergence") -> Callable:
    """Return KD's loss of logits (N, K) under a rule and a divergence."""
    return lambda v, u: L.softened_kl(v, u, getattr(L, rule)(v, u, 1.0), divergence=getattr(L, divergence))


def dtkd(rule: str) -> Callable:
    """Return DTKD's: the loss under the rule, and KD."""
    return lambda v, u: kd(rule)(v, u) + kd("fixed")(v, u)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 4096), ("classes", 2048), ("chunk", 1024), ("rounds", 7), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    chunk = a.chunk or a.tokens
    teacher, target = 3 * torch.randn(a.tokens, a.classes), torch.randint(a.classes, (a.tokens,))
    student = torch.randn(a.tokens, a.classes).requires_grad_()
    gpt, nothing = GPT(a.classes, 4, 128), nn.Identity()
    optimizer, ids = torch.optim.AdamW(gpt.parameters(), 1e-3), target.view(-1, BLOCK)

    def step() -> None:
        optimizer.zero_grad()

        def losses(logits: Tensor, rows: slice) -> dict[str, Tensor]:
            logits = bounded(logits)
            return {"ce": L.ce_loss(logits, target[rows]), "kd": kd("fixed")(logits, bounded(teacher[rows]))}

        sum(chunked(losses, gpt.head, gpt.hidden(ids), chunk)[1].values()).backward()
        optimizer.step()

    def alone(loss: Callable) -> None:
        chunked(lambda logits, rows: {"": loss(bounded(logits), bounded(teacher[rows]))}, nothing, student, chunk)

    losses = {f"KD, {rule}": kd(rule) for rule in RULES} | {f"DTKD, {rule}": dtkd(rule) for rule in RULES}
    losses |= {f"KD, {name}": kd("fixed", name) for name in DIVERGENCES}
    jobs = {"step": step} | {name: functools.partial(alone, loss) for name, loss in losses.items()}
    best = dict.fromkeys(jobs, float("inf"))
    for place in range(a.rounds + 1):  # the first one warms up
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if place:
                best[name] = min(best[name], time.perf_counter() - start)
    weights = sum(parameter.numel() for parameter in gpt.parameters())
    print(
        f"{a.tokens} tokens, {a.classes} classes, chunks of {chunk}, {a.threads} threads of {os.cpu_count()} cores, "
        f"{platform.machine()}, torch {torch.__version__}; the least of {a.rounds} rounds"
    )
    print(f"a step of a GPT of {weights:,} parameters with KD: {1e3 * best['step']:.0f} ms\n")
    print("| rule | KD, ms | DTKD, ms | of a step |\n|---|---:|---:|---:|")
    for rule in RULES:
        own = best[f"KD, {rule}"]
        share = (own - best["KD, fixed"]) / best["step"]
        print(f"| `{rule}` | {1e3 * own:.0f} | {1e3 * best[f'DTKD, {rule}']:.0f} | {100 * share:.1f} % |")
    print("\n| divergence | KD, ms |\n|---|---:|")
    for name in DIVERGENCES:
        print(f"| `{name}` | {1e3 * best[f'KD, {name}']:.0f} |")


if __name__ == "__main__":
    run_command(main)
