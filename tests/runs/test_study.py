"""Studies that run: nothing of them is done twice or lost, what fails is reported, and the same command goes on."""

import contextlib
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import ROOT, own_kd, wait_for
from studies import Dying, Ended, Here, change, figures, write, write_plan

from mdistiller import config, registry
from mdistiller.errors import UserError
from mdistiller.runs.folder import RunFolder
from mdistiller.study import conduct, plan, results
from mdistiller.study.conduct import Conductor, state
from mdistiller.study.jobs import Outcome, Slurm
from mdistiller.study.records import record_of

RECORD = Path("results/runs.jsonl")


def conducted(file, executor=None, only=(), budget=None):
    """(status, conductor, executor) of the plan in `file`, its record in results/."""
    study, executor = plan.load(file), executor or Here()
    conductor = Conductor(study.name, study.select(only), RECORD, executor, budget)
    return conductor.run(), conductor, executor


def runs_of(file, only=()):
    return [run for group in plan.load(file).select(only) for run in group.runs]


def command(*words):
    """Run tools/reproduce.py in this process; return its status."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["reproduce.py", *words])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(ROOT / "tools" / "reproduce.py"))["main"]()
    return caught.value.code


def train_at(rate, name):
    """Give the network another learning rate in its YAML file, which its folder's name does not show."""
    solver = {"EPOCHS": 2, "BATCH_SIZE": 16, "LR_DECAY_STAGES": [1], "LR": rate}
    change(Path(f"configs/none/{name}.yaml"), SOLVER=solver)


@pytest.fixture(scope="module")
def whole_study(tmp_path_factory):
    """The folder of the plan small.yaml, all of whose runs are done, and what `conducted` returned."""
    root = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        return root, conducted(write_plan(root))


