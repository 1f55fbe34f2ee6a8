"""What TEACHER_BANK_TOP_K changes: temperatures, KL and its gradient against whole rows, by k; and what it takes.

python3 benchmarks/topk.py [--run FOLDER] [--vocabulary 2048] [--tokens 2048] [--k 16 64 256] [--json FILE]

Rows are those of teacher and student of a run on text, on the part that it tests on; else heavy-tailed ones, drawn.
`temperature` is the largest relative error of a teacher's temperature, by rule at tau 1. KL is KL(teacher, student) in
nats at T on both sides, given with its error, and `gradient` |error| / |that of whole rows| in the student's logits;
both are means over tokens. Beside the form that is kept, `flat` gives all of the tail one value, of the right mass at
T = 1, and `none` no mass. Times: medians of 9, 256 rows.
"""

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mdistiller.bank.topk import TopK
from mdistiller.dataset import load_dataset
from mdistiller.distillers.losses import kl_divergence
from mdistiller.engine.cfg import load
from mdistiller.engine.method import build_distiller
from mdistiller.registry import temperature_rules
from mdistiller.runs import checkpoint

RULES = ("fixed", "max_logit", "centred", "std", "norm", "centred_sharpness")
TEMPERATURES = (0.5, 1.0, 2.0, 4.0)
TOGETHER = 256


def drawn(tokens: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Return rows of a teacher and of a student."""
    generator = torch.Generator().manual_seed(0)
    often = 1.5 * torch.randn(vocabulary, generator=generator)
    teacher = often + 1.5 * torch.randn(tokens, vocabulary, generator=generator)
    teacher += 0.8 * torch.empty(tokens, vocabulary).exponential_(generator=generator)
    raised = torch.randint(0, vocabulary, (tokens, 3), generator=generator)
    teacher.scatter_(1, raised, 12 + 2 * torch.randn(tokens, 3, generator=generator))
    return teacher, 0.7 * teacher + torch.randn(teacher.shape, generator=generator)


def of_run(folder: Path, tokens: int) -> tuple[Tensor, Tensor]:
    """Return the same of a run's two networks."""
    cfg = load(str(folder / "config.yaml"))
    data = load_dataset(cfg.DATASET.TYPE, cfg.DATASET.ROOT, cfg.DATASET)
    distiller = build_distiller(cfg, data, Path(cfg.DISTILLER.TEACHER_CKPT), torch.device("cpu")).eval()
    distiller.student.load_state_dict(checkpoint.load(folder / "student_best")["model"])
    ids = data.test_images[: -(-tokens // data.test_images.shape[1])].long()
    with torch.no_grad():
        return tuple(network(ids)[0][:tokens].float() for network in (distiller.teacher, distiller.student))


def forms(rows: Tensor, k: int) -> dict[str, Tensor]:
    """Return what there is of `rows` under each form."""
    form = TopK(k, rows.shape[1])
    ids = rows.topk(k, 1).indices
    tail = rows.scatter(1, ids, -math.inf)
    level = tail.logsumexp(1, keepdim=True) - math.log(rows.shape[1] - k)
    return {
        "kept": form.unpack(form.pack(rows)),
        "flat": level.expand_as(rows).scatter(1, ids, rows.gather(1, ids)),
        "none": tail.fill_(-1e4).scatter(1, ids, rows.gather(1, ids)),
    }


def gradient(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return KL (N,) and its gradient (N, V)."""
    student = student.detach().requires_grad_()
    values = kl_divergence(student, teacher, temperature, temperature)
    return values.detach(), torch.autograd.grad(values.sum(), student)[0]


def errors(teacher: Tensor, student: Tensor, found: dict[str, Tensor]) -> dict:
    """Return the errors by form and temperature, and those of the kept form's temperatures by rule."""
    figures: dict = {"temperature": {}}
    for name in RULES:
        exact, kept = (temperature_rules[name](student, rows, 1.0).teacher for rows in (teacher, found["kept"]))
        figures["temperature"][name] = float((kept / exact - 1).abs().max())
    for temperature in TEMPERATURES:
        value, exact = gradient(student, teacher, temperature)
        figures[f"T {temperature:g}"] = {"KL": float(value.mean())}
        for name, rows in found.items():
            other, slope = gradient(student, rows, temperature)
            error = (slope - exact).norm(dim=1) / exact.norm(dim=1)
            figures[f"T {temperature:g}"][name] = {
                "KL": float((other - value).mean()), "gradient": float(error.mean()),
            }  # fmt: skip
    return figures


def milliseconds(work: Callable[[], object]) -> float:
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run's folder")
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--k", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--json", type=Path, help="also write the figures there")
    a = parser.parse_args()
    teacher, student = of_run(a.run, a.tokens) if a.run else drawn(a.tokens, a.vocabulary)
    print(f"{len(teacher):,} rows of {teacher.shape[1]:,}; {platform.processor() or platform.machine()}, torch "
          f"{torch.__version__}, {torch.get_num_threads()} threads")  # fmt: skip
    results = {}
    for k in a.k:
        form, some = TopK(k, teacher.shape[1]), teacher[:TOGETHER]
        words = form.pack(some)
        figures = {
            "bytes": 2 * form.width,
            "mass": {f"{T:g}": float((teacher / T).softmax(1).topk(k, 1).values.sum(1).mean()) for T in TEMPERATURES},
            "pack ms": milliseconds(lambda form=form, some=some: form.pack(some)),
            "unpack ms": milliseconds(lambda form=form, words=words: form.unpack(words)),
        } | errors(teacher, student, forms(teacher, k))
        results[k] = figures
        print(f"\nk = {k}: {figures['bytes']} bytes a token; pack {figures['pack ms']:.2f} ms, unpack "
              f"{figures['unpack ms']:.2f} ms; mass of the k {figures['mass']}")  # fmt: skip
        print("temperature  " + "  ".join(f"{name} {error:.1e}" for name, error in figures["temperature"].items()))
        for T in TEMPERATURES:
            at = figures[f"T {T:g}"]
            print(f"T = {T:<3g}  KL {at['KL']:.4f}  " + "  ".join(
                f"{name} {at[name]['KL']:+.4f}, gradient {at[name]['gradient']:.4f};" for name in at if name != "KL"
            ))  # fmt: skip
    if a.json:
        a.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
