"""DISTILLER.ENSEMBLE: the mean of several teachers is distilled."""

import json
import re

import pytest
import torch
from helpers import called, changed, outcome, refused, run, run_set, same, save_teacher
from notebook import TEST, Net, nets, quick
from torch import nn
from torch.nn import functional as F

import mdistiller as md
from mdistiller import config
from mdistiller.engine.run import train
from mdistiller.models import Ensemble, build_model
from mdistiller.study.groups import group_runs
from mdistiller.study.published import published_figure
from mdistiller.study.runs import read_run
from mdistiller.study.tables import compared


@pytest.fixture(scope="module")
def two(small, tmp_path_factory):
    """Options of an epoch by KD of a resnet14 and a resnet20."""
    other = save_teacher(tmp_path_factory.mktemp("other") / "other.pth", "resnet20")
    return [*small, "SOLVER.EPOCHS", "1", "DISTILLER.TYPE", "KD", "DISTILLER.ENSEMBLE", f"[resnet20:{other}]"]


@pytest.fixture(scope="module")
def whole(two, tmp_path_factory):
    """The folder of such a run."""
    return run(two, tmp_path_factory.mktemp("whole"))


class Given(nn.Module):
    """Returns logits, alone or with features."""

    def __init__(self, logits, feats=None):
        super().__init__()
        self.logits, self.feats = logits, feats

    def forward(self, image):
        return self.logits if self.feats is None else (self.logits, self.feats)


def test_the_mean_of_logits_and_of_probabilities():
    a, b = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    networks = [Given(a), Given(b, {"pooled_feat": a})]
    logits, feats = Ensemble(networks)(None)
    assert torch.equal(logits, (a + b) / 2) and feats == {}
    logits, _ = Ensemble(networks, "probabilities")(None)
    torch.testing.assert_close(F.softmax(logits, 1), (F.softmax(a, 1) + F.softmax(b, 1)) / 2)
    torch.testing.assert_close(logits.mean(1), torch.zeros(5), rtol=0, atol=1e-6)
    torch.testing.assert_close(Ensemble([networks[0]] * 2, "probabilities")(None)[0], a - a.mean(1, keepdim=True))


def test_one_teacher_twice_is_that_teacher(small, undisturbed, tmp_path):
    """To the bit: the mean of two equal numbers is that number."""
    teacher = small[small.index("DISTILLER.TEACHER_CKPT") + 1]
    twice = run([*small, "DISTILLER.TYPE", "DTKD"], tmp_path, DISTILLER__ENSEMBLE=f"[resnet14:{teacher}]")
    assert outcome(twice)[1] == outcome(undisturbed("DTKD"))[1]


def test_a_run_its_bank_and_its_seeds(two, whole, undisturbed, tmp_path, interrupted):
    assert "KD: resnet14+resnet20 -> resnet8" in (whole / "worklog.txt").read_text()
    expected, alone = outcome(whole), outcome(undisturbed("KD"))
    assert expected[1][0]["train_loss"] != alone[1][0]["train_loss"], "the other teacher counts"
    bank = {"TEACHER_BANK": "lazy", "TEACHER_BANK_FOLDER": tmp_path / "banks"}
    assert same(outcome(run(two, tmp_path / "bank", **bank))[0]["model"], expected[0]["model"])
    run(two, tmp_path / "mean", DISTILLER__ENSEMBLE_MEAN="probabilities", **bank)
    run([*two, "DISTILLER.ENSEMBLE", "[]"], tmp_path / "single", **bank)
    assert len(list((tmp_path / "banks").iterdir())) == 3, "each mean, and the first alone, has its own"
    assert same(outcome(interrupted(lambda resume: run(two, tmp_path / "parts", resume), 2)), expected)
    summary, folders = run_set(two, tmp_path / "s", [0], EXPERIMENT__NAME="set")
    assert summary["teacher"] == "resnet14+resnet20"
    assert same(outcome(folders[0])[0]["model"], expected[0]["model"])


def test_a_run_goes_on_with_the_teachers_that_it_was_started_with(two, tmp_path):
    folder = run(two, tmp_path / "runs")
    kept = [*two[:-1], "[resnet20]"]  # whose checkpoint stands in config.yaml
    assert len(outcome(run(kept, tmp_path / "runs", resume=True, SOLVER__EPOCHS=2))[1]) == 2
    save_teacher(tmp_path / "resnet32.pth", "resnet32")
    other = save_teacher(tmp_path / "moved.pth", "resnet20")
    state = torch.load(other, weights_only=True)
    state["model"]["fc.bias"][0] += 1
    torch.save(state, other)
    with refused("the teacher in DISTILLER.TEACHER_CKPT is not what this run was started with"):
        run([*two[:-1], f"[resnet20:{other}]"], tmp_path / "runs", resume=True, SOLVER__EPOCHS=3)
    with pytest.raises(md.UserError, match=r"DISTILLER.ENSEMBLE is \['resnet32'\], but .* with \['resnet20'\]"):
        run([*two[:-1], f"[resnet32:{tmp_path / 'resnet32.pth'}]"], tmp_path / "runs", resume=True)
    assert folder.is_dir()


