"""Several processes give what one gives: weights, figures, counts, and runs that go on under another number of them."""

import functools
import importlib.util
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import ROOT, changed, on_ranks, outcome, run, same

from mdistiller import config
from mdistiller.engine import build
from mdistiller.engine.ranks import Ranks, of_this_start, parts_of
from mdistiller.engine.run import train
from mdistiller.engine.shard import own_part, shard
from mdistiller.runs.stop import Stop

spec = importlib.util.spec_from_file_location("ranks_exact", ROOT / "benchmarks" / "ranks_exact.py")
ranks_exact = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ranks_exact)

# methods with every kind of exchange, beside what a solver may do to a batch and its gradient
CASES = {
    "KD": ["SOLVER.TRAINER", "dot", "SOLVER.CLIP", "0.5", "LOG.TEMPERATURE", "samples"],
    "NONE": "SOLVER.ACCUMULATE 2 SOLVER.EMA 0.9 DATASET.MIXUP 0.4 DATASET.CUTMIX 1 SOLVER.TYPE AdamW".split(),
    "DTKD": ["TEMPERATURE.FACTOR", "mean", "SOLVER.NAN_POLICY", "skip"],
    "CRD": [],
    "MLKD": [],
    "OFD": ["SOLVER.LABEL_SMOOTHING", "0.1"],
}

