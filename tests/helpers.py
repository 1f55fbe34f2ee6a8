"""What several test files use."""

import subprocess
import sys
from pathlib import Path

import torch

from mdistiller.engine.recorder import read_metrics
from mdistiller.models import cifar_model_dict

ROOT = Path(__file__).resolve().parents[1]


def save_teacher(path: Path, name: str = "resnet8", num_classes: int = 10) -> Path:
    torch.manual_seed(1)
    torch.save({"model": cifar_model_dict[name][0](num_classes=num_classes).state_dict()}, path)
    return path


def tool(name: str, *words: object, cwd: Path) -> subprocess.CompletedProcess:
    """Run tools/NAME.py as a user would, in the folder `cwd`."""
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=240)


def digits_opts(**changes: object) -> list[str]:
    """KEY VALUE pairs of a short run on digits; in keywords, a double underscore stands for the dot."""
    opts = {"DATASET.TYPE": "digits", "DISTILLER.STUDENT": "resnet8", "SOLVER.EPOCHS": 1, "DEVICE": "cpu"}
    opts |= {key.replace("__", "."): value for key, value in changes.items()}
    return [str(word) for pair in opts.items() for word in pair]


def outcome(folder: Path) -> tuple[dict, list[dict]]:
    """All that a run's future and its reader depend on: the state in `latest` and the rows, but for what a clock says
    and how long the worklog is.
    """
    state = torch.load(folder / "latest", weights_only=True)
    rows = read_metrics(folder)
    for row in rows:
        del row["epoch_seconds"], row["images_per_second"]
    return {key: value for key, value in state.items() if key not in ("checksum", "log_bytes")}, rows


def same(a: object, b: object) -> bool:
    """Equal in every bit, tensors and what holds them."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
