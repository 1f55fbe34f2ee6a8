"""A run's folder: its name, and that one process at a time trains there."""

import os

import pytest

from mdistiller.engine.cfg import load
from mdistiller.errors import FolderInUse, UserError
from mdistiller.runs.folder import RunFolder, in_use, run_folder


@pytest.mark.parametrize(
    "opts", [["EXPERIMENT.NAME", "."], ["EXPERIMENT.NAME", " "], ["EXPERIMENT.TAG", ".."], ["EXPERIMENT.NAME", "a\nb"]]
)
def test_a_name_that_is_no_folder_is_refused(opts):
    with pytest.raises(UserError, match=r"EXPERIMENT\.NAME"):
        run_folder(load(None, opts))


def test_a_folder_in_use_is_refused(tmp_path):
    assert not in_use(tmp_path / "run")
    held = RunFolder(tmp_path / "run")
    assert in_use(tmp_path / "run")
    with pytest.raises(FolderInUse, match=f"process {os.getpid()} on"):
        RunFolder(tmp_path / "run")
    held.close()
    RunFolder(tmp_path / "run").close()


def test_a_run_is_named_by_what_was_typed():
    cfg = load(
        None, ["SOLVER.LR", "0.1", "LOG.PREFIX", "out", "EXPERIMENT.TAG", "x", "SOLVER.LR_DECAY_STAGES", "[1, 2]"]
    )
    assert str(run_folder(cfg)) == "out/distill/x+SOLVER.LR:0.1,SOLVER.LR_DECAY_STAGES:[1,2]"
    assert str(run_folder(load(None, ["SEED", "3", "EXPERIMENT.NAME", "y"]))) == "output/distill/y"
