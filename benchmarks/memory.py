"""Peak memory of each way to train, beside the plain loop's: every one in a process of its own.

python3 benchmarks/memory.py [--teacher resnet32x4 --student resnet8x4] [--steps 12] [--device auto]

On CUDA what the allocator has taken of the device at most, graphs' pools and the bank included; on a CPU what the
process has occupied at most, less what it had before there was a network. The bank of a CPU lies on the disk and counts
as far as it is mapped.
`activations`: what one plain step keeps for its backward pass.
"""

import argparse
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from speed import BATCH, CLASSES, NAMES, OurLoop, PlainLoop, precisions
from torch.nn import functional as F

from mdistiller.device import resolve_device
from mdistiller.errors import run_command
from mdistiller.models import build_model

MB = 2**20


def peak(device: torch.device) -> float:
    """MB since `forget`; of a process, Linux has it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / MB
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def forget(device: torch.device) -> None:
    """What comes from here on counts: libraries that were loaded took more for a moment than they keep."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def use(way: tuple[str, str, str] | None, teacher: str, student: str, steps: int, device: torch.device) -> float:
    """MB that training takes at most."""
    images = np.random.RandomState(0).randint(0, 256, (BATCH * steps, 32, 32, 3)).astype(np.uint8)

    def pair():
        torch.manual_seed(0)
        return build_model(student, CLASSES), build_model(teacher, CLASSES)

    F.conv2d(torch.ones(1, 1, 8, 8), torch.ones(1, 1, 3, 3))  # libraries are loaded
    forget(device)
    before = peak(device)
    with tempfile.TemporaryDirectory() as folder:
        if way is None:
            loop = PlainLoop(*pair(), images, device)
        else:
            loop = OurLoop(pair, images, device, *way, Path(folder))
        loop.round()
        return peak(device) - before


def activations(student: str) -> float:
    """MB that the backward pass of a batch needs."""
    kept = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        network = build_model(student, CLASSES).train()
        loss = F.cross_entropy(network(torch.randn(BATCH, 3, 32, 32))[0], torch.zeros(BATCH, dtype=torch.long))
    loss.backward()
    return sum(kept.values()) / MB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="resnet32x4")
    parser.add_argument("--student", default="resnet8x4")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--device", default="auto")
    a = parser.parse_args()
    device = resolve_device(a.device)
    print(f"{a.teacher} -> {a.student}, batch {BATCH}: activations {activations(a.student):,.0f} MB\n")
    print(f"| {'mode':<20} | {'peak, MB':>8} | {'beyond plain':>12} |")
    print(f"|-{'-' * 20}-|-{'-' * 8}:|-{'-' * 12}:|")
    amps = precisions(device)
    ways = {f"{way}, {NAMES[amp]}": (amp, way, "graph") for amp in amps for way in ("off", "ahead", "cold", "warm")}
    ways |= {f"compiled warm, {NAMES[amp]}": (amp, "warm", "compile") for amp in amps}
    plain = None
    for name, way in ({"plain loop, float32": None} | ways).items():
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            value = pool.submit(use, way, a.teacher, a.student, a.steps, device).result()
        plain = plain or value
        print(f"| {name:<20} | {value:>8,.0f} | {value - plain:>+12,.0f} |", flush=True)


if __name__ == "__main__":
    run_command(main)
