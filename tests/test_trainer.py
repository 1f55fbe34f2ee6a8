"""The loop against a plain PyTorch loop, the schedule, evaluation, interruptions inside a process."""

import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mdistiller.config import CFG
from mdistiller.dataset import Batches
from mdistiller.distillers import distiller_dict
from mdistiller.engine.evaluator import evaluate
from mdistiller.engine.solver import MultiStep, sgd
from mdistiller.engine.step import Step
from mdistiller.engine.trainer import Trainer
from mdistiller.errors import TrainingDiverged
from mdistiller.models import cifar_model_dict
from mdistiller.runs import checkpoint
from mdistiller.runs.recorder import Recorder, line_of, read_metrics

CPU = torch.device("cpu")


def data(n=40, batch_size=16, augment="crop_flip"):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return Batches(images, torch.arange(n) % 10, (0.5,) * 3, (0.25,) * 3, batch_size, CPU, augment, seed=3)


def models(name):
    torch.manual_seed(0)
    student, teacher = (cifar_model_dict[m][0](num_classes=10) for m in ("resnet8", "resnet14"))
    return (student,) if name == "NONE" else (student, teacher.eval())


def trainer(name, folder, epochs=2, lr=0.05):
    parts = models(name)
    distiller = distiller_dict[name](*parts) if name == "NONE" else distiller_dict[name](*parts, CFG)
    optimizer = sgd(distiller.get_learnable_parameters(), 0.9, 5e-4)
    schedule = MultiStep(lr, (1,), 0.1)
    return Trainer(distiller, Step(distiller, optimizer, CPU), schedule, data(), data(augment=None), epochs, folder)


def plain_loop(name, epochs=2, lr=0.05):
    """What a user would write by hand on the same batches."""
    parts = models(name)
    student = parts[0].train()
    optimizer = torch.optim.SGD(student.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1], 0.1)
    for epoch in range(1, epochs + 1):
        for image, target, _ in data().epoch(epoch):
            v, _ = student(image)
            loss = F.cross_entropy(v, target)
            if name != "NONE":
                with torch.no_grad():
                    u, _ = parts[1](image)
                kd = F.kl_div(F.log_softmax(v / 4, 1), F.softmax(u / 4, 1), reduction="batchmean") * 16
                loss = 0.1 * loss + 0.9 * kd
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
    return student


@pytest.mark.parametrize(("name", "tolerance"), [("NONE", 0), ("KD", 2e-5)])
def test_training_equals_a_plain_pytorch_loop(tmp_path, name, tolerance):
    run = trainer(name, tmp_path)
    run.fit(Recorder(tmp_path, 2))
    expected = plain_loop(name).state_dict()
    for key, value in run.distiller.student.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=tolerance, atol=tolerance, msg=key)


@pytest.mark.parametrize(
    ("epoch", "rate"), [(1, 0.05), (150, 0.05), (151, 0.005), (180, 0.005), (181, 5e-4), (210, 5e-4), (240, 5e-5)]
)
def test_the_rate_falls_after_each_stages_epoch(epoch, rate):
    assert MultiStep(0.05, (150, 180, 210), 0.1).at(epoch) == pytest.approx(rate)


def test_scores():
    torch.manual_seed(0)
    table = torch.randn(30, 10)
    batches = [(table[i : i + 8], torch.arange(i, min(i + 8, 30)) % 10, None) for i in range(0, 30, 8)]
    scores = evaluate(lambda image: image, batches)
    target = torch.arange(30) % 10
    top5 = table.topk(5, 1).indices
    assert scores.top1 == pytest.approx(100 * (table.argmax(1) == target).double().mean().item())
    assert scores.top5 == pytest.approx(100 * (top5 == target[:, None]).any(1).double().mean().item())
    assert scores.loss == pytest.approx(F.cross_entropy(table, target).item(), rel=1e-5)
    assert evaluate(lambda image: image[:, :2], [(table, target % 2, None)]).top5 == 100


def test_files_and_rows(tmp_path):
    run = trainer("NONE", tmp_path, epochs=3)
    run.save_every = 2
    result = run.fit(Recorder(tmp_path, 3))
    names = {path.name for path in tmp_path.iterdir()}
    files = {"latest", "previous", "best", "student_latest", "student_best", "epoch_2", "student_2"}
    assert names == files | {"metrics.jsonl", "worklog.txt", "train.events"}
    rows = read_metrics(tmp_path)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    fields = "epoch lr train_loss train_acc test_acc test_acc_top5 test_loss epoch_seconds images_per_second".split()
    assert set(fields) < set(rows[0])
    assert [row["lr"] for row in rows] == pytest.approx([0.05, 0.005, 0.005])
    assert result["best_acc"] == max(row["test_acc"] for row in rows)
    assert result["last_acc"] == rows[-1]["test_acc"]
    assert rows[result["best_epoch"] - 1]["test_acc"] == result["best_acc"]
    assert list((tmp_path / "train.events").iterdir())
    log = (tmp_path / "worklog.txt").read_text()
    assert "last" in log
    assert "best" in log
    state = torch.load(tmp_path / "student_best", weights_only=True)
    assert state["epoch"] == result["best_epoch"]


