"""What keeping a run costs: the files of an epoch's end, their time and size, and their share of an epoch.

python3 benchmarks/checkpoint.py [--pair resnet20 resnet8] [--amp bf16] [--folder .] [--json FILE]

Random images in CIFAR-100's numbers, DTKD, batch 64. The epoch is `steps` steps, timed, times 782 over `steps`; what
is kept at its end, in a folder on the disk at hand, is timed `rounds` times, with metrics.jsonl and worklog.txt as long
as those of a run of 240 epochs are on average: 120 rows.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from mdistiller.config import load
from mdistiller.dataset import ImageSet
from mdistiller.engine import builder
from mdistiller.engine.device import resolve_device
from mdistiller.engine.evaluator import Scores
from mdistiller.engine.recorder import Recorder
from mdistiller.engine.solver import set_lr
from mdistiller.engine.step import Meter

TRAIN, TEST, CLASSES, BATCH = 50_000, 10_000, 100, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", nargs=2, default=["resnet20", "resnet8"], metavar=("TEACHER", "STUDENT"))
    parser.add_argument("--amp", default="bf16", choices=["none", "bf16"])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=Path("."), help="where the files are written, then removed")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    a = parser.parse_args()
    teacher, student = a.pair
    cfg = load(None, ["DISTILLER.TYPE", "DTKD", "DISTILLER.TEACHER", teacher, "DISTILLER.STUDENT", student])
    device = resolve_device("auto")
    sizes = ((TRAIN, 32, 32, 3), (TEST, 32, 32, 3))
    images = [torch.randint(0, 256, size, dtype=torch.uint8) for size in sizes]
    labels = [torch.arange(size[0]) % CLASSES for size in sizes]
    data = ImageSet(images[0], labels[0], images[1], labels[1], CLASSES, (0.5,) * 3, (0.25,) * 3)
    with tempfile.TemporaryDirectory(dir=a.folder) as name:
        folder = Path(name)
        trainer = builder.build_trainer(cfg, builder.build_distiller(cfg, data, None, device), data, device, folder)
        trainer.step.amp = a.amp
        trainer.distiller.train()
        set_lr(trainer.step.optimizer, 1e-3)
        meter = Meter()
        for number, batch in zip(range(a.steps + 5), trainer.train_batches.epoch(1), strict=False):
            if number == 5:
                meter.read()  # waits for the device; the first steps warm up
                begin = time.perf_counter()
            trainer.step(batch, 1, meter)
        meter.read()
        epoch = (time.perf_counter() - begin) / a.steps * len(trainer.train_batches)

        recorder = Recorder(folder, 240)
        losses = {"train_loss": 1.0, "train_acc": 1.0, "images_per_second": 1.0, "epoch_seconds": 1.0}
        losses["train_losses"] = {"loss/loss_ce": 1.0, "loss/loss_kd": 1.0}
        spread = dict.fromkeys("mean std min max q05 q25 q50 q75 q95".split(), 1.2345678901234567)
        sides = ("t_student", "t_teacher", "sharpness_student", "sharpness_teacher")
        losses["temperature"] = dict.fromkeys(sides, spread) | {"fell_back": 0.0}
        recorder.rows = [{"epoch": n} | losses for n in range(1, 121)]
        recorder.text = "x" * 200 * 120
        seconds = []
        for _ in range(a.rounds):
            row = {"epoch": trainer.epoch + 1, "lr": 0.1} | losses | trainer.score(Scores(trainer.epoch, 50.0, 1.0))
            begin = time.perf_counter()
            recorder.end_epoch(row, 0)
            trainer.save(recorder)
            seconds.append(time.perf_counter() - begin)
        files = {file: (folder / file).stat().st_size for file in ("latest", "student_latest")}
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    ms = [1000 * s for s in sorted(seconds)]
    print(f"{teacher} -> {student}, {a.amp}; {where}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    for file, size in files.items():
        print(f"{file:<16}{size / 1e6:8.2f} MB")
    print(f"{'an epoch':<16}{epoch:8.1f} s of training, from {a.steps} steps")
    print(f"{'its end':<16}{statistics.median(ms):8.1f} ms to keep, {ms[0]:.1f} - {ms[-1]:.1f} over {a.rounds} rounds")
    print(f"{'share':<16}{statistics.median(ms) / 10 / epoch:8.3f} %")
    if a.json:
        figures = {"bytes": files, "epoch_s": epoch, "keep_ms": ms, "torch": torch.__version__, "device": where}
        a.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
