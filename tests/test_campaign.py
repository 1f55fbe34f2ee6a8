"""Plans of many runs: what they hold, that nothing of them is lost or done twice, and the tables that come of it."""

import contextlib
import io
import json
import multiprocessing
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import ROOT, outcome, same, tool
from hypothesis import given, settings
from hypothesis import strategies as st

from mdistiller import config, registry
from mdistiller.analysis.statistics import mean_and_std
from mdistiller.campaign import command, estimate, executors, tables, view, worker
from mdistiller.campaign import conduct as conducting
from mdistiller.campaign import plan as plans
from mdistiller.campaign.conduct import Campaign
from mdistiller.campaign.estimate import Estimates, Measured
from mdistiller.campaign.identity import computing, differing, identity
from mdistiller.campaign.ledger import Ledger, hash_of, shortcoming, state
from mdistiller.campaign.view import Board
from mdistiller.dataset import load_dataset
from mdistiller.distillers import distiller_dict
from mdistiller.engine import builder
from mdistiller.errors import ConfigError, UserError
from mdistiller.runs.folder import RunFolder
from mdistiller.runs.stop import Stop

PLANS = ROOT / "configs" / "plans"
PUBLISHED = json.loads((ROOT / "results" / "published.json").read_text())
KILLS = int(os.environ.get("CAMPAIGN_KILLS", "0"))  # of `quick`, which takes minutes


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """40 + 20 digits."""
    path, data = tmp_path_factory.mktemp("images") / "digits.npz", load_dataset("digits", ".")
    arrays = {"train_images": data.train_images[:40], "train_labels": data.train_labels[:40]}
    arrays |= {"test_images": data.test_images[:20], "test_labels": data.test_labels[:20]}
    np.savez(path, **{name: values.numpy() for name, values in arrays.items()})
    return path


@pytest.fixture
def small(tmp_path, images, monkeypatch):
    """small.yaml in the current folder: resnet14 -> resnet8 by NONE, KD and DTKD, two epochs of three steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(conducting, "PAUSE", 0.01)
    solver = {"EPOCHS": 2, "BATCH_SIZE": 16, "LR_DECAY_STAGES": [1]}
    for name in ("resnet8", "resnet14"):
        write(
            tmp_path / "configs" / "none" / f"{name}.yaml", DATASET={"TYPE": "npz", "ROOT": str(images)}, SOLVER=solver,
            DISTILLER={"TYPE": "NONE", "STUDENT": name},
        )  # fmt: skip
    return write(
        tmp_path / "small.yaml", configs="configs", pairs=["resnet14/resnet8"], methods=["NONE", "KD", "DTKD"],
        seeds=[0, 1], overrides={"DTKD": {"WARMUP": 1}},
    )  # fmt: skip


def write(path, **tree):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree))
    return path


PLUGIN = """
from mdistiller.distillers.KD import KD
from mdistiller.distillers import register_distiller

@register_distiller("PLUGGED", defaults={"WEIGHT": 1.0})
class Plugged(KD):
    pass
