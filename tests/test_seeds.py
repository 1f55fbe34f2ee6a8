"""Several students in one process: each is the one that its seed gives alone."""

import fcntl
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, agree, cases, changed, on, outcome, run, same, tool

from mdistiller import config
from mdistiller.distillers import distiller_dict
from mdistiller.engine import builder, seeds
from mdistiller.engine.seeds import summary_file, table, train_seeds
from mdistiller.errors import FolderInUse, Preempted, RunFailed, UserError
from mdistiller.runs.stop import Stop

config.load()
METHODS = sorted(name for name, cls in distiller_dict.items() if cls.__module__.startswith("mdistiller."))
KILLS = int(os.environ.get("KILLS", "3"))


def unnamed(opts):
    """Without EXPERIMENT.NAME, as a configuration file has it."""
    place = opts.index("EXPERIMENT.NAME")
    return opts[:place] + opts[place + 2 :] + ["EXPERIMENT.TAG", "run"]


def run_set(opts, prefix, numbers, resume=False, **changes):
    """Train the set; returns its summary and the folder of each."""
    words = changed(unnamed(opts), prefix, **changes)
    summary = train_seeds(config.load(None, words), numbers, resume)
    return summary, {run["seed"]: run["folder"] for run in summary["runs"]}


def alone(opts, prefix, seed, **changes):
    words = changed(unnamed(opts), prefix, **changes, SEED=seed)
    return train(config.load(None, words), words)["folder"]


@pytest.mark.parametrize(("method", "device"), cases(METHODS, ("DTKD", "FITNET", "NONE")))
def test_each_is_the_one_trained_alone(small, tmp_path, method, device):
    opts = [*on(device, small, epochs=1), "DISTILLER.TYPE", method]
    _, folders = run_set(opts, tmp_path / "set", [3, 0, 11])
    for seed in (3, 0, 11)[: 3 if method in ("DTKD", "CRD", "MLKD", "NONE") else 1]:
        by_itself = alone(opts, tmp_path / "alone", seed)
        assert agree(outcome(Path(folders[seed])), outcome(Path(by_itself)), device)
        assert Path(folders[seed]).name == Path(by_itself).name


@pytest.mark.parametrize(("bank", "device"), cases(["off", "lazy", "full"], ("off", "lazy", "full")))
def test_a_shared_bank_changes_no_bit(small, tmp_path, bank, device):
    opts = [*on(device, small), "DISTILLER.TYPE", "DTKD", "TEACHER_BANK", bank]
    _, folders = run_set(opts, tmp_path / "set", [0, 1], TEACHER_BANK_FOLDER=tmp_path / "common")
    for seed in (0, 1):
        by_itself = alone(opts, tmp_path / "alone", seed, TEACHER_BANK_FOLDER=tmp_path / f"own {seed}")
        assert agree(outcome(Path(folders[seed])), outcome(Path(by_itself)), device)


def test_the_summary_says_mean_and_deviation_of_last_and_best(small, tmp_path, capsys):
    summary, folders = run_set(small, tmp_path, [0, 1, 2], DISTILLER__TYPE="KD")
    (file,) = (tmp_path / "distill").glob("*.json")
    assert json.loads(file.read_text()) == summary
    assert file.name.endswith("+SEED:0,1,2.json")
    for key in ("last", "best"):
        values = [outcome(Path(folder))[0][f"{key}_acc"] for folder in folders.values()]
        assert summary[key] == {
            "n": 3,
            "mean": pytest.approx(statistics.mean(values)),
            "std": pytest.approx(statistics.stdev(values)),
        }
    shown = capsys.readouterr().out
    assert "\n".join(table(summary)) in shown
    assert len({len(line) for line in table(summary)}) == 1, "columns align"


def test_one_seed_has_no_deviation(small, tmp_path):
    summary, _ = run_set(small, tmp_path, [4], DISTILLER__TYPE="NONE")
    assert summary["last"]["std"] is None
    assert "±" not in table(summary)[-1].removeprefix("mean ± sd")


def stopping_after(steps):
    class Timed(Stop):
        seen = 0

        def watch(self, items):
            for item in super().watch(items):
                self.seen += 1
                if self.seen == steps:
                    self.signal = "SIGTERM"
                yield item

    return Timed


@pytest.mark.parametrize(("steps", "device"), cases([1, 5, 9], (5, 40)))
def test_a_signal_keeps_all_and_resume_goes_on_with_all(small, tmp_path, monkeypatch, steps, device):
    opts = [
        *on(device, small),
        "DISTILLER.TYPE",
        "DTKD",
        "TEACHER_BANK",
        "lazy",
        "TEACHER_BANK_FOLDER",
        str(tmp_path / "bank"),
    ]
    _, whole = run_set(opts, tmp_path / "whole", [0, 1, 2])
    monkeypatch.setattr(builder, "Stop", stopping_after(steps))
    with pytest.raises(Preempted, match="3 of 3 students"):
        run_set(opts, tmp_path / "parts", [0, 1, 2])
    monkeypatch.undo()
    summary, parts = run_set(opts, tmp_path / "parts", [0, 1, 2], resume=True)
    for seed in (0, 1, 2):
        assert agree(outcome(Path(whole[seed])), outcome(Path(parts[seed])), device)
    assert summary["last"]["n"] == 3


