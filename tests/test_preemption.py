"""Runs that are told to stop, killed, or let down by the machine: what they leave goes on bit for bit."""

import contextlib
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import ROOT, forked, killed, outcome, run, same, save_teacher, tool

from mdistiller import config
from mdistiller.dataset import Batch
from mdistiller.distillers import distiller_dict
from mdistiller.engine import builder
from mdistiller.engine.solver import zero_momenta
from mdistiller.engine.step import Meter, Step
from mdistiller.errors import Preempted, RunFailed, TrainingDiverged, UserError
from mdistiller.runs import checkpoint
from mdistiller.runs.folder import RunFolder
from mdistiller.runs.recorder import read_metrics
from mdistiller.runs.stop import Stop
from mdistiller.runs.temperature import read_record

config.load()
METHODS = sorted(name for name, cls in distiller_dict.items() if cls.__module__.startswith("mdistiller."))
KILLS = int(os.environ.get("KILLS", "12"))  # of each kind


@pytest.fixture(scope="module", autouse=True)
def listening():
    """A background job ignores SIGINT, under nohup SIGHUP too, and what it starts inherits that."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGHUP, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def stopping_after(items: int):
    """A Stop to which the signal comes while it handles its item number `items`, be it a training or a test batch."""

    class Timed(Stop):
        seen = 0

        def watch(self, batches):
            for batch in super().watch(batches):
                self.seen += 1
                if self.seen == items:
                    self.signal = "SIGTERM"
                yield batch

    return Timed


@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_on_at_the_very_step(small, tmp_path, monkeypatch, method):
    opts = [*small, "DISTILLER.TYPE", method]
    whole = run(opts, tmp_path / "whole")
    for items in (2, 2):  # after step 2 of epoch 1; then in its evaluation, which comes again
        monkeypatch.setattr(builder, "Stop", stopping_after(items))
        with pytest.raises(Preempted, match="SIGTERM in epoch 1"):
            run(opts, tmp_path / "parts", resume="auto")
    monkeypatch.undo()
    parts = run(opts, tmp_path / "parts", resume=True)
    assert same(outcome(whole), outcome(parts))
    if (whole / "temperatures.bin").exists():
        assert (whole / "temperatures.bin").read_bytes() == (parts / "temperatures.bin").read_bytes()
    log = (parts / "worklog.txt").read_text()
    assert [log.count(words) for words in ("stopped by", "resumed after", "epoch 1/2", "epoch 2/2")] == [2, 2, 1, 1]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_signal_ends_the_command_with_status_75(small, tmp_path, name):
    folder = tmp_path / "output" / "distill" / "run"
    with started(*small, "--resume", "auto", cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: (folder / "latest").exists(), process)
        process.send_signal(getattr(signal, name))
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert f"stopped by {name} in epoch" in errors
    assert "--resume auto" in errors
    assert "Traceback" not in errors
    state = checkpoint.load(folder / "latest")
    assert len(read_metrics(folder)) == state["epoch"]


@contextlib.contextmanager
def started(*words, cwd, **options):
    """tools/train_ours.py for far too many epochs; gone at the end, whatever happened."""
    command = [sys.executable, str(ROOT / "tools" / "train_ours.py"), *words, "SOLVER.EPOCHS", "100000"]
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, **options)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_status_does_not_depend_on_who_listens(small, tmp_path):
    """As in `train 2>&1 | tee log`, where Ctrl-C ends tee as well."""
    folder = tmp_path / "output" / "distill" / "run"
    with started(*small, cwd=tmp_path, stderr=subprocess.STDOUT) as process:
        wait_for(lambda: (folder / "latest").exists(), process)
        process.stdout.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 75
    assert checkpoint.load(folder / "latest")["progress"]["done"] in (1, 2, 3)


def test_auto_looks_again_when_it_holds_the_folder(small, tmp_path):
    folder = RunFolder(tmp_path / "run", resume="auto")
    assert folder.resumed is False
    (tmp_path / "run" / "metrics.jsonl").write_text('{"epoch": 1}\n')
    folder.close()
    folder = RunFolder(tmp_path / "run", resume="auto")  # died before its first checkpoint
    assert folder.resumed is False
    (tmp_path / "run" / "latest").touch()
    folder.close()
    folder = RunFolder(tmp_path / "run", resume="auto")
    assert folder.resumed is True
    folder.close()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    RunFolder(tmp_path / "run").close()
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run~1"}


def test_a_second_ctrl_c_stops_at_once():
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal == ""
    finally:
        signal.signal(signal.SIGHUP, before)


# Kills: a fresh process each time would spend its life importing torch, so children are forked.


@pytest.fixture(scope="module")
def undisturbed(small, tmp_path_factory):
    """Options of a run, its outcome, its record, and the seconds that a child takes for it."""
    opts = [*small, "DISTILLER.TYPE", "DTKD", "SOLVER.EPOCHS", "4", "LOG.SAVE_CHECKPOINT_FREQ", "2"]
    folder = run(opts, tmp_path_factory.mktemp("undisturbed"))
    begin = time.monotonic()
    killed(forked(lambda: run(opts, tmp_path_factory.mktemp("timed"))))
    return opts, outcome(folder), (folder / "temperatures.bin").read_bytes(), time.monotonic() - begin


def whole(folder) -> None:
    """Nobody who reads the folder finds half a line or an epoch twice."""
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        json.loads(line)
    epochs = [row["epoch"] for row in read_metrics(folder)]
    assert epochs == list(range(1, len(epochs) + 1))
    text = (folder / "worklog.txt").read_text()
    assert text == "" or text.endswith("\n")


def test_kill_9_at_random_moments_changes_nothing(undisturbed, tmp_path):
    opts, expected, record, seconds = undisturbed
    generator = random.Random(0)
    kills = runs = 0
    while kills < KILLS:
        runs += 1
        prefix = tmp_path / str(runs)
        folder = prefix / "distill" / "run"
        alive = True
        while alive:
            child = forked(lambda prefix=prefix: run(opts, prefix, resume="auto"))
            time.sleep(generator.uniform(0, seconds))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            alive = killed(child)
            kills += alive
            if (folder / "metrics.jsonl").exists() and (folder / "worklog.txt").exists():
                whole(folder)
        assert same(outcome(folder), expected), f"run {runs}"
        assert (folder / "temperatures.bin").read_bytes() == record
        assert not list(folder.glob(".*.tmp")) + list(folder.parent.glob("run~*"))
        shutil.rmtree(prefix)
    print(f"{kills} kills, {runs} runs, 0 differences")


def test_a_kill_at_any_file_operation_changes_nothing(undisturbed, tmp_path):
    """A child dies at its nth file operation, for n over all that a run of two epochs has; the next one goes on."""
    opts, _, _, _ = undisturbed
    opts = [*opts, "SOLVER.EPOCHS", "2"]
    expected = run(opts, tmp_path / "whole")
    record = (expected / "temperatures.bin").read_bytes()
    folder = tmp_path / "hurt" / "distill" / "run"

    def dies_at(number):
        count = 0

        def dying(function):
            def call(*arguments, **keywords):
                nonlocal count
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **keywords)

            return call

        for name in ("fsync", "replace", "link", "truncate", "unlink"):
            setattr(os, name, dying(getattr(os, name)))  # in the child alone
        run(opts, tmp_path / "hurt", resume="auto")

    number, kills = 1, 0
    while killed(forked(functools.partial(dies_at, number))):
        kills += 1
        if (folder / "worklog.txt").exists() and (folder / "metrics.jsonl").exists():
            whole(folder)
        assert not killed(forked(lambda: run(opts, tmp_path / "hurt", resume="auto")))
        assert same(outcome(folder), outcome(expected)), f"operation {number}"
        assert (folder / "temperatures.bin").read_bytes() == record
        assert not list(folder.glob(".*.tmp")) + list(folder.parent.glob("run~*"))
        shutil.rmtree(tmp_path / "hurt")
        number += max(1, 72 // KILLS)  # every one of them for KILLS 72 and more
    assert kills > 10
    print(f"{kills} kills at file operations, of {number} in a run, 0 differences")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "gone", "junk"])
def test_a_damaged_latest_falls_back_to_the_one_before(small, tmp_path, capsys, damage):
    opts = [*small, "DISTILLER.TYPE", "DTKD", "SOLVER.EPOCHS", "3"]
    expected = run(opts, tmp_path / "whole")
    folder = run(opts, tmp_path / "hurt")
    data = bytearray((folder / "latest").read_bytes())
    data[len(data) // 2] ^= 1
    bad = {"truncated": data[:-1000], "flipped": data, "empty": b"", "gone": None, "junk": b"x" * 5000}[damage]
    (folder / "latest").unlink()
    if bad is not None:
        (folder / "latest").write_bytes(bad)
    run(opts, tmp_path / "hurt", resume=True)
    assert "going on from the checkpoint before it, after epoch 2" in capsys.readouterr().out
    assert same(outcome(expected), outcome(folder))
    assert (expected / "temperatures.bin").read_bytes() == (folder / "temperatures.bin").read_bytes()
    (folder / "latest").write_bytes(b"")
    (folder / "previous").write_bytes(b"")
    with pytest.raises(UserError, match="latest"):
        run(opts, tmp_path / "hurt", resume=True)


def test_another_teacher_or_other_data_are_refused(small, tmp_path):
    opts = [*small, "DISTILLER.TYPE", "KD"]
    folder = run(opts, tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    other = save_teacher(tmp_path / "other", "resnet14", 10)
    state = torch.load(other, weights_only=True)
    state["model"]["fc.bias"][0] += 1
    torch.save(state, other)
    with np.load(small[small.index("DATASET.ROOT") + 1]) as file:
        arrays = dict(file)
    arrays["train_images"][0, 0, 0] ^= 1
    np.savez(tmp_path / "other.npz", **arrays)
    for key, path in (("DISTILLER.TEACHER_CKPT", other), ("DATASET.ROOT", tmp_path / "other.npz")):
        with pytest.raises(UserError, match=f"in {key} is not what this run was started with"):
            run([*opts, key, str(path)], tmp_path, resume=True, SOLVER__EPOCHS=3)
    del before[".lock"]
    assert before == {p.name: p.stat().st_mtime_ns for p in folder.iterdir() if p.name != ".lock"}, "nothing is written"


@pytest.mark.parametrize("change", ["summary first", "gone", "junk"])
def test_a_record_that_lacks_epochs_costs_no_run(small, tmp_path, capsys, change):
    opts = [*small, "DISTILLER.TYPE", "DTKD"]
    first = {"LOG__TEMPERATURE": "summary"} if change == "summary first" else {}
    folder = run(opts, tmp_path, SOLVER__EPOCHS=1, **first)
    if change == "gone":
        (folder / "temperatures.bin").unlink()
    if change == "junk":
        (folder / "temperatures.bin").write_bytes(b"junk" * 5000)
    for epochs in (2, 3):
        run(opts, tmp_path, resume=True, SOLVER__EPOCHS=epochs)
    assert capsys.readouterr().out.count("has nothing of 1 finished epochs") == 1
    values = read_record(folder / "temperatures.bin").values
    assert [bool(np.isnan(epoch).all()) for epoch in values] == [True, False, False]


def test_more_epochs_take_the_teacher_that_the_run_was_started_with(small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    place = small.index("DISTILLER.TEACHER_CKPT")
    opts = [*small[:place], *small[place + 2 :], "DISTILLER.TYPE", "KD", "DISTILLER.TRAIN_TEACHER", "True"]
    run(opts, tmp_path / "out")
    folder = run(opts, tmp_path / "out", resume="auto", SOLVER__EPOCHS=3)
    assert len(read_metrics(folder)) == 3
    assert capsys.readouterr().out.count("comes first") == 1


# What the machine does to a run


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_a_full_disk_costs_no_checkpoint(small, tmp_path):
    """On a tmpfs that the second checkpoint overfills; with room again, the run goes on to the same end."""
    opts = [*small, "DISTILLER.TYPE", "KD", "LOG.SAVE_CHECKPOINT_FREQ", "1", "SOLVER.EPOCHS", "5"]
    expected = run(opts, tmp_path / "whole")
    words = " ".join(f"'{word}'" for word in opts)
    train_it = f"{sys.executable} {ROOT}/tools/train_ours.py {words} --resume auto LOG.PREFIX {tmp_path}/full"
    script = f"""
        mount -t tmpfs -o size=4m none {tmp_path}/full || exit 99
        {train_it} > /dev/null; echo status $?
        ls -A {tmp_path}/full/distill/run | grep tmp
        mount -o remount,size=40m {tmp_path}/full
        {train_it} > /dev/null; echo status $?
        cp -r {tmp_path}/full/distill/run {tmp_path}/after"""
    (tmp_path / "full").mkdir()
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, timeout=120)
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip(f"no tmpfs for an ordinary user here: {done.stderr}")
    assert done.stdout.split("\n")[:2] == ["status 1", "status 0"], done
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert same(outcome(expected), outcome(tmp_path / "after"))


@pytest.mark.parametrize("name", ["metrics.jsonl", "worklog.txt", "latest", "temperatures.bin", "events"])
def test_any_file_that_cannot_be_written_ends_the_run_in_one_line(small, tmp_path, monkeypatch, name):
    real = open

    def full(file, mode="r", *arguments, **keywords):
        if name in str(file) and "r" not in mode and (tmp_path / "armed").exists():
            raise OSError(28, "No space left on device", str(file))
        return real(file, mode, *arguments, **keywords)

    opts = [*small, "DISTILLER.TYPE", "DTKD"]
    monkeypatch.setattr("builtins.open", full)
    (tmp_path / "armed").touch()
    with pytest.raises(RunFailed, match="No space left on device") as caught:
        run(opts, tmp_path)
    assert len(caught.value.lines) == 1
    (tmp_path / "armed").unlink()
    run(opts, tmp_path, resume="auto")


def test_a_folder_that_vanishes_ends_the_run_in_one_line(small, tmp_path, monkeypatch):
    def vanish(self):
        shutil.rmtree(tmp_path / "distill")
        return real(self)

    real = builder.Trainer.evaluate
    monkeypatch.setattr(builder.Trainer, "evaluate", vanish)
    with pytest.raises(RunFailed, match="No such file or directory"):
        run(small, tmp_path)


@pytest.mark.parametrize("prefix", ["/proc/nowhere", "/dev/null/x"])
def test_a_folder_that_cannot_be_written_is_refused(small, prefix, tmp_path):
    done = tool("train_ours", *small, "LOG.PREFIX", prefix, cwd=tmp_path)
    assert done.returncode == 2
    assert "set LOG.PREFIX" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate")],
)
def test_out_of_memory_names_the_batch_size(small, tmp_path, monkeypatch, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(builder.Trainer, "evaluate", fails)
    with pytest.raises(RunFailed, match=r"SOLVER\.BATCH_SIZE 16, .* halve them") as caught:
        run(small, tmp_path)
    assert len(caught.value.lines) == 1


def test_a_clock_that_jumps_changes_nothing(small, tmp_path, monkeypatch):
    expected = run(small, tmp_path / "a")
    jumps = random.Random(0)
    monkeypatch.setattr(time, "time", lambda: jumps.uniform(0, 4e9))
    assert same(outcome(expected), outcome(run(small, tmp_path / "b")))


def test_a_broken_stdout_changes_nothing(small, tmp_path):
    expected = run(small, tmp_path / "whole")
    words = " ".join(f"'{word}'" for word in small)
    command = (
        f"{sys.executable} {ROOT}/tools/train_ours.py {words} LOG.PREFIX broken | head -c 10; exit ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    folder = tmp_path / "broken" / "distill" / "run"
    assert same(outcome(expected), outcome(folder))
    assert "result:" in (folder / "worklog.txt").read_text()


# A loss that is not finite


def poisoned(monkeypatch, step: int, value=float("nan"), where="images"):
    """In step `step` (from 0), a pixel of the batch is `value`, or the gradient of the student's first layer."""
    real = builder.Step.compute

    def call(self, batch, epoch, meter, logits):
        if self.steps == step and where == "images":
            batch.image[0, 0, 0, 0] = value
        if self.steps == step and where == "gradient":
            handle = self.distiller.student.conv1.weight.register_hook(lambda gradient: gradient * value)
        real(self, batch, epoch, meter, logits)
        if self.steps == step and where == "gradient":
            handle.remove()

    monkeypatch.setattr(builder.Step, "compute", call)