"""


class Quiet:
    """A display that keeps what it is told."""

    def __init__(self):
        self.lines = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def say(self, text):
        self.lines.append(text)

    def update(self, campaign):
        pass


class Here:
    """Trains in this process, and keeps what it was asked for."""

    slots = 1

    def __init__(self):
        self.asked = []

    def start(self, cell, trials):
        seeds = [trial.seed for trial in trials]
        self.asked.append((cell.name, seeds))
        status = worker.run(cell.file, cell.opts, seeds)
        return Ended(status, "")


class Ended:
    def __init__(self, status, complaints):
        self.status, self.text = status, complaints

    def poll(self):
        return self.status

    def stop(self, at_once=False):
        pass

    def complaints(self):
        return self.text


def conduct(file, executor=None, only=(), **options):
    """(status, campaign, executor) of the plan in `file`, its record in results/."""
    plan, executor = plans.load(file), executor or Here()
    ledger = Ledger(Path("results/runs.jsonl"))
    campaign = Campaign(plan.name, plan.select(only), ledger, executor, Estimates(ledger), Quiet(), **options)
    return campaign.run(), campaign, executor


def figures(path="results/runs.jsonl"):
    """What must not depend on how often a campaign was disturbed."""
    records = [json.loads(line) for line in Path(path).read_text().splitlines()]
    keys = ("cell", "seed", "hash", "last", "best", "best_epoch", "epochs", "images", "sha256", "config", "curve")
    return {(r["cell"], r["seed"]): {key: r[key] for key in keys} for r in records}


# Plans


@pytest.mark.parametrize("file", sorted(PLANS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_plan_stands_for_runs_of_folders_and_hashes_of_their_own(file):
    plan = plans.load(file)
    assert plan.title
    assert f"python3 tools/reproduce.py {file.stem}\n" in file.read_text()
    for what in (lambda t: t.name, lambda t: t.folder, lambda t: t.hash):
        assert len({what(trial) for trial in plan.trials}) == len(plan.trials)
    order = [cell.name for cell in plan.cells]
    for cell in plan.cells:
        if cell.teacher:
            assert order.index(cell.teacher.cell.name) < order.index(cell.name), "teachers come first"
            assert cell.cfg.DISTILLER.TEACHER_CKPT == str(cell.teacher.weights)
            assert cell.teacher.cfg.SOLVER.EPOCHS == cell.cfg.SOLVER.EPOCHS


def test_the_published_plans_are_what_was_published():
    charts, pairs = plans.load(PLANS / "dtkd_charts.yaml"), plans.load(PLANS / "dtkd_pairs.yaml")
    assert {c.name.partition(",")[2] for c in charts.cells if c.teacher} == {
        f"{teacher},{student}"
        for student in ("resnet8", "MobileNetV2")
        for teacher in PUBLISHED[f"dtkd_chart_{student}"]["teacher"]
    }
    assert {c.name for c in pairs.cells if c.name.startswith("DKD")} == {
        "DKD," + pair.replace("/", ",") for pair in PUBLISHED["pairs_in_the_seed_configs"]
    }
    for plan in (charts, pairs):
        for cell in plan.cells:
            assert tables.departures(cell.cfg, PUBLISHED) == [], cell.name
            pair = f"{cell.cfg.DISTILLER.TEACHER}/{cell.cfg.DISTILLER.STUDENT}"
            for method in ("DKD", "DTKD"):
                if cell.cfg.DISTILLER.TYPE == method:
                    wanted = PUBLISHED[f"{method.lower()}_hyperparameters"]
                    for key, value in (wanted["default"] | wanted.get(pair, {})).items():
                        assert cell.cfg[method][key] == value, (cell.name, key)


def test_published_figures_are_those_of_the_reference():
    reference = ROOT.parent / "shared" / "reference" / "published.json"
    if not reference.exists():
        pytest.skip("../shared/reference is not here")
    assert json.loads(reference.read_text()) == PUBLISHED


def test_a_plan_reports_all_its_mistakes_at_once(small):
    tree = yaml.safe_load(small.read_text()) | {
        "metods": ["KD"], "methods": ["KD", "DTKDD", "FITNET", "KD"], "rules": ["std", "hot"], "seeds": [0, "one", -1],
        "pairs": ["resnet14/resnet8", "resnet14", "resnet21/resnet8"], "note": 3, "students": ["resnet8"],
        "overrides": {"SOLVER": {"EPOCS": 3, "LR": "much"}, "SEED": 4, "DISTILLER": {"TYPE": "KD"}},
    }  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        plans.load(write(small, **tree))
    text = str(caught.value)
    for line in (
        "unknown key 'metods'; did you mean methods?",
        "unknown method 'DTKDD'; did you mean DTKD?", "KD stands there twice",
        "unknown temperature rule 'hot'", "FITNET takes no temperature rule", "seeds: takes whole numbers; got 'one'",
        "must be in [0, 2**32)", "must be teacher/student, such as resnet56/resnet20; got resnet14",
        "unknown model 'resnet21'; did you mean resnet32?", "note: must be text", "SEED is the plan's own business",
        "DISTILLER.TYPE is the plan's own business", "SOLVER.EPOCS: unknown key; did you mean SOLVER.EPOCHS?",
        "SOLVER.LR: must be a number",
    ):  # fmt: skip
        assert line in text, f"{line}\n{text}"
    assert all(line.startswith(f"{small}: ") for line in text.splitlines())
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": []}, "give either pairs: [teacher/student, ...], or teachers: and students:"),
        ({"methods": []}, "methods: is missing"),
        ({"configs": "nowhere"}, "configs: there is no folder"),
        ({"pairs": ["resnet14/resnet20"]}, "none has no YAML for resnet20; add one"),
        ({"teacher_seed": True}, "teacher_seed: must be a whole number"),
    ],
)
def test_a_plan_says_what_it_lacks(small, change, message):
    with pytest.raises(ConfigError) as caught:
        plans.load(write(small, **yaml.safe_load(small.read_text()) | change))
    assert message in str(caught.value)


def test_a_plan_inherits(small):
    child = write(small.with_name("child.yaml"), _BASE_="small.yaml", seeds=[7], overrides={"SOLVER": {"LR": 0.1}})
    plan = plans.load(child)
    assert [t.seed for t in plan.trials] == [7, 0, 7, 7], "the teacher keeps its seed"
    assert {c.cfg.SOLVER.LR for c in plan.cells} == {0.1}
    assert plan.cells[-1].cfg.DTKD.WARMUP == 1
    assert "DTKD.WARMUP" not in plan.cells[0].opts, "sections of other methods stand in no run's name"


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("KD", ["NONE,resnet14", "KD,resnet14,resnet8"]),
        ("none,RESNET8", ["NONE,resnet8"]),
        ("*kd,resnet8", ["NONE,resnet14", "KD,resnet14,resnet8", "DTKD,resnet14,resnet8"]),
    ],
)
def test_only_takes_along_the_teachers(small, pattern, names):
    plan = plans.load(small)
    chosen = plan.select([pattern])
    assert [cell.name for cell in chosen] == names
    assert all([t.seed for t in cell.trials] == ([0] if cell.name == "NONE,resnet14" else [0, 1]) for cell in chosen)
    with pytest.raises(UserError, match=r"--only DKD: names nothing in the plan small, which has NONE,resnet8 "):
        plan.select(["DKD"])


def test_seeds_times_and_parameters():
    assert command.parse_seeds("0-2,5,1") == [0, 1, 2, 5]
    assert [command.parse_time(text) for text in ("2h", "90m", "1h30m", "0.5d", "45s")] == [7200, 5400, 5400, 43200, 45]
    assert command.parse_parameters(["timeout_min=5", "slurm_partition=gpu"]) == {
        "timeout_min": 5,
        "slurm_partition": "gpu",
    }
    for parse, bad in (
        (command.parse_seeds, ("", "4-2", "a", "-1", "0-99999999", "1,,2")),
        (command.parse_time, ("", "2", "h", "2 hours", "-1h")),
        (command.parse_parameters, (["x"],)),
    ):
        for text in bad:
            with pytest.raises(UserError):
                parse(text)


def test_runs_that_would_share_a_folder_are_refused(small):
    file = Path("configs/kd/pair.yaml")
    pair = {"TYPE": "KD", "TEACHER": "resnet14", "STUDENT": "resnet8"}
    write(file, _BASE_="../none/resnet8.yaml", EXPERIMENT={"NAME": "x"}, DISTILLER=pair)
    write(Path("configs/dtkd/pair.yaml"), _BASE_="../kd/pair.yaml", DISTILLER={"TYPE": "DTKD"})
    tree = yaml.safe_load(small.read_text()) | {"overrides": {}}
    with pytest.raises(ConfigError, match=r"DTKD,resnet14,resnet8,seed1: is not alone in the folder output/"):
        plans.load(write(small, **tree))


def test_many_overrides_give_runs_a_short_name(small):
    tree = yaml.safe_load(small.read_text())
    before = [trial.folder for trial in plans.load(small).trials]
    solver = {
        "LR": 0.0123456789012345,
        "LR_DECAY_RATE": 0.123456789,
        "WEIGHT_DECAY": 0.000123456789,
        "MOMENTUM": 0.8765432109876543,
        "BATCH_SIZE": 20,
        "EPOCHS": 2,
    }
    many = {"SOLVER": solver | {"NAN_POLICY": "skip"}, "DATASET": {"AUGMENT": "none"}, "DTKD": {"WARMUP": 1}}
    status, campaign, _ = conduct(write(small, **tree | {"overrides": many}), only=["NONE,resnet8"])
    assert status == 0, campaign.view.lines
    names = [trial.folder.name for trial in plans.load(small).trials]
    assert all(len(name) < 60 and "SOLVER" not in name for name in names), names
    assert Path("output/campaign/configs").joinpath(names[1], "latest").exists()
    many["SOLVER"]["LR"] = 0.02
    assert not {t.folder.name for t in plans.load(write(small, **tree | {"overrides": many})).trials} & set(names)
    assert [trial.folder for trial in plans.load(write(small, **tree)).trials] == before


def test_a_grid_runs_one_student_after_the_other(small):
    for name in ("resnet20", "resnet32"):
        alone = {"TYPE": "NONE", "STUDENT": name}
        write(Path(f"configs/none/{name}.yaml"), _BASE_="resnet8.yaml", DISTILLER=alone)
    tree = {"configs": "configs", "methods": ["NONE", "KD"], "seeds": [0]}
    grid = plans.load(write(small, **tree, teachers=["resnet20", "resnet32"], students=["resnet8", "resnet14"]))
    assert [cell.name for cell in grid.cells] == [
        "NONE,resnet8", "NONE,resnet20", "KD,resnet20,resnet8", "NONE,resnet32", "KD,resnet32,resnet8",
        "NONE,resnet14", "KD,resnet20,resnet14", "KD,resnet32,resnet14",
    ]  # fmt: skip
    listed = plans.load(write(small, **tree, pairs=["resnet20/resnet8", "resnet32/resnet8", "resnet20/resnet14"]))
    assert [cell.name for cell in listed.cells if cell.teacher] == [
        "KD,resnet20,resnet8", "KD,resnet20,resnet14", "KD,resnet32,resnet8",
    ]  # fmt: skip


# The hash


def test_the_hash_is_of_what_is_computed(small):
    def of(file="configs/none/resnet8.yaml", *opts):
        return identity(computing(config.load(file, opts)), None)

    kd = ["DISTILLER.TYPE", "KD", "DISTILLER.TEACHER", "resnet14"]
    same_ = [
        ["LOG.PREFIX", "x"], ["DEVICE", "cpu"], ["EXPERIMENT.NAME", "y"], ["DISTILLER.TEACHER_CKPT", "z"],
        ["DKD.T", "9"], ["LOG.SAVE_CHECKPOINT_FREQ", "1"], ["DATASET.TEST.BATCH_SIZE", "7"],
    ]  # fmt: skip
    other = [
        ["SOLVER.LR", "0.1"],
        ["SEED", "1"],
        ["SOLVER.AMP", "bf16"],
        ["SOLVER.EPOCHS", "3"],
        ["DATASET.TYPE", "digits"],
    ]
    for words in same_:
        assert of() == of("configs/none/resnet8.yaml", *words), words
    for words in [*other, ["DISTILLER.STUDENT", "resnet14"], kd]:
        assert of() != of("configs/none/resnet8.yaml", *words), words
    base = of("configs/none/resnet8.yaml", *kd)
    for words in (["KD.TEMPERATURE", "2"], ["TEMPERATURE.RULE", "std"], ["EXPERIMENT.LOGIT_STAND", "True"]):
        assert base != of("configs/none/resnet8.yaml", *kd, *words), words
    assert of("configs/none/resnet8.yaml", "DISTILLER.TEACHER", "vgg8") == of(), "NONE has no teacher"
    own, teacher = {"SEED": 0}, {"SOLVER.EPOCHS": 2}
    assert len({identity(own, None), identity(own, teacher), identity(own, {"SOLVER.EPOCHS": 3})}) == 3


def test_a_key_that_is_added_later_makes_no_run_another_one(small, monkeypatch):
    for trial in plans.load(small).trials:
        record = {
            "config": trial.settings,
            "teacher": {"config": trial.teacher_settings} if trial.cell.teacher else None,
        }
        record = json.loads(json.dumps(record))
        assert hash_of(record) == trial.hash
        with monkeypatch.context() as patched:
            patched.setitem(config.CFG.SOLVER, "LOOKAHEAD", 0)
            later = next(t for t in plans.load(small).trials if t.name == trial.name)
            assert "SOLVER.LOOKAHEAD" in later.settings
            assert hash_of(record) == later.hash != trial.hash


# Running


def test_a_campaign_runs_once_and_knows_it(small, capsys):
    status, campaign, first = conduct(small)
    assert status == 0, campaign.view.lines
    assert first.asked == [
        ("NONE,resnet8", [0, 1]), ("NONE,resnet14", [0]), ("KD,resnet14,resnet8", [0, 1]),
        ("DTKD,resnet14,resnet8", [0, 1]),
    ]  # fmt: skip
    text = Path("results/runs.jsonl").read_text()
    assert len(figures()) == 7
    record = json.loads(text.splitlines()[-1])
    assert len(record["curve"]) == record["epochs"] == 2
    assert record["images"] == 80
    assert record["last"] == record["curve"][-1]
    assert record["best"] == max(record["curve"])
    assert record["git"][0] is None or set(record["git"][0]) == {"commit", "clean"}
    assert record["teacher"]["sha256"] == figures()["NONE,resnet14", 0]["sha256"]["student"]
    assert str(Path.cwd()) not in text, "no machine's paths"

    status, _, again = conduct(small)
    assert (status, again.asked) == (0, [])
    assert Path("results/runs.jsonl").read_text() == text

    Path("results/runs.jsonl").unlink()  # what lies finished in folders is put on record, not trained
    status, campaign, again = conduct(small)
    assert (status, again.asked) == (0, [])
    assert len(figures()) == 7
    assert "on record" not in campaign.view.lines


def test_half_done_runs_go_on_and_finished_seeds_are_left_alone(small, monkeypatch):
    conduct(small, only=["KD"])
    trials = [trial for trial in plans.load(small).trials if trial.folder.exists()]
    expected = {trial.name: outcome(trial.folder) for trial in trials}
    told = figures()
    Path("output").rename("undisturbed")
    Path("results/runs.jsonl").unlink()

    class Late(Stop):
        """The signal comes to the sixth item of every session: in the second epoch."""

        def watch(self, items):
            for item in super().watch(items):
                self.seen = getattr(self, "seen", 0) + 1
                if self.seen == 6:
                    self.signal = "SIGTERM"
                yield item

    monkeypatch.setattr(builder, "Stop", Late)
    status, campaign, executor = conduct(small, only=["KD"])
    assert status == 0, campaign.view.lines
    assert any(line.startswith("stopped  NONE,resnet14,seed0") for line in campaign.view.lines)
    assert len(executor.asked) > 2, "a job that was stopped and came on is started again"
    assert figures() == told
    for trial in trials:
        assert same(outcome(trial.folder), expected[trial.name]), trial.name


def test_a_run_that_is_killed_in_its_first_epoch_is_started_again(small, monkeypatch):
    class Stuck(Stop):
        def watch(self, items):
            for number, item in enumerate(super().watch(items)):
                if number == 2:
                    Path("stuck").touch()
                    time.sleep(600)
                yield item

    class Killing(Here):
        def start(self, cell, trials):
            if self.asked:
                return super().start(cell, trials)
            self.asked.append((cell.name, [trial.seed for trial in trials]))
            with monkeypatch.context() as patch:
                patch.setattr(builder, "Stop", Stuck)
                child = forked(lambda: worker.run(cell.file, cell.opts, self.asked[0][1]))
            wait_for(Path("stuck").exists, child)
            child.kill()
            child.join()
            return Ended(-signal.SIGKILL, "")

    status, campaign, executor = conduct(small, Killing(), only=["NONE,resnet8"])
    assert status == 0, campaign.view.lines
    assert executor.asked == [("NONE,resnet8", [0, 1])] * 2
    assert any(line.startswith("stopped  NONE,resnet8,seed0") for line in campaign.view.lines)
    assert "from the journal" in (plans.load(small).trials[0].folder / "worklog.txt").read_text()


def test_a_failing_run_does_not_stop_the_rest(small):
    write(
        Path("configs/kd/bad.yaml"), _BASE_="../none/resnet8.yaml", SOLVER={"LR": 1e18},
        DISTILLER={"TYPE": "KD", "TEACHER": "resnet14", "STUDENT": "resnet8"},
    )  # fmt: skip
    status, campaign, _ = conduct(small)
    assert status == 1
    assert campaign.summary() == "5 done, 2 failed"
    assert {cell for cell, _ in figures()} == {"NONE,resnet8", "NONE,resnet14", "DTKD,resnet14,resnet8"}
    assert any(line.startswith("FAILED   KD,resnet14,resnet8,seed0: ") for line in campaign.view.lines)


def test_students_of_a_failed_teacher_are_not_tried(small):
    tree = yaml.safe_load(Path("configs/none/resnet14.yaml").read_text())
    tree["SOLVER"]["LR"] = 1e18
    write(Path("configs/none/resnet14.yaml"), **tree)
    status, campaign, executor = conduct(small)
    assert status == 1
    assert campaign.summary() == "2 done, 1 failed, 4 blocked"
    assert [name for name, _ in executor.asked] == ["NONE,resnet8", "NONE,resnet14"]
    assert campaign.progress["KD,resnet14,resnet8,seed0"].reason == "its teacher NONE,resnet14,seed0 failed"


def test_another_run_in_the_folder_is_kept_and_not_taken(small):
    conduct(small, only=["NONE,resnet8"])
    before = figures()
    tree = yaml.safe_load(Path("configs/none/resnet8.yaml").read_text())
    tree["SOLVER"]["LR"] = 0.01
    write(Path("configs/none/resnet8.yaml"), **tree)  # the folder's name does not show it
    trial = plans.load(small).trials[0]
    assert state(trial) == "another"
    status, _, executor = conduct(small, only=["NONE,resnet8"])
    assert (status, executor.asked) == (0, [("NONE,resnet8", [0, 1])])
    assert trial.folder.with_name(f"{trial.folder.name}~1").is_dir()
    records = [json.loads(line) for line in Path("results/runs.jsonl").read_text().splitlines()]
    assert len(records) == 4
    assert {record["config"]["SOLVER.LR"] for record in records} == {0.05, 0.01}
    assert before


def test_a_teacher_whose_network_is_gone_is_trained_again_where_it_is_needed(small):
    import shutil

    conduct(small, only=["NONE"])
    text = Path("results/runs.jsonl").read_text()
    latest = next(t for t in plans.load(small).trials if t.name == "NONE,resnet14,seed0").folder / "latest"
    latest.unlink()
    assert conducting.lost_teachers(plans.load(small).cells, Ledger(Path("results/runs.jsonl"))) == set()
    shutil.rmtree("output")
    assert conduct(small, only=["NONE"])[2].asked == []
    status, _, executor = conduct(small, only=["KD"])
    assert status == 0
    assert executor.asked == [("NONE,resnet14", [0]), ("KD,resnet14,resnet8", [0, 1])]
    assert Path("results/runs.jsonl").read_text().startswith(text)
    assert len(figures()) == 5, "and is on record once"


def test_a_run_that_another_process_trains_is_waited_for(small):
    trial = plans.load(small).trials[0]
    holder = RunFolder(trial.folder)
    row = {"epoch": 1, "test_acc": 50.0, "best_acc": 50.0, "images_per_second": 40.0, "epoch_seconds": 100.0}
    seen, shown = [], []

    class Watching(Quiet):
        def update(self, campaign):
            p = campaign.progress[trial.name]
            seen.append(p.status)
            if p.status == "in use":
                assert p.active
                shown.append((view.figures(p), round(campaign.left(p) or 0)))
                (trial.folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
            if seen.count("in use") == 3:
                (trial.folder / "metrics.jsonl").unlink()
                holder.close()

    plan, ledger = plans.load(small), Ledger(Path("results/runs.jsonl"))
    executor = Here()
    campaign = Campaign(
        "small", plan.select(["NONE,resnet8"]), ledger, executor, Estimates(ledger), Watching()
    )  # fmt: skip
    assert campaign.run() == 0
    assert executor.asked == [("NONE,resnet8", [1]), ("NONE,resnet8", [0])]
    assert shown[0][0] == ("0/2", "", "", "")
    assert shown[-1][0] == ("1/2", "50.00", "50.00", "40")
    assert not campaign.progress[trial.name].active


def test_the_budget_starts_nothing_that_does_not_fit(small):
    plan, ledger = plans.load(small), Ledger(Path("results/runs.jsonl"))
    estimates = Estimates(ledger)
    estimates.told = {cell.name: Measured(1, 1e4 if "KD" in cell.name else 1, 1, 1) for cell in plan.cells}
    executor = Here()
    campaign = Campaign("small", plan.cells, ledger, executor, estimates, Quiet(), time.monotonic() + 600)
    assert campaign.run() == 75
    assert [name for name, _ in executor.asked] == ["NONE,resnet8", "NONE,resnet14"]
    assert campaign.progress["KD,resnet14,resnet8,seed0"].reason == "does not fit the budget"


def test_what_never_fits_does_not_hide_a_failure(small):
    """`while [ $? = 75 ]` must end."""
    tree = yaml.safe_load(Path("configs/none/resnet8.yaml").read_text())
    tree["SOLVER"]["LR"] = 1e18
    write(Path("configs/none/resnet8.yaml"), **tree)
    plan, ledger = plans.load(small), Ledger(Path("results/runs.jsonl"))
    for seconds, expected in ((1e4, 1), (100.0, 75)):
        estimates = Estimates(ledger)
        estimates.told = {
            cell.name: Measured(1, seconds if "resnet14" in cell.name else 1, 1, 1) for cell in plan.cells
        }
        campaign = Campaign("small", plan.cells, ledger, Here(), estimates, Quiet(), time.monotonic() + 150)
        campaign.budget = 600.0  # and much of it is used up
        assert campaign.run() == expected
        assert campaign.summary() == "5 waiting, 2 failed"


def test_the_budget_takes_as_many_seeds_as_fit(small):
    plan, ledger = plans.load(small), Ledger(Path("results/runs.jsonl"))
    estimates = Estimates(ledger)
    estimates.told = {cell.name: Measured(1, 100.0 if cell.teacher is None else 1.0, 1, 1) for cell in plan.cells}
    campaign = Campaign("small", plan.cells, ledger, Here(), estimates, Quiet(), time.monotonic() + 300)
    first, second = (campaign.progress[f"NONE,resnet8,seed{seed}"] for seed in (0, 1))
    second.rows = [{"epoch": 1}]
    assert campaign._fitting([first, second]) == [second], "100 s are left of it, 200 s of the other; 20 s to start"
    second.rows = []
    assert campaign._fitting([first, second]) == [first]
    assert second.reason == "does not fit the budget"
    campaign.deadline = time.monotonic() + 200
    assert campaign.run() == 75
    assert campaign.progress["KD,resnet14,resnet8,seed0"].reason == (
        "its teacher NONE,resnet14,seed0 is not trained: does not fit the budget"
    )


def test_the_budget_ends_the_wait_for_another_process(small):
    plan, ledger = plans.load(small), Ledger(Path("results/runs.jsonl"))
    estimates = Estimates(ledger)
    estimates.told = {cell.name: Measured(1, 0.01, 1, 1) for cell in plan.cells}
    holders = [RunFolder(trial.folder) for trial in plan.cells[0].trials]
    campaign = Campaign("small", plan.cells[:1], ledger, Here(), estimates, Quiet(), time.monotonic() + 0.5)
    begin = time.monotonic()
    assert campaign.run() == 75
    assert time.monotonic() - begin < 20
    for holder in holders:
        holder.close()


def test_a_worker_that_finds_a_folder_taken_fails_nobody(small):
    class Late(Here):
        """Another campaign takes the second seed between the look and the worker's start."""

        def start(self, cell, trials):
            if self.asked:
                return super().start(cell, trials)
            holder = RunFolder(trials[1].folder)
            job = super().start(cell, trials)
            holder.close()
            return job

    status, campaign, executor = conduct(small, Late(), only=["NONE,resnet8"])
    assert status == 0, campaign.view.lines
    assert executor.asked == [("NONE,resnet8", [0, 1])] * 2
    assert not any(line.startswith("FAILED") for line in campaign.view.lines)


