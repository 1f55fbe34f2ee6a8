"""The loop against a plain PyTorch loop, what it leaves, and how its steps run."""

import re

import pytest
import torch
from helpers import agree, gpu, make_trainer, on, outcome, run, save_teacher
from torch.nn import functional as F

from mdistiller import config
from mdistiller.engine import build, stepmode
from mdistiller.engine import run as runs
from mdistiller.engine.graph import GraphStep
from mdistiller.engine.teachers import teacher_config
from mdistiller.engine.trainer import Options
from mdistiller.errors import UserError
from mdistiller.runs import checkpoint, recorder
from mdistiller.runs.recorder import Recorder, read_metrics


def trainer(folder, method="NONE", epochs=2, **given):
    return make_trainer(method, folder, ahead=False, options=Options(epochs), **given)


@pytest.mark.parametrize(("method", "tolerance"), [("NONE", 0), ("KD", 2e-5)])
def test_training_equals_a_plain_pytorch_loop(tmp_path, method, tolerance):
    """What a user would write by hand, on the same batches."""
    ours, hand = trainer(tmp_path, method), trainer(tmp_path, method)
    student, teacher = hand.distiller.student.train(), getattr(hand.distiller, "teacher", None)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2], 0.1)
    for epoch in (1, 2, 3):
        for image, target, _ in hand.feed.batches.epoch(epoch):
            v, _ = student(image)
            loss = F.cross_entropy(v, target)
            if teacher is not None:
                with torch.no_grad():
                    u, _ = teacher(image)
                kd = F.kl_div(F.log_softmax(v / 4, 1), F.softmax(u / 4, 1), reduction="batchmean") * 16
                loss = 0.1 * loss + 0.9 * kd
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
    ours.options = Options(3)
    ours.fit(Recorder(tmp_path, 3))
    for key, value in ours.distiller.student.state_dict().items():
        torch.testing.assert_close(value, student.state_dict()[key], rtol=tolerance, atol=tolerance, msg=key)


def test_files_and_rows(tmp_path):
    result = trainer(tmp_path, epochs=3).fit(Recorder(tmp_path, 3))
    files = {"latest", "previous", "best", "student_latest", "student_best", "epoch_2", "student_2"}
    assert {path.name for path in tmp_path.iterdir()} == files | {"metrics.jsonl", "worklog.txt", "train.events"}
    rows = read_metrics(tmp_path)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    fields = "epoch lr train_loss train_acc test_acc test_acc_top5 test_loss epoch_seconds images_per_second".split()
    assert set(fields) < set(rows[0])
    assert [row["lr"] for row in rows] == pytest.approx([0.02, 0.02, 0.002])
    assert result["best_acc"] == max(row["test_acc"] for row in rows) == rows[result["best_epoch"] - 1]["test_acc"]
    assert result["last_acc"] == rows[-1]["test_acc"]
    assert list((tmp_path / "train.events").iterdir())
    assert "result: test top-1" in (tmp_path / "worklog.txt").read_text()
    assert torch.load(tmp_path / "student_best", weights_only=True)["epoch"] == result["best_epoch"]


@pytest.mark.parametrize("moment", ["before the checkpoint", "after it"])
def test_a_kill_at_an_epochs_end_costs_no_row_and_doubles_none(tmp_path, monkeypatch, moment):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    trainer(tmp_path / "whole").fit(Recorder(tmp_path / "whole", 2))
    killed, folder = trainer(tmp_path / "killed"), tmp_path / "killed"

    def save(recorder, save=killed.save):
        if killed.state.epoch == 1 or moment == "after it":
            save(recorder)
        if killed.state.epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(killed, "save", save)
    with pytest.raises(KeyboardInterrupt):
        killed.fit(Recorder(folder, 2))
    again = trainer(folder)
    again.state.load(*again.keeper.restore())
    again.fit(Recorder(folder, 2, again.state.epoch, again.state.log_bytes))
    losses = [[(row["epoch"], row["train_loss"]) for row in read_metrics(tmp_path / n)] for n in ("whole", "killed")]
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_a_log_has_a_line_every_few_steps_where_that_is_asked_for(small, tmp_path, capsys, monkeypatch):
    """Three steps an epoch; the epoch's own line stands for its last one. A terminal has its bar instead."""

    def lines(name, words):
        folder = run([*small, "DISTILLER.TYPE", "NONE", *words], tmp_path / name)
        assert "  step" not in (folder / "worklog.txt").read_text()
        return re.findall(r"^epoch (\d/2  step \d/3)  loss +\d\.\d{3}  train +[\d.]+$", capsys.readouterr().out, re.M)

    assert lines("default", []) == []
    assert lines("two", ["LOG.PRINT_FREQ", "2"]) == ["1/2  step 2/3", "2/2  step 2/3"]
    assert len(lines("one", ["LOG.PRINT_FREQ", "1"])) == 4
    monkeypatch.setattr(recorder, "shows_bars", lambda: True)
    assert lines("terminal", ["LOG.PRINT_FREQ", "1"]) == []


