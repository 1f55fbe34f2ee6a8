"""Rows in files that never change: whatever happens to processes or files, no wrong row comes out of them."""

import errno
import functools
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch
from helpers import forked, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mdistiller.bank import segments as module
from mdistiller.bank.segments import Segments

DESCRIPTION = {"teacher": "resnet56", "views": 162}
ROWS, WIDTH = 40, 5


@pytest.fixture(scope="module", autouse=True)
def _no_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


def values_of(rows, width=WIDTH, dtype=torch.float16):
    """What row r holds: numbers that no other row has."""
    return ((rows[:, None] * 7919 + torch.arange(width) * 31 + 1) % 2039).to(dtype)


def opened(folder, description=DESCRIPTION, rows=ROWS):
    return Segments(folder, description, rows, WIDTH, torch.float16)


def add(store, rows):
    rows = torch.tensor(sorted(rows))
    store.add(rows, values_of(rows))


def held(store):
    """The rows that are held, after a look at every one of them, in a random order."""
    rows = store.holds(torch.arange(store.rows)).nonzero()[:, 0]
    rows = rows[torch.randperm(len(rows))]
    if len(rows):
        assert torch.equal(store.read(rows), values_of(rows))
    assert store.filled == len(rows)
    return set(rows.tolist())


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def folder(tmp_path):
    """Three files, of 6 rows together."""
    store = opened(tmp_path / "bank")
    for rows in ({3}, {7, 0, 11}, {1, 2}):
        add(store, rows)
        store.commit()
    return tmp_path / "bank"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_was_added_is_read_at_once_and_later(tmp_path, dtype):
    folder = tmp_path / "a" / "b"
    store, order = Segments(folder, DESCRIPTION, 500, 7, dtype), torch.randperm(500)
    assert store.filled == 0 and not store.holds(order).any()
    assert not (tmp_path / "a").exists(), "nothing is written before there is something to write"
    for part in (order[:1], order[1:200], order[200:203]):
        store.add(part, values_of(part, 7, dtype))
        assert torch.equal(store.read(part), values_of(part, 7, dtype))
    store.commit()
    store.commit()
    (file,) = folder.iterdir()
    found = load_file(file)
    assert torch.equal(found["values"], values_of(found["rows"], 7, dtype)), "read back with nothing of the module"
    for at in (store, Segments(folder, DESCRIPTION, 500, 7, dtype)):
        assert at.filled == 203 and at.holds(order[:203]).all()
        twice = torch.cat([order[:203], order[:9]])
        assert torch.equal(at.read(twice), values_of(twice, 7, dtype))
        assert at.read(twice).dtype == dtype


def test_values_stay_on_the_disk(tmp_path):
    def anonymous():
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])

    if not os.path.exists("/proc/self/status"):
        pytest.skip("needs Linux")
    wanted = (tmp_path, {}, 200_000, 100, torch.float16)
    store = Segments(*wanted)
    store.add(torch.arange(200_000), torch.zeros(200_000, 100, dtype=torch.float16))  # 40 MB
    store.commit()
    del store
    before = anonymous()
    store = Segments(*wanted)
    for _ in range(20):
        store.read(torch.randint(0, 200_000, (64,)))
    assert anonymous() - before < 20_000


def test_rows_may_lie_on_a_device_too(folder):
    store = opened(folder)
    store.to_device(torch.device("cpu"))
    add(store, {4, 5})
    other = opened(folder)
    add(other, {20})
    other.commit()
    store.commit()
    assert held(store) == {0, 1, 2, 3, 4, 5, 7, 11, 20}
    assert torch.equal(store.table[20], values_of(torch.tensor([20]))[0])


# what else may lie there


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"teacher": "x"}, "teacher resnet56, asked for is x"),
        ({"new": 1}, "no new, asked for is 1"),
        ({"views": 81}, "views 162, asked for is 81"),
    ],
)
def test_rows_of_another_kind_are_refused(folder, changed, said):
    before = files(folder)
    with refused(f"was made with {said}; remove it, or choose another folder"):
        opened(folder, DESCRIPTION | changed)
    assert files(folder) == before


def test_a_torn_file_is_left_out_with_a_line(folder, capsys):
    torn = min(folder.iterdir())
    data, whole = torn.read_bytes(), held(opened(folder))
    assert capsys.readouterr().out == ""
    for length in (0, 4, 8, 20, len(data) // 2, len(data) - 1):
        torn.write_bytes(data[:length])
        assert held(opened(folder)) < whole
        assert capsys.readouterr().out.count(f"warning: {torn}: cannot be read and is left out") == 1


def test_what_is_no_file_of_ours_is_left_alone(folder, capsys):
    (folder / "notes.txt").write_text("x")
    (folder / "noise.safetensors").write_bytes(random.Random(0).randbytes(300))
    (folder / "folder.safetensors").mkdir()
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "nowhere.safetensors").symlink_to("gone")
    assert len(held(opened(folder))) == 6
    assert capsys.readouterr().out.count("\n") == 1


