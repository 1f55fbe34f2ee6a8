"""Whether W processes give what one gives: every method for ten steps in float64, the same runs under W = 1, 2, 3, 4.

python3 benchmarks/ranks_exact.py [--methods KD CRD ...] [--worlds 1 2 3 4] [--out FILE]
python3 benchmarks/ranks_exact.py --run DTKD    # three epochs in float32, the rows of metrics.jsonl side by side
python3 benchmarks/ranks_exact.py --time DTKD   # an epoch by one process of two threads, and by two of one

A run is tools/train_ours.py's: an epoch of resnet14 -> resnet8 on 316 random images of 16 x 16 pixels, nine batches of
33 and one of 19, SOLVER.SYNC_BN True, then a test on 101 images, which none of these W divides. A cell is the largest
difference of any number of the checkpoint from W = 1: weights, running statistics, momenta and a method's own buffers,
each tensor's by its largest entry where that is above 1. The last column has the test's hits under each W. Processes
are forked, and talk by gloo.
"""

import argparse
import functools
import json
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median

os.environ["OMP_NUM_THREADS"] = "1"
import numpy as np
import torch

from mdistiller import config
from mdistiller.dataset import Batches
from mdistiller.distillers import distiller_dict
from mdistiller.engine import method as engine_method
from mdistiller.engine import run as engine_run
from mdistiller.models import cifar_model_dict
from mdistiller.terminal import silence

LIMIT = 1e-12
TESTED = 101


