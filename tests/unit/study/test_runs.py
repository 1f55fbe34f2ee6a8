"""Runs read from folders, and the groups of seeds that may be averaged."""

import json

import pytest
import yaml
from studies import write_run

from mdistiller import config
from mdistiller.errors import UserError
from mdistiller.study.groups import differing, group_runs
from mdistiller.study.networks import images_of
from mdistiller.study.runs import read_run, read_runs, rule_of

SCORES = ("test_acc", "best_acc", "train_acc", "train_loss")


def test_seeds_are_averaged_and_nothing_else(tmp_path):
    pair = {"DISTILLER__TYPE": "KD", "DISTILLER__TEACHER": "resnet20"}
    folders = [
        write_run(tmp_path, "a0", [50.0, 60.0], 0),
        write_run(tmp_path, "b0", [10.0, 90.0], 0, SOLVER__LR=0.1),
        write_run(tmp_path, "a1", [70.0, 64.0], 1, DATASET__ROOT="elsewhere", EXPERIMENT__NAME="other"),
        write_run(tmp_path, "a2", [50.0, 68.0], 2, finished=1),
        write_run(tmp_path, "k0", [50.0, 60.0], 0, TEACHER_BANK="lazy", **pair),
        write_run(tmp_path, "k1", [5.0, 6.0], 1, EXPERIMENT__LOGIT_STAND=True, **pair),
        write_run(tmp_path, "k2", [5.0, 6.0], 2, TEACHER_BANK="auto", SOLVER__STEP="eager", **pair),
        write_run(tmp_path, "a0~1", [50.0, 60.0], 0),
    ]
    groups, notes = group_runs([read_run(folder) for folder in folders])
    assert [[run.name for run in group.runs] for group in groups] == [
        ["a0", "a1"], ["b0"], ["a2"], ["k0", "k2"], ["k1"],
    ]  # fmt: skip
    assert notes == ["a0~1: left out, it repeats SEED 0 of a0"]
    assert groups[0].last == (62, pytest.approx(8**0.5), 2)
    assert groups[0].best == (65, pytest.approx(50**0.5), 2)
    assert groups[2].schedule == "1 of 2 epochs"
    assert [group.label for group in groups] == [
        "alone, resnet8, 2 epochs, SOLVER.LR 0.05",
        "alone, resnet8, 2 epochs, SOLVER.LR 0.1",
        "alone, resnet8, 1 of 2 epochs",
        "KD, resnet20 → resnet8, 2 epochs",
        "KD+LSKD, resnet20 → resnet8, 2 epochs",
    ]
    assert [groups[0].name, groups[4].name] == ["NONE,resnet8", "KD+std,resnet20,resnet8"]


def test_other_data_and_other_teachers_are_other_groups(tmp_path):
    def run(name, seed, data, teacher="", **keys):
        folder = write_run(tmp_path, name, [50.0, 60.0], seed, **keys)
        (folder / "environment.json").write_text(json.dumps({"sha256": {"data": data, "teacher": teacher}}))
        return folder

    pair = {"DISTILLER__TYPE": "KD", "DISTILLER__TEACHER": "resnet20"}
    folders = [
        run("a0", 0, "aaaaaaaaaa", DATASET__TYPE="npz", DATASET__ROOT="one.npz"),
        run("a1", 1, "bbbbbbbbbb", DATASET__TYPE="npz", DATASET__ROOT="two.npz"),
        run("a2", 0, "cccccccccc", DATASET__TYPE="npz", DATASET__ROOT="two.npz"),
        run("a3", 3, "aaaaaaaaaa", DATASET__TYPE="npz", DATASET__ROOT="moved/one.npz"),
        run("k0", 0, "d", "t1", DISTILLER__TEACHER_CKPT="short/student_best", **pair),
        run("k1", 0, "d", "t2", DISTILLER__TEACHER_CKPT="long/student_best", **pair),
        run("k2", 1, "d", "t2", DISTILLER__TEACHER_CKPT="long/student_best", **pair),
    ]
    groups, notes = group_runs([read_run(folder) for folder in folders])
    assert [[run.name for run in group.runs] for group in groups] == [
        ["a0", "a3"], ["a1"], ["a2"], ["k0"], ["k1", "k2"],
    ]  # fmt: skip
    assert not notes
    assert [group.extra for group in groups] == [
        "data one.npz", "data bbbbbbbb", "data cccccccc", "teacher checkpoint short/student_best",
        "teacher checkpoint long/student_best",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("opts", "rule"),
    [
        (["DISTILLER.TYPE", "NONE"], "-"),
        (["DISTILLER.TYPE", "AT"], "-"),
        (["DISTILLER.TYPE", "DTKD"], "max_logit"),
        (["DISTILLER.TYPE", "KD"], "fixed"),
        (["DISTILLER.TYPE", "KD", "TEMPERATURE.RULE", "erratum"], "erratum"),
        (["DISTILLER.TYPE", "KD", "EXPERIMENT.LOGIT_STAND", "True"], "std"),
    ],
)
def test_rule(opts, rule):
    assert rule_of(config.load(None, opts)) == rule


