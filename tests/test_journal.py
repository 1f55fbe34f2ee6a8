"""The journal: a killed run goes on at the step after the last whole one, bit for bit, whatever lies in the files."""

import contextlib
import errno
import functools
import json
import math
import os
import random
import shutil
import signal
import time

import pytest
import torch
from helpers import changed, forked, killed, outcome, run, same, save_teacher

from mdistiller import config
from mdistiller.distillers import distiller_dict
from mdistiller.engine import builder
from mdistiller.engine.seeds import train_seeds
from mdistiller.errors import DamagedFile, Preempted, UserError
from mdistiller.runs import checkpoint, journal
from mdistiller.runs.journal import BLOCK, HEAD, MAGIC, NAMES, Journal, digest, place
from mdistiller.runs.stop import Stop

config.load()
METHODS = sorted(name for name, cls in distiller_dict.items() if cls.__module__.startswith("mdistiller."))
KILLS = int(os.environ.get("KILLS", "4"))
STEPS = 3  # an epoch, in a small run


class Killed(BaseException):
    """Ends a run at once, as far as that goes inside a process."""


@pytest.fixture(autouse=True)
def every_step(monkeypatch):
    """However long a write takes beside these short steps."""
    monkeypatch.setattr(builder, "SHARE", math.inf)


@contextlib.contextmanager
def dying_after(writes):
    """The journal's write number `writes` is the last."""
    with pytest.MonkeyPatch.context() as patch:
        real, count = Journal.write, 0

        def write(self, state):
            nonlocal count
            real(self, state)
            count += 1
            if count == writes:
                raise Killed

        patch.setattr(Journal, "write", write)
        with pytest.raises(Killed):
            yield


def lines(text, *words):
    return [line for line in text.splitlines() if any(word in line for word in words)]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_on_from_its_journal(small, tmp_path, capsys, method):
    opts = [*small, "DISTILLER.TYPE", method, "SOLVER.EPOCHS", "1"]
    whole = run(opts, tmp_path / "whole")
    with dying_after(1):
        run(opts, tmp_path / "parts")
    capsys.readouterr()
    parts = run(opts, tmp_path / "parts", resume=True)
    assert "resumed after epoch 0 of 1, 1 steps into the next, from the journal" in capsys.readouterr().out
    assert same(outcome(whole), outcome(parts))
    if (whole / "temperatures.bin").exists():
        assert (whole / "temperatures.bin").read_bytes() == (parts / "temperatures.bin").read_bytes()
    log = (parts / "worklog.txt").read_text()
    assert [log.count(words) for words in (f"{method}: ", "resumed after", "epoch 1/1")] == [1, 1, 1]
    assert not list(parts.glob("journal*"))


@pytest.mark.parametrize("method", ["CRD", "DTKD", "MLKD"])
def test_kills_in_every_epoch(small, tmp_path, method):
    opts = [*small, "DISTILLER.TYPE", method, "TEACHER_BANK", "lazy", "TEACHER_BANK_FOLDER", str(tmp_path / "bank")]
    whole = run(opts, tmp_path / "whole", TEACHER_BANK_FOLDER=tmp_path / "other bank")
    for writes in (2, 2):  # in epoch 1, before there is a checkpoint; then in epoch 2
        with dying_after(writes):
            run(opts, tmp_path / "parts", resume="auto")
    parts = run(opts, tmp_path / "parts", resume="auto")
    assert same(outcome(whole), outcome(parts))
    if method == "DTKD":
        assert (whole / "temperatures.bin").read_bytes() == (parts / "temperatures.bin").read_bytes()
    log = (parts / "worklog.txt").read_text()
    assert [log.count(words) for words in ("resumed after", "epoch 1/2", "epoch 2/2")] == [2, 1, 1]


# Kills


@pytest.fixture(scope="module")
def undisturbed(small, tmp_path_factory):
    """Options of a run, its outcome, its record, and the seconds that a child takes for it."""
    opts = [*small, "DISTILLER.TYPE", "DTKD", "SOLVER.EPOCHS", "3"]
    folder = run(opts, tmp_path_factory.mktemp("undisturbed"))
    begin = time.monotonic()
    killed(forked(lambda: run(opts, tmp_path_factory.mktemp("timed"))))
    return opts, outcome(folder), (folder / "temperatures.bin").read_bytes(), time.monotonic() - begin


