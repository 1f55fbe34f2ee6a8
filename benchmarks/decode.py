"""How fast picture files are streamed, beside decoding alone, and how long steps wait for them.

python3 benchmarks/decode.py FOLDER [--size 224] [--workers 2] [--student tv:resnet18]

FOLDER holds train/CLASS/* and val/CLASS/*. "alone": one process that decodes and
crops, times the number of processors; "stream": all that training gets of an
epoch's batches, when it does nothing with them.
"""

import argparse
import os
import time
from pathlib import Path

import torch

from mdistiller.config import load
from mdistiller.dataset import Batches, load_dataset
from mdistiller.device import prepare
from mdistiller.models import build_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, default=2000, help="how many are decoded for each figure")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--student", default="tv:resnet18")
    a = parser.parse_args()
    words = ["DATASET.TYPE", "imagefolder", "DATASET.SIZE", str(a.size), "DATASET.NUM_WORKERS", str(a.workers)]
    data = load_dataset("imagefolder", a.folder, load(None, words).DATASET)
    given = data.train_images, data.train_labels, data.mean, data.std, a.batch, "resized_crop"
    batches, alone, streamed = Batches(*given), [], []
    steps = max(1, min(a.images, batches.num_samples) // a.batch)
    for number in range(a.rounds):
        plan = batches.plan(number + 1)[:, : steps * a.batch]
        begin = time.perf_counter()
        for place, draw in zip(*plan[:2, : len(plan[0]) // a.workers].tolist(), strict=True):
            data.train_images.image(place, draw)
        alone.append(len(plan[0]) // a.workers / (time.perf_counter() - begin))
        batches.start(plan)
        begin = time.perf_counter()
        for part in plan.split(a.batch, dim=1):
            batches.reader.take(batches._decoded(part))
        streamed.append(plan.shape[1] / (time.perf_counter() - begin))
    best = max(alone) * a.workers
    print(f"alone    {max(alone):8.0f} images/s in one process, times {a.workers}: {best:.0f}")
    print(f"stream   {max(streamed):8.0f} images/s, {100 * max(streamed) / best:.0f} % of that")
    network = prepare(build_model(a.student, data.num_classes), torch.device("cpu")).train()
    waited = busy = 0.0
    begin = time.perf_counter()
    for number, batch in enumerate(batches.epoch(a.rounds + 1)):
        taken = time.perf_counter()
        network(batch.image)[0].logsumexp(1).mean().backward()
        waited, busy = waited + taken - begin, busy + time.perf_counter() - taken
        begin = time.perf_counter()
        if number + 1 == steps:
            break
    share = 100 * waited / (waited + busy)
    print(f"steps    {a.student}, batches of {a.batch}: {share:.1f} % of the time waits for pictures")


if __name__ == "__main__":
    main()
