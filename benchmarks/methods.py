"""What a training step of each method costs, relative to KD, and what it adds; measured in one run.

python3 benchmarks/methods.py [--teacher resnet32x4] [--student resnet8x4] [--rounds 5] [--steps 3] [--json FILE]

Random images, batch 64, float32. Each round runs every method in turn for `steps` steps; a method's cost is the
median over rounds of its time over KD's in the same round.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch

from mdistiller.config import load
from mdistiller.dataset import Batches
from mdistiller.device import resolve_device
from mdistiller.distillers import distiller_dict
from mdistiller.engine.method import prepare_parts
from mdistiller.engine.solver import set_lr, sgd
from mdistiller.engine.step import Step
from mdistiller.errors import UserError, run_command
from mdistiller.models import build_model

BATCH, SAMPLES, CLASSES = 64, 50_000, 100


def build(method: str, teacher: str, student: str, device: torch.device) -> Step:
    torch.manual_seed(0)
    models = build_model(student, CLASSES), build_model(teacher, CLASSES)
    extra = (SAMPLES, torch.arange(SAMPLES) % CLASSES) if method == "CRD" else ()
    arguments = models[:1] if method == "NONE" else (*models, load(), *extra)
    distiller = prepare_parts(distiller_dict[method](*arguments), device).train()
    optimizer = sgd(distiller.get_learnable_parameters(), 0.9, 5e-4)
    set_lr(optimizer, 1e-3)
    return Step(distiller, optimizer, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="resnet32x4")
    parser.add_argument("--student", default="resnet8x4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    a = parser.parse_args()
    device = resolve_device(a.device)
    load()
    steps: dict[str, Step] = {}
    for method in sorted(distiller_dict):
        try:
            steps[method] = build(method, a.teacher, a.student, device)
        except UserError as error:
            print(f"left out: {error}")
    images = torch.randint(0, 256, (BATCH * a.steps, 32, 32, 3), dtype=torch.uint8)
    labels = torch.arange(len(images), device=device) % CLASSES
    batches = Batches(images.to(device), labels, (0.5,) * 3, (0.25,) * 3, BATCH, "crop_flip")
    seconds: dict[str, list[float]] = {method: [] for method in steps}
    for number in range(a.rounds + 1):
        for method, step in steps.items():
            data = list(batches.epoch(number + 1))
            begin = time.perf_counter()
            for batch in data:
                step(batch, 20)
            step.meter.read()  # waits for the device
            if number:  # the first round warms up
                seconds[method].append((time.perf_counter() - begin) / a.steps)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    head = f"{a.teacher} -> {a.student}, batch {BATCH}, float32, {a.rounds} rounds of {a.steps} steps; {where}; torch "
    head += f"{torch.__version__}, {platform.system()}, {torch.get_num_threads()} threads"
    print(f"{head}\n{'method':<10}{'ms a step':>10}{'x KD':>7}{'range':>14}{'extra parameters':>18}")
    rows = {}
    for method, times in seconds.items():
        ratios = [t / base for t, base in zip(times, seconds["KD"], strict=True)]
        extra = steps[method].distiller.get_extra_parameters()
        low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
        rows[method] = {"cost": round(statistics.median(ratios), 2), "range": [low, high], "extra": extra}
        print(
            f"{method:<10}{1e3 * statistics.median(times):>10,.0f}{rows[method]['cost']:>7.2f}"
            f"{f'{low} - {high}':>14}{extra:>18,}"
        )
    if a.json:
        a.json.write_text(json.dumps({"measured": head, "methods": rows}, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
