"""Optimizers, schedules, soft targets, clipping, accumulation and averages of weights, beside torch's own."""

import copy
import math

import pytest
import torch
from helpers import CPU, outcome, refused, run, same
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler as torchs

from mdistiller.config import load
from mdistiller.dataset import Batch, Mixing
from mdistiller.distillers.base import Vanilla
from mdistiller.engine.build import build_optimizer, schedule_of
from mdistiller.engine.cfg import unread_overrides
from mdistiller.engine.refusals import refuse_unused
from mdistiller.engine.solver import Schedule, set_lr
from mdistiller.engine.step import Step
from mdistiller.runs.recorder import read_metrics


class Plain(nn.Module):
    """A network whose samples do not see each other."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).relu().mean((2, 3))), {}


def batch(n=12):
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(n, 3, 8, 8, generator=generator)
    return Batch(image, torch.arange(n) % 5, torch.arange(n))


def trained(network, *words, steps=3, target=None, **attributes):
    """Train a copy of `network` for some steps on one batch as the configuration `words` says. Return it."""
    solver = load(None, words).SOLVER
    student, given = copy.deepcopy(network), batch()
    given = given if target is None else given._replace(target=target)
    distiller = Vanilla(student).train()
    optimizer = build_optimizer(solver, distiller.get_learnable_parameters())
    set_lr(optimizer, 0.1)
    step = Step(distiller, optimizer, CPU)
    step.clip, step.parts = solver.CLIP, solver.ACCUMULATE
    for name, value in attributes.items():
        setattr(step, name, value)
    for _ in range(steps):
        step(given, 1)
    return student


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Plain()


def by_hand(network, optimizer, loss_of, steps=3, clip=None):
    set_lr(optimizer, 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(network(batch().image)[0]).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
        optimizer.step()
    return network


def hard(logits):
    return F.cross_entropy(logits, batch().target)


def assert_close(one, other):
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_adamw_and_groups_are_torchs(network):
    theirs = copy.deepcopy(network)
    wide = [p for p in theirs.parameters() if p.ndim > 1]
    flat = [p for p in theirs.parameters() if p.ndim <= 1]
    groups = [{"params": wide, "weight_decay": 0.05}, {"params": flat, "weight_decay": 0.0}]
    ours = trained(network, "SOLVER.TYPE", "AdamW", "SOLVER.WEIGHT_DECAY", 0.05, "SOLVER.DECAY_NORMS", False)
    assert_close(ours, by_hand(theirs, torch.optim.AdamW(groups, 0.1), hard))


def test_clipping_is_torchs(network):
    theirs = copy.deepcopy(network)
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1, 0.9, weight_decay=1e-4)
    assert_close(trained(network, "SOLVER.CLIP", 0.02), by_hand(theirs, optimizer, hard, clip=0.02))
    assert_close(trained(network, "SOLVER.CLIP", 1e6), trained(network))


@pytest.mark.parametrize("parts", [2, 5, 12, 50])
def test_accumulation_adds_up_to_the_batch(network, parts):
    assert_close(trained(network, "SOLVER.ACCUMULATE", parts), trained(network))


def test_label_smoothing_is_torchs(network):
    theirs = copy.deepcopy(network)
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1, 0.9, weight_decay=1e-4)
    _, soft = Mixing(5, 0.2)(batch().image, batch().target, None)
    wanted = by_hand(theirs, optimizer, lambda v: F.cross_entropy(v, batch().target, label_smoothing=0.2))
    assert_close(trained(network, target=soft), wanted)


def test_mixing_follows_its_papers():
    image, target = batch().image, batch().target
    mixup = Mixing(5, mixup=0.4)
    plan = mixup.draw(5000, 7)
    assert torch.equal(plan, mixup.draw(5000, 7)) and not torch.equal(plan, mixup.draw(5000, 8))
    shares = plan[1] / 2**24
    assert shares.mean() == pytest.approx(0.5, abs=0.02) and shares.var() == pytest.approx(0.25 / 1.8, rel=0.05)
    mixed, soft = mixup(image, target, plan[:, :12])
    share = float(shares[0])
    torch.testing.assert_close(mixed, share * image + (1 - share) * image.flip(0))
    labels = F.one_hot(target, 5).float()
    torch.testing.assert_close(soft, share * labels + (1 - share) * labels.flip(0))
    cutmix = Mixing(5, cutmix=1.0)
    for place in range(0, 60, 12):
        mixed, soft = cutmix(image, target, cutmix.draw(60, 3)[:, place : place + 12])
        other = (mixed == image.flip(0)).all(1)[0]
        assert ((mixed == image) | (mixed == image.flip(0))).all()
        assert soft.sum(1).allclose(torch.ones(12))
        assert float(soft[0, 0]) == pytest.approx(1 - other.float().mean().item(), abs=0.02)
    both = Mixing(5, mixup=0.2, cutmix=1.0).draw(1000, 0)
    assert 400 < int((both[0] == 1).sum()) < 600 and {*both[0].tolist()} == {1, 2}


def test_schedules_are_torchs():
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.4)
    cosine = torchs.CosineAnnealingLR(optimizer, 20)
    schedule, wanted = Schedule(0.4, kind="cosine", epochs=5), []
    for _ in range(20):
        wanted.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()
    assert [schedule.at(1 + n // 4, n % 4, 4) for n in range(20)] == pytest.approx(wanted)
    warm = Schedule(0.4, (3,), 0.1, warmup=2)
    rates = [warm.at(1 + n // 4, n % 4, 4) for n in range(16)]
    assert rates == pytest.approx([*(0.05 * n for n in range(1, 9)), *[0.4] * 4, *[0.04] * 4])
    assert [warm.changes_within(epoch) for epoch in (1, 2, 3)] == [True, True, False]
    later = Schedule(0.4, kind="cosine", epochs=5, warmup=1)
    assert later.at(2, 0, 4) == pytest.approx(0.4) and later.at(5, 3, 4) < 0.01
    cfg = load(None, ["SOLVER.SCHEDULE", "cosine", "SOLVER.EPOCHS", 7, "SOLVER.WARMUP", 1.5])
    assert schedule_of(cfg.SOLVER) == Schedule(0.05, (150, 180, 210), 0.1, "cosine", 7, 1.5)


def test_what_does_not_go_together_is_a_line():
    for words, says in (
        ("DISTILLER.TYPE DKD SOLVER.LABEL_SMOOTHING 0.1", "LABEL_SMOOTHING: DKD needs the one label"),
        ("DISTILLER.TYPE CRD DATASET.MIXUP 0.2", "DATASET.MIXUP: CRD needs the one label"),
        ("DISTILLER.TYPE DTKD TEMPERATURE.PART target DATASET.CUTMIX 1", "CUTMIX: TEMPERATURE.PART target"),
        ("DISTILLER.TYPE MLKD SOLVER.TRAINER ours DATASET.CUTMIX 1", "two views .* which are not mixed"),
        ("DISTILLER.TYPE KD SOLVER.TRAINER dot SOLVER.TYPE AdamW", "dot is SGD with two momenta"),
        ("SOLVER.EMA 1.0", r"SOLVER.EMA: must be in \[0, 1\)"),
        ("SOLVER.TYPE Adam", "SOLVER.TYPE: unknown value 'Adam'; did you mean AdamW"),
    ):
        with refused(says):
            refuse_unused(load(None, words.split()))
    unread = "SOLVER.SCHEDULE cosine SOLVER.LR_DECAY_RATE 0.2 SOLVER.TYPE AdamW SOLVER.MOMENTUM 0"
    cfg = load(None, unread.split())
    assert unread_overrides(cfg).count("SOLVER.") == 4


ALL = (
    "SOLVER.TYPE AdamW SOLVER.LR 0.002 SOLVER.SCHEDULE cosine SOLVER.WARMUP 0.5 SOLVER.CLIP 1 SOLVER.EMA 0.8 "
    "SOLVER.LABEL_SMOOTHING 0.1 SOLVER.ACCUMULATE 2 SOLVER.DECAY_NORMS False DATASET.MIXUP 0.2 DATASET.CUTMIX 1.0"
).split()


@pytest.mark.parametrize("method", ["NONE", "DTKD", "AT"])
def test_all_of_it_goes_on_bit_for_bit(small, tmp_path, interrupted, method):
    opts = [*small, "DISTILLER.TYPE", method, *ALL]
    whole = run(opts, tmp_path / "whole")
    parts = interrupted(lambda resume: run(opts, tmp_path / "parts", resume), 2)
    assert same(outcome(whole), outcome(parts))
    averages = [torch.load(folder / "student_ema", weights_only=True) for folder in (whole, parts)]
    assert same(averages[0]["model"], averages[1]["model"])
    row = read_metrics(whole)[-1]
    assert row["ema_acc"] == averages[0]["acc"] and row["lr"] < 0.002 and math.isfinite(row["train_loss"])


def test_the_average_is_of_the_weights_that_were(small, tmp_path):
    """With one step an epoch, and a checkpoint after each, the average follows from the checkpoints."""
    opts = [*small, "DISTILLER.TYPE", "NONE", "SOLVER.BATCH_SIZE", "1000", "SOLVER.EPOCHS", "3"]
    folder = run(opts, tmp_path, SOLVER__EMA=0.75, LOG__SAVE_CHECKPOINT_FREQ=1)
    states = [torch.load(folder / f"student_{n}", weights_only=True)["model"]["fc.weight"] for n in (1, 2, 3)]
    wanted = states[0].lerp(states[1], 0.25).lerp(states[2], 0.25)
    average = torch.load(folder / "student_ema", weights_only=True)["model"]["fc.weight"]
    torch.testing.assert_close(average, wanted)
    plain = run(opts, tmp_path / "plain")
    assert torch.equal(torch.load(plain / "student_latest", weights_only=True)["model"]["fc.weight"], states[2])