def test_a_record_that_cannot_be_kept_fails_that_run_alone(small, monkeypatch):
    keep = Ledger.append

    def append(self, record):
        if record["seed"] == 1:
            raise OSError("disk full")
        return keep(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "append", append)
        status, campaign, _ = conduct(small, only=["NONE,resnet8"])
    assert (status, campaign.summary()) == (1, "1 done, 1 failed")
    assert "disk full" in campaign.progress["NONE,resnet8,seed1"].reason
    status, _, again = conduct(small, only=["NONE,resnet8"])
    assert (status, again.asked) == (0, []), "it is put on record later, not trained again"


def test_a_job_of_several_seeds_says_when_all_its_turns_are_over(small):
    cell = plans.load(small).cells[0]
    ledger = Ledger(Path("results/runs.jsonl"))
    estimates = Estimates(ledger)
    estimates.told = {cell.name: Measured(1, 10.0, 1, 1)}
    campaign = Campaign("small", [cell], ledger, Here(), estimates, Quiet())
    first = campaign.progress["NONE,resnet8,seed0"]
    assert campaign.job_left(first) == 20.0
    campaign.jobs.append(conducting.Running(Ended(None, ""), cell, cell.trials, {}))
    assert campaign.job_left(first) == campaign.total_left() == 40.0