QUICK = ("KD", "NONE", "CRD")
SLOW = tuple(name for name in CASES if name not in QUICK)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Options of a run of three steps, of 8, 8 and 6 images, and a test on 11."""
    opts = ranks_exact.write_data(tmp_path_factory.mktemp("tiny"), images=22, tested=11)
    return [*opts, "SOLVER.BATCH_SIZE", "8", "EXPERIMENT.NAME", "run"]


def train_all(opts, prefix, names=CASES, resume=False):
    """Train a run of each of `names`, in float64."""
    ranks_exact.in_float64()
    for name in names:
        train(config.load(None, [*changed(opts, prefix / name), "DISTILLER.TYPE", name, *CASES[name]]), resume)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """`whole(world, name)`: the folder of undisturbed runs of so many processes, which holds that of a method."""

    @functools.cache
    def trained(world, names):
        folder = tmp_path_factory.mktemp(f"whole{world}")
        assert on_ranks(world, functools.partial(train_all, tiny, folder, names), folder / "errors") == [0] * world
        return folder

    # the others' parts of a batch have too few images for four
    return lambda world, name: trained(world, (name,) if world == 4 else QUICK if name in QUICK else SLOW)


def run_of(folder, name):
    return folder / name / "distill" / "run"


def figures(folder):
    """A run's weights and momenta, and its last row without the clock's figures."""
    state, rows = outcome(folder)
    return {"model": state["model"], "optimizer": state["optimizer"]["state"]}, rows[-1]


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_any_number_of_processes_gives_what_one_gives(whole, name):
    expected, row = figures(run_of(whole(1, name), name))
    for world in (2, 3):
        found, other = figures(run_of(whole(world, name), name))
        assert max(ranks_exact.differences(expected, found)) < 1e-12, world
        assert (other["test_acc"], other["train_acc"]) == (row["test_acc"], row["train_acc"])
        assert other["test_loss"] == pytest.approx(row["test_loss"], rel=1e-6)
        assert other["train_losses"] == pytest.approx(row["train_losses"], rel=1e-5)
        assert other.get("ema_acc") == row.get("ema_acc")
        record, own = (run_of(whole(w, name), name) / "temperatures.bin" for w in (1, world))
        assert record.exists() == (name == "KD") and (name != "KD" or record.read_bytes() == own.read_bytes())


class Asked(Stop):
    """A signal comes to the process of rank 1 at its second step."""

    number = signal.SIGTERM

    def watch(self, items):
        for number, item in enumerate(super().watch(items), 1):
            if os.environ["RANK"] == "1" and number == 2:
                os.kill(os.getpid(), self.number)
            yield item


class Struck(Asked):
    number = signal.SIGKILL


def disturbed(kind, opts, prefix, names):
    build.Stop = kind  # in a child
    train_all(opts, prefix, names)


@pytest.mark.parametrize(
    ("name", "world"), [("CRD", 3), *(pytest.param(name, 4, marks=pytest.mark.slow) for name in ("CRD", "KD"))]
)
def test_all_stop_after_the_same_step_and_any_number_goes_on(tiny, whole, tmp_path, name, world):
    errors = tmp_path / "errors"
    assert on_ranks(world, lambda: disturbed(Asked, tiny, tmp_path, [name]), errors) == [75] * world
    said = [Path(f"{errors}{rank}").read_text() for rank in range(world)]
    assert "stopped by SIGTERM in epoch 1 after step 2 of 3" in said[0] and not any(said[1:])
    shutil.copytree(tmp_path / name, tmp_path / "other" / name)
    assert on_ranks(world, lambda: train_all(tiny, tmp_path, [name], "auto")) == [0] * world
    own = outcome(run_of(whole(world, name), name))
    assert same(outcome(run_of(tmp_path, name)), own), "the bits of the same number"
    assert on_ranks(2, lambda: train_all(tiny, tmp_path / "other", [name], "auto")) == [0] * 2
    found = [figures(run_of(folder, name))[0] for folder in (tmp_path / "other", whole(1, name))]
    assert max(ranks_exact.differences(*found)) < 1e-12


def test_who_is_left_names_the_process_that_is_gone(tiny, tmp_path):
    errors = tmp_path / "errors"
    assert on_ranks(3, lambda: disturbed(Struck, tiny, tmp_path, ["NONE"]), errors) == [1, -signal.SIGKILL, 1]
    said = [Path(f"{errors}{rank}").read_text().splitlines() for rank in (0, 2)]
    assert said == [["error: process 1 of 3 is gone; --resume auto goes on from the last checkpoint"], []]


def test_what_cannot_be_shared_is_refused_in_one_line(tiny, tmp_path):
    errors = tmp_path / "errors"
    assert on_ranks(2, lambda: run(tiny, tmp_path, SOLVER__BATCH_SIZE=3), errors) == [2, 2]
    said = [Path(f"{errors}{rank}").read_text().splitlines() for rank in (0, 1)]
    assert len(said[0]) == 1 and "leaves one of 2 processes without any of 22 training" in said[0][0] and not said[1]
    assert not (tmp_path / "distill").exists()


def test_a_teacher_in_parts_teaches_the_same(tiny, whole, tmp_path):
    def work():
        def sharded(teacher, ranks, device):
            total = sum(p.numel() for p in teacher.parameters())
            shard(teacher, ranks, device)
            own = sum(own_part(p).numel() for p in teacher.parameters())
            (tmp_path / f"share{ranks.rank}").write_text(str(own / total))

        build.shard = sharded  # in a child
        train_all([*tiny, "DISTILLER.TEACHER_SHARD", "True"], tmp_path, ["KD", "CRD"])

    assert on_ranks(2, work) == [0, 0]
    assert all(0.4 < float((tmp_path / f"share{rank}").read_text()) < 0.6 for rank in (0, 1))
    for name in ("KD", "CRD"):
        found = [figures(run_of(folder, name))[0] for folder in (tmp_path, whole(2, name))]
        assert max(ranks_exact.differences(*found)) < 1e-12


def test_a_start_uses_nothing_that_an_earlier_one_has_left():
    store = dist.HashStore()
    for late in (0, 1, 2, 2):  # the process that comes last, each time
        with ThreadPoolExecutor(3) as pool:
            parts = {rank: pool.submit(of_this_start, store, rank, 3) for rank in range(3) if rank != late}
            time.sleep(0.2)
            parts[late] = pool.submit(of_this_start, store, late, 3)
            parts = {rank: part.result(20) for rank, part in parts.items()}
        assert not any(part.check([f"address/{rank}"]) for rank, part in parts.items())
        for rank, part in parts.items():
            part.set(f"address/{rank}", str(rank))
        assert all(part.check([f"address/{rank}" for rank in range(3)]) for part in parts.values())


@pytest.mark.parametrize("parts", [1, 3])
def test_every_place_of_a_batch_is_one_rank_s(parts):
    for world in (1, 2, 3, 4):
        ranks = [Ranks(world, rank) for rank in range(world)]
        for n in (12, 13, 33):
            rows = [torch.arange(n) if world == 1 else r.rows(n, parts) for r in ranks]
            assert torch.cat(rows).sort().values.tolist() == list(range(n))
            for part in parts_of(n, parts):
                sizes = [len(r.own(part)) for r in ranks]
                assert sizes == ranks[0].sizes(len(part)) and max(sizes) - min(sizes) <= 1
