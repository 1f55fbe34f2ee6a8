"""A loss that is not finite: named and kept to run again, or left out and counted."""

import math

import numpy as np
import pytest
import torch
from helpers import KINDS, called, load_tool, own_kd, run

from mdistiller.engine.replay import replay
from mdistiller.engine.step import Step
from mdistiller.errors import TrainingDiverged, UserError
from mdistiller.runs import checkpoint
from mdistiller.runs.recorder import read_metrics


@pytest.fixture
def harm(monkeypatch):
    """`harm(number, where)`: in that step, from 0 (None: in every one), a pixel is NaN ("image"), the gradient of the
    student's first layer ("gradient"), or a layer's weights overflow ("weights").
    """
    update = Step.update

    def at(number: int | None, where: str = "image") -> None:
        def harmed(self, batch, *given):
            if number not in (None, self.steps):
                return update(self, batch, *given)
            if where == "image":
                batch.image[0, 0, 0, 0] = math.nan
            elif where == "weights":
                with torch.no_grad():
                    self.distiller.student.layer2[0].conv1.weight[0] *= 1e38
            hook = self.distiller.student.conv1.weight.register_hook(
                lambda gradient: gradient * (math.nan if where == "gradient" else 1)
            )
            update(self, batch, *given)
            hook.remove()

        monkeypatch.setattr(Step, "update", harmed)

    return at


MESSAGE = r"epoch 2, step 2 of 3: .*ce (NaN|infinite).*first to go bad: the output of student\.layer2\.0\."


@pytest.mark.parametrize("method", KINDS)
def test_stop_names_the_step_and_the_tensor_and_keeps_the_batch(small, tmp_path, harm, method):
    harm(4, "weights")
    with pytest.raises(TrainingDiverged, match=MESSAGE):
        run([*small, "DISTILLER.TYPE", method], tmp_path)
    folder = tmp_path / "distill" / "run"
    assert [row["epoch"] for row in read_metrics(folder)] == [1]
    (file,) = folder.glob("bad_batch*")
    bad, losses = replay(file)
    assert "the output of student.layer2.0." in bad
    assert "ce NaN" in losses or "ce infinite" in losses


def test_a_bad_step_runs_again_from_the_command_line(small, tmp_path, harm):
    """With the plug-in that the method came from."""
    plugin = tmp_path / "mine.py"
    harm(1)
    with pytest.raises(TrainingDiverged, match="first to go bad: the images"):
        run([*small, *own_kd(plugin, "MINE")], tmp_path)
    (file,) = (tmp_path / "distill" / "run").glob("bad_batch*")
    done = called("replay", file, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "first to go bad: the images" in done.stdout
    with pytest.raises(UserError, match="mine.py"):
        load_tool("replay").main([str(plugin)])


def test_a_bad_gradient_is_told_from_a_bad_loss(small, tmp_path, harm):
    harm(1, "gradient")
    with pytest.raises(TrainingDiverged, match="step 2 of 3: the loss or its gradient is not finite"):
        run(small, tmp_path)


@pytest.mark.parametrize(("method", "where"), [("NONE", "image"), ("DTKD", "gradient"), ("CRD", "image")])
def test_skip_leaves_the_step_out_and_counts_it(small, tmp_path, harm, method, where):
    harm(1, where)
    folder = run([*small, "DISTILLER.TYPE", method, "SOLVER.NAN_POLICY", "skip"], tmp_path)
    rows = read_metrics(folder)
    assert [row["skipped_steps"] for row in rows] == [1, 0]
    assert all(np.isfinite(row["train_loss"]) for row in rows)
    assert "skipped 1 step" in (folder / "worklog.txt").read_text()
    model = checkpoint.load(folder / "student_latest")["model"]
    assert all(value.isfinite().all() for value in model.values())
    assert int(model["bn1.num_batches_tracked"]) == 5, "BatchNorm has not seen the skipped batch"


def test_a_run_that_only_skips_stops(small, tmp_path, harm):
    harm(None)
    with pytest.raises(TrainingDiverged, match="no step had a finite loss"):
        run(small, tmp_path, SOLVER__NAN_POLICY="skip")


@pytest.mark.parametrize("method", ["DTKD", "CRD"])
def test_what_the_device_marked_is_named_at_the_epochs_end(small, tmp_path, harm, fused_kernels, method):
    harm(4, "gradient")  # step 2 of epoch 2, whose last batch is smaller
    with pytest.raises(TrainingDiverged, match="epoch 2, step 2 of 3: .*nothing when the step ran again"):
        run([*small, "DISTILLER.TYPE", method, "LOG.TENSORBOARD_FREQ", "500"], tmp_path)


def test_a_step_that_is_noticed_later_draws_the_same_numbers_again(small, tmp_path, harm, fused_kernels, monkeypatch):
    """On the host and on the device, here a counter: the dump has both as they were before that step."""
    harm(4, "gradient")
    drawn, given, device = [], [], torch.zeros(1, dtype=torch.uint8)

    def counted(self, *batch):
        drawn.append((torch.get_rng_state(), device.clone()))
        device.add_(1)
        update(self, *batch)

    update = Step.update
    monkeypatch.setattr(Step, "update", counted)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_rng_state", device.clone)
    monkeypatch.setattr(torch.cuda, "set_rng_state", given.append)
    with pytest.raises(TrainingDiverged, match="epoch 2, step 2 of 3"):
        run([*small, "DISTILLER.TYPE", "CRD", "LOG.TENSORBOARD_FREQ", "500"], tmp_path)
    (file,) = (tmp_path / "distill" / "run").glob("bad_batch*")
    kept = checkpoint.load(file)
    assert len(drawn) == 6 and not torch.equal(drawn[4][0], drawn[5][0])
    assert torch.equal(kept["rng"], drawn[4][0]) and torch.equal(kept["rng_cuda"], drawn[4][1])
    given.clear()
    replay(file)
    assert given and torch.equal(given[-1], drawn[4][1])


@pytest.mark.parametrize("how", ["a signal", "a minute that is over"])
def test_behind_a_bad_step_no_checkpoint_is_written(
    small, tmp_path, harm, fused_kernels, stop_after, save_every_step, how
):
    harm(0)
    more = ["LOG.TENSORBOARD_FREQ", "500"]
    if how == "a signal":
        stop_after(2)
    else:
        more += save_every_step
    with pytest.raises(TrainingDiverged, match="epoch 1, step 1 of 3"):
        run([*small, *more], tmp_path)
    assert not (tmp_path / "distill" / "run" / "latest").exists()