class Crowded(Here):
    """Takes `room` jobs, as a queue with a limit does; each stays until the campaign has looked at it twice."""

    slots = 10

    def __init__(self, room):
        super().__init__()
        self.room, self.jobs = room, []

    def start(self, cell, trials):
        if sum(job.poll() is None for job in self.jobs) >= self.room:
            raise UserError("cannot be submitted: QOSMaxSubmitJobPerUserLimit")
        job = super().start(cell, trials)
        status, looks = job.status, iter([None, None])
        job.poll = lambda: next(looks, status)
        self.jobs.append(job)
        return job


def test_a_job_that_is_refused_waits_for_the_others_and_fails_alone(small, monkeypatch):
    monkeypatch.setattr(conducting, "RETRY", 0.0)
    status, campaign, _ = conduct(small, Crowded(1), only=["NONE"])
    assert (status, campaign.summary()) == (0, "3 done"), campaign.view.lines
    write(small, **yaml.safe_load(small.read_text()) | {"overrides": {"SOLVER": {"LR": 0.01}}})
    status, campaign, _ = conduct(small, Crowded(0), only=["KD"])
    assert (status, campaign.summary()) == (1, "1 failed, 2 blocked")
    assert "QOSMaxSubmitJobPerUserLimit" in campaign.progress["NONE,resnet14,seed0"].reason


def test_executors_say_what_cannot_be_started(small, monkeypatch):
    cell = plans.load(small).cells[0]
    logs = cell.trials[0].folder.parent / ".logs"
    write(logs)
    with pytest.raises(UserError, match="cannot be started: .*: File exists"):
        executors.Local().start(cell, cell.trials)
    pytest.importorskip("submitit")
    from submitit.core.utils import FailedJobError

    def refuse(*_):
        raise FailedJobError("sbatch: error: invalid\npartition")

    slurm = executors.Slurm(Path("jobs"), {}, "debug")
    monkeypatch.setattr(slurm.executor, "submit", refuse)
    with pytest.raises(UserError, match="cannot be submitted: sbatch: error: invalid partition"):
        slurm.start(cell, cell.trials)


def test_a_damaged_seed_fails_alone(small):
    trials = plans.load(small).cells[0].trials
    folder = RunFolder(trials[0].folder)
    folder.write_config(trials[0].cfg, None)
    (trials[0].folder / "latest").write_bytes(b"damaged")
    folder.close()

    class Saying(Here):
        def start(self, cell, trials):
            capture = io.StringIO()
            with contextlib.redirect_stderr(capture):
                status = super().start(cell, trials).status
            return Ended(status, capture.getvalue())

    status, campaign, executor = conduct(small, Saying(), only=["NONE,resnet8"])
    assert (status, campaign.summary()) == (1, "1 done, 1 failed")
    assert executor.asked == [("NONE,resnet8", seeds) for seeds in ([0, 1], [0], [1])]
    assert "latest" in campaign.progress["NONE,resnet8,seed0"].reason


