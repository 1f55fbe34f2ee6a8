"""tools/train.py: mdistiller's command line, and LSKD's options."""

import re

import pytest
import yaml
from helpers import called, digits_opts, evaluated, load_tool, save_teacher, small_run

from mdistiller.config import get, load
from mdistiller.dataset import get_dataset
from mdistiller.distillers import distiller_dict
from mdistiller.engine.cfg import lskd_pairs
from mdistiller.engine.utils import load_checkpoint, validate
from mdistiller.errors import UserError
from mdistiller.models import cifar_model_dict
from mdistiller.runs.recorder import read_metrics


def test_the_command_of_the_readmes(tmp_path):
    """--cfg, LSKD's options, pairs; --resume; then what eval says of the student."""
    words = small_run(tmp_path)
    root = words[words.index("DATASET.ROOT") + 1]
    (tmp_path / "kd.yaml").write_text(
        "EXPERIMENT: {TAG: 'kd,res14,res8', PROJECT: lab}\n"
        "DISTILLER: {TYPE: KD, TEACHER: resnet14, STUDENT: resnet8}\n"
        "SOLVER: {BATCH_SIZE: 16, EPOCHS: 2, TRAINER: base}\n"
        f"DATASET: {{TYPE: npz, ROOT: '{root}', NUM_WORKERS: 2}}\n"
        "KD: {LOSS: {CE_WEIGHT: 0.1}}\n"
    )
    lskd = ["--logit-stand", "--base-temp", "2", "--kd-weight", "9"]
    pairs = ["DISTILLER.TEACHER_CKPT", tmp_path / "teacher", "DEVICE", "cpu", "EXPERIMENT.NAME", "run"]
    done = called("train", "--cfg", "kd.yaml", *lskd, "SOLVER.EPOCHS", "1", *pairs, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "output" / "lab" / "run"
    cfg = yaml.safe_load((folder / "config.yaml").read_text())
    assert cfg["EXPERIMENT"]["LOGIT_STAND"] is True
    assert cfg["KD"] == {"TEMPERATURE": 2.0, "LOSS": {"CE_WEIGHT": 0.1, "KD_WEIGHT": 9.0}}
    done = called("train", "--cfg", "kd.yaml", "--resume", *lskd, *pairs, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [row["epoch"] for row in read_metrics(folder)] == [1, 2]
    done = called("train", "--cfg", "kd.yaml", "--resume", *pairs, cwd=tmp_path)
    assert done.returncode == 2 and "--resume: EXPERIMENT.LOGIT_STAND is False" in done.stderr


def test_evaluation_of_a_pretrained_network(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "download_ckpts" / "digits_teachers" / "resnet8_vanilla" / "ckpt_epoch_240.pth"
    file.parent.mkdir(parents=True)
    save_teacher(file)
    load_tool("eval").main(["-m", "resnet8", "-c", "pretrain", "-d", "digits", "-bs", "100"])
    figures = evaluated(capsys.readouterr().out)
    distiller = distiller_dict["NONE"](cifar_model_dict["resnet8"][0](num_classes=10))
    distiller.student.load_state_dict(load_checkpoint(file)["model"])
    top1, top5, _ = validate(get_dataset(load(None, ["DATASET.TYPE", "digits"]))[1], distiller)
    assert float(figures["top-1 (%)"]) == pytest.approx(top1, abs=0.3)
    assert float(figures["top-5 (%)"]) == pytest.approx(top5, abs=0.3)


def test_evaluation_on_data_of_other_classes_fetches_nothing(tmp_path, monkeypatch):
    """The default is cifar100, which would be fetched."""
    monkeypatch.chdir(tmp_path)
    file = save_teacher(tmp_path / "student_best")
    for says in (" (-d cifar100 has 100 classes)", "its data set: -d digits (-d cifar100 has 100 classes)"):
        with pytest.raises(UserError, match="holds resnet8 with 10 classes.*" + re.escape(says)):
            load_tool("eval").main(["-m", "resnet8", "-c", str(file)])
        (tmp_path / "config.yaml").write_text(load(None, digits_opts()).dump())
    with pytest.raises(UserError, match="resnet14 with 10 classes is wanted[^-]*$"):
        load_tool("eval").main(["-m", "resnet14", "-c", str(file), "-d", "digits"])
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("KD", (True, None, None), {"TEMPERATURE": 2.0, "LOSS.KD_WEIGHT": 9.0}),
        ("KD", (False, "3", None), {"TEMPERATURE": 3.0, "LOSS.KD_WEIGHT": 0.9}),
        ("DKD", (True, "3", "6"), {"T": 3.0, "ALPHA": 6.0, "BETA": 48.0, "CE_WEIGHT": 1.0}),
        ("MLKD", (True, "2.5", "9"), {"TEMPERATURES": [2.0, 3.0, 2.5, 5.0, 6.0], "LOSS.KD_WEIGHT": 9.0}),
        ("DIST", (True, None, "1"), {"TEMPERATURE": 2.0, "LOSS.KD_WEIGHT": 1.0, "BETA": 1.0}),
        ("RLD", (False, "2", "9"), {"T": 2.0, "ALPHA": 9.0, "BETA": 72.0}),
        ("CTKD", (True, None, None), {"LOSS.KD_WEIGHT": 9.0}),
    ],
)
def test_what_lskds_options_set(method, options, expected):
    given = ["DISTILLER.TYPE", method]
    cfg = load(None, given + lskd_pairs(load(None, given), *options))
    assert cfg.EXPERIMENT.LOGIT_STAND == options[0]
    for name, value in expected.items():
        assert get(cfg, f"{method}.{name}") == value, name
    assert method != "CTKD" or cfg.KD.TEMPERATURE == 2.0
