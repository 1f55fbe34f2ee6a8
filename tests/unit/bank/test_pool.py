"""Whether a teacher's logits go into a bank, into which, and who shares it."""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import CPU, changed, save_teacher

from mdistiller import config
from mdistiller.bank import pool
from mdistiller.bank.pool import choose, share_of_draws
from mdistiller.dataset import Batches, load_dataset
from mdistiller.engine.build import Workspace, build_trainer
from mdistiller.engine.method import build_distiller
from mdistiller.errors import UserError


@pytest.mark.parametrize(
    ("views", "draws", "held", "cuda", "mode"),
    [
        (162, 240, 0.0, False, "lazy"),
        (162, 240, 0.0, True, "full"),
        (162, 12, 0.0, False, "none"),
        (162, 12, 0.5, False, "lazy"),
        (162, 60, 0.0, True, "none"),
        (162, 60 * 5, 0.0, True, "full"),
        (162, 12, 1.0, True, "full"),
        (1, 2, 0.0, False, "lazy"),
        (1, 1, 0.0, False, "none"),
    ],
)
def test_auto_counts_the_teachers_passes(views, draws, held, cuda, mode):
    assert choose("auto", views, draws, held, cuda).mode == mode
    assert choose("lazy", views, draws, held, cuda).mode == "lazy"


def test_the_share_of_passes_that_is_said_is_that_of_a_run():
    """Against a simulation: draws of the plan, counted when they are new."""
    images = torch.zeros(50, 32, 32, 3, dtype=torch.uint8)
    data, seen, passes = Batches(images, torch.arange(50), (0.5,) * 3, (0.25,) * 3, 4, "crop"), set(), 0
    for epoch in range(1, 61):
        fresh = set(data.row_numbers(data.plan(epoch)).tolist()) - seen
        passes += len(fresh)
        seen |= fresh
    said = choose("auto", 81, 60, 0.0, False).reason
    saved = float(said.split("it saves ")[1].split(" %")[0]) / 100
    assert math.isclose(1 - passes / (60 * 50), saved, abs_tol=0.03)
    rows = SimpleNamespace(holds=lambda rows: torch.tensor([row in seen for row in rows.tolist()]))
    assert share_of_draws(rows, data, 60) == 1


@pytest.fixture
def opened(small, tmp_path):
    """`opened(**changes)`: the TeacherLogits of a run, and what is said about them; nothing is trained."""
    own = config.load(None, small)
    data = load_dataset(own.DATASET.TYPE, own.DATASET.ROOT)

    def open_logits(workspace=None, **changes):
        words = {"DISTILLER__TYPE": "KD", "TEACHER_BANK": "lazy", "TEACHER_BANK_FOLDER": tmp_path / "banks"} | changes
        cfg = config.load(None, changed(small, tmp_path, **words))
        open_logits.workspace = workspace or Workspace(data, CPU)
        file = Path(cfg.DISTILLER.TEACHER_CKPT)
        distiller = build_distiller(cfg, data, file, CPU)
        trainer, line = build_trainer(cfg, distiller, open_logits.workspace, tmp_path / "run", file)
        return trainer.feed.teacher, line

    return open_logits


def test_a_bank_is_of_one_teacher_one_augmentation_one_precision(opened, tmp_path):
    file = save_teacher(tmp_path / "other", "resnet14")
    state = torch.load(file)["model"]
    state["fc.bias"][3] += 1
    torch.save({"model": state}, file)
    folders = set()
    for changes in (
        {},
        {"SOLVER__AMP": "bf16"},
        {"DATASET__AUGMENT": "crop_flip"},
        {"TEACHER_BANK_DTYPE": "float32"},
        {"DISTILLER__TEACHER_CKPT": file},
    ):
        logits, line = opened(**changes)
        assert line.startswith("teacher bank: lazy, 0.0 % held, in ")
        folders.add(logits.bank.folder.name)
    assert len(folders) == 5
    assert opened(SEED=5, SOLVER__BATCH_SIZE=8, DISTILLER__TYPE="DTKD")[0].bank.folder.name in folders
    assert not (tmp_path / "banks").exists(), "nothing is written before something is computed"


def test_a_bank_under_another_ones_name_is_refused(opened):
    first, other = opened()[0].bank, opened(SOLVER__AMP="bf16")[0].bank
    first.rows.add(torch.tensor([3]), torch.zeros(1, 10, dtype=torch.float16))
    first.commit()
    shutil.copytree(first.folder, other.folder)
    with pytest.raises(UserError, match="was made with precision none, asked for is bf16"):
        opened(SOLVER__AMP="bf16")
    logits, line = opened(SOLVER__AMP="bf16", TEACHER_BANK="auto")
    assert logits.bank is None and line.startswith("teacher bank: none (") and "precision" in line


def test_students_of_one_teacher_share_it(opened):
    first, _ = opened()
    workspace = opened.workspace
    second, _ = opened(workspace, SEED=1, DISTILLER__TYPE="DTKD")
    assert first.bank is second.bank and first.inference is second.inference
    third, _ = opened(workspace, TEACHER_BANK="auto")
    assert third.bank is None and third.inference is first.inference


def test_a_checkpoint_with_a_long_name_has_a_bank(opened, tmp_path):
    logits, _ = opened(DISTILLER__TEACHER_CKPT=save_teacher(tmp_path / f"{'é' * 125}.pth", "resnet14"))
    assert len(logits.bank.folder.name.encode()) <= 255


def refused(path, key):
    raise UserError(f"set {key}")


@pytest.mark.parametrize("mode", ["full", "lazy"])
def test_what_the_disk_does_not_take_is_said_beforehand(opened, monkeypatch, tmp_path, mode):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="needs 0.. MB of disk space, and .* TEACHER_BANK off"):
        opened(TEACHER_BANK=mode)
    monkeypatch.undo()
    monkeypatch.setattr(pool, "check_writable", refused)
    with pytest.raises(UserError, match="TEACHER_BANK_FOLDER"):
        opened(TEACHER_BANK=mode)
    monkeypatch.setattr(pool, "choose", lambda *given: pool.Choice(mode, "as on CUDA"))
    assert opened(TEACHER_BANK="auto")[1] == "teacher bank: none (set TEACHER_BANK_FOLDER)"
    assert not (tmp_path / "banks").exists()


def test_banks_of_images_keep_their_name():
    """It comes from the description, its order included: banks that are on disk would not be found again."""
    cfg = config.load(None, ["DISTILLER.TYPE", "KD", "DISTILLER.TEACHER", "resnet20"])
    images, labels = torch.zeros(4, 32, 32, 3, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    batches = Batches(images, labels, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), 2, "crop_flip")
    views = pool.description(cfg, batches, "weights", "data")
    names = ["teacher", "weights", "data", "version", "augment", "views", "padding", "scale", "precision", "stored"]
    assert [*views] == [*names, "device"]
