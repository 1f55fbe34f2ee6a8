"""Seconds from the command to the first training step that is done, on a CPU, in new processes.

python3 benchmarks/start.py [--cfg configs/cifar100/dtkd/res32x4_res8x4.yaml] [--rounds 5] [KEY VALUE ...]

The teacher's weights are random. A run is killed as soon as its first checkpoint appears, which it writes after its
first step. The first round, whose files may have to come from the disk, is not counted.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from mdistiller.engine.cfg import load
from mdistiller.models import build_model

ROOT = Path(__file__).resolve().parents[1]


def start(words: list[str], folder: Path) -> float:
    begin = time.perf_counter()
    line = [sys.executable, str(ROOT / "tools" / "train_ours.py"), *words, "LOG.PREFIX", str(folder), "DEVICE", "cpu"]
    line += ["LOG.SAVE_EVERY_SECONDS", "1e-9"]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL) as process:
        try:
            while not any(folder.rglob("latest")):
                if process.poll() is not None:
                    raise SystemExit(f"the run ended with status {process.returncode}")
                time.sleep(0.01)
            return time.perf_counter() - begin
        finally:
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", default=str(ROOT / "configs/cifar100/dtkd/res32x4_res8x4.yaml"))
    parser.add_argument("--rounds", type=int, default=5)
    a, opts = parser.parse_known_args()
    classes = {"cifar100": 100, "cifar10": 10, "digits": 10}
    cfg = load(a.cfg, opts)
    with tempfile.TemporaryDirectory() as folder:
        teacher = Path(folder) / "teacher"
        network = build_model(cfg.DISTILLER.TEACHER, classes[cfg.DATASET.TYPE])
        torch.save({"model": network.state_dict()}, teacher)
        words = ["--cfg", a.cfg, *opts, "DISTILLER.TEACHER_CKPT", str(teacher)]
        seconds = [start(words, Path(folder) / str(number)) for number in range(a.rounds + 1)][1:]
    print(f"{statistics.median(seconds):.1f} s, {min(seconds):.1f} to {max(seconds):.1f}, {a.rounds} rounds")


if __name__ == "__main__":
    main()