def test_leftovers_of_killed_writers_go_after_an_hour(folder):
    for name, age in ((".a.safetensors.0.tmp", 10), (".b.safetensors.1.tmp", 4000)):
        (folder / name).touch()
        os.utime(folder / name, (time.time() - age,) * 2)
    opened(folder)
    assert [name for name in files(folder) if name.endswith("tmp")] == [".a.safetensors.0.tmp"]


# several processes


@pytest.fixture
def merging(monkeypatch):
    """More than four files are merged."""
    monkeypatch.setattr(module, "MOST_SMALL", 4)


@pytest.mark.usefixtures("merging")
def test_a_file_that_is_merged_while_another_process_opens_the_folder(folder, monkeypatch):
    for row in (20, 21):
        store = opened(folder)
        add(store, {row})
        module.Segments._merge, merge = lambda self: None, module.Segments._merge
        store.commit()
        module.Segments._merge = merge
    assert len(files(folder)) == 5
    real = module.safe_open

    def merged_first(*given, **keywords):
        monkeypatch.setattr(module, "safe_open", real)
        opened(folder)
        assert len(files(folder)) == 1
        return real(*given, **keywords)

    monkeypatch.setattr(module, "safe_open", merged_first)
    assert held(opened(folder)) == {0, 1, 2, 3, 7, 11, 20, 21}


@pytest.mark.usefixtures("merging")
def test_a_folder_that_cannot_be_written_is_read(folder, monkeypatch):
    for row in (20, 21, 22):
        (folder / f"{row}.safetensors").write_bytes((folder / files(folder)[0]).read_bytes())

    def read_only(*given):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(module, "write_atomic", read_only)
    store = opened(folder)
    assert len(held(store)) == 6 and len(files(folder)) == 6
    add(store, {30})
    with pytest.raises(OSError, match="Read-only"):
        store.commit()
    assert 30 in held(store), "it is held in memory"
    monkeypatch.undo()
    store.commit()
    assert 30 in held(opened(folder))


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["add"] * 4 + ["commit"] * 2 + ["open", "die"]), st.integers(0, 2**32 - 1)), max_size=30
)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(OPERATIONS)
def test_any_history_of_two_processes_agrees_with_sets(operations):
    """`own`: what each of them has added; `safe`: what either has committed."""
    safe, own = {0, 1, 2}, [{0, 1, 2}, set()]
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MOST_SMALL", 1)
        folder = Path(name) / "bank"
        stores = [opened(folder), opened(folder)]
        for row in own[0]:
            add(stores[0], {row})
            stores[0].commit()
        for operation, seed in operations:
            generator = random.Random(seed)
            who = generator.randrange(2)
            if operation == "add":
                new = generator.sample(range(ROWS), generator.randint(1, 8))
                add(stores[who], new)
                own[who].update(new)
            elif operation == "commit":
                stores[who].commit()
                safe |= own[who]
            else:  # what a killed process had added since its last commit is gone
                if operation == "open":
                    stores[who].commit()
                    safe |= own[who]
                stores[who], own[who] = opened(folder), set()
                assert held(stores[who]) == safe
            assert own[who] <= held(stores[who]) <= own[who] | safe, "though its files may be merged and gone"
        assert held(opened(folder)) == safe
        assert len(files(folder)) <= 2, "many small files become one"


def fill(folder, seed, sink=None):
    """Add rows in a random order, commit by commit; tell the rows that are safe."""
    order = random.Random(seed).sample(range(ROWS), ROWS)
    store = opened(folder)
    while missing := [row for row in order if not store.holds(torch.tensor([row]))]:
        add(store, missing[:3])
        store.commit()
        if sink is not None:
            os.write(sink, bytes(missing[:3]))


@pytest.mark.usefixtures("merging")
@pytest.mark.parametrize("kills", [3, pytest.param(int(os.environ.get("KILLS", "12")), marks=pytest.mark.slow)])
def test_two_processes_of_which_one_is_killed_at_random_lose_what_was_not_committed(tmp_path, kills):
    generator, runs, begin = random.Random(0), 0, time.monotonic()
    fill(tmp_path / "timed", 0)
    seconds = time.monotonic() - begin
    while kills > 0:
        folder, safe, alive = tmp_path / str(runs), set(), True
        runs += 1
        while alive:
            source, sink = os.pipe()
            children = [forked(functools.partial(fill, folder, seed, sink)) for seed in (runs, kills)]
            os.close(sink)
            time.sleep(generator.uniform(0, seconds))
            os.kill(children[0], signal.SIGKILL)
            statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
            assert statuses[1] == 0 and statuses[0] in (0, -signal.SIGKILL)
            kills -= statuses[0] != 0
            with open(source, "rb") as file:
                safe |= set(file.read())
            alive = len(held(opened(folder))) < ROWS
            assert held(opened(folder)) >= safe
        assert not [name for name in files(folder) if not name.endswith((".safetensors", ".tmp"))]