def test_emulated_bfloat16_is_said(small, tmp_path, monkeypatch):
    words, said = [*small, "DISTILLER.TYPE", "NONE", "SOLVER.EPOCHS", "1", "SOLVER.AMP", "bf16"], []
    for present in (True, False):
        monkeypatch.setattr(runs, "has_bf16", lambda device, present=present: present)
        folder = run(words, tmp_path / str(present))
        said.append("SOLVER.AMP none would be several times faster" in (folder / "worklog.txt").read_text())
    assert said == [False, True]


# Graphs: tests/unit/test_graph.py has their steps


def test_the_run_says_once_why_its_steps_are_no_graph(small, tmp_path, monkeypatch):
    def fails(work, beside):
        raise RuntimeError("no graphs here")

    monkeypatch.setattr(stepmode, "GraphStep", lambda *given: GraphStep(*given, fails))
    monkeypatch.setattr(build, "uses_graph", lambda cfg, device, capturable: True)
    folder = run([*small, "DISTILLER.TYPE", "KD"], tmp_path)
    assert (folder / "worklog.txt").read_text().count("not as a graph: no graphs here") == 1


@pytest.mark.parametrize(("bank", "exclusive"), [("off", True), ("full", True), ("lazy", False), ("auto", False)])
def test_a_step_is_not_alone_beside_the_teachers_own_graph(small, tmp_path, monkeypatch, bank, exclusive):
    """On CUDA graphs that run at the same time would read each other's place in the generator."""
    seen = []

    class Kept(GraphStep):
        def _watch(self, *given):
            seen.append(self.exclusive)
            return "seen"

    monkeypatch.setattr(stepmode, "GraphStep", Kept)
    monkeypatch.setattr(build, "uses_graph", lambda cfg, device, capturable: True)
    run([*small, "DISTILLER.TYPE", "KD", "TEACHER_BANK", bank], tmp_path, TEACHER_BANK_FOLDER=tmp_path / "banks")
    assert seen == [exclusive]


@gpu
@pytest.mark.parametrize("step", ["graph", "compile"])
def test_a_run_on_cuda_is_the_eager_one(small, tmp_path, step):
    opts = [*on("cuda", small), "DISTILLER.TYPE", "DTKD"]
    eager, other = (run(opts, tmp_path / name, SOLVER__STEP=name) for name in ("eager", step))
    assert "steps run" not in (other / "worklog.txt").read_text()
    assert agree(outcome(eager), outcome(other), "cuda")


@gpu
def test_an_epoch_on_cuda_is_that_on_the_cpu(tmp_path):
    losses = []
    for device in ("cpu", "cuda"):
        (tmp_path / device).mkdir()
        trainer(tmp_path / device, epochs=1, device=torch.device(device)).fit(Recorder(tmp_path / device, 1))
        losses.append(read_metrics(tmp_path / device)[0]["train_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_student_starts_from_a_checkpoint(small, tmp_path):
    """With a rate of next to nothing it keeps those weights; a teacher that is trained for it does not start there."""
    file = save_teacher(tmp_path / "start.pth", "resnet8")
    weights = checkpoint.load(file)["model"]
    opts = [*small, "SOLVER.EPOCHS", "1", "SOLVER.LR", "1e-12", "DISTILLER.TYPE", "NONE", "DISTILLER.STUDENT_CKPT"]
    student = checkpoint.load(run([*opts, str(file)], tmp_path / "runs") / "student_latest")["model"]
    for name, value in weights.items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(student[name], value, rtol=0, atol=1e-8)
    assert teacher_config(config.load(None, opts + [str(file)])).DISTILLER.STUDENT_CKPT == ""
    with pytest.raises(UserError, match=r"start\.pthx"):
        run([*opts, f"{file}x"], tmp_path / "runs")
