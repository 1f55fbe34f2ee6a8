"""What several test files use."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mdistiller import config
from mdistiller.dataset import load_dataset
from mdistiller.engine.run import train
from mdistiller.models import cifar_model_dict
from mdistiller.runs.recorder import read_metrics

ROOT = Path(__file__).resolve().parents[1]
GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))


def cases(names: list[str], on_cuda: tuple[str, ...]) -> list:
    """(name, device) for tests: all of them on the CPU, some on CUDA."""
    return [(name, "cpu") for name in names] + [pytest.param(name, "cuda", marks=GPU) for name in on_cuda]


def on(device: str, opts: list[str], epochs: int = 2) -> list[str]:
    """`opts` of a small run on that device; on CUDA for so many epochs that steps are replayed."""
    words = list(opts)
    words[words.index("DEVICE") + 1] = device
    words[words.index("SOLVER.EPOCHS") + 1] = str(epochs if device == "cpu" else 6)
    return words


def agree(a: tuple[dict, list[dict]], b: tuple[dict, list[dict]], device: str) -> bool:
    """Whether two outcomes are of the same run: bit for bit on the CPU, in their losses within rounding on CUDA."""
    if device == "cpu":
        return same(a, b)
    losses = [[row["train_loss"] for row in rows] for _, rows in (a, b)]
    return len(losses[0]) == len(losses[1]) and np.allclose(*losses, rtol=5e-2)


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


def small_run(root: Path) -> list[str]:
    """KEY VALUE pairs of a run on 40 + 20 digits, three steps of 16 an epoch, with a resnet14 as teacher."""
    data = load_dataset("digits", ".")
    arrays = {"train_images": data.train_images[:40], "train_labels": data.train_labels[:40]}
    arrays |= {"test_images": data.test_images[:20], "test_labels": data.test_labels[:20]}
    np.savez(root / "digits.npz", **{name: values.numpy() for name, values in arrays.items()})
    classes = 1 + int(max(arrays["train_labels"].max(), arrays["test_labels"].max()))
    return digits_opts(
        DATASET__TYPE="npz", DATASET__ROOT=root / "digits.npz", SOLVER__EPOCHS=2, SOLVER__BATCH_SIZE=16,
        DISTILLER__TEACHER="resnet14", DISTILLER__TEACHER_CKPT=save_teacher(root / "teacher", "resnet14", classes),
        DTKD__WARMUP=1, LOG__TEMPERATURE="samples", LOG__TENSORBOARD_FREQ=2, EXPERIMENT__NAME="run",
        CRD__NCE__K=8, CRD__FEAT__DIM=8,
    )  # fmt: skip


def changed(opts: list[str], prefix: Path, **changes: object) -> list[str]:
    """`opts` with LOG.PREFIX and others; in keywords, a double underscore stands for the dot."""
    words = [*opts, "LOG.PREFIX", str(prefix)]
    return words + [str(word) for key, value in changes.items() for word in (key.replace("__", "."), value)]


def run(opts: list[str], prefix: Path, resume: bool | str = False, **changes: object) -> Path:
    """Train a `small_run`; returns its folder."""
    words = changed(opts, prefix, **changes)
    train(config.load(None, words), resume)
    return prefix / "distill" / "run"


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


def forked(work) -> int:
    """Run `work()` in a forked child with its output thrown away; returns the child's process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        for descriptor in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        sys.stdout, sys.stderr = open(os.devnull, "w"), open(os.devnull, "w")  # noqa: SIM115
        work()
        status = 0
    finally:
        os._exit(status)


def killed(child: int) -> bool:
    """Wait for the child; whether a SIGKILL ended it. It must not have failed."""
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL), "a resumed run failed"
    return os.waitstatus_to_exitcode(status) == -signal.SIGKILL