def test_deaths_without_a_step_are_failures_in_the_end(small):
    class Deadly(Here):
        def start(self, cell, trials):
            self.asked.append((cell.name, [trial.seed for trial in trials]))
            return Ended(-signal.SIGKILL, "")

    status, campaign, executor = conduct(small, Deadly(), only=["KD"])
    assert (status, campaign.summary()) == (1, "1 failed, 2 blocked")
    assert executor.asked == [("NONE,resnet14", [0])] * 4
    assert campaign.progress["NONE,resnet14,seed0"].reason == "ended by signal 9"
    _, campaign, executor = conduct(small, Deadly(), only=["NONE,resnet8"])
    assert [seeds for _, seeds in executor.asked] == [[0, 1]] * 4 + [[0]] * 4 + [[1]] * 4


def test_a_finished_run_that_cannot_go_on_record_says_why(small):
    conduct(small, only=["KD"])
    Path("results/runs.jsonl").unlink()
    teacher, first, second = (t for t in plans.load(small).trials if t.folder.exists())
    rows = (first.folder / "metrics.jsonl").read_text().splitlines(True)
    (first.folder / "metrics.jsonl").write_text(rows[1])
    status, campaign, _ = conduct(small, only=["KD"])
    assert (status, campaign.summary()) == (1, "2 done, 1 failed")
    reason = campaign.progress[first.name].reason
    assert reason.endswith("metrics.jsonl: has 1 of 2 epochs; remove that folder, and the same command trains it again")
    (teacher.folder / "student_latest").write_bytes((second.folder / "student_latest").read_bytes())
    assert "was taught by other weights" in shortcoming(second)
    (second.folder / "config.yaml").write_text("SEED: 7")
    assert "holds another run" in shortcoming(second)


def test_a_plug_ins_method_can_be_in_a_plan(small):
    Path("mine.py").write_text(PLUGIN)
    tree = yaml.safe_load(small.read_text()) | {"methods": ["PLUGGED"], "seeds": [0]}
    write(small, **tree | {"overrides": {"EXPERIMENT": {"PLUGINS": ["mine.py"]}, "PLUGGED": {"WEIGHT": 2.0}}})
    try:
        status, campaign, _ = conduct(small)
        (found,) = (r for r in campaign.ledger.records.values() if r["cell"] == "PLUGGED,resnet14,resnet8")
    finally:
        registry.distillers.pop("PLUGGED", None)
        config.CFG.pop("PLUGGED", None)
    assert status == 0, campaign.view.lines
    assert "EXPERIMENT.PLUGINS ['mine.py']" in found["command"]
    assert found["config"]["PLUGGED.WEIGHT"] == 2.0
    assert found["teacher"]["config"]["EXPERIMENT.PLUGINS"] == ["mine.py"]
    shown = command.show(["results/runs.jsonl"], PLANS, None, None, ROOT / "results/published.json", [])
    assert "| resnet14 → resnet8 | PLUGGED | 1 |" in shown, "where the plug-in is not loaded"


def test_seconds_are_shared_as_long_as_others_are_there(small):
    conduct(small, only=["NONE,resnet8"])
    Path("results/runs.jsonl").unlink()
    trial = plans.load(small).trials[0]
    file = trial.folder / "environment.json"
    body = json.loads(file.read_text())
    assert [(s["students"], s["epoch"]) for s in body["sessions"]] == [(2, 0)]
    body["sessions"] = [body["sessions"][0] | {"epoch": 1}, body["sessions"][0] | {"students": 1, "epoch": 1}]
    file.write_text(json.dumps(body))
    rows = [json.loads(line) | {"epoch_seconds": 8.0} for line in (trial.folder / "metrics.jsonl").open()]
    (trial.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    conduct(small, only=["NONE,resnet8"])
    first, _ = Ledger(Path("results/runs.jsonl")).records.values()
    assert (first["seconds"], first["students"]) == (16.0, 1.33), "4 + 8 of its own"


# The record


@given(cut=st.integers(0, 10**6), junk=st.sampled_from([b"", b"\n", b'{"cell": "x"', b"\0\0\0\0", b"\xff{"]))
@settings(max_examples=30, deadline=None)
def test_a_torn_last_line_is_mended_and_costs_that_line_alone(tmp_path_factory, cut, junk):
    path = tmp_path_factory.mktemp("record") / "runs.jsonl"
    ledger = Ledger(path)
    records = [record(seed=seed) for seed in range(3)]
    assert all(ledger.append(r) for r in records)
    assert not any(ledger.append(r) for r in records), "never twice"
    data = path.read_bytes()
    last = data.rfind(b"\n", 0, -1) + 1
    path.write_bytes(data[: last + cut % (len(data) - last + 1)] + (junk if junk != b"\n" else b""))
    survivors = list(Ledger(path).records.values())
    assert survivors in (records, records[:2])
    for r in (records[2], record(seed=3)):
        Ledger(path).append(r)
    assert list(Ledger(path).records.values()) == [*records, record(seed=3)]
    assert [json.loads(line) for line in path.read_text().splitlines()] == [*records, record(seed=3)]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    ledger = Ledger(tmp_path / "runs.jsonl")
    for seed in range(3):
        ledger.append(record(seed=seed))
    lines = ledger.path.read_text().splitlines()
    ledger.path.write_text("\n".join([lines[0], lines[1][:50], lines[2], ""]))
    with pytest.raises(UserError, match="line 2: is no record of a run; mend or remove that line"):
        Ledger(ledger.path).records  # noqa: B018


def record(method="KD", teacher="resnet20", student="resnet8", seed=0, last=60.0, best=61.0, plan="p", **changes):
    """A finished run of the published protocol; in `changes`, a double underscore stands for the dot."""
    opts = {"DISTILLER.TYPE": method, "DISTILLER.TEACHER": teacher, "DISTILLER.STUDENT": student, "SEED": seed}
    opts |= {key.replace("__", "."): value for key, value in changes.items()}
    words = [str(word) for pair in opts.items() for word in pair]
    own = computing(config.load(ROOT / "configs/cifar100/_base.yaml", words))
    alone = {"DISTILLER.TYPE": "NONE", "DISTILLER.STUDENT": teacher}
    source = computing(config.load(ROOT / "configs/cifar100/_base.yaml", [w for p in alone.items() for w in p]))
    cell = f"NONE,{student}" if method == "NONE" else f"{method},{teacher},{student}"
    torch = {"torch": "2"}
    return json.loads(json.dumps({
        "plan": plan, "cell": cell, "seed": seed, "hash": "", "last": last, "best": best, "best_epoch": 1,
        "epochs": own["SOLVER.EPOCHS"], "seconds": 60.0, "students": 1, "images": 1, "device": "cpu (x)", "threads": 1,
        "versions": torch, "git": [{"commit": "0" * 40, "clean": True}], "sha256": {"data": "d", "student": "s"},
        "config": own, "curve": [last],
        "teacher": None if method == "NONE" else {"run": "t", "hash": "", "sha256": "t", "config": source},
    }))  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"versions": {}}, {"sha256": {"student": "s"}}, {"teacher": {"run": "t", "config": {}}}, {"students": 0},
        {"last": float("nan")}, {"curve": ["high"]}, {"config": {"SOLVER.LR": "much"}}, {"git": [{"commit": None}]},
        {"config": {"SOLVER": 1, "SOLVER.LR": 0.1}}, {"config": {"SOLVER": 1}}, {"epochs": True, "git": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_line_that_no_table_could_be_made_of_is_named(tmp_path, change):
    file = tmp_path / "runs.jsonl"
    file.write_text(json.dumps(record()) + "\n\n" + json.dumps(record(seed=1) | change) + "\n")
    with pytest.raises(UserError, match="line 3: is no record of a run"):
        Ledger(file).records  # noqa: B018
    file.write_text(json.dumps(record()) + "\n\n" + json.dumps(record(seed=1)) + "\n")
    assert len(Ledger(file).records) == 2


def test_a_record_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "runs.jsonl").mkdir()
    with pytest.raises(UserError, match=r"runs.jsonl: cannot be read \(Is a directory\)"):
        Ledger(tmp_path / "runs.jsonl").records  # noqa: B018


def test_records_lack_keys_that_were_added_later():
    """A configuration without SOLVER.LR had what is the default today."""
    old = record()
    del old["config"]["SOLVER.LR"]
    assert "learning rate 0.05" in tables.report(tables.of_records([old]), "t", "t", {}).markdown


# Tables and charts


