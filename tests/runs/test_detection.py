"""Runs of detectors: their figures, a stop inside an epoch, several processes, several seeds."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers import called, on_ranks, outcome, refused, run, same
from torch.utils._pytree import tree_map_only

from mdistiller import config
from mdistiller.dataset import DetectionBatches
from mdistiller.engine import detection, method
from mdistiller.engine.run import train
from mdistiller.engine.seeds import train_seeds
from mdistiller.engine.task import Task
from mdistiller.models import build_model
from mdistiller.runs import checkpoint
from mdistiller.runs.recorder import read_metrics

OPTS = """DATASET.TYPE scenes DATASET.SCENES.TRAIN 10 DATASET.SCENES.TEST 5 DATASET.SIZE 64 DISTILLER.TYPE DTKD
DISTILLER.STUDENT fasterrcnn_resnet8 DISTILLER.TEACHER fasterrcnn_resnet14 SOLVER.BATCH_SIZE 4 SOLVER.EPOCHS 2
SOLVER.LR 0.01 LOG.TENSORBOARD_FREQ 1 LOG.SAVE_EVERY_SECONDS 0 EXPERIMENT.NAME run DEVICE cpu DTKD.WARMUP 1
DATASET.TEST.BATCH_SIZE 2 LOG.TEMPERATURE samples""".split()


@pytest.fixture(scope="module", autouse=True)
def blank_pictures():
    """Nobody looks at what detectors find: to draw that takes as long as the run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detection, "png", lambda image: b"")
        yield


@pytest.fixture(scope="module")
def detectors(tmp_path_factory, blank_pictures):
    """A run's folder, and its options."""
    folder = tmp_path_factory.mktemp("detectors")
    torch.manual_seed(5)
    checkpoint.save({"model": build_model("fasterrcnn_resnet14", 11, "scenes").state_dict()}, folder / "teacher.pth")
    opts = [*OPTS, "DISTILLER.TEACHER_CKPT", str(folder / "teacher.pth")]
    return run(opts, folder), opts


def test_rows_have_average_precision(detectors):
    rows = read_metrics(detectors[0])
    assert [row["epoch"] for row in rows] == [1, 2]
    for row in rows:
        assert {"AP", "AP50", "AP75", "APs", "APm", "APl", "train_loss", "images_per_second"} <= {*row}
        assert row["test_acc"] == row["AP"] and "train_acc" not in row
        assert {*row["train_losses"]} == {
            f"loss/loss_{name}" for name in ("ce", "kd", "box_reg", "objectness", "rpn_box_reg")
        }
        assert row["temperature"]["t_student"]["mean"] > 0
    assert (detectors[0] / "detections.png").exists()
    assert "10 classes and background" in (detectors[0] / "worklog.txt").read_text()


def test_a_stopped_run_goes_on_to_the_same_bits(detectors, tmp_path, interrupted):
    items = 2, 5, 3  # in the teacher's test; after step 2 of epoch 1; in its test
    parts = interrupted(lambda resume: run(detectors[1], tmp_path, resume), *items)
    assert same(outcome(detectors[0]), outcome(parts))
    assert (detectors[0] / "temperatures.bin").read_bytes() == (parts / "temperatures.bin").read_bytes()


def test_students_side_by_side_are_the_runs_alone(detectors, tmp_path):
    pairs = dict(zip(detectors[1][::2], detectors[1][1::2], strict=True)) | {"SOLVER.EPOCHS": 1}
    tree = {}
    for key, value in pairs.items():
        *sections, leaf = key.split(".")
        place = functools.reduce(lambda node, part: node.setdefault(part, {}), sections, tree)
        place[leaf] = value
    del tree["EXPERIMENT"]["NAME"]  # which would be the longer one's of all options
    (tmp_path / "opts.yaml").write_text(yaml.safe_dump(tree))
    given = ["LOG.PREFIX", str(tmp_path)]
    summary = train_seeds(config.load(tmp_path / "opts.yaml", given), [0, 3])
    alone = run([*detectors[1], "SOLVER.EPOCHS", "1"], tmp_path / "alone", SEED=3)
    assert same(outcome(Path(summary["runs"][1]["folder"])), outcome(alone))


