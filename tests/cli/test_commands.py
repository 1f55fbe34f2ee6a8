"""The commands that users type, one after the other. The first is a process of its own; the others start no Python."""

import importlib.util
import json
import re

import numpy as np
import pytest
import torch
import yaml
from helpers import changed, evaluated, load_tool, tool

from mdistiller.errors import UserError
from mdistiller.models import cifar_model_dict
from mdistiller.runs.recorder import read_metrics


def type_in(monkeypatch, name, *words):
    monkeypatch.setattr("sys.argv", [name, *map(str, words)])
    load_tool(name).main()


def test_train_then_eval_then_compare_then_train_again(small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [*small, "DISTILLER.TYPE", "DTKD", "SOLVER.AMP", "bf16", "SOLVER.EPOCHS", "1"]
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")  # it says on stderr what it imports
    done = tool("train_ours", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "mdistiller.models.libraries" in done.stderr and not re.search(r"\| +(timm|torchvision)\b", done.stderr)
    assert "epoch 1/1" in done.stdout and "last" in done.stdout
    folder = tmp_path / "output" / "distill" / "run"
    (row,) = read_metrics(folder)
    environment = json.loads((folder / "environment.json").read_text())
    assert (environment["seed"], environment["torch"]) == (0, torch.__version__)
    assert environment["command"] == ["train_ours.py", *words]
    assert yaml.safe_load((folder / "config.yaml").read_text())["SOLVER"]["AMP"] == "bf16"

    data = ["-d", "npz", "-r", small[small.index("DATASET.ROOT") + 1], "--device", "cpu"]
    type_in(monkeypatch, "eval", "-m", "resnet8", "-c", folder / "student_latest", *data)
    figures = evaluated(capsys.readouterr().out)
    assert float(figures["top-1 (%)"]) == pytest.approx(
        row["test_acc"], abs=10.1
    )  # float32 here, bf16 there; 20 images
    parameters = cifar_model_dict["resnet8"][0](num_classes=10).parameters()
    assert figures["parameters"] == f"{sum(p.numel() for p in parameters):,}"

    type_in(monkeypatch, "eval", "-r", folder, "--device", "cpu", "--json", "--out", tmp_path / "mistakes")
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["student, last", "student, best", "teacher"] and found["student, last"]["parameters"]
    assert found["student, last"]["top1"] == pytest.approx(float(figures["top-1 (%)"]), abs=0.005)
    assert json.loads((tmp_path / "mistakes" / "scores.json").read_text()) == found
    named = np.genfromtxt(tmp_path / "mistakes" / "confusion,student_last.csv", delimiter=",", skip_header=1)[:, 1:]
    assert named.sum() == 20 and np.trace(named) / 20 == pytest.approx(found["student, last"]["top1"] / 100)
    by_class = np.genfromtxt(tmp_path / "mistakes" / "classes,student_last.csv", delimiter=",", skip_header=1)
    assert by_class[:, 1] == pytest.approx(100 * np.diag(named) / 2) and (by_class[:, 3] == 2).all()

    type_in(monkeypatch, "compare", folder)
    assert f"{row['test_acc']:.2f}" in capsys.readouterr().out.splitlines()[-1]

    with pytest.raises(UserError, match=r"SOLVER\.LR is 0\.1, but this run was started with 0\.05"):
        type_in(monkeypatch, "train_ours", *words, "--resume", "SOLVER.LR", "0.1")
    type_in(monkeypatch, "train_ours", *words)
    assert read_metrics(folder.with_name("run~1")) == [row], "the earlier run is kept"


def test_a_missing_teacher_says_the_three_things_to_type_and_can_be_trained(small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = changed(small, tmp_path / "out", DISTILLER__TYPE="KD", DISTILLER__TEACHER_CKPT="", SOLVER__EPOCHS=1)
    with pytest.raises(UserError) as caught:
        type_in(monkeypatch, "train_ours", *words)
    for says in ("ckpt_epoch_240.pth", "tools/download.py", "DISTILLER.TEACHER_CKPT", "DISTILLER.TRAIN_TEACHER True"):
        assert any(says in line for line in caught.value.lines)
    assert list(tmp_path.iterdir()) == [], "nothing is written"

    type_in(monkeypatch, "train_ours", *words, "DISTILLER.TRAIN_TEACHER", "True")
    (stored,) = (tmp_path / "download_ckpts" / "npz_teachers" / "resnet14_vanilla").iterdir()
    assert stored.name.startswith("none,resnet14,npz,1-epochs,seed0,")
    assert capsys.readouterr().out.count("result:") == 2
    type_in(monkeypatch, "train_ours", *words, "DISTILLER.TRAIN_TEACHER", "True")
    assert capsys.readouterr().out.count("result:") == 1, "a stored teacher is not trained again"


def test_wandb_is_named_where_it_is_missing(small, monkeypatch):
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    with pytest.raises(UserError, match="pip install wandb"):
        type_in(monkeypatch, "train_ours", *small, "DISTILLER.TYPE", "NONE", "LOG.WANDB", "True")
