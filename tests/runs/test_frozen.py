"""SOLVER.FREEZE: parts of the student that do not learn."""

from pathlib import Path

import pytest
import torch
from helpers import Recording, changed, outcome, refused, run, same, save_teacher
from notebook import nets, quick

import mdistiller as md
from mdistiller import config
from mdistiller.engine import build, stepmode
from mdistiller.engine.graph import GraphStep
from mdistiller.engine.seeds import train_seeds
from mdistiller.engine.teachers import teacher_config, teacher_files
from mdistiller.models import build_model
from mdistiller.runs import checkpoint

STEM = ["SOLVER.FREEZE", "[conv1.*, bn1.*, layer1.*]"]


def is_frozen(name):
    return name.startswith(("conv1.", "bn1.", "layer1."))


@pytest.mark.parametrize(("method", "trainer"), [("NONE", "base"), ("DTKD", "base"), ("CRD", "base"), ("KD", "dot")])
def test_what_is_frozen_stays_in_every_bit_and_the_rest_learns(small, tmp_path, method, trainer):
    start = save_teacher(tmp_path / "start.pth", "resnet8")
    opts = [*small, "DISTILLER.TYPE", method, "DISTILLER.STUDENT_CKPT", str(start), "SOLVER.TRAINER", trainer, *STEM]
    folder = run(opts, tmp_path / "runs", SOLVER__EPOCHS=1)
    before, after = (checkpoint.load(file)["model"] for file in (start, folder / "student_latest"))
    assert {name for name in before if torch.equal(before[name], after[name])} == set(filter(is_frozen, before))
    learning = len([name for name, _ in build_model("resnet8", 10).named_parameters() if not is_frozen(name)])
    count = len(checkpoint.load(folder / "latest")["optimizer"]["param_groups"][0]["params"])
    assert count == learning + (4 if method == "CRD" else 0), "CRD embeds both sides by a weight and a bias"


def test_a_normalisation_that_learns_in_part_keeps_gathering_statistics(small, tmp_path):
    opts = [*small, "DISTILLER.TYPE", "NONE", "SOLVER.FREEZE", "bn1.bias", "SOLVER.EPOCHS", "1"]
    file = run(opts, tmp_path) / "student_latest"
    student = checkpoint.load(file)["model"]
    assert not student["bn1.bias"].any() and student["bn1.running_mean"].any()


def test_a_stopped_run_and_a_set_of_seeds_are_the_same_run(small, tmp_path, interrupted):
    opts = [*small, "DISTILLER.TYPE", "DTKD", *STEM, "SOLVER.EPOCHS", "1"]
    whole = run(opts, tmp_path / "whole", SEED=1)
    parts = interrupted(lambda resume: run(opts, tmp_path / "parts", resume, SEED=1), 2)
    assert same(outcome(parts), outcome(whole))
    summary = train_seeds(config.load(None, changed(opts, tmp_path / "set")), [0, 1])
    assert same(outcome(Path(summary["runs"][1]["folder"])), outcome(whole))
    with pytest.raises(md.UserError, match="SOLVER.FREEZE is .*'conv1.weight'.*started with"):
        run(opts, tmp_path / "parts", resume=True, SEED=1, SOLVER__FREEZE="conv1.weight")


def test_a_frozen_part_is_no_reason_against_a_graph(small, tmp_path, monkeypatch):
    monkeypatch.setattr(stepmode, "GraphStep", lambda *given: GraphStep(*given, Recording))
    opts = [*small, "DISTILLER.TYPE", "KD", *STEM, "SOLVER.EPOCHS", "1", "SOLVER.BATCH_SIZE", "8"]  # 5 steps
    eager = run(opts, tmp_path / "eager")
    monkeypatch.setattr(build, "uses_graph", lambda cfg, device, capturable: True)
    made = Recording.made
    graph = run(opts, tmp_path / "graph")
    assert Recording.made == made + 1
    assert "not as a graph" not in (graph / "worklog.txt").read_text()
    assert same(outcome(graph)[0]["model"], outcome(eager)[0]["model"])


@pytest.mark.parametrize(
    ("patterns", "says"),
    [
        ("[layer9.*]", r"SOLVER.FREEZE: 'layer9.\*' matches no parameter of resnet8; near it are layer3.\*, layer2"),
        ("[conv1.*,layer1]", "SOLVER.FREEZE: 'layer1' matches no parameter of resnet8; near it are layer1.*"),
        ("[zzzz]", r"near it are conv1.\*, bn1.\*, layer1.\*"),
        ("*", "SOLVER.FREEZE: .* leaves nothing of resnet8 that learns; leave a part out"),
        ("[1]", "SOLVER.FREEZE: must be patterns of names"),
    ],
)
def test_a_pattern_of_nothing_or_of_all_is_a_line(small, tmp_path, patterns, says):
    with refused(says, md.UserError):
        run([*small, "DISTILLER.TYPE", "KD", "SOLVER.FREEZE", patterns], tmp_path)
    with refused(says, md.UserError):
        train_seeds(config.load(None, changed(small, tmp_path, SOLVER__FREEZE=patterns)), [0, 1])
    assert not list(tmp_path.iterdir())


def test_a_network_of_ones_own():
    teacher, student = nets()
    result = quick(teacher, student, epochs=1, SOLVER__FREEZE=["conv.*", "bn.*"])
    frozen = {
        name for name, value in student.state_dict().items() if torch.equal(value, result.student.state_dict()[name])
    }
    assert frozen == {name for name in student.state_dict() if name.startswith(("conv.", "bn."))}
    assert all(parameter.requires_grad for parameter in student.parameters()), "the caller's own stays as it is"
    student.bn.requires_grad_(False)
    own = quick(teacher, student, epochs=1).student
    assert not own.bn.running_mean.any() and own.conv.weight.requires_grad, "however it was frozen"
    with refused("'cnv.*' matches no parameter of Net; near it are conv.*", md.UserError):
        quick(teacher, student, SOLVER__FREEZE=["cnv.*"])


def test_a_teacher_that_is_trained_first_is_not_frozen_and_keeps_its_name():
    """The names of teachers that were trained before a key of SOLVER was there."""
    cfg = config.load(None, ["DATASET.TYPE", "digits", "DISTILLER.TEACHER", "resnet20"])
    assert teacher_files(cfg)[1].stem == "none,resnet20,digits,240-epochs,seed0,299b8162"
    frozen = config.load(None, ["DATASET.TYPE", "digits", "DISTILLER.TEACHER", "resnet20", *STEM])
    assert teacher_config(frozen).SOLVER.FREEZE == [] and teacher_files(frozen) == teacher_files(cfg)