def counting(opts, prefix):
    """Run in a child that leaves the number of the newest step that was done, and of the one it began behind."""
    keep, introduce = builder.Trainer.keep, builder.introduce

    def note(name, trainer):
        (prefix / f"{name}.new").write_text(str(trainer.epoch * STEPS + trainer.done))
        os.replace(prefix / f"{name}.new", prefix / name)

    def kept(self, recorder):
        note("done", self)
        keep(self, recorder)

    def introduced(cfg, recorder, trainer, *rest):
        note("began", trainer)
        introduce(cfg, recorder, trainer, *rest)

    builder.Trainer.keep, builder.introduce = kept, introduced  # in the child alone
    prefix.mkdir(exist_ok=True)
    run(opts, prefix, resume="auto")


def number(file):
    return int(file.read_text()) if file.exists() else 0


def test_kill_9_at_random_moments_costs_a_step_at_most(undisturbed, tmp_path):
    opts, expected, record, seconds = undisturbed
    generator = random.Random(0)
    kills = runs = resumed = 0
    lost = {0: 0, 1: 0}
    while kills < KILLS:
        runs += 1
        prefix = tmp_path / str(runs)
        folder = prefix / "distill" / "run"
        alive = True
        while alive:
            done = number(prefix / "done")
            (prefix / "began").unlink(missing_ok=True)
            child = forked(lambda prefix=prefix: counting(opts, prefix))
            time.sleep(generator.uniform(0, seconds))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            alive = killed(child)
            kills += alive
            if (prefix / "began").exists() and done:
                lost[done - number(prefix / "began")] += 1  # a KeyError: more than a step
                resumed += 1
        assert same(outcome(folder), expected), f"run {runs}"
        assert (folder / "temperatures.bin").read_bytes() == record
        assert not list(folder.glob(".*.tmp")) + list(folder.parent.glob("run~*")) + list(folder.glob("journal*"))
        shutil.rmtree(prefix)
    assert resumed
    print(f"{kills} kills, {runs} runs, {resumed} resumed: {lost[0]} lost no step, {lost[1]} one; 0 differences")