def test_keys_that_a_run_lacks_have_their_defaults(tmp_path):
    folder = write_run(tmp_path, "old", [50.0], DISTILLER__TYPE="DTKD")
    before = read_run(folder)
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    del tree["TEMPERATURE"], tree["EXPERIMENT"]["LOGIT_STAND"], tree["TEACHER_BANK"]
    (folder / "config.yaml").write_text(yaml.dump(tree))
    after = read_run(folder, ["DEVICE", "cuda"])
    assert rule_of(after.cfg) == "max_logit"
    assert after.hash == before.hash
    assert after.cfg.DEVICE == "cuda"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.yaml", "SEED: 1", "it lacks DEVICE"),
        ("config.yaml", "SOLVER: [1]", "it lacks"),
        ("config.yaml", "_BASE_: whole.yaml\nTEMPERATURE: 3", "TEMPERATURE is of another kind"),
        ("config.yaml", "_BASE_: whole.yaml\nSEED: one", "SEED is of another kind"),
        ("metrics.jsonl", "", "no epoch is finished yet"),
        ("metrics.jsonl", '{"epoch": 1}', "other than the epochs"),
        ("metrics.jsonl", json.dumps({"epoch": 2} | dict.fromkeys(SCORES, 1)), "other than the epochs"),
    ],
)
def test_a_folder_that_is_no_run_is_named(tmp_path, name, text, message):
    folder = write_run(tmp_path, "run", [50.0])
    (folder / "whole.yaml").write_text((folder / "config.yaml").read_text())
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_run(folder)
    with pytest.raises(UserError, match="is no run's folder"):
        read_run(tmp_path)


def test_files_beside_runs_are_passed_over(tmp_path):
    write_run(tmp_path, "run", [50.0])
    for name in ("seeds.json", "notes.txt"):
        (tmp_path / name).write_text("{}")
    assert [run.name for run in read_runs(sorted(tmp_path.iterdir()))] == ["run"]
    with pytest.raises(UserError, match="notes.txt: is no run's folder"):
        read_runs([tmp_path / "notes.txt"])


def test_seconds_are_shared_as_long_as_others_are_there(tmp_path):
    folder = write_run(tmp_path, "run", [50.0, 60.0])
    sessions = [{"students": 2, "epoch": 0}, {"students": 1, "epoch": 1, "git": {"commit": "0", "clean": True}}]
    (folder / "environment.json").write_text(json.dumps({"sessions": sessions}))
    run = read_run(folder)
    run.rows[0]["epoch_seconds"] = run.rows[1]["epoch_seconds"] = 8.0
    assert (run.seconds, round(run.students, 2)) == (16.0, 1.33), "4 + 8 of its own"
    assert run.commits == [{"commit": "0", "clean": True}]


def test_differing_keys_come_with_their_values():
    assert differing([{"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}]) == {"b": [2, 3], "c": ["absent", 4]}


def test_images_of_another_size_are_other_images(tmp_path):
    """So that what a teacher says of them is not taken for these."""
    runs = [
        read_run(write_run(tmp_path, f"r{size}", [50.0], DATASET__TYPE="imagefolder", DATASET__SIZE=size))
        for size in (32, 64)
    ]
    same = read_run(write_run(tmp_path, "w", [50.0], DATASET__TYPE="imagefolder", DATASET__SIZE=32, LOG__WANDB=True))
    assert images_of(runs[0]) != images_of(runs[1]) and images_of(runs[0]) == images_of(same)