def test_a_table_is_what_a_hand_computes():
    """59, 60 and 62: mean 60.33, deviation sqrt((1.78 + 0.11 + 2.78) / 2) = 1.53."""
    runs = [record(seed=s, last=v - 1, best=v) for s, v in enumerate((59.0, 60.0, 62.0))]
    runs += [record("NONE", seed=0, last=58.0, best=58.5), record("DTKD", seed=5, last=60.0, best=60.5)]
    report = tables.report(tables.of_records(runs), "t", "t", PUBLISHED)
    rows = [[str(cell) for cell in row] for row in report.table.rows]
    # pair, method, n, seeds, last, best, published, best - published, lies
    assert rows[0][:7] == ["resnet20 → resnet8", "KD", "3", "0, 1, 2", "59.33 ± 1.53", "60.33 ± 1.53", "~59.3"]
    assert float(rows[0][7]) == pytest.approx(60.3333 - 59.3, abs=1e-3)
    assert rows[0][8] == "inside"
    assert rows[1][:7] == ["resnet8", "NONE", "1", "0", "58.00", "58.50", "59.90"]
    assert rows[1][8] == "one seed"
    assert rows[2][6] == "~61.9"
    assert "+1.03" in report.markdown
    assert "240 epochs, batches of 64, learning rate 0.05" in report.markdown


def test_the_verdict_says_where_the_published_figure_lies():
    ours = mean_and_std([70.0, 71.0, 72.0])  # 71 +- 1
    assert [tables.verdict(ours, figure) for figure in (69.9, 70.0, 71.0, 72.0, 72.1)] == [
        "below", "inside", "inside", "inside", "above",
    ]  # fmt: skip
    assert tables.verdict(ours, 72.1, off=0.15) == "inside"
    assert tables.verdict(mean_and_std([70.0]), 80.0) == "one seed"


def test_the_caption_says_how_often_an_equally_good_run_lies_outside():
    draws = np.random.default_rng(0).normal(size=(200_000, 4))
    for n, percent in ((2, 56), (3, 48)):
        ours, other = draws[:, :n], draws[:, -1]
        outside = np.abs(other - ours.mean(1)) > ours.std(1, ddof=1)
        assert round(100 * outside.mean()) == percent
        assert f"n = {n}: {percent} %" in tables.BESIDE_CAPTION


def test_another_protocol_is_labelled_and_not_compared():
    runs = [record(m, SOLVER__EPOCHS=8, SOLVER__LR_DECAY_STAGES="[5,7]", SOLVER__AMP="bf16") for m in ("NONE", "KD")]
    report = tables.report(tables.of_records(runs), "t", "t", PUBLISHED)
    assert "published (%)" not in report.table.head
    assert "**Not the published protocol**: SOLVER.EPOCHS 8 (published: 240)" in report.markdown
    assert report.charts[0].title == "t (not the published protocol): resnet8"
    assert "bf16 autocast" in report.markdown