def train_in_float64(opts):
    prepare, batch = method.prepare_parts, DetectionBatches.batch
    method.prepare_parts = lambda distiller, *given: prepare(distiller, *given).double()

    def doubled(batches, *given):
        return tree_map_only(
            torch.Tensor, lambda value: value.double() if value.is_floating_point() else value, batch(batches, *given)
        )

    DetectionBatches.batch = doubled
    detection.Detection.leave = Task.leave  # a picture, of images in float32
    train(config.load(None, opts))


@pytest.mark.parametrize("name", ["DTKD", pytest.param("REVIEWKD", marks=pytest.mark.slow)])
def test_two_processes_give_what_one_gives(detectors, tmp_path, name):
    found = []
    for world in (1, 2):
        given = ["SOLVER.SYNC_BN", "True", "LOG.PREFIX", str(tmp_path / str(world)), "DISTILLER.TYPE", name]
        work = functools.partial(train_in_float64, [*detectors[1], *given])
        assert on_ranks(world, work, tmp_path / "errors") == [0] * world, (tmp_path / "errors0").read_text()
        found.append(outcome(next((tmp_path / str(world)).glob("*/*/latest")).parent))
    (state, rows), (other, others) = found
    for key, value in state["model"].items():
        assert torch.allclose(value, other["model"][key], rtol=1e-9, atol=1e-12), key
    assert others[-1]["train_losses"] == pytest.approx(rows[-1]["train_losses"], rel=1e-5)
    assert others[-1]["AP"] == pytest.approx(rows[-1]["AP"], abs=1e-9)


def test_what_the_run_left_is_evaluated(detectors, tmp_path):
    found = called("eval", "-r", detectors[0], "--json", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    reports = json.loads(found.stdout)
    assert {*reports} == {"student, last", "student, best", "teacher"}
    assert reports["student, last"]["AP"] == pytest.approx(read_metrics(detectors[0])[-1]["AP"], abs=1e-9)
    said = f"the teacher on the test set: AP {reports['teacher']['AP']:.2f}, AP50"
    assert (detectors[0] / "worklog.txt").read_text().count(said) == 1


def test_a_teacher_of_other_classes_is_left_out(detectors, tmp_path):
    folder = shutil.copytree(detectors[0], tmp_path / "run")
    checkpoint.save({"model": build_model("fasterrcnn_resnet14", 4, "scenes").state_dict()}, tmp_path / "four.pth")
    given = yaml.safe_load((folder / "config.yaml").read_text())
    given["DISTILLER"] |= {"NEW_HEAD": True, "TEACHER_CKPT": str(tmp_path / "four.pth")}
    (folder / "config.yaml").write_text(yaml.safe_dump(given))
    found = called("eval", "-r", folder, "--json", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert {*json.loads(found.stdout)} == {"student, last", "student, best"}
    assert "the teacher fasterrcnn_resnet14 has no last layer for these classes" in found.stderr


def test_a_classifier_is_no_teacher(detectors, tmp_path):
    with refused("unknown detector 'resnet8'"):
        run(detectors[1], tmp_path, DISTILLER__TEACHER="resnet8")
    assert not any(tmp_path.iterdir())


def test_a_detector_is_exported_as_onnx_alone(detectors, tmp_path):
    found = called("export", detectors[0] / "student_latest", "--out", tmp_path / "out", cwd=tmp_path)
    assert found.returncode == 2 and "set --to onnx" in found.stderr and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_exported_detector_finds_the_same(detectors, tmp_path):
    pytest.importorskip("onnxruntime")
    found = called("export", detectors[0] / "student_latest", "--to", "onnx", "--out", tmp_path / "out", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    eager, onnx = json.loads((tmp_path / "out" / "export.json").read_text())["forms"]
    assert onnx["form"] == "onnx" and onnx["ap"] == pytest.approx(eager["ap"], abs=0.05)
    assert "10 triangle" in (tmp_path / "out" / "README.md").read_text()
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1
