"""Runs on folders of pictures: a stream trains as memory does, and its teacher's logits are kept as they are."""

import pytest
import torch
from helpers import refused, run, same, save_teacher, write_folder
from safetensors import safe_open
from safetensors.torch import save_file

from mdistiller.bank.streamed import StreamedLogits
from mdistiller.errors import UserError
from mdistiller.runs.recorder import read_metrics


@pytest.fixture
def words(tmp_path, monkeypatch):
    """KEY VALUE pairs of a run on 15 + 15 pictures of three classes, in the current folder."""
    monkeypatch.chdir(tmp_path)
    root, teacher = write_folder(tmp_path / "data", ("a", "b", "c"), 5), save_teacher(tmp_path / "t", "resnet14", 3)
    return [
        "DATASET.TYPE", "imagefolder", "DATASET.ROOT", str(root), "DATASET.SIZE", "16", "DISTILLER.STUDENT", "resnet8",
        "DISTILLER.TEACHER", "resnet14", "DISTILLER.TEACHER_CKPT", str(teacher), "DISTILLER.TYPE", "DTKD",
        "SOLVER.BATCH_SIZE", "8", "SOLVER.EPOCHS", "2", "EXPERIMENT.NAME", "run",
    ]  # fmt: skip


def test_a_streamed_run_is_the_run_from_memory(words, tmp_path, stop_after):
    words += ["DATASET.AUGMENT", "crop_flip"]
    whole = run(words, tmp_path / "memory")
    words += ["DATASET.MEMORY", "0"]
    streamed = run(words, tmp_path / "stream")
    keys = ("train_loss", "train_acc", "test_acc", "test_loss")
    rows = [[{key: row[key] for key in keys} for row in read_metrics(folder)] for folder in (whole, streamed)]
    assert rows[0] == rows[1]
    states = [torch.load(folder / "student_latest", weights_only=True)["model"] for folder in (whole, streamed)]
    assert same(*states)
    stop_after(5)
    with pytest.raises(UserError, match="SIGTERM"):
        run(words, tmp_path / "parts", resume="auto")
    stop_after(0)
    parts = run(words, tmp_path / "parts", resume=True)
    assert same(torch.load(parts / "student_latest", weights_only=True)["model"], states[0])


def test_later_runs_of_a_seed_find_the_teachers_logits_of_streamed_pictures(words, tmp_path, stop_after, monkeypatch):
    passes, of_teacher = [], StreamedLogits.passes
    monkeypatch.setattr(StreamedLogits, "passes", lambda *given: passes.append(1) or of_teacher(*given))

    def weights(name, *more):
        passes.clear()
        folder = run([*words, "DATASET.NUM_WORKERS", "0", *more], tmp_path / name, resume="auto")
        return torch.load(folder / "student_latest", weights_only=True)["model"]

    without, lazy = weights("auto"), ("TEACHER_BANK", "lazy", "TEACHER_BANK_FOLDER", str(tmp_path / "banks"))
    assert len(passes) == 4  # two batches an epoch
    stop_after(5)
    with pytest.raises(UserError, match="SIGTERM"):
        weights("lazy", *lazy)
    stop_after(0)
    assert same(weights("lazy", *lazy), without) and same(weights("warm", *lazy), without)
    assert len(passes) == 1  # which compares
    assert not same(weights("other", *lazy, "SEED", "1"), without) and len(passes) == 4
    kd = "DISTILLER.TYPE", "KD", "KD.TEMPERATURE", "1.0"
    assert not same(weights("kd", *lazy, *kd), without) and len(passes) == 1
    cut = weights("kd2", *lazy, *kd, "TEACHER_BANK_TOP_K", "1")
    assert len(passes) == 4 and same(weights("kd3", *lazy, *kd, "TEACHER_BANK_TOP_K", "1"), cut) and len(passes) == 1
    for more, says in (
        ((*lazy, "TEACHER_BANK_TOP_K", "1"), "temperature 1"),
        (("TEACHER_BANK", "full"), "set lazy"),
        ((*kd, "TEACHER_BANK", "off", "TEACHER_BANK_TOP_K", "1"), "TEACHER_BANK off keeps no logits"),
        ((*kd, "TEACHER_BANK_TOP_K", "1", "DATASET.MEMORY", "1", "DATASET.AUGMENT", "crop_flip"), "streamed pictures"),
    ):
        with refused(says):
            weights("refused", *more)
        assert not (tmp_path / "refused").exists()
    for file in (tmp_path / "banks").rglob("*.safetensors"):
        with safe_open(file, "pt") as held:
            rows, values, said = held.get_tensor("rows"), held.get_tensor("values"), held.metadata()
        save_file({"rows": rows, "values": values + 1}, file, said)
    with refused("holds other logits than this teacher gives"):
        weights("changed", *lazy)
