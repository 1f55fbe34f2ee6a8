"""How fast picture files are streamed, beside decoding alone, and how long steps wait for them.

python3 benchmarks/decode.py FOLDER [--size 224] [--workers 2] [--student tv:resnet18]

FOLDER holds train/CLASS/* and val/CLASS/*. "alone": as many processes as there
are workers decode and crop at once and hand nothing over; "stream": all that
training gets of the same pictures, when it does nothing with them. Rounds of
both follow each other; a figure is the median, "ratio" that of the rounds'.
"""

import argparse
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from mdistiller.config import load
from mdistiller.dataset import Batches, load_dataset
from mdistiller.dataset._pictures import Decoding, Pictures, units_of
from mdistiller.device import prepare
from mdistiller.models import build_model


def decode(pictures: Pictures, unit: tuple[list[int], list[int]]) -> None:
    """Decode a unit and give nothing back."""
    Decoding(pictures).__getitems__(unit)


def alone(pool: ProcessPoolExecutor, pictures: Pictures, parts: Sequence[Tensor]) -> float:
    """Return the pictures a second of the pool's processes, which keep what they decode to themselves."""
    units = [unit for part in parts for unit in units_of(part)]
    begin = time.perf_counter()
    list(pool.map(decode, [pictures] * len(units), units))
    return sum(part.shape[1] for part in parts) / (time.perf_counter() - begin)


def stream(batches: Batches, parts: Sequence[Tensor]) -> float:
    """Return the pictures a second that a training gets."""
    begin = time.perf_counter()
    batches.reader.expect(parts)
    for part in parts:
        batches.reader.take(part)
    return sum(part.shape[1] for part in parts) / (time.perf_counter() - begin)


def waiting(batches: Batches, epoch: int, steps: int, student: str, classes: int) -> float:
    """Return the share of the time of `steps` training steps that waits for pictures; the first does not count."""
    network = prepare(build_model(student, classes), torch.device("cpu")).train()
    waited, begin = [], time.perf_counter()
    for batch in batches.epoch(epoch):
        taken = time.perf_counter()
        network(batch.image)[0].logsumexp(1).mean().backward()
        end = time.perf_counter()
        waited.append((taken - begin, end - begin))
        begin = end
        if len(waited) == steps:
            break
    waits, whole = zip(*(waited[1:] or waited), strict=True)
    return sum(waits) / sum(whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, default=2000, help="how many are decoded for each figure")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--student", default="tv:resnet18")
    a = parser.parse_args()
    words = ["DATASET.TYPE", "imagefolder", "DATASET.SIZE", str(a.size), "DATASET.NUM_WORKERS", str(a.workers)]
    data = load_dataset("imagefolder", a.folder, load(None, words).DATASET)
    batches = Batches(data.train_images, data.train_labels, data.mean, data.std, a.batch, "resized_crop")
    rates = []
    with ProcessPoolExecutor(a.workers) as pool:
        epochs = -(-a.images // len(data.train_images))
        for number in range(a.rounds + 1):
            plans = [batches.plan(1 + number * epochs + epoch)[:2] for epoch in range(epochs)]
            parts = torch.cat(plans, 1)[:, : a.images].split(a.batch, dim=1)
            rates.append((alone(pool, data.train_images, parts), stream(batches, parts)))
    rates = rates[1:]  # the first one starts the processes
    ratios = [100 * streamed / decoded for decoded, streamed in rates]
    print(f"alone    {median(rate for rate, _ in rates):8.0f} images/s by {a.workers} processes at once")
    print(f"stream   {median(rate for _, rate in rates):8.0f} images/s")
    print(f"ratio    {median(ratios):8.0f} % (rounds: {', '.join(f'{ratio:.0f}' for ratio in ratios)})")
    share = waiting(batches, 1, max(2, a.images // a.batch), a.student, data.num_classes)
    print(f"steps    {100 * share:8.1f} % of their time waits for pictures ({a.student}, batches of {a.batch})")


if __name__ == "__main__":
    main()