def test_resume_auto_starts_what_is_missing_and_leaves_what_is_done(small, tmp_path):
    opts = [*small, "DISTILLER.TYPE", "KD"]
    first = Path(alone(opts, tmp_path, 1))
    before = (first / "latest").stat().st_mtime_ns
    with pytest.raises(UserError, match="no run of seed 0 in .*--resume auto"):
        run_set(opts, tmp_path, [0, 1], resume=True)
    summary, folders = run_set(opts, tmp_path, [0, 1], resume="auto")
    assert Path(folders[1]) == first
    assert (first / "latest").stat().st_mtime_ns == before
    assert [run["epochs"] for run in summary["runs"]] == [2, 2]


def test_one_lost_student_does_not_stop_the_others(small, tmp_path, monkeypatch):
    real = builder.Step.compute

    def call(self, batch, epoch, meter, logits):
        if self.steps == 4 and torch.initial_seed() and id(self) == victim[0]:
            batch.image.fill_(float("nan"))
        real(self, batch, epoch, meter, logits)

    victim = []
    opened = seeds.Run

    def remember(plan, *args):
        made = opened(plan, *args)
        if plan.cfg.SEED == 1:
            victim.append(id(made.trainer.step))
        return made

    monkeypatch.setattr(builder.Step, "compute", call)
    monkeypatch.setattr(seeds, "Run", remember)
    with pytest.raises(RunFailed, match="seed 1: epoch 2, step 2"):
        run_set(small, tmp_path / "set", [0, 1, 2], DISTILLER__TYPE="KD")
    monkeypatch.undo()
    (file,) = (tmp_path / "set" / "distill").glob("*.json")
    summary = json.loads(file.read_text())
    assert [("error" in run) for run in summary["runs"]] == [False, True, False]
    assert summary["last"]["n"] == 2
    by_itself = alone(small, tmp_path / "alone", 2, DISTILLER__TYPE="KD")
    assert same(outcome(Path(summary["runs"][2]["folder"])), outcome(Path(by_itself)))


def test_a_name_of_ones_own_gets_the_seed(small, tmp_path):
    words = changed(small, tmp_path, DISTILLER__TYPE="NONE", SOLVER__EPOCHS=1)
    summary = train_seeds(config.load(None, words), [0, 1])
    assert [run["folder"].rpartition("/")[2] for run in summary["runs"]] == ["run+SEED:0", "run+SEED:1"]


def test_teachers_share_their_parameters(small, tmp_path, monkeypatch):
    runs = []
    opened = seeds.Run

    def remember(*args):
        runs.append(opened(*args))
        return runs[-1]

    monkeypatch.setattr(seeds, "Run", remember)
    run_set(small, tmp_path, [0, 1], DISTILLER__TYPE="FITNET", SOLVER__EPOCHS=1)
    pointers = [{p.data_ptr() for p in run.trainer.distiller.teacher.parameters()} for run in runs]
    assert pointers[0] == pointers[1]


def fading(small, tmp_path, write, after=0):
    """Options of a method that writes to its teacher's weights, from the epoch behind `after` on."""
    name = f"F{len(write)}{after}"
    plugin = tmp_path / "fading.py"
    plugin.write_text(
        "import torch\nfrom mdistiller.distillers.KD import KD\nfrom mdistiller.distillers import register_distiller\n"
        f"@register_distiller('{name}', defaults={{'A': 1.0}})\nclass Fading(KD):\n"
        "    def losses(self, *args, epoch, **kwargs):\n        with torch.no_grad():\n"
        "            for p in self.teacher.parameters():\n"
        f"                if epoch > {after}:\n                    {write}\n"
        "        return super().losses(*args, epoch=epoch, **kwargs)\n"
    )
    return [*small, "EXPERIMENT.PLUGINS", str(plugin), "DISTILLER.TYPE", name, "TEACHER_BANK", "off"]


@pytest.mark.parametrize("write", ["p.mul_(0.9)", "p.data.mul_(0.9)", "p.data = 0.9 * p.data"])
def test_a_teacher_that_its_method_writes_to_is_kept_and_not_shared(small, tmp_path, monkeypatch, write):
    opts = fading(small, tmp_path, write)
    expected = outcome(Path(alone(opts, tmp_path / "alone", 1)))
    assert "teacher.fc.weight" in expected[0]["model"]
    _, folders = run_set(opts, tmp_path / "set", [0, 1])
    assert same(outcome(Path(folders[1])), expected)
    monkeypatch.setattr(builder, "Stop", stopping_after(3))
    with pytest.raises(Preempted):
        run_set(opts, tmp_path / "parts", [0, 1])
    monkeypatch.undo()
    _, folders = run_set(opts, tmp_path / "parts", [0, 1], resume=True)
    assert same(outcome(Path(folders[1])), expected)


