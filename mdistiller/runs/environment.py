"""What has to be known of a machine and its software to run something again."""

import contextlib
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from mdistiller import __version__

PREFIXES = ("CUDA", "CUBLAS", "CUDNN", "NVIDIA_TF32", "OMP_", "MKL_", "KMP_", "TORCH_")  # variables that change bits


def environment(device: torch.device) -> dict:
    """Return versions, device, git commit and command of this process."""
    cuda = device.type == "cuda"
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git": _git(),
        "mdistiller": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "device": device_name(device),
        "capability": torch.cuda.get_device_capability(device) if cuda else torch.backends.cpu.get_cpu_capability(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
        "environment": {key: os.environ[key] for key in sorted(os.environ) if key.startswith(PREFIXES)},
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
    }


def device_name(device: torch.device) -> str:
    """Return the name of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    chip = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):  # Linux
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        chip = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{device.type} ({chip})"


def _git() -> dict | None:
    """Return the commit of the package's own checkout and whether its tree was clean, results/ apart, which runs
    themselves add to; None outside a checkout.
    """

    def ask(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        changed = ask("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)results")
        return {"commit": ask("rev-parse", "HEAD"), "clean": not changed}
    except (OSError, subprocess.SubprocessError):
        return None