def test_a_kill_inside_a_write_costs_that_step(undisturbed, tmp_path):
    """A child dies in its nth write, a part of which has reached the file."""
    opts, _, _, _ = undisturbed
    opts = [*opts, "SOLVER.EPOCHS", "1"]
    expected = outcome(run(opts, tmp_path / "whole"))
    prefix, generator, real = tmp_path / "hurt", random.Random(0), os.pwrite

    def dies_in(number):
        count = 0

        def pwrite(file, data, start):
            nonlocal count
            count += 1
            if count == number:
                real(file, data[: generator.randrange(len(data))], start)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(file, data, start)

        os.pwrite = pwrite  # in the child alone
        counting(opts, prefix)

    writes = 2 * STEPS  # of the tensors and of the text
    for write in range(1, writes + 1, max(1, 20 // KILLS)):
        generator.random()
        assert killed(forked(functools.partial(dies_in, write)))
        done = number(prefix / "done")
        assert done == (write + 1) // 2
        assert not killed(forked(lambda: counting(opts, prefix)))
        assert number(prefix / "began") == done - 1
        assert same(outcome(prefix / "distill" / "run"), expected)
        shutil.rmtree(prefix)


def test_a_run_whose_first_steps_are_skipped(small, tmp_path, monkeypatch):
    """The momenta come later, and with them another layout."""
    real = builder.Step.compute

    def call(self, batch, epoch, meter, logits):
        if epoch == 1 and float(self._number) == self.steps and meter.images < 32:
            batch.image[0, 0, 0, 0] = math.nan
        real(self, batch, epoch, meter, logits)

    monkeypatch.setattr(builder.Step, "compute", call)
    opts = [*small, "SOLVER.NAN_POLICY", "skip"]
    expected = outcome(run(opts, tmp_path / "whole"))
    assert expected[1][0]["skipped_steps"] == 2
    for writes in (1, 2, 2):
        with dying_after(writes):
            run(opts, tmp_path / "parts", resume="auto")
    assert same(outcome(run(opts, tmp_path / "parts", resume="auto")), expected)


def test_several_students_go_on_from_their_journals(small, tmp_path):
    opts = [word for word in small if word not in ("EXPERIMENT.NAME", "run")] + ["EXPERIMENT.TAG", "run"]

    def train(name, resume=False):
        words = changed(opts, tmp_path / name, DISTILLER__TYPE="DTKD")
        return [run["folder"] for run in train_seeds(config.load(None, words), [0, 1], resume)["runs"]]

    for writes in (1, 7):  # one student has none yet; then all are in epoch 2
        with dying_after(writes):
            train("parts", "auto")
    pairs = zip(train("whole"), train("parts", "auto"), strict=True)
    for whole, parts in pairs:
        assert same(*(outcome(builder.Path(folder)) for folder in (whole, parts)))


# What may lie in the files


@pytest.fixture(scope="module")
def hurt(small, tmp_path_factory):
    """Options of a run; the outcome; a folder as it lies there after a kill in epoch 2, behind step 2."""
    opts = [*small, "DISTILLER.TYPE", "DTKD"]
    root = tmp_path_factory.mktemp("hurt")
    expected = outcome(run(opts, root / "whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "SHARE", math.inf)
        with dying_after(STEPS + 2):
            run(opts, root / "parts")
    return opts, expected, root / "parts"


def crafted(text, body=b""):
    """A file whose checksum is right."""
    tensors = torch.frombuffer(bytearray(body), dtype=torch.uint8) if body else torch.empty(0, dtype=torch.uint8)
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    return HEAD.pack(MAGIC, len(body), len(text), digest(text, tensors)) + body + text


def tensor(*kind):
    return crafted({"run": "x", "state": {"d": [["model", {"t": kind}]]}}, bytes(BLOCK))


JUNK = {
    "empty": b"",
    "zeros": bytes(4000),
    "noise": random.Random(0).randbytes(4000),
    "head of noise": MAGIC + random.Random(0).randbytes(4000),
    "sizes": HEAD.pack(MAGIC, 2**64 - 1, 2**64 - 1, bytes(32)),
    "no JSON": crafted(b"\xff{"),
    "deep": crafted(b"[" * 100_000),
    "a long number": crafted(b'{"run": "x", "state": ' + b"9" * 10_000 + b"}"),
    "a list": crafted([]),
    "no state": crafted({"run": "x"}),
    "no run": crafted({"run": "x", "state": {"d": []}}),
    "no numbers": crafted(b'{"run": "x", "state": {"d": [["epoch", NaN], ["progress", {"d": [["done", 1]]}]]}}'),
    "negative": crafted({"run": "x", "state": {"d": [["epoch", 1], ["progress", {"d": [["done", -1]]}]]}}),
    "unhashable": crafted({"run": "x", "state": {"d": [[[], 1]]}}),
    "a huge tensor": tensor("float32", [2**40, 2**40], False),
    "a negative size": tensor("float32", [-1, -16], False),
    "no size": tensor("float32", ["4"], False),
    "an endless size": tensor("float32", [1e300], False),
    "zeros and huge": tensor("float32", [0, 2**80], False),
    "an object": tensor("object", [1], False),
    "a type that is a name": tensor("nn", [1], False),
    "flat, channels last": tensor("float32", [4], True),
}


@pytest.mark.parametrize("kind", JUNK)
def test_junk_is_no_journal(tmp_path, kind):
    (tmp_path / NAMES[0]).write_bytes(JUNK[kind])
    with pytest.raises(DamagedFile) as caught:
        journal.read(tmp_path / NAMES[0])
    assert len(caught.value.lines) == 1
    assert not journal.exists(tmp_path)
    assert Journal(tmp_path, "x").read()[0] is None


def test_what_is_no_file_is_no_journal(tmp_path):
    paths = [tmp_path / name for name in NAMES]
    for makers in ((os.mkfifo, os.mkdir), (lambda p: os.symlink(p, p), lambda p: os.symlink("/dev/zero", p))):
        for path, make in zip(paths, makers, strict=True):
            make(path)
        assert not journal.exists(tmp_path)
        state, problem = Journal(tmp_path, "x").read()
        assert state is None
        assert problem
        for path in paths:
            path.rmdir() if path.is_dir() else path.unlink()
    with open(paths[0], "wb") as file:
        file.truncate(2**42)  # a sparse one
    assert not journal.exists(tmp_path)


def test_a_damaged_file_never_gives_another_state(hurt, tmp_path):
    """Flipped bits, cuts, and pages of the state before: the file is refused, or the change was in unused bytes."""
    _, _, prefix = hurt
    files = [(prefix / "distill" / "run" / name).read_bytes() for name in NAMES]
    expected = checkpoint.digest(journal.read(prefix / "distill" / "run" / NAMES[0]))
    generator, refused = random.Random(0), 0
    for case in range(300):
        data = bytearray(files[0])
        if case % 3 == 0:
            for _ in range(generator.choice((1, 1, 2, 8))):
                data[generator.randrange(generator.choice((100, len(data))))] ^= 1 << generator.randrange(8)
        elif case % 3 == 1:
            del data[generator.randrange(len(data)) :]
        else:
            page = 4096 * generator.randrange(len(data) // 4096)
            data[page : page + 4096] = files[1][page : page + 4096]
        (tmp_path / "journal").write_bytes(data)
        try:
            assert checkpoint.digest(journal.read(tmp_path / "journal")) == expected
        except UserError:
            refused += 1
    assert refused > 200


DAMAGE = {
    "newest": (1, 0, "1 steps into the next, from the journal"),
    "older": (0, 1, "2 steps into the next, from the journal"),
    "both": (1, 1, "warning"),
}


@pytest.mark.parametrize(
    ("which", "kind"), [("newest", "flipped"), ("older", "cut"), ("both", "flipped"), ("both", "junk")]
)
def test_damage_costs_what_the_other_file_lacks(hurt, tmp_path, capsys, which, kind):
    opts, expected, prefix = hurt
    shutil.copytree(prefix, tmp_path / "run")
    folder = tmp_path / "run" / "distill" / "run"
    for name, damaged in zip(NAMES, DAMAGE[which], strict=False):
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 4
        if damaged:
            (folder / name).write_bytes({"flipped": data, "cut": data[:-10], "junk": b"x" * 5000}[kind])
    run(opts, tmp_path / "run", resume=True)
    said = capsys.readouterr().out
    assert DAMAGE[which][2] in said
    assert len(lines(said, "warning")) == (which == "both")
    assert same(outcome(folder), expected)
    assert not list(folder.glob("journal*"))


def test_a_stale_journal_is_ignored_silently(hurt, tmp_path, capsys):
    opts, expected, prefix = hurt
    with dying_after(2):
        run(opts, tmp_path)
    folder = tmp_path / "distill" / "run"
    stale = {name: (folder / name).read_bytes() for name in NAMES}
    shutil.rmtree(folder)
    shutil.copytree(prefix / "distill" / "run", folder)
    for name, data in stale.items():
        (folder / name).write_bytes(data)
    capsys.readouterr()
    run(opts, tmp_path, resume=True)
    said = capsys.readouterr().out
    assert "resumed after epoch 1 of 2\n" in said
    assert not lines(said, "warning", "from the journal")
    assert same(outcome(folder), expected)


@pytest.mark.parametrize("first", [True, False])
def test_the_journal_of_another_run_is_not_taken(hurt, small, tmp_path, capsys, first):
    """`first`: this run has no checkpoint yet."""
    opts, expected, prefix = hurt
    folder = tmp_path / "run" / "distill" / "run"
    with dying_after(STEPS + 2):
        run([*opts, "SEED", "7"], tmp_path / "other", EXPERIMENT__NAME="run")
    shutil.copytree(prefix, tmp_path / "run")
    if first:
        (folder / "latest").unlink()
    for name in NAMES:
        shutil.copyfile(tmp_path / "other" / "distill" / "run" / name, folder / name)
    capsys.readouterr()
    if first:
        with pytest.raises(UserError, match="is the journal of another run") as caught:
            run(opts, tmp_path / "run", resume=True)
        assert len(caught.value.lines) == 1
        return
    run(opts, tmp_path / "run", resume=True)
    assert len(lines(capsys.readouterr().out, "warning")) == 1
    assert same(outcome(folder), expected)


def test_a_whole_journal_that_does_not_fit_the_model_is_not_taken(hurt, tmp_path, capsys):
    opts, expected, prefix = hurt
    shutil.copytree(prefix, tmp_path / "run")
    folder = tmp_path / "run" / "distill" / "run"
    name, state = journal.read(folder / NAMES[0])
    state["model"]["student.fc.bias"] = torch.zeros(3)
    Journal(folder, name).write(state)
    run(opts, tmp_path / "run", resume=True)
    said = capsys.readouterr().out
    assert len(lines(said, "warning")) == 1
    assert "resumed after epoch 1 of 2\n" in said
    assert same(outcome(folder), expected)


def test_a_damaged_latest_costs_nothing_where_the_journal_is_whole(hurt, tmp_path, capsys):
    opts, expected, prefix = hurt
    shutil.copytree(prefix, tmp_path / "run")
    folder = tmp_path / "run" / "distill" / "run"
    (folder / "latest").unlink()
    run(opts, tmp_path / "run", resume=True)
    assert "resumed after epoch 1 of 2, 2 steps into the next, from the journal" in capsys.readouterr().out
    assert same(outcome(folder), expected)


def test_another_teacher_is_refused_before_there_is_a_checkpoint(small, tmp_path):
    with dying_after(2):
        run(small, tmp_path, DISTILLER__TYPE="KD")
    other = save_teacher(tmp_path / "other", "resnet14", 10)
    state = torch.load(other, weights_only=True)
    state["model"]["fc.bias"][0] += 1
    torch.save(state, other)
    with pytest.raises(UserError, match="is not what this run was started with"):
        run(small, tmp_path, resume="auto", DISTILLER__TYPE="KD", DISTILLER__TEACHER_CKPT=other)


def test_a_new_run_sets_aside_one_that_has_only_a_journal(small, tmp_path):
    with dying_after(1):
        run(small, tmp_path)
    run(small, tmp_path)
    assert (tmp_path / "distill" / "run~1" / NAMES[0]).exists()


def test_a_torn_first_write_is_no_run(small, tmp_path, capsys):
    expected = outcome(run(small, tmp_path / "whole"))
    with dying_after(1):
        run(small, tmp_path / "parts")
    file = tmp_path / "parts" / "distill" / "run" / NAMES[0]
    os.truncate(file, 1000)
    with pytest.raises(UserError, match="there is no run"):
        run(small, tmp_path / "parts", resume=True)
    capsys.readouterr()
    assert same(outcome(run(small, tmp_path / "parts", resume="auto")), expected)
    assert not lines(capsys.readouterr().out, "warning", "resumed")
    assert os.listdir(tmp_path / "parts" / "distill") == ["run"]


def test_nothing_of_the_files_stays_in_the_model(hurt):
    _, _, prefix = hurt
    _, state = journal.read(prefix / "distill" / "run" / NAMES[0])
    tensors = list(state["model"].values())
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in tensors)
    assert len({value.untyped_storage().data_ptr() for value in tensors if value.numel()}) == len(tensors)


# The disk, signals, the clock


@pytest.mark.parametrize("call", [1, 3, 4])
@pytest.mark.parametrize("name", ["pwrite", "open"])
def test_a_disk_that_takes_no_journal_costs_no_run(hurt, tmp_path, monkeypatch, capsys, name, call):
    opts, expected, _ = hurt
    real, count = getattr(os, name), 0

    def refuse(*arguments, **keywords):
        nonlocal count
        count += name == "pwrite" or "journal" in str(arguments[0])
        if count >= call:
            raise OSError(errno.ENOSPC if name == "pwrite" else errno.EROFS, "No space, or read-only")
        return real(*arguments, **keywords)

    def limited(self, state):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, name, refuse)
            write(self, state)

    write = Journal.write
    monkeypatch.setattr(Journal, "write", limited)
    folder = run(opts, tmp_path)
    warnings = lines(capsys.readouterr().out, "warning")
    assert len(warnings) == (name == "pwrite" or call == 1)  # each file is opened once
    assert all("no journal is kept (No space, or read-only)" in line for line in warnings)
    assert same(outcome(folder), expected)
    assert not list(folder.glob("journal*"))


def test_a_folder_in_the_journals_place_costs_no_run(hurt, tmp_path, capsys):
    opts, expected, _ = hurt
    (tmp_path / "distill" / "run" / NAMES[1]).mkdir(parents=True)
    assert same(outcome(run(opts, tmp_path)), expected)
    assert len(lines(capsys.readouterr().out, "warning: no journal is kept")) == 1


def test_a_method_whose_state_no_journal_holds_is_trained_without(hurt, tmp_path, monkeypatch, capsys):
    opts, expected, _ = hurt
    real = builder.Trainer.state
    monkeypatch.setattr(builder.Trainer, "state", lambda self: real(self) | {"more": 1j})
    folder = run(opts, tmp_path)
    assert len(lines(capsys.readouterr().out, "warning: no journal is kept")) == 1
    assert outcome(folder)[0].pop("more") == 1j
    assert same(outcome(folder)[1], expected[1])


def test_a_signal_supersedes_the_journal(hurt, tmp_path, monkeypatch):
    opts, expected, _ = hurt

    class Timed(Stop):
        def watch(self, batches):
            for batch in super().watch(batches):
                self.signal = "SIGTERM"
                yield batch

    folder = tmp_path / "distill" / "run"
    with dying_after(1):
        run(opts, tmp_path)
    monkeypatch.setattr(builder, "Stop", Timed)
    with pytest.raises(Preempted, match="in epoch 1 after step 2"):
        run(opts, tmp_path, resume="auto")
    assert not list(folder.glob("journal*"))
    monkeypatch.undo()
    monkeypatch.setattr(builder, "SHARE", math.inf)
    with dying_after(1):
        run(opts, tmp_path, resume="auto")
    assert place(journal.read(folder / NAMES[0])[1]) == (0, 3)
    assert same(outcome(run(opts, tmp_path, resume=True)), expected)


def state_of(epoch, done, **more):
    return {"epoch": epoch, "progress": {"done": done}, "values": torch.arange(1000.0)} | more


def test_what_is_written_is_what_is_read(tmp_path):
    values = {
        "last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "strided": torch.randn(6, 4).T,
        "empty": torch.empty(0, 3),
        "number": torch.tensor(7),
        **{name: torch.arange(5).to(dtype) for name, dtype in journal.DTYPES.items()},
        0: [None, True, 2**70, 0.1, -math.inf, "ü", {"a": [], "b": {}}],
    }
    kept = Journal(tmp_path, "x")
    kept.write(state_of(1, 1))
    kept.write(state_of(1, 2, more=values))
    kept.write(state_of(1, 3) | {"values": torch.zeros(2)})  # shorter than what lay there
    kept.close()
    assert same(journal.read(tmp_path / NAMES[1]), ("x", state_of(1, 2, more=values)))
    again = Journal(tmp_path, "x")
    assert place(again.read()[0]) == (1, 3)
    again.write(state_of(1, 4))
    assert [place(journal.read(tmp_path / name)[1]) for name in NAMES] == [(1, 3), (1, 4)]
    assert Journal(tmp_path, "y").read()[0] is None


def test_writing_keeps_to_its_share_of_the_time(tmp_path, monkeypatch):
    clock, cost = 0.0, 0.001
    real = journal.digest

    def costly(*arguments):
        nonlocal clock
        clock += cost
        return real(*arguments)

    monkeypatch.setattr(journal.time, "perf_counter", lambda: clock)
    monkeypatch.setattr(journal, "digest", costly)
    kept = Journal(tmp_path, "x", 0.02)
    writes = 0
    for step, seconds in enumerate([0.06] * 100 + [0.005] * 400):
        cost = 1.0 if step == 50 else 0.001  # a stall
        clock += seconds
        if kept.due():
            kept.write(state_of(0, step))
            writes += 1
    assert 100 + 400 // 11 <= writes <= 100 + 400 // 10
    rare = Journal(tmp_path, "x", 0.02, interval=10.0)
    clock += 9.9
    assert not rare.due()
    clock += 0.2
    assert rare.due()
    kept.remove()