def write_data(root: Path, images: int = 316, tested: int = TESTED, size: int = 16) -> list[str]:
    """Write random images and a resnet14 below `root`. Return KEY VALUE pairs of a run on them."""
    generator, arrays = np.random.default_rng(0), {}
    for split, n in (("train", images), ("test", tested)):
        arrays[f"{split}_images"] = generator.integers(0, 256, (n, size, size, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(n) % 10
    np.savez(root / "images.npz", **arrays)
    torch.manual_seed(1)
    torch.save({"model": cifar_model_dict["resnet14"][0](num_classes=10).state_dict()}, root / "teacher")
    pairs = {
        "DATASET.TYPE": "npz", "DATASET.ROOT": root / "images.npz", "DEVICE": "cpu", "DISTILLER.STUDENT": "resnet8",
        "DISTILLER.TEACHER": "resnet14", "DISTILLER.TEACHER_CKPT": root / "teacher", "SOLVER.EPOCHS": 1,
        "SOLVER.BATCH_SIZE": 33, "SOLVER.LR": 0.01, "SOLVER.SYNC_BN": True, "TEACHER_BANK": "off", "CRD.NCE.K": 8,
        "CRD.FEAT.DIM": 8,
    }  # fmt: skip
    return [str(word) for pair in pairs.items() for word in pair]


def in_float64() -> None:
    """Let runs of this process compute in float64."""
    prepare, normalise = engine_method.prepare_parts, Batches.normalise
    engine_method.prepare_parts = lambda distiller, *given: prepare(distiller, *given).double()
    Batches.normalise = lambda self, images: normalise(self, images).double()


def on_ranks(world: int, work: Callable[[], None]) -> list[int]:
    """Call `work()` in `world` forked processes, which find each other as under torchrun; return their statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        child = os.fork()
        if child:
            children.append(child)
            continue
        status = 1
        try:
            where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1"}
            os.environ |= {name: str(value) for name, value in (where | {"MASTER_PORT": port}).items()}
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def train_all(opts: Sequence[str], prefix: Path, names: Iterable[str], double: bool = True, threads: int = 1) -> None:
    """Train by every method of `names`, each in a folder of its name below `prefix`."""
    if double:
        in_float64()
    torch.set_num_threads(threads)
    for name in names:
        words = [*opts, "DISTILLER.TYPE", name, "LOG.PREFIX", str(prefix), "EXPERIMENT.NAME", name]
        with silence():
            engine_run.train(config.load(None, words))


def differences(a: object, b: object) -> Iterable[float]:
    """Yield the largest difference of each pair of tensors in two checkpoints' parts."""
    if isinstance(a, torch.Tensor):
        a, b = a.double(), b.double()
        yield float((a - b).abs().max() / a.abs().max().clamp(min=1)) if a.numel() else 0.0
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            yield from differences(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        for x, y in zip(a, b, strict=True):
            yield from differences(x, y)


def outcome(folder: Path) -> tuple[dict, float]:
    """Return a run's weights and momenta, and how many test images it gets right."""
    state = torch.load(folder / "latest", weights_only=True)
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return {"model": state["model"], "optimizer": state["optimizer"]["state"]}, row["test_acc"] * TESTED / 100


def rows_of(folder: Path) -> list[dict]:
    """Return the rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def print_run(root: Path, opts: Sequence[str], method: str, worlds: Sequence[int]) -> None:
    """Print the figures of a run of three epochs in float32, under each number of processes."""
    print("| W | epoch | train_loss | train_acc | test_loss | test_acc |\n|---:|---:|---:|---:|---:|---:|")
    for world in worlds:
        work = functools.partial(train_all, [*opts, "SOLVER.EPOCHS", "3"], root / str(world), [method], False)
        assert not any(on_ranks(world, work))
        for row in rows_of(root / str(world) / "distill" / method):
            figures = (f"{row[key]:.7f}" for key in ("train_loss", "train_acc", "test_loss", "test_acc"))
            print(f"| {world} | {row['epoch']} | {' | '.join(figures)} |")


def print_times(root: Path, method: str, rounds: int = 5) -> None:
    """Print how long a step takes by one process of two threads, and by two processes of one thread, in turn."""
    opts = write_data(root, 3200, 64, 32)
    opts += ["SOLVER.BATCH_SIZE", "64", "SOLVER.EPOCHS", "2", "SOLVER.SYNC_BN", "False", "SOLVER.STEP", "eager"]
    found: dict[int, list[float]] = {1: [], 2: []}
    for number in range(rounds):
        for world, times in found.items():
            prefix = root / f"{world}-{number}"
            work = functools.partial(train_all, opts, prefix, [method], False, 2 // world)
            assert not any(on_ranks(world, work))
            times.append(rows_of(prefix / "distill" / method)[-1]["epoch_seconds"] / 50 * 1000)
    for world, times in found.items():
        spread = f"{min(times):.1f} to {max(times):.1f}"
        print(f"W = {world}, {2 // world} threads each: {median(times):.1f} ms a step ({spread})")
    ratios = [two / one for one, two in zip(*found.values(), strict=True)]
    print(f"W = 2 takes {median(ratios):.2f} of W = 1's time ({min(ratios):.2f} to {max(ratios):.2f}, {rounds} rounds)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted(name for name, cls in distiller_dict.items() if cls.__module__.startswith("mdistiller."))
    parser.add_argument("--methods", nargs="+", default=known, choices=known)
    parser.add_argument("--worlds", nargs="+", type=int, default=[1, 2, 3, 4])
    parser.add_argument("--out", type=Path, help="write the table to OUT.md")
    parser.add_argument("--run", choices=known, metavar="METHOD")
    parser.add_argument("--time", choices=known, metavar="METHOD")
    a = parser.parse_args()
    config.load()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        opts = write_data(root)
        if a.run or a.time:
            print_run(root, opts, a.run, a.worlds) if a.run else print_times(root, a.time)
            return
        for world in {1, *a.worlds}:
            statuses = on_ranks(world, lambda world=world: train_all(opts, root / str(world), a.methods))
            if any(statuses):
                raise SystemExit(f"W = {world}: statuses {statuses}")
        worlds = [world for world in a.worlds if world != 1]
        lines = [f"| method | {' | '.join(f'W = {world}' for world in worlds)} | hits of {TESTED} |"]
        lines.append("|---|" + "---:|" * (len(worlds) + 1))
        failed = []
        for name in a.methods:
            expected, hits = outcome(root / "1" / "distill" / name)
            cells, counted = [], [hits]
            for world in worlds:
                found, right = outcome(root / str(world) / "distill" / name)
                worst = max(differences(expected, found))
                cells.append(f"{worst:.1e}")
                counted.append(right)
                if not worst <= LIMIT or abs(right - hits) > 1e-6:
                    failed.append(f"{name} under W = {world}")
            lines.append(f"| {name} | {' | '.join(cells)} | {', '.join(f'{x:g}' for x in counted)} |")
    print("\n".join(lines))
    if a.out:
        a.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    if failed:
        raise SystemExit(f"above the limit: {', '.join(failed)}")


if __name__ == "__main__":
    main()
