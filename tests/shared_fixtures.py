"""Fixtures of many tests, in the processes that run them."""

import os

import numpy as np
import pytest
import torch
from helpers import digits_opts, on, run, save_teacher, small_run, stopping_after
from webserver import Server

from mdistiller import download
from mdistiller.engine import build
from mdistiller.engine.solver import zero_momenta
from mdistiller.errors import Preempted
from mdistiller.runs import keeper
from mdistiller.runs.stop import Stop

torch.set_num_threads(1)
os.fsync = lambda _: None  # no test pulls the plug, and on some disks a run waits a quarter of a second for it


@pytest.fixture
def teacher_file(tmp_path):
    """A resnet8 for the ten digits, freshly initialised."""
    return save_teacher(tmp_path / "teacher.pth")


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Options of a `small_run`."""
    return small_run(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def undisturbed(small, tmp_path_factory):
    """`undisturbed(method, KEY=value ...)`: the folder of a `small_run` that nothing befell, trained once for all tests
    that hold theirs against it: ask for it before anything is patched.
    """
    root, folders = tmp_path_factory.mktemp("undisturbed"), {}

    def trained(method, device="cpu", **changes):
        changes = {"SEED": 0, "TEACHER_BANK": "auto", "SOLVER__TRAINER": "base"} | changes
        key = method, device, *changes.items()
        if key not in folders:
            opts = [*on(device, small), "DISTILLER.TYPE", method]
            folders[key] = run(opts, root / str(len(folders)), **changes)
        return folders[key]

    return trained


@pytest.fixture
def stop_after(monkeypatch):
    """`stop_after(items)`: SIGTERM reaches the next runs at that batch, of training or of a test; 0: none any more."""
    return lambda items: monkeypatch.setattr(build, "Stop", stopping_after(items) if items else Stop)


@pytest.fixture
def interrupted(stop_after):
    """`interrupted(train, *items)`: what `train(resume)` returns after SIGTERM has ended it at these batches."""

    def trained(train, *items, says="stopped by SIGTERM"):
        for number in items:
            stop_after(number)
            with pytest.raises(Preempted, match=says):
                train("auto")
        stop_after(0)
        return train(True)

    return trained


@pytest.fixture
def save_every_step(monkeypatch):
    """Checkpoints inside an epoch come at every step, however long they take, in runs with these options."""
    monkeypatch.setattr(keeper, "MOST_SHARE", float("inf"))
    return ["LOG.SAVE_EVERY_SECONDS", "1e-9"]


@pytest.fixture
def fused_kernels(monkeypatch):
    """As on CUDA: fused kernels, and a look at what they decided only where the loop waits for the device anyway."""

    def fused(parameters, momentum, weight_decay):
        optimizer = torch.optim.SGD([*parameters], 0.0, momentum, weight_decay=weight_decay, fused=True)
        zero_momenta(optimizer)
        return optimizer

    monkeypatch.setattr(build, "sgd", fused)


@pytest.fixture(scope="session")
def recorded_runs(tmp_path_factory):
    """Runs on 160 + 60 digits, 16 x 16: DTKD, three epochs in two seeds, with every sample's temperature; KD, one
    epoch, with summaries; resnet8 alone, one epoch.
    """
    from studies import few_digits

    root = tmp_path_factory.mktemp("recorded")
    np.savez(root / "digits.npz", **few_digits(160, 60))
    few = {"DATASET__TYPE": "npz", "DATASET__ROOT": root / "digits.npz"}
    distil = {"DISTILLER__TEACHER": "resnet8", "DISTILLER__TEACHER_CKPT": save_teacher(root / "teacher.pth")}
    samples = {"DISTILLER__TYPE": "DTKD", "LOG__TEMPERATURE": "samples", "LOG__SAVE_CHECKPOINT_FREQ": 1}
    wanted = {
        "dtkd-0": distil | samples | {"SEED": 0, "SOLVER__EPOCHS": 3},
        "dtkd-1": distil | samples | {"SEED": 1, "SOLVER__EPOCHS": 3},
        "kd": distil | {"DISTILLER__TYPE": "KD", "LOG__TEMPERATURE": "summary"},
        "alone": {"DISTILLER__TYPE": "NONE"},
    }
    for name, keys in wanted.items():
        run(digits_opts(EXPERIMENT__NAME=name, EXPERIMENT__PROJECT="runs", **few | keys), root)
    return root / "runs"


@pytest.fixture
def curves(monkeypatch):
    """The test accuracies of an epoch are those of CURVES for the run's seed, whatever it has learned."""
    from studies import CURVES

    from mdistiller.engine.evaluator import Scores
    from mdistiller.engine.trainer import Trainer

    def evaluate(self):
        return Scores(float(CURVES[self.feed.batches.seed][self.state.epoch]), None, 1.0)

    monkeypatch.setattr(Trainer, "evaluate", evaluate)


@pytest.fixture
def small_plan(tmp_path, monkeypatch):
    """The plan small.yaml, in the current folder."""
    from studies import write_plan

    monkeypatch.chdir(tmp_path)
    return write_plan(tmp_path)


@pytest.fixture
def server(monkeypatch):
    """A web server on this machine; a transfer that stalls for half a second is given up."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download, "TIMEOUT", (5, 0.5))
    server = Server()
    yield server
    server.shutdown()
    server.server_close()