@pytest.mark.parametrize("write", ["p.mul_(0.9)", "p.data.mul_(0.9)"])
def test_a_shared_teacher_that_is_written_to_ends_the_set_before_it_is_kept(small, tmp_path, write):
    opts = fading(small, tmp_path, write, after=1)
    with pytest.raises(RunFailed, match="run seed by seed"):
        run_set(opts, tmp_path, [0, 1])
    expected, rows = outcome(Path(alone(opts, tmp_path / "alone", 0)))
    (kept,) = (tmp_path / "distill").glob("run*/latest")  # the first one's first epoch; what follows was not kept
    state, kept_rows = outcome(kept.parent)
    assert same(kept_rows, rows[:1])
    assert "teacher.fc.weight" in expected["model"]
    assert "teacher.fc.weight" not in state["model"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds"], "no seed follows"),
        (["--seeds", "0", "0"], "given twice"),
        (["--seeds", "0", "--seeds", "1"], "given twice"),
        (["--seed", "3"], "unknown option --seed"),
        (["--seeds", "0-5000"], "1,000 at most"),
        (["--seeds", "3-1"], "the smaller one first"),
        (["--seeds", "4294967296"], "2**32"),
        (["--seeds=1.5"], "is no seed"),
        (["--seeds", "0", "-1"], "--seeds: -1 is no seed; write --seeds 0 1 2"),
        (["--seeds", "0", "-", "2"], "--seeds: - is no seed"),
        (["--seeds", "0", "1", "x"], "--seeds: x is no seed"),
        (["--seeds", "0-999", "1000-1999"], "2,000, and 1,000 at most"),
        (["--seeds", "0", "1", "SEED", "3"], "give one of them"),
        (["--seeds", "0", "LOG.WANDB", "True"], "LOG.WANDB False"),
    ],
)
def test_seeds_that_are_none_are_named(tmp_path, words, message):
    done = tool("train_ours", *words, "DATASET.TYPE", "digits", cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_command_takes_lists_and_ranges(small, tmp_path):
    opts = changed(unnamed(small), tmp_path, DISTILLER__TYPE="NONE", SOLVER__EPOCHS=1)
    done = tool("train_ours", "--seeds", "5", "0-1", *opts, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "distill").glob("run*SEED:*/student_latest"))) == 3
    assert "mean ± sd" in done.stdout


@pytest.mark.parametrize("number", range(KILLS))
def test_a_set_that_is_killed_goes_on_to_the_same_end(small, tmp_path, number):
    """kill -9 at a random moment, then --resume auto."""
    opts = [*small, "DISTILLER.TYPE", "DTKD", "TEACHER_BANK", "lazy"]
    words = changed(opts, tmp_path / "killed", SOLVER__EPOCHS=6, TEACHER_BANK_FOLDER=tmp_path / "bank")
    command = [sys.executable, str(ROOT / "tools/train_ours.py"), "--seeds", "0", "1", "--resume", "auto", *words]
    moment = random.Random(number)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, stderr=subprocess.STDOUT)
    for line in process.stdout:
        if "epoch 1/6" in line:
            break
    time.sleep(moment.uniform(0, 0.5))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert subprocess.run(command, capture_output=True).returncode == 0
    _, whole = run_set(small, tmp_path / "whole", [0, 1], DISTILLER__TYPE="DTKD", SOLVER__EPOCHS=6)
    for seed, folder in whole.items():
        (killed,) = (tmp_path / "killed" / "distill").glob(f"run*SEED:{seed}")
        state, rows = outcome(killed)
        expected, expected_rows = outcome(Path(folder))
        assert same(state, expected)
        assert same(rows, expected_rows)


def test_a_summary_of_many_seeds_has_a_short_name(small, tmp_path):
    words = changed(unnamed(small), tmp_path, DISTILLER__TYPE="NONE")
    cfg = config.load(None, words)
    assert summary_file(cfg, range(100)).name.endswith("+SEED:0-99.json")
    assert summary_file(cfg, [0, 1, 2, 9]).name.endswith("+SEED:0,1,2,9.json")
    scattered = [7 * seed + seed**2 for seed in range(200)]
    assert len(summary_file(cfg, scattered).name) < 255


def test_a_seed_in_use_is_found_before_another_ones_run_is_touched(small, tmp_path):
    opts = [*small, "DISTILLER.TYPE", "NONE", "SOLVER.EPOCHS", "1"]
    _, folders = run_set(opts, tmp_path, [0, 1])
    before = outcome(Path(folders[0]))
    with open(Path(folders[1]) / ".lock", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(FolderInUse, match="SEED:1"):
            run_set(opts, tmp_path, [0, 1])
    assert same(outcome(Path(folders[0])), before)
    assert not list((tmp_path / "distill").glob("*~1"))


def test_run_alone_is_not_touched_by_the_driver(small, tmp_path):
    """`run` and a set of one: the same files."""
    _, folders = run_set(small, tmp_path / "set", [0], DISTILLER__TYPE="DTKD")
    assert same(outcome(Path(folders[0])), outcome(run(small, tmp_path / "alone", DISTILLER__TYPE="DTKD")))
