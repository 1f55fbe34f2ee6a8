"""A run with SOLVER.TRAINER dot goes on with all that it keeps: buffers, own parameters, both momenta."""

import pytest
from helpers import outcome, run, same


@pytest.mark.parametrize("method", ["CRD", "VID"])
def test_two_epochs_at_once_or_one_after_the_other(small, tmp_path, method):
    opts = [*small, "DISTILLER.TYPE", method, "SOLVER.TRAINER", "dot", "SOLVER.LR_DECAY_STAGES", "[]"]
    whole = run(opts, tmp_path / "whole")
    run(opts, tmp_path / "halves", SOLVER__EPOCHS=1)
    assert same(outcome(run(opts, tmp_path / "halves", resume=True)), outcome(whole))
