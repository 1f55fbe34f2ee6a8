"""What the machine does to a run: one line that says what to do, and a run that goes on."""

import errno
import shutil

import pytest
from helpers import outcome, refused, run, same

from mdistiller import config
from mdistiller.engine.run import failures
from mdistiller.engine.trainer import Trainer
from mdistiller.errors import RunFailed


@pytest.mark.parametrize("name", ["metrics.jsonl", "worklog.txt", "best", "temperatures.bin", "events"])
def test_any_file_that_cannot_be_written_ends_the_run_in_one_line(small, tmp_path, monkeypatch, name):
    real = open

    def full(file, mode="r", *arguments, **keywords):
        if name in str(file) and "r" not in mode:
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        return real(file, mode, *arguments, **keywords)

    opts = [*small, "DISTILLER.TYPE", "DTKD", "SOLVER.EPOCHS", "1"]
    with monkeypatch.context() as patched:
        patched.setattr("builtins.open", full)
        with refused("No space left on device", RunFailed):
            run(opts, tmp_path)
    run(opts, tmp_path, resume="auto")


@pytest.mark.parametrize("number", [0, 2, 5])
def test_a_full_disk_costs_no_checkpoint(small, undisturbed, tmp_path, monkeypatch, save_every_step, number):
    """With a checkpoint at every step, the disk is full halfway through the first, third and last of them."""
    whole = outcome(undisturbed("KD"))
    opts, real, left = [*small, "DISTILLER.TYPE", "KD", *save_every_step], open, [number]

    def full(file, mode="r", *arguments, **keywords):
        opened = real(file, mode, *arguments, **keywords)
        if any(name in str(file) for name in ("/.latest.", "/.best.")) and "w" in mode:
            left[0] -= 1
            if left[0] < 0:
                opened.write(b"half of it")
                raise OSError(errno.ENOSPC, "No space left on device", str(file))
        return opened

    with monkeypatch.context() as patched:
        patched.setattr("builtins.open", full)
        with pytest.raises(RunFailed, match="No space left on device"):
            run(opts, tmp_path)
    folder = run(opts, tmp_path, resume="auto")
    assert not list(folder.glob(".*.tmp"))
    assert same(outcome(folder), whole)


def test_a_folder_that_vanishes_ends_the_run_in_one_line(small, tmp_path, monkeypatch):
    real = Trainer.evaluate

    def vanish(self):
        shutil.rmtree(tmp_path / "distill")
        return real(self)

    monkeypatch.setattr(Trainer, "evaluate", vanish)
    with refused("No such file or directory", RunFailed):
        run(small, tmp_path)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory")]
)
def test_out_of_memory_names_the_batch_size(error):
    with refused(r"SOLVER\.BATCH_SIZE 64, .* halve them", RunFailed), failures(config.load()):
        raise error