@pytest.fixture
def studied(whole_study, tmp_path, monkeypatch):
    """The plan small.yaml in the current folder, where all of its runs are done."""
    shutil.copytree(whole_study[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "small.yaml"


def keep_records(wanted):
    """Leave on record what `wanted(record)` is true of."""
    lines = RECORD.read_text().splitlines(True)
    RECORD.write_text("".join(line for line in lines if wanted(json.loads(line))))


def test_a_study_runs_once_and_knows_it(whole_study, studied, capsys):
    root, (status, conductor, first) = whole_study
    assert (status, conductor.failed) == (0, {})
    assert first.asked == [
        ("NONE,resnet8", [0, 1]), ("NONE,resnet14", [0]), ("KD,resnet14,resnet8", [0, 1]),
        ("DTKD,resnet14,resnet8", [0, 1]),
    ]  # fmt: skip
    text = RECORD.read_text()
    assert len(figures()) == 7
    record = json.loads(text.splitlines()[-1])
    assert len(record["curve"]) == record["epochs"] == 2
    assert (record["last"], record["best"]) == (record["curve"][-1], max(record["curve"]))
    assert record["students"] == 2
    assert record["git"] == [] or set(record["git"][0]) == {"commit", "clean"}
    assert record["teacher"]["sha256"] == figures()["NONE,resnet14", 0]["sha256"]["student"]
    assert "hash" not in record and "hash" not in record["teacher"], "it is computed anew, of what it says"
    assert str(root) not in text.replace(str(root / "digits.npz"), ""), "no machine's paths"

    status, _, again = conducted(studied)
    assert (status, again.asked) == (0, [])
    assert RECORD.read_text() == text

    RECORD.unlink()  # what lies finished in folders is exported, not trained
    status, _, again = conducted(studied)
    assert (status, again.asked) == (0, [])
    assert len(figures()) == 7

    capsys.readouterr()
    assert command("small.yaml", "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["NONE,resnet8,seed0", "done", "2/2"]
    assert lines[-1] == "0 runs, 0 epochs left: about 0:00:00 one after the other"
    assert command("small.yaml", "--dry-run", "--seeds", "0-2", "--results", "new") == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"NONE,resnet8,seed2 +missing +0/2 +\d\.\d +0:00:0\d", lines[4]), "by its other seeds"
    assert lines[-1].startswith("3 runs, 6 epochs left: about 0:00:0")
    assert command("small.yaml") == 0
    out = capsys.readouterr().out
    assert "7 of 7 runs are on record in results/runs.jsonl; --results FOLDER starts another" in out
    assert re.search(r"\nresnet14 → resnet8 +KD +2 ", out), "a table for the terminal"
    assert re.search(r"\n7 done, in 0:00:\d\d; tables and charts in results/small\n", out)
    assert Path("results/small/table.md").exists()


def test_a_run_that_stopped_early_is_finished(small_plan, curves, capsys):
    change(
        small_plan, methods=["NONE"], pairs=["resnet8/resnet8"],
        overrides={"SOLVER": {"EPOCHS": 8, "EARLY_STOP": 3}},
    )  # fmt: skip
    status, conductor, first = conducted(small_plan)
    assert (status, conductor.failed, first.asked) == (0, {}, [("NONE,resnet8", [0, 1])])
    assert "done     NONE,resnet8,seed0: last 45.00, best 50.00 @ 2, stopped early at epoch 5 of 8" in (
        capsys.readouterr().out
    )
    run = conductor.groups[0].runs[0]
    assert state(run) == "finished"
    RECORD.unlink()
    assert conducted(small_plan)[2].asked == [], "what lies finished in folders is exported, not trained"
    assert command("small.yaml", "--dry-run") == 0
    assert re.search(r"NONE,resnet8,seed0 +done +5/8", capsys.readouterr().out)
    assert command("small.yaml") == 0
    table = Path("results/small/table.md").read_text()
    assert "NONE,resnet8: stopped early at epochs 5, 8 of 8, 3 epochs behind the best test accuracy, which" in table


def test_what_fails_does_not_stop_the_rest(studied):
    keep_records(lambda record: "KD" not in record["cell"])
    for file in Path("output").glob("*/*/*kd*/metrics.jsonl"):
        shutil.rmtree(file.parent)
    bad = {"TYPE": "KD", "TEACHER": "resnet14", "STUDENT": "resnet8"}
    write(Path("configs/kd/bad.yaml"), _BASE_="../none/resnet8.yaml", SOLVER={"LR": 1e18}, DISTILLER=bad)
    status, conductor, _ = conducted(studied)
    assert status == 1
    assert list(conductor.failed) == ["KD,resnet14,resnet8,seed0", "KD,resnet14,resnet8,seed1"]
    assert conductor.failed["KD,resnet14,resnet8,seed1"].startswith("seed 1: "), "each has its own reason"
    assert {cell for cell, _ in figures()} == {"NONE,resnet8", "NONE,resnet14", "DTKD,resnet14,resnet8"}


def test_students_of_a_failed_teacher_are_skipped(small_plan):
    train_at(1e18, "resnet14")
    status, conductor, executor = conducted(small_plan, only=["KD"])
    assert (status, executor.asked) == (1, [("NONE,resnet14", [0])])
    assert len(conductor.failed) == 3
    assert conductor.failed["KD,resnet14,resnet8,seed0"] == "skipped: its teacher NONE,resnet14,seed0 failed"


def test_jobs_that_die_are_started_again_and_fail_in_the_end(small_plan):
    status, conductor, executor = conducted(small_plan, Dying(2), only=["NONE,resnet14"])
    assert (status, executor.asked) == (0, [("NONE,resnet14", [0])] * 3)
    shutil.rmtree("output")
    RECORD.unlink()
    status, conductor, executor = conducted(small_plan, Dying(99), only=["KD"])
    assert (status, executor.asked) == (1, [("NONE,resnet14", [0])] * 3)
    assert conductor.failed["NONE,resnet14,seed0"] == "ended by signal 9"


def test_another_run_in_the_folder_is_kept_and_not_taken(studied):
    train_at(0.01, "resnet8")
    run = runs_of(studied)[0]
    assert state(run) == "another"
    status, _, executor = conducted(studied, only=["NONE,resnet8"])
    assert (status, executor.asked) == (0, [("NONE,resnet8", [0, 1])])
    assert run.folder.with_name(f"{run.folder.name}~1").is_dir()
    keep_records(lambda record: record["cell"] == "NONE,resnet8")
    records = [json.loads(line) for line in RECORD.read_text().splitlines()]
    assert [record["config"]["SOLVER.LR"] for record in records] == [0.05, 0.05, 0.01, 0.01]


def test_a_teacher_whose_network_is_gone_is_trained_again_where_it_is_needed(studied):
    keep_records(lambda record: record["teacher"] is None)
    shutil.rmtree("output")
    assert conducted(studied, only=["NONE"])[2].asked == []
    status, _, executor = conducted(studied, only=["KD"])
    assert status == 0
    assert executor.asked == [("NONE,resnet14", [0]), ("KD,resnet14,resnet8", [0, 1])]
    assert len(figures()) == len(RECORD.read_text().splitlines()) == 5, "and is on record once"


def test_a_run_that_another_process_trains_is_waited_for(small_plan, monkeypatch):
    holder = RunFolder(runs_of(small_plan)[0].folder)
    monkeypatch.setattr(conduct, "POLL_SECONDS", 0.02)

    class Watched(Here):
        def train(self, group, seeds):
            if group.name == "NONE,resnet14":
                threading.Timer(0.5, holder.close).start()
            return super().train(group, seeds)

    status, _, executor = conducted(small_plan, Watched(), only=["NONE"])
    assert status == 0
    assert executor.asked == [("NONE,resnet8", [1]), ("NONE,resnet14", [0]), ("NONE,resnet8", [0])]


def test_the_budget_starts_nothing_that_is_known_not_to_fit(studied):
    records = [json.loads(line) for line in RECORD.read_text().splitlines()]
    slow = [r | {"seconds": 2e4 if r["cell"].startswith("DTKD") else 0.1} for r in records]
    RECORD.write_text("".join(json.dumps(r) + "\n" for r in slow if r["seed"] == 0))
    shutil.rmtree("output")
    status, conductor, executor = conducted(studied, budget=600)
    assert (status, conductor.failed) == (75, {})
    assert executor.asked == [("NONE,resnet8", [1]), ("NONE,resnet14", [0]), ("KD,resnet14,resnet8", [1])]
    assert conductor.waiting == {"DTKD,resnet14,resnet8,seed1": "does not fit the budget"}
    (*_, group) = conductor.groups
    conductor.deadline = time.monotonic() + 2e4 + 100  # 5e3 s an epoch, two epochs a run
    assert conductor._fitting(group, [*group.runs, *group.runs]) == [*group.runs], "as many seeds as fit"
    conductor.records = {}
    assert len(conductor._fitting(group, [*group.runs, *group.runs])) == 4, "its time is not known"


def test_the_budget_ends_what_runs_over(small_plan, monkeypatch, capsys):
    class Slow(Here):
        stopped = False

        def start(self, group, seeds):
            job = Ended(Outcome(False, ["exit status 75"]))
            job.ended, job.stop = lambda: self.stopped, lambda at_once=False: setattr(self, "stopped", True)
            return job

    monkeypatch.setattr(conduct, "PAUSE_SECONDS", 0.01)
    status, conductor, executor = conducted(small_plan, Slow(), budget=0.2)
    assert (status, executor.stopped, len(conductor.left()), conductor.failed) == (75, True, 7, {})
    assert "the budget is used up; what runs keeps a checkpoint" in capsys.readouterr().out


def test_a_run_that_cannot_go_on_record_fails_alone(small_plan, monkeypatch):
    def full(group, run, study):
        if run.seed == 1:
            raise OSError("disk full")
        return record_of(group, run, study)

    with monkeypatch.context() as patch:
        patch.setattr(conduct, "record_of", full)
        status, conductor, _ = conducted(small_plan, only=["NONE,resnet8"])
    assert (status, len(figures())) == (1, 1)
    assert "disk full" in conductor.failed["NONE,resnet8,seed1"]
    status, _, again = conducted(small_plan, only=["NONE,resnet8"])
    assert (status, again.asked) == (0, []), "it is put on record later, not trained again"
    RECORD.unlink()
    file = runs_of(small_plan)[0].folder / "metrics.jsonl"
    file.write_text(file.read_text().splitlines(True)[1])
    status, conductor, _ = conducted(small_plan, only=["NONE,resnet8"])
    assert (status, list(conductor.failed)) == (1, ["NONE,resnet8,seed0"])


def test_a_job_that_is_refused_waits_for_the_others_and_fails_alone(small_plan):
    class Crowded(Here):
        slots = 10

        def start(self, group, seeds):
            if self.full:
                raise UserError("cannot be submitted: QOSMaxSubmitJobPerUserLimit")
            job, self.full = super().start(group, seeds), True
            job.ended = lambda: setattr(self, "full", False) or True
            return job

    executor = Crowded()
    executor.full = True
    status, conductor, _ = conducted(small_plan, executor, only=["KD"])
    assert (status, executor.asked) == (1, [])
    assert "QOSMaxSubmitJobPerUserLimit" in conductor.failed["NONE,resnet14,seed0"]
    executor.full = False
    assert conducted(small_plan, executor, only=["NONE"])[0] == 0
    assert executor.asked == [("NONE,resnet8", [0, 1]), ("NONE,resnet14", [0])]


def test_a_plug_ins_method_can_be_in_a_plan(small_plan):
    own_kd(Path("mine.py"), "PLUGGED")
    overrides = {"EXPERIMENT": {"PLUGINS": ["mine.py"]}, "PLUGGED": {"WEIGHT": 2.0}}
    change(small_plan, methods=["PLUGGED"], seeds=[0], overrides=overrides)
    try:
        status, conductor, _ = conducted(small_plan)
    finally:
        registry.distillers.pop("PLUGGED", None)
        config.CFG.pop("PLUGGED", None)
        config.SECTIONS.pop("PLUGGED", None)
        config.KEYS.pop("PLUGGED.WEIGHT", None)
    assert (status, conductor.failed) == (0, {})
    record = json.loads(RECORD.read_text().splitlines()[-1])
    assert record["config"]["PLUGGED.WEIGHT"] == 2.0
    shown = results.show(str(RECORD), ROOT / "configs/plans", None, None, None, [])
    assert re.search(r"\| resnet14 → resnet8 \| PLUGGED +\| 1 ", shown), "where the plug-in is not loaded"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quik"], "unknown plan 'quik'; did you mean quick?"),
        (["gone.yaml"], "gone.yaml"),
        (["small.yaml", "--seeds", "4-1"], "--seeds: 4-1: seeds are below 2**32, the smaller one first"),
        (["small.yaml", "--budget", "soon"], "--budget soon: give a time such as 2h"),
        (["small.yaml", "--only", "DKD"], "--only DKD: names nothing in the plan"),
        (["small.yaml", "SOLVER.LR", "1"], "SOLVER.LR: pairs of KEY VALUE say only where"),
        (["small.yaml", "EXPERIMENT.NAME", "x"], "EXPERIMENT.NAME: pairs of KEY VALUE say only where"),
        (["small.yaml", "DATASET.ROOT", "gone.npz"], "gone.npz"),
        (["small.yaml", "LOG.PREFIX"], "LOG.PREFIX: has no value"),
        (["small.yaml", "--sedes", "1"], "unknown option --sedes"),
        (["small.yaml", "--slurm", "a=b"], "--slurm: add --executor slurm"),
        (["small.yaml", "--slurm", "a=b", "LOG.PREFIX", "x"], "KEY VALUE pairs stand before --slurm"),
        (["small.yaml", "--published", "gone.json"], "gone.json: cannot be read"),
        (["small.yaml", "--results", "small.yaml"], "small.yaml"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(small_plan, words, message):
    before = sorted(Path().rglob("*"))
    with pytest.raises(UserError) as caught:
        command(*words)
    assert message in str(caught.value)
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("tasks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_submitit_runs_a_study(small_plan, monkeypatch, tasks):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
    here = Slurm(Path("jobs"), {"timeout_min": 5, "tasks_per_node": tasks}, "local")
    status, conductor, _ = conducted(small_plan, here, only=["NONE,resnet8"])
    assert (status, conductor.failed) == (0, {})
    assert set(figures()) == {("NONE,resnet8", 0), ("NONE,resnet8", 1)}
    for file in Path().rglob("environment.json"):
        sessions = json.loads(file.read_text())["sessions"]
        assert {session.get("processes", 1) for session in sessions} == {tasks}


def test_slurm_says_what_it_needs_and_what_it_refuses(small_plan, monkeypatch):
    pytest.importorskip("submitit")
    slurm, (group, *_) = Slurm(Path("jobs"), {}, "debug"), plan.load(small_plan).groups
    group.file = Path("gone.yaml")
    assert slurm.start(group, [0]).outcome() == Outcome(
        True, ["gone.yaml: cannot be read (No such file or directory); pass an existing YAML file with --cfg"]
    )
    group.file = Path("configs/none/resnet8.yaml")
    assert slurm.start(group, []).outcome().final is False, "a crash"
    monkeypatch.setattr(slurm.executor, "submit", lambda *_: Path("sbatch").read_text())
    with pytest.raises(UserError, match="cannot be submitted: .*No such file"):
        slurm.start(group, [0])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs submitit: pip install submitit"):
        Slurm(Path("jobs"), {})


def children(number):
    found = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(number)], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in found.splitlines() if "spawn_main" in line]


def is_alive(number):
    with contextlib.suppress(OSError):
        return "Z" not in Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    return False


@pytest.mark.slow
def test_signals_and_kill_9_end_a_study_and_the_same_command_goes_on(tmp_path, monkeypatch):
    (tmp_path / "calm").mkdir()
    (tmp_path / "wild").mkdir()
    expected = {}
    for place in ("calm", "wild"):
        monkeypatch.chdir(tmp_path / place)
        solver = {"EPOCHS": 25, "BATCH_SIZE": 16, "LR_DECAY_STAGES": [20]}
        change(write_plan(Path()), configs="configs", overrides={"SOLVER": solver, "DTKD": {"WARMUP": 1}})
        for name in ("resnet8", "resnet14"):
            change(
                Path(f"configs/none/{name}.yaml"), DATASET={"TYPE": "npz", "ROOT": str(tmp_path / "calm/digits.npz")}
            )
        if place == "calm":
            conducted(Path("small.yaml"), only=["KD"])
            expected = figures()

    def start():
        log = open("log.txt", "a")  # noqa: SIM115
        words = [sys.executable, str(ROOT / "tools/reproduce.py"), "small.yaml", "--only", "KD"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(words, stdout=log, stderr=log, env=environment)
        (child,) = wait_for(lambda: children(process.pid))
        wait_for(lambda: list(Path("output").glob("campaign/configs/*/metrics.jsonl")))
        return process, child

    process, child = start()
    os.kill(child, signal.SIGKILL)
    wait_for(lambda: children(process.pid) not in ([], [child]))
    process.terminate()
    assert process.wait(60) == 75
    log = Path("log.txt").read_text()
    assert "stopped  NONE,resnet14: ended by signal 9; it is started again" in log
    assert "stopped by SIGTERM" in log
    assert "FAILED" not in log

    process, child = start()
    process.kill()
    process.wait()
    wait_for(lambda: not is_alive(child))  # or it would train on beside its successor

    process, _ = start()
    assert process.wait(300) == 0, Path("log.txt").read_text()
    assert figures() == expected
    assert Path("results/small/table.md").exists()