def test_runs_of_different_protocols_do_not_mix():
    with pytest.raises(UserError, match=r"KD,resnet20,resnet8: its runs differ in SOLVER.LR \(0.05 / 0.1\)"):
        tables.of_records([record(seed=0), record(seed=1, SOLVER__LR=0.1)])
    rows = tables.of_records([record("KD"), record("DTKD", SOLVER__EPOCHS=12)])
    with pytest.raises(UserError, match=r"different protocols in one table: SOLVER.EPOCHS \(240 / 12\)"):
        tables.report(rows, "t", "t", PUBLISHED)
    other = record("DTKD") | {"sha256": {"data": "another", "student": "s"}}
    with pytest.raises(UserError, match=r"sha256 of the data"):
        tables.report(tables.of_records([record("KD"), other]), "t", "t", PUBLISHED)
    assert differing([{"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}]) == {"b": [2, 3], "c": ["absent", 4]}


def test_a_plans_table_has_every_seed_and_says_which_are_missing(small):
    conduct(small)
    plan, ledger = plans.load(small, seeds=[0, 1, 2]), Ledger(Path("results/runs.jsonl"))
    records = list(ledger.records.values())
    rows, notes = tables.of_plan(plan, records)
    assert {row.name: (len(row.records), row.missing) for row in rows} == {
        "NONE,resnet8": (2, [2]), "NONE,resnet14": (1, []), "KD,resnet14,resnet8": (2, [2]),
        "DTKD,resnet14,resnet8": (2, [2]),
    }  # fmt: skip
    assert notes == []
    assert "Not run yet: NONE,resnet8 (seed 2); KD" in tables.report(rows, "t", "t", {}).markdown
    less, _ = tables.of_plan(plans.load(small, seeds=[1]), records)
    assert len(less[0].records) == 2, "seeds are never picked"
    write(small, **yaml.safe_load(small.read_text()) | {"overrides": {"SOLVER": {"LR": 0.01}}})
    rows, notes = tables.of_plan(plans.load(small), records)
    assert not any(row.records for row in rows)
    assert "Left out: NONE,resnet8 (seeds 0, 1), run by another protocol: SOLVER.LR (0.05 / 0.01)." in notes
    assert len(notes) == 4
    report = tables.report(rows, "t", "t", {}, notes=notes)
    assert report.markdown.startswith("Nothing of it is on record yet.\n\nLeft out: NONE,resnet8 (seeds 0, 1)")
    assert "Not run yet" not in report.markdown


def test_charts_have_a_bar_for_each_method_and_a_level_for_the_student(tmp_path):
    runs = [record("NONE", seed=s, best=59.0 + s) for s in (0, 1)]
    for teacher in ("resnet14", "resnet20"):
        runs += [record(m, teacher, seed=s, best=60.0 + s) for m in ("KD", "DTKD") for s in (0, 1)]
    runs = [r for r in runs if (r["cell"], r["seed"]) != ("DTKD,resnet20,resnet8", 1)]
    report = tables.report(tables.of_records(runs), "T & T", "t", PUBLISHED, notes=["a note\nof two lines"])
    (chart,) = report.charts
    best, last = chart.panels
    assert [(s.name, s.kind, list(s.x)) for s in best.series] == [
        ("KD", "bars", ["resnet14", "resnet20"]), ("DTKD", "bars", ["resnet14", "resnet20"]),
        ("resnet8 alone", "level", ["teacher"]),
    ]  # fmt: skip
    (ends,) = best.series[0].bands.values()
    np.testing.assert_allclose(np.subtract(*ends[::-1]), 2 * 0.5**0.5)  # 60 and 61: 60.5 +- 0.707
    np.testing.assert_allclose(best.series[1].bands["minus_sd", "plus_sd"][0][1], 60.0)
    report.write(tmp_path)
    names = {"table.md", "table.tex", "table.csv", "chart-resnet8.png", "chart-resnet8.svg"}
    folder = tmp_path / "t"
    assert {path.name for path in folder.iterdir()} == names
    before = {name: (folder / name).read_bytes() for name in names}
    report.write(tmp_path)
    assert before == {name: (folder / name).read_bytes() for name in names}, "the same figures give the same files"
    assert b"\\begin{tabular}" in before["table.tex"]
    assert b"\\caption{T \\& T. Top-1" in before["table.tex"]
    assert b"% a note\n% of two lines\n" in before["table.tex"]
    assert before["table.csv"].decode().splitlines()[0].startswith("pair,method,n,seeds,last (%),last (%) sd,")


def test_a_methods_colour_does_not_depend_on_what_else_is_shown():
    def shades(*methods):
        runs = [record(m, teacher) for teacher in ("resnet14", "resnet20") for m in methods]
        series = tables.charts_of(tables.of_records(runs), "t")[0].panels[0].series
        return {s.name: s.colour for s in series}

    every = [name for name in distiller_dict if name != "NONE"]
    whole = shades(*every)
    assert len(set(whole.values())) == len(every)
    assert shades("KD", "DTKD") | shades("DTKD", "SP") == {name: whole[name] for name in ("KD", "DTKD", "SP")}


def test_pairs_of_different_students_share_one_chart():
    runs = [record("NONE", student=s) for s in ("resnet8", "resnet20")]
    runs += [record("KD", "resnet56", s) for s in ("resnet8", "resnet20")]
    (chart,) = tables.report(tables.of_records(runs), "t", "t", {}).charts
    assert [(s.name, list(s.x)) for s in chart.panels[0].series] == [
        (name, ["resnet56 → resnet8", "resnet56 → resnet20"]) for name in ("alone", "KD")
    ]


@pytest.mark.parametrize("name", sorted(file.stem for file in PLANS.glob("*.yaml")))
def test_every_plan_can_be_reported(name, tmp_path):
    plan = plans.load(PLANS / f"{name}.yaml")
    made = []
    for number, trial in enumerate(plan.trials):
        source = trial.cell.teacher
        teacher = {"run": "t", "hash": "", "sha256": "t", "config": source.settings} if source else None
        run = record(seed=trial.seed, best=60.0 + number % 5, plan=plan.name)
        made.append(run | {"cell": trial.cell.name, "config": trial.settings, "teacher": teacher})
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in made))
    report = command.report_of(plan, Ledger(tmp_path / "runs.jsonl"), PUBLISHED, PLANS)
    assert len(report.table.rows) == len(plan.cells)
    assert report.charts
    if name == "rules":
        assert [chart.name for chart in report.charts] == ["chart-resnet56-resnet20", "chart-resnet32x4-resnet8x4"]
        assert all(len(panel.series) == 4 for panel in report.charts[0].panels), "KD, DKD, DTKD, the student alone"
    if name in ("dtkd_charts", "dtkd_pairs", "rules"):
        assert not any(line.startswith("**") for line in report.notes), report.notes
        assert "published (%)" in report.table.head


def test_other_hyperparameters_are_named_and_not_compared():
    runs = [record("KD", seed=0, KD__TEMPERATURE=20.0), record("DTKD", seed=0)]
    report = tables.report(tables.of_records(runs), "t", "t", PUBLISHED, plans.Shipped(ROOT / "configs/cifar100"))
    kd, dtkd = report.table.rows
    column = report.table.head.index("published (%)")
    assert (kd[column], dtkd[column]) == (None, "~61.9")
    assert "**Not the published hyperparameters**: KD.TEMPERATURE 20" in " ".join(report.notes)
    assert report.charts[0].title == "t (not the published hyperparameters): resnet8"


def test_what_is_on_record_is_found_again():
    """Whatever has been added to the configuration and the hash since it was run."""
    records = Ledger(ROOT / "results" / "runs.jsonl").records
    assert {trial.hash for trial in plans.load(PLANS / "cpu_charts.yaml").trials} <= set(records)
    assert len(records) >= 12


def test_the_page_shows_what_the_results_give():
    page = ROOT / "docs" / "reproduction.md"
    text = command.fill(page, PLANS, ROOT / "results/published.json", ROOT / "results", write=False)
    assert text == page.read_text(), "run: make results"
    assert len(command.MARKERS.findall(text)) >= 3
    for file in (ROOT / "results").glob("*/table.md"):
        assert file.read_text().partition("\n\n")[2] in text


def test_a_plans_table_leaves_out_what_does_not_fit_the_rest(small):
    conduct(small)
    ledger = Ledger(Path("results/runs.jsonl"))
    records = [json.loads(json.dumps(r)) for r in ledger.records.values()]
    for r in records:
        r["sha256"]["data"] = "another" if r["cell"].startswith("KD") else r["sha256"]["data"]
    ledger.path.write_text("".join(json.dumps(r) + "\n" for r in records))
    report = command.report_of(plans.load(small), Ledger(ledger.path), {}, PLANS)
    assert [row[1] for row in report.table.rows] == ["NONE", "NONE", "DTKD"]
    assert (
        "Left out: KD,resnet14,resnet8, of another protocol than the other rows: sha256 of the data" in report.markdown
    )


def test_a_page_links_the_charts_where_they_are(small):
    ledger = Ledger(Path("mine/runs.jsonl"))
    for trial in plans.load(PLANS / "cpu_charts.yaml").trials:
        source = trial.cell.teacher
        teacher = {"run": "t", "hash": "", "sha256": "t", "config": source.settings} if source else None
        cell = {"cell": trial.cell.name, "config": trial.settings, "teacher": teacher, "epochs": 4}
        ledger.append(json.loads(json.dumps(record(seed=trial.seed) | cell)))
    page = Path("pages/page.md")
    page.parent.mkdir()
    page.write_text("<!-- results of cpu_charts -->\n<!-- end of results -->\n")
    text = command.fill(page, PLANS, None, Path("mine"))
    (link,) = re.findall(r"\]\((.*?)\)", text)
    assert (page.parent / link).is_file()


# The commands


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quik"], "unknown plan 'quik'; did you mean quick?"),
        (["gone.yaml"], "gone.yaml"),
        (["small.yaml", "--seeds", "4-1"], "--seeds 4-1: give a range such as 0-4"),
        (["small.yaml", "--budget", "soon"], "--budget soon: give a time such as 2h"),
        (["small.yaml", "--only", "DKD"], "--only DKD: names nothing in the plan"),
        (["small.yaml", "SOLVER.LR", "1"], "SOLVER.LR: pairs of KEY VALUE say only where"),
        (["small.yaml", "DISTILLER.TEACHER_CKPT", "x"], "DISTILLER.TEACHER_CKPT: pairs of KEY VALUE say only where"),
        (["small.yaml", "EXPERIMENT.NAME", "x"], "EXPERIMENT.NAME: pairs of KEY VALUE say only where"),
        (["small.yaml", "LOG.WANDB", "True"], "LOG.WANDB: pairs of KEY VALUE say only where"),
        (["small.yaml", "--sedes", "1"], "unknown option --sedes"),
        (["small.yaml", "--slurm", "a=b", "LOG.PREFIX", "x"], "KEY VALUE pairs stand before --slurm"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(small, words, message):
    before = sorted(Path().rglob("*"))
    with pytest.raises(UserError) as caught:
        reproduce(*words)
    assert message in str(caught.value)
    assert sorted(Path().rglob("*")) == before


def reproduce(*words):
    """tools/reproduce.py in this process; returns its status."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["reproduce.py", *words])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(ROOT / "tools" / "reproduce.py"))["main"]()
    return caught.value.code


def test_the_command_ends_with_status_2(small):
    done = tool("reproduce", "quik", cwd=Path.cwd())
    assert (done.returncode, done.stderr.startswith("error: unknown plan 'quik'")) == (2, True)


def test_dry_run_lists_everything_and_writes_nothing(small, capsys):
    conduct(small, only=["NONE,resnet8"])
    capsys.readouterr()
    before = sorted(Path().rglob("*"))
    plan, ledger = plans.load(small), Ledger(Path("results/runs.jsonl"))
    estimates = Estimates(ledger)
    measured = Measured(0.1, 10.0, 4_000_000, 2_000_000)
    estimates.measure = lambda cells: estimates.told.update({cell.name: measured for cell in cells}) or {}
    command.forecast(plan.cells, ledger, estimates)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[:2] == ["NONE,resnet8,seed0", "done"]
    assert lines[4].split() == ["NONE,resnet14,seed0", "missing", "0/2", "10.0", "0:00:20", "16", "MB"]
    assert lines[-1] == "5 runs, 10 epochs left: about 0:01:40 one after the other, 0.08 GB"
    assert sorted(Path().rglob("*")) == before


def test_dry_run_counts_no_finished_run_among_those_left(small, capsys):
    conduct(small, only=["NONE,resnet8"])
    Path("results/runs.jsonl").unlink()
    capsys.readouterr()
    cells, ledger = plans.load(small).cells[:1], Ledger(Path("results/runs.jsonl"))
    command.forecast(cells, ledger, Estimates(ledger))
    text = capsys.readouterr().out
    assert "NONE,resnet8,seed0  finished     2/2\n" in text
    assert "measuring" not in text
    assert "0 runs, 0 epochs left" in text


def test_the_first_cell_of_a_teacher_fills_its_bank(small):
    plan = plans.load(small)
    *_, kd, dtkd = plan.cells
    estimates = Estimates(Ledger(Path("results/runs.jsonl")))
    estimates.told = {cell.name: Measured(1, 10.0, 1, 1, 0, 60.0 * bool(cell.teacher)) for cell in plan.cells}
    estimates.fillers = {kd.teacher.name: kd.name}
    campaign = Campaign("small", plan.cells, estimates.ledger, Here(), estimates, Quiet(), time.monotonic() + 90)
    assert [estimates.filling(cell) for cell in plan.cells] == [0, 0, 60, 0]
    assert campaign.total_left() == 7 * 2 * 10 + 60
    assert campaign._fitting([campaign.progress[kd.trials[0].name]]) == []
    assert campaign._fitting([campaign.progress[dtkd.trials[0].name]]) != []
    estimates.observe(kd, [{"epoch_seconds": 20.0}])
    assert [estimates.filling(cell) for cell in plan.cells] == [0, 0, 0, 0], "it is in the epochs of the former"


def test_a_step_is_measured(small, monkeypatch):
    monkeypatch.setattr(estimate, "TIMED", 0.05)
    measure = estimate.measure
    cells = plans.load(small).cells
    found = measure(cells[2].file, cells[2].opts)
    assert isinstance(found, Measured)
    assert 0 < found.step < found.epoch
    assert 0.2e6 < found.student < 0.5e6
    assert found.filling == 0, "two draws do not pay for a bank"
    lazy = measure(cells[2].file, [*cells[2].opts, "TEACHER_BANK", "lazy"], students=2)
    assert lazy.filling > 0
    assert lazy.bank > 0
    off = measure(cells[2].file, [*cells[2].opts, "TEACHER_BANK", "off"])
    assert off.filling == off.bank == 0
    assert "npz" in measure(cells[0].file, ["DATASET.ROOT", "gone.npz"])


def test_results_refuses_and_shows(small, capsys):
    ledger = Ledger(Path("mine/runs.jsonl"))
    for r in (record(seed=0), record(seed=1), record(seed=2, SOLVER__LR=0.1)):
        ledger.append(r)
    show = lambda *words, **o: command.show(list(words), PLANS, None, None, ROOT / "results/published.json", **o)  # noqa: E731
    with pytest.raises(UserError, match="SOLVER.LR"):
        show("mine/runs.jsonl", only=[])
    assert [path.name for path in Path("mine").iterdir()] == ["runs.jsonl"]
    ledger.path.write_text("".join(ledger.path.read_text().splitlines(True)[:2]))
    assert "| resnet20 → resnet8 | KD | 2 | 0, 1 |" in show("mine/runs.jsonl", only=[])
    assert Path("mine/all/chart-resnet8.png").stat().st_size > 10_000
    for words, message in ((["x.jsonl"], "is no file"), (["mine/runs.jsonl", "quick"], "give one plan, or files")):
        with pytest.raises(UserError, match=message):
            show(*words, only=[])
    with pytest.raises(UserError, match="matches --only DKD"):
        show("mine/runs.jsonl", only=["DKD"])
    theirs = Ledger(Path("theirs/runs.jsonl"))
    theirs.append(record(seed=0))
    assert "| KD | 2 | 0, 1 |" in show("mine/runs.jsonl", "theirs/runs.jsonl", only=[])
    theirs.append(record(seed=1, last=70.0))
    with pytest.raises(UserError, match=r"KD,resnet20,resnet8, seed 1: is another run in mine\S+ than in theirs\S+;"):
        show("mine/runs.jsonl", "theirs/runs.jsonl", only=[])


def test_the_board_fits_its_terminal(small):
    from rich.console import Console

    console = Console(width=100, height=14, record=True, force_terminal=True, file=open(os.devnull, "w"))  # noqa: SIM115
    status, campaign, _ = conduct(small)
    board = Board("T", console)
    with board:
        board.say("done     x")
        board.update(campaign)
    campaign.progress["NONE,resnet8,seed0"].status = "running"
    campaign.progress["DTKD,resnet14,resnet8,seed1"].status = "waiting"
    console.print(board.draw(campaign))
    lines = console.export_text().splitlines()
    lines = lines[lines.index("T: 5 of 7 runs done") :]
    assert [line.split()[0] for line in lines[2:8]] == [
        "NONE,resnet8,seed0", "NONE,resnet14,seed0", "KD,resnet14,resnet8,seed0", "KD,resnet14,resnet8,seed1",
        "DTKD,resnet14,resnet8,seed0", "DTKD,resnet14,resnet8,seed1",
    ]  # fmt: skip
    assert lines[8].startswith("5 done, 1 running, 1 waiting, 1 not shown; left for the plan: about 0:00:0")


# Slurm, through submitit


@pytest.mark.parametrize("cluster", ["debug", "local"])
def test_submitit_runs_a_campaign(small, cluster, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PYTHONPATH", executors.environment()["PYTHONPATH"])
    executor = executors.Slurm(Path("jobs"), {"timeout_min": 5}, cluster)
    status, campaign, _ = conduct(small, executor, only=["KD"])
    assert status == 0, campaign.view.lines
    assert set(figures()) == {("NONE,resnet14", 0), ("KD,resnet14,resnet8", 0), ("KD,resnet14,resnet8", 1)}


def test_slurm_says_what_it_needs(small, monkeypatch):
    monkeypatch.setattr(executors.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs submitit: pip install submitit"):
        executors.Slurm(Path("jobs"), {})


# Kills


def forked(work):
    """A child of this process that does `work()`, its output in log.txt; a fresh one would import torch for seconds."""

    def quietly():
        log = os.open("log.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.exit(work())

    child = multiprocessing.get_context("fork").Process(target=quietly)
    child.start()
    return child


def wait_for(condition, process=None):
    deadline = time.monotonic() + 120
    while not condition():
        assert process is None or process.is_alive(), Path("log.txt").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def children(process):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    return [int(number) for number in found.split()]


def is_alive(number):
    try:
        return "Z" not in Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def test_signals_and_kill_9_end_a_campaign_and_the_same_command_goes_on(small):
    conduct(small, only=["NONE"])
    told = figures()
    Path("results").rename("undisturbed")
    Path("output").rename("undisturbed-output")

    def campaign():
        process = forked(lambda: reproduce("small.yaml", "--only", "NONE"))
        wait_for(lambda: children(process), process)
        return process, children(process)

    process, (child,) = campaign()
    os.kill(child, signal.SIGKILL)  # of the first of two cells
    wait_for(lambda: children(process) not in ([], [child]), process)
    process.terminate()
    process.join(60)
    assert process.exitcode == 75
    assert "stopped  NONE,resnet8,seed0; it is started again" in Path("log.txt").read_text()
    assert "FAILED" not in Path("log.txt").read_text()
    assert "stopped by SIGTERM" in Path("log.txt").read_text()

    process, (child,) = campaign()
    process.kill()
    process.join()
    wait_for(lambda: not is_alive(child))  # or it would train on beside its successor

    process, _ = campaign()
    process.join(120)
    assert process.exitcode == 0, Path("log.txt").read_text()
    assert figures() == told
    assert Path("results/small/table.md").exists()


def test_kill_9_at_random_moments_changes_nothing(small):
    begin = time.monotonic()
    conduct(small, only=["KD"])
    seconds, told = time.monotonic() - begin, figures()
    trials = [trial for trial in plans.load(small).trials if trial.folder.exists()]
    expected = {trial.name: outcome(trial.folder) for trial in trials}
    generator, kills, status = random.Random(0), 0, None
    Path("results").rename("undisturbed")
    Path("output").rename("undisturbed-output")
    while status != 0:
        child = forked(lambda: conduct(small, only=["KD"])[0])
        child.join(generator.uniform(0, seconds / 2))
        child.kill()
        child.join()
        status = child.exitcode
        assert status in (0, -signal.SIGKILL)
        kills += status != 0
    assert kills
    assert figures() == told
    assert all(same(outcome(trial.folder), expected[trial.name]) for trial in trials)


@pytest.mark.slow
@pytest.mark.skipif(not KILLS, reason="minutes; CAMPAIGN_KILLS=3 runs it")
def test_quick_killed_gives_the_same_numbers(tmp_path):
    line = [sys.executable, str(ROOT / "tools" / "reproduce.py"), "quick"]
    begin = time.monotonic()
    subprocess.run(line, cwd=tmp_path, check=True)
    seconds = time.monotonic() - begin
    told = figures(tmp_path / "output/results/runs.jsonl")
    table = (tmp_path / "output/results/quick/table.csv").read_text()
    (tmp_path / "output").rename(tmp_path / "undisturbed")
    generator = random.Random(0)
    for _ in range(KILLS):
        with subprocess.Popen(line, cwd=tmp_path) as process:
            time.sleep(generator.uniform(0.1, 0.9) * seconds / KILLS)
            process.kill()
    subprocess.run(line, cwd=tmp_path, check=True)
    assert figures(tmp_path / "output/results/runs.jsonl") == told
    assert (tmp_path / "output/results/quick/table.csv").read_text() == table
    print(f"{KILLS} kills, {len(told)} runs, 0 differences; {seconds:.0f} s undisturbed")
