"""Several students in one process: each is the one that its seed gives alone."""

import functools
import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import GPU, KINDS, Recording, agree, cases, changed, on, outcome, own_kd, run, run_set, same, unnamed

from mdistiller import config
from mdistiller.engine import build, graph, seeds, stepmode
from mdistiller.engine.graph import GraphStep
from mdistiller.engine.seeds import summary_file, table, train_seeds
from mdistiller.engine.step import Step
from mdistiller.errors import FolderInUse, RunFailed, UserError
from mdistiller.files import FileLock


@pytest.fixture
def opened(monkeypatch):
    """The runs of a set, as they are opened."""
    runs, real = [], seeds.OpenRun
    monkeypatch.setattr(seeds, "OpenRun", lambda *given: runs.append(real(*given)) or runs[-1])
    return runs


@pytest.mark.parametrize(("method", "device"), cases(KINDS, ("DTKD", "FITNET", "NONE")))
def test_each_is_the_one_trained_alone(small, undisturbed, tmp_path, method, device):
    _, folders = run_set([*on(device, small), "DISTILLER.TYPE", method], tmp_path, [1, 0])
    assert agree(outcome(folders[0]), outcome(undisturbed(method, device)), device)
    if method == "CRD":
        assert agree(outcome(folders[1]), outcome(undisturbed(method, device, SEED=1)), device)
    if method == "DTKD" and device == "cpu":
        records = [(folder / "temperatures.bin").read_bytes() for folder in (folders[0], undisturbed(method))]
        assert records[0] == records[1]


@pytest.mark.parametrize(("bank", "device"), cases(["off", "full"], ("off", "lazy", "full")))
def test_a_shared_bank_changes_no_bit(small, undisturbed, tmp_path, bank, device):
    opts = [*on(device, small), "DISTILLER.TYPE", "DTKD", "TEACHER_BANK", bank]
    _, folders = run_set(opts, tmp_path, [0, 1], TEACHER_BANK_FOLDER=tmp_path / "bank")
    alone = undisturbed("DTKD", device, SEED=1, TEACHER_BANK="off" if bank == "off" else "auto")
    assert agree(outcome(folders[1]), outcome(alone), device)


@pytest.mark.parametrize(("stops", "device"), [((1, 8), "cpu"), pytest.param((5, 35), "cuda", marks=GPU)])
def test_a_signal_keeps_all_and_resume_goes_on_with_all(small, undisturbed, tmp_path, interrupted, stops, device):
    """Under a bank that they fill together."""
    opts = [*on(device, small), "DISTILLER.TYPE", "DTKD", "TEACHER_BANK", "lazy"]
    whole = {seed: outcome(undisturbed("DTKD", device, SEED=seed)) for seed in (0, 1, 2)}
    train = functools.partial(run_set, opts, tmp_path, [0, 1, 2], TEACHER_BANK_FOLDER=tmp_path / "bank")
    summary, parts = interrupted(lambda resume: train(resume=resume), *stops, says="3 of 3 students")
    assert all(agree(whole[seed], outcome(parts[seed]), device) for seed in (0, 1, 2))
    assert summary["last"]["n"] == 3


def test_replays_need_no_generators_of_their_own(small, tmp_path, monkeypatch, save_every_step):
    """Nothing is drawn in them: to swap every generator twice a step would cost more than to start the graph. What a
    checkpoint holds is the student's own all the same, inside an epoch too.
    """
    monkeypatch.setattr(build, "uses_graph", lambda *given: True)
    monkeypatch.setattr(stepmode, "GraphStep", functools.partial(GraphStep, capture=Recording))
    swaps, real = [], np.random.set_state
    monkeypatch.setattr(np.random, "set_state", lambda state: swaps.append(1) or real(state))
    opts = [*small, "DISTILLER.TYPE", "KD", "SOLVER.BATCH_SIZE", "8"]  # 5 steps an epoch
    _, folders = run_set(opts, tmp_path / "set", [0, 1])
    assert len(swaps) < 2 * (graph.WARM_UP + 1 + 2 + 2), "10 steps each"
    alone = outcome(run(unnamed(opts), tmp_path / "alone", SEED=1))
    assert same(outcome(folders[1]), alone)
    _, folders = run_set([*opts, *save_every_step], tmp_path / "often", [0, 1])
    assert same(outcome(folders[1]), alone)


@pytest.mark.parametrize(("students", "kind"), [(25, "cuda"), (24, "cuda"), (25, "cpu")])
def test_on_cuda_there_are_streams_for_so_many(small, tmp_path, monkeypatch, students, kind):
    class Begins(Exception):
        pass

    def begin(*given):
        raise Begins

    monkeypatch.setattr(seeds, "resolve_device", lambda name: torch.device(kind))
    monkeypatch.setattr(seeds, "RunRequest", begin)
    cfg = config.load(None, changed(unnamed(small), tmp_path))
    too_many = (students, kind) == (25, "cuda")
    with pytest.raises(UserError if too_many else Begins, match="give 24 at a time" if too_many else None):
        train_seeds(cfg, range(students))
    assert not (tmp_path / "distill").exists()


def test_the_summary_says_mean_and_deviation_of_last_and_best(small, tmp_path, capsys):
    summary, folders = run_set([*small, "DISTILLER.TYPE", "KD"], tmp_path, [0, 1, 2], SOLVER__EPOCHS=1)
    (file,) = (tmp_path / "distill").glob("*.json")
    written = json.loads(file.read_text())
    assert {key: summary[key] for key in written if key != "runs"} | {"runs": written["runs"]} == written
    assert file.name.endswith("+SEED:0,1,2.json")
    for key in ("last", "best"):
        values = [outcome(folder)[0][f"{key}_acc"] for folder in folders.values()]
        spread = {"mean": pytest.approx(statistics.mean(values)), "std": pytest.approx(statistics.stdev(values))}
        assert summary[key] == {"n": 3} | spread
    assert "\n".join(table(summary)) in capsys.readouterr().out
    assert len({len(line) for line in table(summary)}) == 1, "columns align"
    single, _ = run_set([*small, "DISTILLER.TYPE", "KD"], tmp_path, [0], resume=True, SOLVER__EPOCHS=1)
    assert single["last"]["std"] is None
    assert "±" not in table(single)[-1].removeprefix("mean ± sd")


