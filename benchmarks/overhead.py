"""What a run's records cost: the temperature record in every step, checkpoints, and all that is kept at an epoch's end.

python3 benchmarks/overhead.py [--pair resnet20 resnet8] [--amp bf16] [--folder .] [--json FILE]

Random images in CIFAR-100's numbers, DTKD, batch 64. Each round times `steps` steps without and with LOG.TEMPERATURE
samples, in turn; the cost is the median over rounds of their ratio. Then a checkpoint inside an epoch and the end of an
epoch are timed as often, in a folder on the disk at hand: the record's figures and its block of the file, rows, log and
checkpoints, with metrics.jsonl and worklog.txt as long as those of a run of 240 epochs are on average, 120 rows. An
epoch is 782 steps.
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
from mdistiller.device import resolve_device
from mdistiller.engine.build import Workspace, build_trainer
from mdistiller.engine.evaluator import Scores
from mdistiller.engine.method import build_distiller
from mdistiller.engine.solver import set_lr
from mdistiller.engine.trainer import Trainer
from mdistiller.errors import run_command
from mdistiller.runs.recorder import Recorder
from mdistiller.runs.temperature import RecordFile

TRAIN, TEST, CLASSES, BATCH = 50_000, 10_000, 100, 64


def build(teacher: str, student: str, amp: str, folder: Path) -> Trainer:
    opts = ["DISTILLER.TYPE", "DTKD", "DISTILLER.TEACHER", teacher, "DISTILLER.STUDENT", student, "SOLVER.AMP", amp]
    cfg = load(None, [*opts, "LOG.TEMPERATURE", "samples"])
    images = [torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8) for n in (TRAIN, TEST)]
    labels = [torch.arange(n) % CLASSES for n in (TRAIN, TEST)]
    data = ImageSet(images[0], labels[0], images[1], labels[1], CLASSES, (0.5,) * 3, (0.25,) * 3)
    device = resolve_device("auto")
    trainer, _ = build_trainer(cfg, build_distiller(cfg, data, None, device), Workspace(data, device), folder)
    set_lr(trainer.step.optimizer, 1e-3)
    trainer.distiller.train()
    return trainer


def step_seconds(trainer: Trainer, steps: int, recording: bool) -> float:
    """Of one step, behind a first one that is not counted."""
    trainer.step.temperatures = trainer.buffer if recording else None
    trainer.distiller.observer = None
    meter = trainer.step.meter
    for number, batch in zip(range(steps + 1), trainer.feed.batches.epoch(1), strict=False):
        if number == 1:
            meter.read()  # waits for the device
            begin = time.perf_counter()
        trainer.step(batch, 20)
    meter.read()
    return (time.perf_counter() - begin) / steps


def checkpoint_seconds(trainer: Trainer, recorder: Recorder, number: int) -> float:
    """Return the median of `number` checkpoints inside an epoch."""
    times = []
    trainer.state.done = 1
    for _ in range(number):
        begin = time.perf_counter()
        trainer.save(recorder)
        times.append(time.perf_counter() - begin)
    trainer.state.done = 0
    return statistics.median(times)


def end_seconds(trainer: Trainer, recorder: Recorder, record: RecordFile) -> tuple[float, float]:
    """Of the record's part of an epoch's end, and of the rest."""
    state = trainer.state
    row = {"epoch": state.epoch + 1, "lr": 0.1, "train_loss": 1.0, "train_acc": 1.0, "images_per_second": 1.0}
    row |= {"epoch_seconds": 1.0, "train_losses": {"loss/loss_ce": 1.0, "loss/loss_kd": 1.0}}
    row |= trainer.score(Scores(state.epoch, 50.0, 1.0))  # the best so far: the costliest kind
    begin = time.perf_counter()
    row["temperature"] = trainer.buffer.summary()
    recorder.histograms(state.epoch, trainer.buffer)
    record.append(trainer.buffer)
    middle = time.perf_counter()
    recorder.end_epoch(row, 0)
    trainer.save(recorder)
    if len(recorder.rows) == 1:
        recorder.rows *= 120
        recorder.text *= 120
    return middle - begin, time.perf_counter() - middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", nargs=2, default=["resnet20", "resnet8"], metavar=("TEACHER", "STUDENT"))
    parser.add_argument("--amp", default="bf16", choices=["none", "bf16"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--folder", type=Path, default=Path("."), help="where the files are written, then removed")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=a.folder) as name:
        trainer = build(*a.pair, a.amp, Path(name))
        pairs = [
            [step_seconds(trainer, a.steps, recording) for recording in (False, True)] for _ in range(a.rounds + 1)
        ]
        recorder, record = Recorder(Path(name), 240), RecordFile(Path(name) / "temperatures.bin", TRAIN)
        inside = checkpoint_seconds(trainer, recorder, a.rounds)
        ends = [end_seconds(trainer, recorder, record) for _ in range(a.rounds + 1)][1:]
        sizes = {file: (Path(name) / file).stat().st_size for file in ("latest", "student_latest", "temperatures.bin")}
    sizes["temperatures.bin"] = sizes["temperatures.bin"] // (a.rounds + 1) * 240  # its header of 4 KB aside
    ratios = sorted(100 * (on / off - 1) for off, on in pairs[1:])
    epoch = len(trainer.feed) * statistics.median(off for off, _ in pairs[1:])
    device = trainer.step.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    head = f"{' -> '.join(a.pair)}, {a.amp}, {a.rounds} rounds of {a.steps} steps; {where}; torch {torch.__version__}, "
    print(head := head + f"{torch.get_num_threads()} threads")
    print(f"an epoch's training          {epoch:8.1f} s")
    print(f"the record in a step         {statistics.median(ratios):8.2f} %    {ratios[0]:.2f} - {ratios[-1]:.2f}")
    print(f"a checkpoint inside it       {100 * inside / 60:8.3f} %    {1000 * inside:.1f} ms every 60 s")
    shares = {}
    for title, times in zip(("the record at its end", "rows, log, checkpoints"), zip(*ends, strict=True), strict=True):
        ms = sorted(1000 * t for t in times)
        shares[title] = statistics.median(ms) / 10 / epoch
        print(f"{title:<29}{shares[title]:8.3f} %    {statistics.median(ms):.1f} ms, {ms[0]:.1f} - {ms[-1]:.1f}")
    for file, size in sizes.items():
        name = f"{file}, 240 epochs" if file[0] == "t" else file
        print(f"{name:<29}{size / 1e6:8.2f} MB")
    if a.json:
        figures = {"measured": head, "epoch_s": epoch, "step_cost_percent": ratios, "share_percent": shares}
        figures |= {"checkpoint_ms": 1000 * inside}
        a.json.write_text(json.dumps(figures | {"bytes": sizes}, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