MESSAGE = r"epoch 2, step 2 of 3: .*ce (NaN|infinite).*first to go bad: the output of student\.layer2\.0\."


@pytest.mark.parametrize("method", METHODS)
def test_stop_names_the_step_and_the_tensor_and_keeps_the_batch(small, tmp_path, monkeypatch, method):
    opts = [*small, "DISTILLER.TYPE", method]
    real = builder.Step.compute

    def call(self, batch, epoch, meter, logits):
        if self.steps == 4:
            with torch.no_grad():
                self.distiller.student.layer2[0].conv1.weight[0] *= 1e38
        real(self, batch, epoch, meter, logits)

    monkeypatch.setattr(builder.Step, "compute", call)
    with pytest.raises(TrainingDiverged, match=MESSAGE):
        run(opts, tmp_path)
    folder = tmp_path / "distill" / "run"
    assert [row["epoch"] for row in read_metrics(folder)] == [1]
    (file,) = folder.glob("bad_batch*")
    bad, losses = builder.replay(file)
    assert "the output of student.layer2.0." in bad
    assert "ce NaN" in losses or "ce infinite" in losses


def test_a_bad_step_runs_again_from_the_command_line(small, tmp_path, monkeypatch):
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from mdistiller.distillers.KD import KD\nfrom mdistiller.distillers import register_distiller\n"
        "@register_distiller('MINE', defaults={'A': 1.0})\nclass Mine(KD):\n    pass\n"
    )
    poisoned(monkeypatch, 1)
    with pytest.raises(TrainingDiverged, match="first to go bad: the images"):
        run([*small, "EXPERIMENT.PLUGINS", str(plugin), "DISTILLER.TYPE", "MINE"], tmp_path)
    (file,) = (tmp_path / "distill" / "run").glob("bad_batch*")
    done = tool("replay", file, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "first to go bad: the images" in done.stdout
    done = tool("replay", plugin, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_bad_gradient_is_told_from_a_bad_loss(small, tmp_path, monkeypatch):
    poisoned(monkeypatch, 1, where="gradient")
    with pytest.raises(TrainingDiverged, match="step 2 of 3: the loss or its gradient is not finite"):
        run(small, tmp_path)


@pytest.mark.parametrize("where", ["images", "gradient"])
@pytest.mark.parametrize("method", ["NONE", "DTKD", "CRD"])
def test_skip_leaves_the_step_out_and_counts_it(small, tmp_path, monkeypatch, method, where):
    opts = [*small, "DISTILLER.TYPE", method, "SOLVER.NAN_POLICY", "skip"]
    poisoned(monkeypatch, 1, where=where)
    folder = run(opts, tmp_path)
    rows = read_metrics(folder)
    assert [row["skipped_steps"] for row in rows] == [1, 0]
    assert all(np.isfinite(row["train_loss"]) for row in rows)
    assert "skipped 1 steps" in (folder / "worklog.txt").read_text()
    model = checkpoint.load(folder / "student_latest")["model"]
    assert all(value.isfinite().all() for value in model.values())
    assert int(model["bn1.num_batches_tracked"]) == 5, "BatchNorm has not seen the skipped batch"


def test_a_run_that_only_skips_stops(small, tmp_path, monkeypatch):
    real = builder.Step.compute

    def call(self, batch, epoch, meter, logits):
        batch.image.fill_(float("nan"))
        real(self, batch, epoch, meter, logits)

    monkeypatch.setattr(builder.Step, "compute", call)
    with pytest.raises(TrainingDiverged, match="no step had a finite loss"):
        run(small, tmp_path, SOLVER__NAN_POLICY="skip")


@pytest.fixture
def lazily(monkeypatch):
    """As on CUDA: fused kernels, and a look at what they decided only where the loop waits for the device anyway."""

    def fused(parameters, momentum, weight_decay):
        parameters = list(parameters)
        optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=momentum, weight_decay=weight_decay, fused=True)
        zero_momenta(optimizer)
        return optimizer

    monkeypatch.setattr(builder, "sgd", fused)


@pytest.mark.parametrize("method", ["DTKD", "CRD", "KDSVD"])
def test_what_the_device_marked_is_named_at_the_epochs_end(small, tmp_path, monkeypatch, lazily, method):
    poisoned(monkeypatch, 4, where="gradient")  # step 2 of epoch 2, whose last batch is smaller
    opts = [*small, "DISTILLER.TYPE", method, "LOG.TENSORBOARD_FREQ", "500"]
    with pytest.raises(TrainingDiverged, match="epoch 2, step 2 of 3: .*nothing when the step ran again"):
        run(opts, tmp_path)


def test_a_signal_behind_a_bad_step_keeps_no_checkpoint_of_it(small, tmp_path, monkeypatch, lazily):
    poisoned(monkeypatch, 0)
    monkeypatch.setattr(builder, "Stop", stopping_after(2))
    with pytest.raises(TrainingDiverged, match="epoch 1, step 1 of 3"):
        run([*small, "LOG.TENSORBOARD_FREQ", "500"], tmp_path)
    assert not (tmp_path / "distill" / "run" / "latest").exists()


def test_a_run_goes_on_with_the_kernels_of_another_device(small, tmp_path, monkeypatch, request):
    monkeypatch.setattr(builder, "Stop", stopping_after(2))
    with pytest.raises(Preempted):
        run(small, tmp_path)
    monkeypatch.undo()
    request.getfixturevalue("lazily")
    rows = read_metrics(run(small, tmp_path, resume=True))
    assert [row["epoch"] for row in rows] == [1, 2]


@pytest.mark.parametrize("skip", [True, False])
def test_the_decision_on_the_device_is_the_same(skip):
    """What CUDA does, with the fused kernel of the CPU: a bad step changes nothing, nor does a later one under stop."""
    weights = []
    for fused in (False, True):
        torch.manual_seed(0)
        student = builder.build_model("resnet8", 10)
        distiller = distiller_dict["NONE"](student).train()
        optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=fused)
        if fused:
            zero_momenta(optimizer)
        step = Step(distiller, optimizer, torch.device("cpu"), "none", "skip" if skip else "stop")
        assert step.lazy == fused
        meter = Meter()
        for number in range(4):
            image = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(number))
            image[0] *= float("nan") if number in (0, 2) else 1
            step(Batch(image, torch.arange(4), torch.arange(4)), 1, meter)
        assert step.bad_step() == (-1 if skip else 0)
        assert meter.read()["skipped"] == (2 if skip else 4)
        weights.append(student.state_dict())
    torch.testing.assert_close(*[{k: v.float() for k, v in w.items() if "fc" in k} for w in weights])