def test_columns_align():
    row = dict.fromkeys(["train_loss", "train_acc", "test_acc", "test_acc_top5", "best_acc", "epoch_seconds"], 7.0)
    row |= {"images_per_second": 10.0, "lr": 0.05, "epoch": 9, "best_epoch": 9}
    lines = [
        line_of(row, 240, 5),
        line_of(row | {"epoch": 210, "best_epoch": 109, "test_acc": 71.25, "lr": 5e-4}, 240, 5),
    ]
    assert len({line.index("top-5") for line in lines}) == len({line.index("img/s") for line in lines}) == 1


def test_what_a_crash_left_behind_is_removed(tmp_path):
    rows = [{"epoch": 1, "x": 1}, {"epoch": 2, "x": 2}]
    text = "".join(f"{row}\n".replace("'", '"') for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + '{"epoch": 3, "x"')
    (tmp_path / "worklog.txt").write_text("head\n  indented\nepoch 1/3  a\nepoch 2/3  b\nepoch 3")
    Recorder(tmp_path, 3, done=1, log=len("head\n  indented\nepoch 1/3  a\n")).close()
    assert read_metrics(tmp_path) == rows[:1]
    assert (tmp_path / "worklog.txt").read_text() == "head\n  indented\nepoch 1/3  a\n"


def test_a_kill_before_the_checkpoint_costs_no_row(tmp_path, monkeypatch):
    run = trainer("NONE", tmp_path / "a", epochs=2)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    run.fit(Recorder(tmp_path / "a", 2))
    for moment in ("before", "after"):
        run = trainer("NONE", tmp_path / "b", epochs=2)
        save = run.save

        def killed(recorder, save=save, run=run, moment=moment):
            if run.epoch == 1 or moment == "after":
                save(recorder)
            if run.epoch == 2 or moment == "after":
                raise KeyboardInterrupt

        monkeypatch.setattr(run, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            run.fit(Recorder(tmp_path / "b", 2))
        again = trainer("NONE", tmp_path / "b", epochs=2)
        again.load_state(torch.load(tmp_path / "b" / "latest", weights_only=True), tmp_path / "b" / "latest")
        again.fit(Recorder(tmp_path / "b", 2, again.epoch, again.log_bytes))
        rows = [read_metrics(tmp_path / name) for name in ("a", "b")]
        assert [row["epoch"] for row in rows[1]] == [1, 2], moment
        assert [row["train_loss"] for row in rows[0]] == [row["train_loss"] for row in rows[1]]


def test_a_checkpoint_restores_every_generator(tmp_path):
    def draw():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()

    run = trainer("NONE", tmp_path)
    checkpoint.save(run.state(), tmp_path / "latest")
    first = draw()
    assert draw() != first
    run.load_state(checkpoint.load(tmp_path / "latest"), tmp_path / "latest")
    assert draw() == first


class Exploding(nn.Module):
    def __init__(self, student):
        super().__init__()
        self.student = student

    def forward(self, image, **kwargs):
        logits = self.student(image)[0]
        return logits, {"fine": logits.mean(), "bad": logits.mean() * math.inf}


def test_a_loss_that_is_not_finite_stops_the_run_and_is_named(tmp_path):
    run = trainer("NONE", tmp_path)
    run.distiller = run.step.distiller = Exploding(run.distiller.student)
    with pytest.raises(TrainingDiverged, match="the loss term bad"):
        run.fit(Recorder(tmp_path, 2))
    assert not (tmp_path / "latest").exists()


@pytest.mark.gpu
def test_gpu_equals_cpu(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    results = []
    for device in ("cpu", "cuda"):
        student = cifar_model_dict["resnet8"][0](num_classes=10)
        torch.manual_seed(0)
        student = models("NONE")[0].to(device, memory_format=torch.channels_last)
        batches = data()
        batches = Batches(
            batches.images, batches.labels, (0.5,) * 3, (0.25,) * 3, 16, torch.device(device), "crop_flip", 3
        )
        distiller = distiller_dict["NONE"](student).train()
        step = Step(distiller, sgd(student.parameters(), 0.9, 5e-4), torch.device(device))
        from mdistiller.engine.step import Meter

        meter = Meter()
        for batch in batches.epoch(1):
            step(batch, 1, meter)
        results.append(meter.read()["loss"])
    assert results[0] == pytest.approx(results[1], rel=1e-3)
