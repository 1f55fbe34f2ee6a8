"""SOLVER.TRAINER: what each name computes."""

import pytest
import torch
from helpers import outcome, run, run_set, same

from mdistiller import config
from mdistiller.distillers import distiller_dict
from mdistiller.engine.replay import replay
from mdistiller.engine.run import RunRequest
from mdistiller.engine.step import Step
from mdistiller.errors import TrainingDiverged, UserError

MLKD = ["DISTILLER.TYPE", "MLKD", "SOLVER.TRAINER"]


def test_names_of_one_computation(small, undisturbed, tmp_path):
    crd = ["DISTILLER.TYPE", "CRD", "SOLVER.TRAINER"]
    for words, name, method, other in (
        (crd, "crd", "CRD", "base"), (crd, "dot", "CRD", "crd_dot"), (MLKD, "aug", "MLKD", "ours")
    ):  # fmt: skip
        found = run([*small, *words, name], tmp_path / name)
        assert same(outcome(found), outcome(undisturbed(method, SOLVER__TRAINER=other)))


def test_two_views_side_by_side_and_under_a_bank_are_the_same_run(small, undisturbed, tmp_path):
    opts, alone = [*small, *MLKD, "ours"], outcome(undisturbed("MLKD", SOLVER__TRAINER="ours"))
    _, folders = run_set(opts, tmp_path / "set", [1, 0])
    assert same(outcome(folders[0]), alone)
    for name in ("cold", "warm"):  # the bank serves the weak view; the strong one passes through the teacher
        lazy = run(opts, tmp_path / name, TEACHER_BANK="lazy", TEACHER_BANK_FOLDER=tmp_path / "banks")
        assert same(outcome(lazy), alone)
    assert not same(outcome(undisturbed("MLKD")), alone)


def test_the_strong_view_reaches_a_method_and_the_file_of_a_bad_step(small, tmp_path, monkeypatch):
    seen, forward = [], distiller_dict["MLKD"].forward_train

    def watched(self, image, target, image_strong=None, **kwargs):
        seen.append(image_strong)
        return forward(self, image, target, image_strong, **kwargs)

    monkeypatch.setattr(distiller_dict["MLKD"], "forward_train", watched)
    run([*small, *MLKD, "ours"], tmp_path / "sound", SOLVER__EPOCHS=1)
    assert [view.shape for view in seen] == [(16, 3, 16, 16), (16, 3, 16, 16), (8, 3, 16, 16)]
    assert all(view.dtype == torch.float32 and view.isfinite().all() for view in seen)
    update = Step.update

    def harmed(self, batch, *given):
        batch.image_strong[0, 0, 0, 0] = torch.nan
        update(self, batch, *given)

    monkeypatch.setattr(Step, "update", harmed)
    with pytest.raises(TrainingDiverged, match="first to go bad: the images"):
        run([*small, *MLKD, "ours"], tmp_path / "bad")
    (file,) = (tmp_path / "bad" / "distill" / "run").glob("bad_batch*")
    assert replay(file)[0] == "the images"


@pytest.mark.parametrize("trainer", ["ours", "aug"])
def test_a_method_without_a_second_view_is_refused(small, trainer):
    opts = [*small, "DISTILLER.TYPE", "DTKD", "SOLVER.TRAINER", trainer]
    with pytest.raises(UserError, match=f"{trainer} gives a second, strong view, which DTKD does not take; set "):
        RunRequest(config.load(None, opts)).check(False)
