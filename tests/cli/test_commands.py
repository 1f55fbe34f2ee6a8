"""The commands that users type."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from helpers import ROOT, digits_opts, outcome, same, tool

from mdistiller.runs.recorder import read_metrics


def run_folder(root):
    (folder,) = (path.parent for path in root.rglob("config.yaml"))
    return folder


def test_train_then_eval_then_compare(tmp_path, teacher_file):
    opts = digits_opts(DISTILLER__TYPE="DTKD", DISTILLER__TEACHER="resnet8", DISTILLER__TEACHER_CKPT=teacher_file)
    done = tool("train_ours", *opts, "SOLVER.AMP", "bf16", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "epoch 1/1" in done.stdout
    assert "last" in done.stdout
    folder = run_folder(tmp_path / "output")
    assert folder.parent.name == "distill"
    assert folder.name.startswith("default+DATASET.TYPE:digits,DISTILLER.STUDENT:resnet8,SOLVER.EPOCHS:1,")
    (row,) = read_metrics(folder)
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["seed"] == 0
    assert environment["torch"] == torch.__version__
    assert "SOLVER.AMP" in environment["command"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["SOLVER"]["AMP"] == "bf16"

    done = tool("eval", "-m", "resnet8", "-c", folder / "student_latest", "-d", "digits", "-bs", 100, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    figures = dict(line.split()[:2] for line in done.stdout.splitlines()[1:])
    assert float(figures["top-1"]) == pytest.approx(row["test_acc"], abs=0.6)  # float32 here, bf16 there
    assert figures["parameters"] == "78,042"

    done = tool("compare", folder, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{row['test_acc']:.2f}" in done.stdout.splitlines()[-1]

    again = tool("train_ours", *opts, "SOLVER.AMP", "bf16", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert read_metrics(folder.with_name(folder.name + "~1")) == [row], "the earlier run is kept"


def test_a_killed_run_resumes_bit_for_bit(tmp_path, teacher_file):
    opts = digits_opts(
        DISTILLER__TYPE="DTKD", DISTILLER__TEACHER="resnet8", DISTILLER__TEACHER_CKPT=teacher_file, SOLVER__EPOCHS=3,
        SOLVER__LR_DECAY_STAGES="[1,2]", EXPERIMENT__NAME="run", LOG__SAVE_CHECKPOINT_FREQ=2,
    )  # fmt: skip
    done = tool("train_ours", *opts, "LOG.PREFIX", "whole", cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    command = [sys.executable, str(ROOT / "tools" / "train_ours.py"), *opts, "LOG.PREFIX", "parts"]
    victim = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    metrics = tmp_path / "parts" / "distill" / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.with_name("latest").exists():
        assert victim.poll() is None, victim.stdout.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    victim.stdout.close()
    assert len(read_metrics(metrics.parent)) < 3, "killed too late to show anything"

    other = tool("train_ours", *opts, "LOG.PREFIX", "parts", "--resume", "SOLVER.LR", "0.1", cwd=tmp_path)
    assert other.returncode == 2
    assert "SOLVER.LR is 0.1, but this run was started with 0.05" in other.stderr
    done = tool("train_ours", "--resume", *opts, "LOG.PREFIX", "parts", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resumed after epoch" in done.stdout
    assert same(*(outcome(tmp_path / name / "distill" / "run") for name in ("whole", "parts")))
    log = (metrics.parent / "worklog.txt").read_text()
    assert [log.count(f"epoch {n}/3") for n in (1, 2, 3)] == [1, 1, 1]


def test_a_missing_teacher_says_the_three_things_to_type_and_can_be_trained(tmp_path):
    opts = digits_opts(DISTILLER__TYPE="KD", DISTILLER__TEACHER="resnet8")
    done = tool("train_ours", *opts, cwd=tmp_path)
    assert done.returncode == 2
    for words in ("ckpt_epoch_240.pth", "DISTILLER.TEACHER_CKPT", "DISTILLER.TRAIN_TEACHER True"):
        assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [], "nothing is written"

    done = tool("train_ours", *opts, "DISTILLER.TRAIN_TEACHER", "True", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (stored,) = (tmp_path / "download_ckpts" / "digits_teachers" / "resnet8_vanilla").iterdir()
    assert stored.name.startswith("none,resnet8,digits,1-epochs,seed0,")
    assert done.stdout.count("result:") == 2
    (tmp_path / "output").rename(tmp_path / "before")
    done = tool("train_ours", *opts, "DISTILLER.TRAIN_TEACHER", "True", cwd=tmp_path)
    assert done.stdout.count("result:") == 1, "a stored teacher is not trained again"


def test_wandb_is_named_where_it_is_missing(tmp_path):
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    done = tool("train_ours", *digits_opts(LOG__WANDB=True), cwd=tmp_path)
    assert done.returncode == 2
    assert "pip install wandb" in done.stderr