# The same seed gives the same student, whatever looks on


def test_nothing_that_looks_on_changes_the_student(small, tmp_path):
    opts = [*small, "DISTILLER.TYPE", "DTKD"]
    expected = outcome(run(opts, tmp_path / "0", LOG__TEMPERATURE="off"))[0]
    changes = [
        {"LOG__TEMPERATURE": "summary"},
        {"LOG__TEMPERATURE": "samples"},
        {"LOG__TENSORBOARD_FREQ": 1, "LOG__SAVE_CHECKPOINT_FREQ": 1},
        {"DETERMINISTIC": True},
        {"SOLVER__NAN_POLICY": "skip"},
        {"DATASET__TEST__BATCH_SIZE": 7},
    ]
    for number, change in enumerate(changes, 1):
        state = outcome(run(opts, tmp_path / str(number), **change))[0]
        assert same(state["model"], expected["model"]), change
        assert same(state["optimizer"], expected["optimizer"]), change
    other = outcome(run(opts, tmp_path / "seed", SEED=1))[0]
    assert not same(other["model"], expected["model"])
    torch.use_deterministic_algorithms(False)


def test_a_terminal_with_its_bar_changes_nothing(small, tmp_path):
    import fcntl
    import pty
    import struct
    import termios

    expected = outcome(run(small, tmp_path / "plain"))
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = [sys.executable, str(ROOT / "tools" / "train_ours.py"), *small, "LOG.PREFIX", "bar"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=side, stderr=subprocess.PIPE)
    os.close(side)
    shown = b""
    with contextlib.suppress(OSError):  # the other side is closed
        while part := os.read(main, 4096):
            shown += part
    assert process.wait(60) == 0, process.stderr.read()
    process.stderr.close()
    assert b"epoch 1/2:" in shown
    assert same(outcome(tmp_path / "bar" / "distill" / "run"), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["NONE", "DTKD", "CRD"])
def test_deterministic_runs_on_cuda_give_the_same_bits(small, tmp_path, method):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    opts = [*small, "DISTILLER.TYPE", method, "DEVICE", "cuda", "DETERMINISTIC", "True"]
    assert same(*(outcome(run(opts, tmp_path / name)) for name in "ab"))
    torch.use_deterministic_algorithms(False)