def test_tables_and_evaluation_name_all_of_them(whole, undisturbed, tmp_path):
    runs = [read_run(whole), read_run(undisturbed("KD"))]
    assert [row[2] for row in compared(runs).rows] == ["resnet14+resnet20", "resnet14"]
    groups, _ = group_runs(runs)
    assert [group.pair for group in groups] == ["resnet14+resnet20 → resnet8", "resnet14 → resnet8"]
    figures = {"KD": {"resnet14/resnet8": 70.0}, "dataset": "npz"}
    assert [published_figure(group, figures) for group in groups] == [None, (70.0, 0.0)]
    done = called("eval", "-r", whole, "--out", tmp_path / "eval", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    parameters = json.loads((tmp_path / "eval" / "scores.json").read_text())["teacher"]["parameters"]
    assert parameters == sum(p.numel() for n in ("resnet14", "resnet20") for p in build_model(n, 10).parameters())


def test_missing_ones_are_trained_first(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opts = changed(small, tmp_path, DISTILLER__TEACHER_CKPT="", DISTILLER__TRAIN_TEACHER=True, DISTILLER__TYPE="KD")
    result = train(config.load(None, [*opts, "DISTILLER.TEACHER", "resnet8", "DISTILLER.ENSEMBLE", "[resnet14]"]))
    kept = config.read(tmp_path / "distill" / "run" / "config.yaml")["DISTILLER"]
    trained = [kept["TEACHER_CKPT"], kept["ENSEMBLE"][0].removeprefix("resnet14:")]
    names = [re.search(r"none,(\w+),npz,2-epochs,seed0", name)[1] for name in trained]
    assert names == ["resnet8", "resnet14"] and len(result["history"]) == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["DISTILLER.ENSEMBLE", "[resnt20]"], "unknown model 'resnt20'; did you mean resnet20?"),
        (["DISTILLER.ENSEMBLE", "[resnet20:gone.pth]"], "DISTILLER.ENSEMBLE: no checkpoint of the teacher resnet20 at"),
        (["DISTILLER.ENSEMBLE", "[resnet20]"], "write resnet20:path/to/checkpoint.pth, or set DISTILLER.TRAIN_TEA"),
        (["DISTILLER.ENSEMBLE", "[resnet20:{teacher}]"], "holds resnet14 with 10 classes, but resnet20 with 10"),
        (["DISTILLER.TYPE", "AT", "DISTILLER.ENSEMBLE", "[resnet14:{teacher}]"], "AT compares features, of which"),
        (["DISTILLER.TYPE", "CRD", "DISTILLER.ENSEMBLE", "[resnet14:{teacher}]"], "CRD compares features, of which"),
        (["DISTILLER.ENSEMBLE_MEAN", "median"], "known: logits, probabilities"),
    ],
)
def test_a_mistake_is_a_line(small, tmp_path, words, says):
    teacher = small[small.index("DISTILLER.TEACHER_CKPT") + 1]
    words = [word.format(teacher=teacher) for word in words]
    with refused(says):
        run([*small, "DISTILLER.TYPE", "KD", *words], tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_library(tmp_path):
    teacher, student = nets()
    with torch.random.fork_rng():
        other = Net(12)
    both = quick([teacher, other], student, method="KD", folder=tmp_path / "both")
    assert same(both.student.state_dict(), quick((teacher, other), student, method="KD").student.state_dict())
    more = {"epochs": 3, "SOLVER__LR_DECAY_STAGES": [1]}
    resumed = quick([teacher, other], student, method="KD", folder=tmp_path / "both", resume=True, **more)
    assert len(resumed.history) == 3
    scores = md.evaluate(both, TEST)
    assert scores.top1 == both.last
    single = [quick(one, student, method="KD").history for one in (teacher, [teacher])]
    assert single[0][0]["train_loss"] == single[1][0]["train_loss"] != both.history[0]["train_loss"]
    soft = quick([teacher, other], student, method="KD", DISTILLER__ENSEMBLE_MEAN="probabilities")
    assert soft.history[0]["train_loss"] != both.history[0]["train_loss"]
    with refused("several must be modules"):
        quick([teacher, "resnet8"], student)
    with refused(r"pass modules as teacher=\[net1, net2\]"):
        quick(teacher, student, DISTILLER__ENSEMBLE=["resnet20"])
    with refused("AT compares features, of which several"):
        quick([teacher, other], student, method="AT")
    with refused("no checkpoint of the teacher resnet20"):
        md.distill(["resnet8", "resnet20"], "resnet8", "digits", DEVICE="cpu", DISTILLER__TEACHER_CKPT="x")