def test_resume_auto_starts_what_is_missing_and_leaves_what_is_done(small, tmp_path):
    opts = [*small, "DISTILLER.TYPE", "NONE", "SOLVER.EPOCHS", "1"]
    first = run(unnamed(opts), tmp_path, SEED=1)
    before = (first / "latest").stat().st_mtime_ns
    with pytest.raises(UserError, match="no run of seed 0 in .*--resume auto"):
        run_set(opts, tmp_path, [0, 1], resume=True)
    summary, folders = run_set(opts, tmp_path, [0, 1], resume="auto")
    assert folders[1] == first
    assert (first / "latest").stat().st_mtime_ns == before
    assert [run["epochs"] for run in summary["runs"]] == [1, 1]


def test_one_lost_student_does_not_stop_the_others_who_share_its_teacher(
    small, undisturbed, tmp_path, monkeypatch, opened
):
    expected, real = outcome(undisturbed("FITNET")), Step.update

    def harmed(self, batch, *given):
        if self.steps == 4 and self is opened[1].trainer.step:
            batch.image.fill_(math.nan)
        real(self, batch, *given)

    monkeypatch.setattr(Step, "update", harmed)
    opened.clear()
    with pytest.raises(RunFailed, match="seed 1: epoch 2, step 2"):
        run_set([*small, "DISTILLER.TYPE", "FITNET"], tmp_path, [2, 1, 0])
    pointers = [{p.data_ptr() for p in run.trainer.distiller.teacher.parameters()} for run in opened]
    assert pointers[0] == pointers[1] == pointers[2]
    (file,) = (tmp_path / "distill").glob("*.json")
    summary = json.loads(file.read_text())
    assert [("error" in run) for run in summary["runs"]] == [False, True, False]
    assert summary["last"]["n"] == 2
    assert same(outcome(Path(summary["runs"][2]["folder"])), expected)


def fading(small, tmp_path, write, after=0):
    """Options of a method that writes to its teacher's weights, from the epoch behind `after` on."""
    name = f"F{len(write)}{after}"
    words = own_kd(
        tmp_path / "fading.py", name,
        "    def losses(self, *args, epoch, **kwargs):\n        with torch.no_grad():\n"
        "            for p in self.teacher.parameters():\n"
        f"                if epoch > {after}:\n                    {write}\n"
        "        return super().losses(*args, epoch=epoch, **kwargs)\n",
    )  # fmt: skip
    return [*small, *words, "TEACHER_BANK", "off", "SOLVER.EPOCHS", str(after + 1)]


@pytest.mark.parametrize("write", ["p.mul_(0.9)", "p.data.mul_(0.9)", "p.data = 0.9 * p.data"])
def test_a_teacher_that_its_method_writes_to_is_kept_and_not_shared(small, tmp_path, interrupted, write):
    opts = fading(small, tmp_path, write)
    expected = outcome(run(opts, tmp_path / "alone", SEED=1))
    assert "teacher.fc.weight" in expected[0]["model"]
    _, folders = interrupted(lambda resume: run_set(opts, tmp_path / "parts", [0, 1], resume), 3)
    assert same(outcome(folders[1]), expected)


@pytest.mark.parametrize("write", ["p.mul_(0.9)", "p.data.mul_(0.9)"])
def test_a_shared_teacher_that_is_written_to_ends_the_set_before_it_is_kept(small, undisturbed, tmp_path, write):
    with pytest.raises(RunFailed, match="run seed by seed"):
        run_set(fading(small, tmp_path, write, after=1), tmp_path, [0, 1])
    (kept,) = (tmp_path / "distill").glob("run*/latest")  # the first one's first epoch; what follows was not kept
    state, rows = outcome(kept.parent)
    assert same(rows, outcome(undisturbed("KD", TEACHER_BANK="off"))[1][:1])
    assert "teacher.fc.weight" not in state["model"]


def test_a_summary_of_many_seeds_has_a_short_name(small, tmp_path):
    cfg = config.load(None, changed(unnamed(small), tmp_path))
    assert summary_file(cfg, range(100)).name.endswith("+SEED:0-99.json")
    assert summary_file(cfg, [0, 1, 2, 9]).name.endswith("+SEED:0,1,2,9.json")
    assert len(summary_file(cfg, [7 * seed + seed**2 for seed in range(200)]).name) < 255


def test_a_seed_in_use_is_found_before_another_ones_run_is_touched(small, tmp_path):
    """Whose names are one of the user's own, and the seed."""
    cfg = config.load(None, changed(small, tmp_path, DISTILLER__TYPE="NONE", SOLVER__EPOCHS=1))
    folders = [Path(run["folder"]) for run in train_seeds(cfg, [0, 1])["runs"]]
    assert [folder.name for folder in folders] == ["run+SEED:0", "run+SEED:1"]
    before = (folders[0] / "latest").stat().st_mtime_ns
    lock = FileLock(folders[1] / ".lock")
    with pytest.raises(FolderInUse, match="SEED:1"):
        train_seeds(cfg, [0, 1])
    lock.close()
    assert (folders[0] / "latest").stat().st_mtime_ns == before
    assert not list((tmp_path / "distill").glob("*~1"))
