"""A store of rows: whatever happens to its process or its files, no wrong row comes out of it."""

import contextlib
import errno
import fcntl
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mdistiller.bank import store as module
from mdistiller.bank.store import SEAL, RowStore, check_space, record_size, space_needed
from mdistiller.errors import DamagedFile, UserError

KILLS = int(os.environ.get("KILLS", "12"))  # of each kind
STRIDE = 5 if KILLS < 100 else 1  # bits from one flip to the next: in every byte or so, each of its bits in turn
DESCRIPTION = {"teacher": "resnet56", "sha256": "0123", "views": 162, "mean": [0.5, 0.25]}
ROWS, WIDTH = 12, 3  # of the small store
CHUNKS = ([3], [7, 0, 11], [1, 2], [10, 9, 8, 6])  # what it holds, add by add


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


def values_of(rows, width=WIDTH, dtype="float16"):
    """What row r holds: numbers that no other row has."""
    rows = np.asarray(rows, np.int64)
    return ((rows[:, None] * 7919 + np.arange(width) * 31 + 1) % 2039).astype(dtype)


def opened(folder, rows=ROWS, width=WIDTH, dtype="float16", description=DESCRIPTION):
    return RowStore(folder, description, rows, width, dtype)


def add(store, rows):
    store.add(np.array(rows, np.int64), values_of(rows, store.width, store.dtype))


def held(store):
    """The rows it holds, after a look at every one of them."""
    every = np.arange(store.rows)
    rows = np.setdiff1d(every, store.missing(every))
    found = store.read(rows)
    assert found.dtype == store.dtype and found.flags.c_contiguous and found.flags.writeable
    np.testing.assert_array_equal(found, values_of(rows, store.width, store.dtype))
    in_order = [row for rows, _ in store.chunks() for row in rows.tolist()]
    for part, values in store.chunks():
        np.testing.assert_array_equal(values, values_of(part, store.width, store.dtype))
    assert sorted(in_order) == rows.tolist() and store.filled == len(rows)
    assert store.complete == (len(rows) == store.rows)
    return rows.tolist()


def fill(store):
    add(store, store.missing(np.arange(store.rows)))
    store.commit()


def die(store):
    """What a kill leaves: all that was written, nothing that close would do."""
    store._release()


@pytest.fixture
def small(tmp_path):
    with opened(tmp_path / "store") as store:
        for rows in CHUNKS:
            add(store, rows)
    return tmp_path / "store"


def sound(folder, capsys, warned=None):
    """The rows that a damaged store still holds; it can be filled up and is whole then."""
    capsys.readouterr()
    with opened(folder) as store:
        rows = held(store)
        said = capsys.readouterr().out
        assert said.count("\n") == (warned if warned is not None else said.count("\n"))
        fill(store)
        assert held(store) == list(range(ROWS))
    with opened(folder) as store:
        assert held(store) == list(range(ROWS))
    assert capsys.readouterr().out == ""
    return rows


# the contract


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("width", [1, 2, 5, 100])
def test_what_was_added_is_read(tmp_path, monkeypatch, width, dtype):
    monkeypatch.setattr(module, "PIECE", 1000)  # adds, verification and chunks in several pieces
    order = np.random.default_rng(0).permutation(500)
    with opened(tmp_path / "a" / "b", 500, width, dtype) as store:
        assert (store.filled, store.complete, store.writable) == (0, False, True)
        assert held(store) == []
        for part in (order[:1], order[1:200], order[200:203]):
            add(store, part)
        assert held(store) == sorted(order[:203])
        np.testing.assert_array_equal(store.missing(order[200:206].repeat(2)), np.sort(order[203:206]))
    with opened(tmp_path / "a" / "b", 500, width, dtype) as store:
        assert held(store) == sorted(order[:203])
        fill(store)
        assert store.complete
        rows = np.array([4, 4, 499, 0])
        np.testing.assert_array_equal(store.read(rows), values_of(rows, width, dtype))
        assert store.read(rows[:0]).shape == (0, width)
    with opened(tmp_path / "a" / "b", 500, width, dtype) as store:
        assert held(store) == list(range(500))
        assert [row for rows, _ in store.chunks() for row in rows.tolist()][:203] == order[:203].tolist()
        assert max(values.nbytes for _, values in store.chunks()) <= 1000 + record_size(width, dtype)


def test_the_file_is_as_described(small):
    """Read back with nothing of the module."""
    header = json.loads((small / "header.json").read_text())
    seal = header.pop("crc32")
    assert seal == zlib.crc32(json.dumps(header, sort_keys=True).encode())
    assert header["description"] == DESCRIPTION
    data, size = (small / "rows.bin").read_bytes(), 4 + 8
    expected = b""
    for rows in CHUNKS:
        chunk = b"".join(struct.pack("<i3e2x", row + 1, *values_of([row])[0]) for row in rows)
        chunk += struct.pack("<i4x", SEAL)
        seal = zlib.crc32(chunk, seal)
        expected += chunk + struct.pack("<I", seal)
    assert data == expected and len(data) == size * (10 + len(CHUNKS))


def test_wrong_calls_are_refused(small):
    store = opened(small)
    for rows in ([-1], [ROWS], [0, -ROWS]):
        for call in (store.read, store.missing, lambda rows: store.add(rows, values_of(rows))):
            with pytest.raises(IndexError):
                call(np.array(rows))
    with pytest.raises(KeyError, match="1 of 2"):
        store.read(np.array([3, 4]))
    good = values_of([4, 5])
    for rows, values in (
        ([3, 4], good), ([4, 4], good), ([4], good), ([4, 5], good[:, :2]), ([4, 5], good.astype("float32")),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            store.add(np.array(rows), values)
    assert len(held(store)) == 10
    store.close()
    store.close()
    with pytest.raises(RuntimeError):
        add(store, [4])
    for rows, width, dtype in ((0, 1, "float16"), (1, 0, "float16"), (1, 1, "float64"), (1 << 31, 1, "float16")):
        with pytest.raises(ValueError):
            opened(small, rows, width, dtype)


def test_it_needs_no_torch():
    code = "import sys, mdistiller.bank.store; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "False"


def test_memory_holds_the_table_and_not_the_file(tmp_path):
    def anonymous():
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])

    if not os.path.exists("/proc/self/status"):
        pytest.skip("needs Linux")
    rows = np.arange(100_000)
    with opened(tmp_path / "store", 400_000, 100) as store:  # 82 MB
        for first in range(0, 400_000, 100_000):
            store.add(rows + first, np.zeros((100_000, 100), np.float16))
    before = anonymous()
    with opened(tmp_path / "store", 400_000, 100) as store:
        for _ in range(20):
            store.read(np.random.default_rng(0).integers(0, 400_000, 64))
        assert sum(len(part) for part, _ in store.chunks()) == 400_000
        assert anonymous() - before < 40_000


# headers, and folders that are none


CHANGES = {
    "rows": ({"rows": 13}, "rows 12, asked for is 13"),
    "width": ({"width": 4}, "width 3, asked for is 4"),
    "dtype": ({"dtype": "float32"}, 'dtype "float16", asked for is "float32"'),
    "text": ({"description": {**DESCRIPTION, "teacher": "x"}}, 'teacher "resnet56", asked for is "x"'),
    "kind": ({"description": {**DESCRIPTION, "views": 162.0}}, "views 162, asked for is 162.0"),
    "list": ({"description": {**DESCRIPTION, "mean": [0.5]}}, r"mean \[0.5, 0.25\], asked for is \[0.5\]"),
    "more": ({"description": {**DESCRIPTION, "new": 1}}, "new nothing, asked for is 1"),
    "fewer": ({"description": {"teacher": "resnet56"}}, 'sha256 "0123", asked for is nothing'),
}


def tree(folder):
    return {str(p): (p.lstat().st_mode, p.lstat().st_size, p.lstat().st_mtime_ns) for p in [folder, *folder.rglob("*")]}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("busy", [False, True])
def test_another_header_is_refused(small, name, busy):
    changes, says = CHANGES[name]
    before, first = tree(small), opened(small) if busy else None
    with pytest.raises(UserError, match=f"store: was made with {says}; remove that folder, or") as refused:
        opened(small, **changes)
    assert len(refused.value.lines) == 1 and "\n" not in str(refused.value)
    if first:
        first.close()
    assert tree(small) == before


def test_another_version_is_refused(small):
    header = json.loads((small / "header.json").read_text())
    (small / "header.json").write_text(json.dumps({**header, "format": 2, "new": None}))
    with pytest.raises(UserError, match="format 2, asked for is 1"):
        opened(small)


def test_the_order_of_a_description_does_not_matter(small):
    opened(small, description=dict(reversed(DESCRIPTION.items())) | {"mean": (0.5, 0.25)}).close()


FOREIGN = {
    "file": lambda folder: folder.write_bytes(b"x"),
    "below-a-file": lambda folder: folder.parent.joinpath("store").write_bytes(b"x"),
    "photos": lambda folder: (folder.mkdir(), (folder / "photo.jpg").touch()),
    "hidden": lambda folder: (folder.mkdir(), (folder / ".config.tmp").touch()),
    "rows-alone": lambda folder: (folder.mkdir(), (folder / "rows.bin").write_bytes(b"x" * 500)),
    "link-to-itself": lambda folder: folder.symlink_to("store"),
} | {
    f"header-{name}": lambda folder, data=data: (folder.mkdir(), (folder / "header.json").write_bytes(data))
    for name, data in {
        "empty": b"",
        "noise": bytes(range(256)),
        "number": b"5",
        "list": b"[]",
        "object": b"{}",
        "description": b'{"crc32": 1, "description": 5}',
        "deep": b"[" * 100_000,
        "digits": b"9" * 10_000,
        "long": b" " * (2 << 20),
    }.items()
} | {
    "header-folder": lambda folder: (folder / "header.json").mkdir(parents=True),
    "header-fifo": lambda folder: (folder.mkdir(), os.mkfifo(folder / "header.json")),
    "header-nowhere": lambda folder: (folder.mkdir(), (folder / "header.json").symlink_to("gone")),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_folder_is_refused_and_left_alone(tmp_path, name):
    FOREIGN[name](tmp_path / "store")
    before = tree(tmp_path)
    with pytest.raises(UserError, match="store") as refused:
        opened(tmp_path / "store" / ("below" if name == "below-a-file" else ""))
    assert len(refused.value.lines) == 1
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["a\0b", "a" * 300, "/proc/store"])
def test_a_folder_that_cannot_be_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="cannot be used"):
        opened(tmp_path / name)


@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_rows_that_are_no_file_are_refused(small, kind):
    (small / "rows.bin").unlink()
    make = {"fifo": os.mkfifo, "folder": os.mkdir, "device": lambda path: path.symlink_to("/dev/zero")}
    make[kind](small / "rows.bin")
    with pytest.raises(UserError):
        opened(small)


# damage


def test_truncated_at_every_byte(small, capsys):
    data = (small / "rows.bin").read_bytes()
    ends = np.cumsum([len(rows) + 1 for rows in CHUNKS]) * 12
    for length in range(len(data)):
        (small / "rows.bin").write_bytes(data[:length])
        whole = int(np.searchsorted(ends, length, "right"))
        cut = length not in (0, *ends)
        assert sound(small, capsys, warned=cut) == sorted(sum(CHUNKS[:whole], []))


def test_every_flipped_bit_of_the_rows_is_noticed(small, capsys):
    data = (small / "rows.bin").read_bytes()
    ends = np.cumsum([len(rows) + 1 for rows in CHUNKS]) * 12
    for bit in range(0, 8 * len(data), STRIDE):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        (small / "rows.bin").write_bytes(damaged)
        whole = int(np.searchsorted(ends, bit // 8, "right"))
        assert sound(small, capsys, warned=1) == sorted(sum(CHUNKS[:whole], [])), f"bit {bit}"


def test_every_flipped_bit_of_the_header_is_refused_or_means_nothing(small):
    data = (small / "header.json").read_bytes()
    refused = []
    for bit in range(0, 8 * len(data), STRIDE):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        (small / "header.json").write_bytes(damaged)
        try:
            with opened(small) as store:
                assert len(held(store)) == 10
        except UserError as error:
            refused.append(error.lines)
    assert all(len(lines) == 1 for lines in refused) and len(refused) > 6 * len(data) / STRIDE


def test_a_flip_that_makes_a_header_fit_another_store_is_refused(small):
    text = (small / "header.json").read_text()
    (small / "header.json").write_text(text.replace("resnet56", "resnet57"))
    with pytest.raises(DamagedFile, match="is damaged"):
        opened(small, description={**DESCRIPTION, "teacher": "resnet57"})


def test_rows_of_another_store_are_not_taken(small, tmp_path):
    with opened(tmp_path / "other", description={"teacher": "x"}) as other:
        add(other, [1, 2])
    shutil.copy(tmp_path / "other" / "rows.bin", small / "rows.bin")
    with opened(small) as store:
        assert held(store) == []


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.randoms(use_true_random=False))
def test_damage_of_any_kind_gives_no_wrong_row(small, generator):
    """Blocks zeroed, swapped, repeated, taken out or filled with noise, anywhere."""
    whole = {path: path.read_bytes() for path in (small / "rows.bin",)}
    path, data = small / "rows.bin", bytearray(whole[small / "rows.bin"])
    for _ in range(generator.randint(1, 3)):
        size = generator.choice((4, 12, 24, 60))
        a, b = (generator.randrange(0, len(data) // 4 + 1) * 4 for _ in "ab")
        kind = generator.choice(("zero", "swap", "repeat", "remove", "noise", "append"))
        if kind == "zero":
            data[a : a + size] = bytes(len(data[a : a + size]))
        elif kind == "swap":
            data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]
        elif kind == "repeat":
            data[a:a] = data[b : b + size]
        elif kind == "remove":
            del data[a : a + size]
        elif kind == "noise":
            data[a : a + size] = generator.randbytes(size)
        else:
            data += whole[path] + generator.randbytes(size)
    path.write_bytes(data)
    with opened(small) as store:
        held(store)
        fill(store)
        assert len(held(store)) == ROWS
    path.write_bytes(whole[path])


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["add"] * 5 + ["commit", "reopen", "kill", "power", "full", "sync"]), st.integers(0, 2**32 - 1)
    ),
    max_size=25,
)


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(OPERATIONS)
def test_any_history_agrees_with_a_set(operations):
    """`there`: what is held; `safe`: what a power loss leaves at least."""
    rows, width = 40, 5
    there, safe = set(), set()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder) / "store"
        path = folder / "rows.bin"
        store = opened(folder, rows, width)
        size = 0  # of what is safe
        for name, seed in operations:
            generator = random.Random(seed)
            new = generator.sample(sorted(set(range(rows)) - there), generator.randint(0, min(8, rows - len(there))))
            if name == "add":
                add(store, new)
                there.update(new)
            elif name == "commit":
                store.commit()
            elif name == "reopen":
                store.close()
                store = opened(folder, rows, width)
            elif name == "kill":  # the kernel has the last add, or a part of it
                add(store, new)
                there.update(new)
                before = path.stat().st_size
                die(store)
                if new and generator.random() < 0.7:
                    os.truncate(path, before - generator.randint(1, 16 * (len(new) + 1)))
                    there.difference_update(new)
                store = opened(folder, rows, width)
            elif name == "power":  # pages reach the disk in any order, or not at all
                die(store)
                tail = bytearray(path.read_bytes()[size:])
                for first in range(0, len(tail), 64):
                    if generator.random() < 0.3:
                        tail[first : first + 64] = bytes(len(tail[first : first + 64]))
                path.write_bytes(path.read_bytes()[:size] + tail[: generator.randint(0, len(tail))])
                store = opened(folder, rows, width)
                left = set(held(store))
                assert safe <= left <= there
                there = left
            elif name == "full" and new:
                room = generator.randrange(16 * (len(new) + 1))
                with disk_of(path, path.stat().st_size + room), pytest.raises(OSError, match="No space"):
                    add(store, new)
            elif name == "sync" and there > safe:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(os, "fsync", failing(errno.EIO))
                    with pytest.raises(OSError, match="Input/output"):
                        store.commit()
                there = set(safe)
            if name in ("commit", "reopen", "kill", "power"):  # an opened store is as safe as what it was opened from
                if name in ("commit", "reopen"):
                    safe = set(there)
                    size = path.stat().st_size
                else:
                    store.commit()
                    store._committed, store._committed_seal = store._end, store._seal
                    safe, size = set(there), path.stat().st_size
            assert set(held(store)) == there
        store.close()


@contextlib.contextmanager
def disk_of(path, size):
    """A disk on which the file at `path` can have `size` bytes."""

    def pwrite(file, data, offset):
        room = size - offset
        if room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(file, data[:room], offset)

    original = os.pwrite
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        yield


def failing(number):
    def call(*_arguments, **_keywords):
        raise OSError(number, os.strerror(number))

    return call


# a disk that is full, or fails


def test_a_full_disk_costs_the_add_that_met_it(small):
    path, store = small / "rows.bin", opened(small)
    size = path.stat().st_size
    for room in range(2 * 12 + 12):
        with disk_of(path, size + room), pytest.raises(OSError, match="No space"):
            add(store, [4, 5])
        assert len(held(store)) == 10 and path.stat().st_size == size
    with disk_of(path, size + 24):
        add(store, [5])
        with pytest.raises(OSError, match="No space"):
            add(store, [4])
    store.commit()
    die(store)
    with opened(small) as store:
        assert held(store) == [r for r in range(ROWS) if r != 4]
        fill(store)


def test_a_cut_that_fails_as_well_leaves_nothing_wrong(small, monkeypatch, capsys):
    path, store = small / "rows.bin", opened(small)
    size = path.stat().st_size
    monkeypatch.setattr(os, "ftruncate", failing(errno.EIO))
    with disk_of(path, size + 30), pytest.raises(OSError):
        add(store, [4, 5])
    assert path.stat().st_size == size + 30 and len(held(store)) == 10
    add(store, [5])
    die(store)
    monkeypatch.undo()
    assert 5 in sound(small, capsys, warned=1)


def test_a_big_add_on_a_full_disk_keeps_what_it_can(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 120)
    with opened(tmp_path / "store", 100) as store:
        with disk_of(tmp_path / "store" / "rows.bin", 600), pytest.raises(OSError):
            add(store, range(100))
        assert held(store) == list(range(44))
        fill(store)
    with opened(tmp_path / "store", 100) as store:
        assert store.complete


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_failed_sync_takes_back_what_it_was_for(small, monkeypatch, number):
    store = opened(small)
    add(store, [5])
    store.commit()
    add(store, [4])
    held(store)
    monkeypatch.setattr(os, "fsync", failing(number))
    with pytest.raises(OSError):
        store.commit()
    assert held(store) == [r for r in range(ROWS) if r != 4]
    add(store, [4])
    with pytest.raises(OSError):
        store.close()
    monkeypatch.undo()
    with opened(small) as store:
        assert store.writable and 5 in held(store)
        fill(store)


@pytest.mark.parametrize("name", ["fsync", "replace", "open"])
def test_a_store_that_cannot_be_made_on_a_full_disk(tmp_path, monkeypatch, name):
    monkeypatch.setattr(os, name, failing(errno.ENOSPC))
    with pytest.raises(OSError, match="No space"):
        opened(tmp_path / "store")
    monkeypatch.undo()
    with opened(tmp_path / "store") as store:
        fill(store)


def test_a_limit_on_the_files_size(tmp_path):
    """What the kernel does, not a stand-in for os.pwrite."""

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        store = opened(tmp_path / "store", 1000)
        for first in range(0, 1000, 10):
            try:
                add(store, range(first, first + 10))
            except OSError:
                break
        store.commit()
        assert held(store) == list(range(70))
        with pytest.raises(OSError):
            add(store, range(500, 600))
        add(store, [70])
        assert held(store) == list(range(71))

    assert waited(forked(work)) == 0
    with opened(tmp_path / "store", 1000) as store:
        assert held(store) == list(range(71))


def test_the_space_that_is_needed(small, tmp_path, monkeypatch):
    wanted = (8_100_000, 100, "float16")
    assert space_needed(tmp_path / "a" / "b", *wanted) == 8_100_000 * 204
    assert space_needed(small, 100, WIDTH, "float16") == 100 * 12 - 14 * 12
    usage = shutil.disk_usage(tmp_path)
    asked = []

    def disk(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: (asked.append(path), usage._replace(free=free))[1])

    disk(1_735_020_000)
    check_space(tmp_path / "a" / "b", *wanted)
    assert asked == [tmp_path]
    disk(1_735_019_999)
    with pytest.raises(UserError, match=r"b: needs 1.74 GB of disk space, and .* has 1.74 GB free; choose .* or turn"):
        check_space(tmp_path / "a" / "b", *wanted)
    disk(0)
    with pytest.raises(UserError, match=r"needs 1.08 kB .* has 0 bytes free"):
        check_space(small, 100, WIDTH, "float16")
    with opened(small) as store:
        fill(store)
    check_space(small, ROWS, WIDTH, "float16")
    assert not (tmp_path / "a").exists()


# two processes, and folders that may only be read


def forked(work) -> int:
    """Run `work()` in a forked child with its output thrown away; returns the child's process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        nowhere = open(os.devnull, "w")  # noqa: SIM115
        sys.stdout = sys.stderr = nowhere
        work()
        status = 0
    finally:
        os._exit(status)


def waited(child) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_the_second_process_reads(small, capsys):
    ours, theirs = os.pipe(), os.pipe()

    def work():
        store = opened(small)
        os.write(ours[1], b"x")
        os.read(theirs[0], 1)
        add(store, [4])
        os.write(ours[1], b"x")
        time.sleep(20)

    child = forked(work)
    os.read(ours[0], 1)
    reader = opened(small)
    assert not reader.writable and len(held(reader)) == 10
    with pytest.raises(RuntimeError, match="another process adds"):
        add(reader, [5])
    os.write(theirs[1], b"x")
    os.read(ours[0], 1)
    assert len(held(reader)) == 10, "what came after it opened is not there"
    with opened(small) as later:
        assert not later.writable and len(held(later)) == 11
    reader.commit()
    os.kill(child, signal.SIGKILL)
    waited(child)
    with opened(small) as writer:
        assert writer.writable
        fill(writer)
        assert len(held(reader)) == 10
    reader.close()
    assert capsys.readouterr().out == ""


def test_one_that_is_in_the_making_is_empty_to_others(tmp_path):
    (tmp_path / "store").mkdir()
    with open(tmp_path / "store" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with opened(tmp_path / "store") as store:
            assert not store.writable and held(store) == [] and not list(store.chunks())
        assert os.listdir(tmp_path / "store") == [".lock"]
    with opened(tmp_path / "store") as store:
        fill(store)


def test_who_holds_a_store_says_what_for(small):
    with opened(small) as first:
        assert (first.busy, first.holder) == (False, "")
        first.announce("lazy")
        with opened(small) as second:
            second.announce("full")
            assert (second.busy, second.holder) == (True, "lazy")
    with opened(small), opened(small) as second:
        assert (second.busy, second.holder) == (True, ""), "what the holder before it said is forgotten"


def test_a_forgotten_store_gives_the_lock_back(small):
    store = opened(small)
    del store
    with opened(small) as store:
        assert store.writable
    with pytest.raises(UserError):
        opened(small, 13)
    with opened(small) as store:
        assert store.writable


def test_a_child_that_lives_on_does_not_keep_the_lock(small):
    store = opened(small)
    child = forked(lambda: time.sleep(20))
    store.close()
    with opened(small) as store:
        assert store.writable
    os.kill(child, signal.SIGKILL)
    waited(child)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.ENOLCK])
def test_where_nothing_can_be_written_a_store_can_be_read(small, monkeypatch, capsys, number):
    original = os.open

    def readonly(path, flags, *mode, **keywords):
        if flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT):
            raise OSError(number, os.strerror(number))
        return original(path, flags, *mode, **keywords)

    with open(small / "rows.bin", "ab") as file:
        file.write(b"x" * 100)
    if number == errno.ENOLCK:
        monkeypatch.setattr(fcntl, "flock", failing(number))
    else:
        monkeypatch.setattr(os, "open", readonly)
    before = tree(small)
    with opened(small) as store:
        assert not store.writable and len(held(store)) == 10
        with pytest.raises(RuntimeError):
            add(store, [4])
    assert tree(small) == before
    assert "store: 10 rows are good; the 100 bytes behind them" in capsys.readouterr().out
    with pytest.raises(UserError, match="rows 12, asked for is 13"):
        opened(small, 13)


def test_permissions(small, tmp_path, monkeypatch):
    """Of a folder and files that another user made: readable, not writable; then not even readable."""
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o555)  # the folders above it need not be open to the stranger

    def as_stranger(work):
        def change():
            if os.getuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            work()

        return waited(forked(change))

    def reads():
        store = opened(Path("store"))
        assert not store.writable and len(held(store)) == 10

    def refused(path):
        with pytest.raises(UserError, match=r"Permission denied"):
            opened(Path(path))

    (small / "rows.bin").chmod(0o444)
    for mode in (0o444, 0o000):
        (small / ".lock").chmod(mode)
        for folder in (0o555, 0o777):
            small.chmod(folder)
            assert as_stranger(reads) == 0
    assert as_stranger(lambda: refused("new")) == 0
    (small / "rows.bin").chmod(0o000)
    assert as_stranger(lambda: refused("store")) == 0
    (small / "rows.bin").chmod(0o444)
    (small / "header.json").chmod(0o000)
    assert as_stranger(lambda: refused("store")) == 0
    small.chmod(0o000)
    assert as_stranger(lambda: refused("store")) == 0
    small.chmod(0o755)
    tmp_path.chmod(0o755)


def test_a_file_that_is_changed_beneath_its_reader(small):
    data = (small / "rows.bin").read_bytes()
    everything = np.array(sum(CHUNKS, []))
    for damaged in (b"", data[:-1], data[12:] + data[:12], bytes(len(data))):
        (small / "rows.bin").write_bytes(data)
        store = opened(small)
        for mapped in (False, True):
            with open(small / "rows.bin", "r+b") as file:  # the same file, not another one under its name
                file.write(damaged)
                file.truncate()
            with pytest.raises(DamagedFile, match="changed by somebody else"):
                store.read(everything)
            with open(small / "rows.bin", "r+b") as file:
                file.write(data)
            if not mapped:
                held(store)
        die(store)


# kills


def history(folder, generator, report=lambda *_: None):
    """Fill a store of 300 rows in random parts; `report(rows, bytes)` after every commit."""
    with opened(folder, 300, 20) as store:
        while not store.complete:
            left = store.missing(np.arange(300))
            add(store, generator.choice(left, min(len(left), int(generator.integers(1, 60))), replace=False))
            if generator.random() < 0.3:
                store.commit()
                report(store.filled, os.stat(folder / "rows.bin").st_size)


def tell(sink, rows, size):
    os.write(sink, struct.pack("<qq", rows, size))


@pytest.mark.parametrize("power", [False, True], ids=["kill", "power"])
def test_kill_9_at_random_moments(tmp_path, power):
    """What was committed is there, and all that is there is right; `power` takes pages behind the last commit away."""
    generator, kills, runs = np.random.default_rng(0), 0, 0
    begin = time.monotonic()
    assert waited(forked(lambda: history(tmp_path / "timed", generator))) == 0
    seconds = time.monotonic() - begin
    while kills < KILLS:
        folder, safe, size, alive = tmp_path / f"store-{runs}", 0, 0, True
        runs += 1
        while alive and kills < KILLS:  # on a machine that has become slow none may ever come to its end
            source, sink = os.pipe()
            seed = int(generator.integers(1 << 30))

            def work(folder=folder, sink=sink, seed=seed):
                history(folder, np.random.default_rng(seed), partial(tell, sink))

            child = forked(work)
            time.sleep(generator.uniform(0, seconds))
            os.kill(child, signal.SIGKILL)  # it may have ended, and is not waited for yet
            status = waited(child)
            assert status in (0, -signal.SIGKILL), "a child failed"
            alive = status != 0
            kills += alive
            os.close(sink)
            with open(source, "rb") as file:
                said = list(struct.iter_unpack("<qq", file.read()))
            safe, size = said[-1] if said else (safe, size)
            path = folder / "rows.bin"
            if power and alive and path.exists():
                tail = bytearray(path.read_bytes()[size:])
                for first in range(0, len(tail), 512):
                    if generator.random() < 0.5:
                        tail[first : first + 512] = bytes(len(tail[first : first + 512]))
                path.write_bytes(path.read_bytes()[:size] + tail)
            with opened(folder, 300, 20) as store:
                assert store.writable and store.filled >= safe
                held(store)
                safe, size = store.filled, path.stat().st_size
        shutil.rmtree(folder)
    print(f"{kills} kills, {runs} stores, 0 wrong rows")


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_a_kill_at_any_file_operation(tmp_path, existing):
    """A child dies at its nth one, for n over all that there are; the next process goes on."""

    def work(folder):
        with opened(folder / "deep" / "store") as store:
            for rows in ([4], [5, 0]) if existing else ([4], [5], [0]):
                add(store, rows)
                store.commit()

    def dies_at(number, folder):
        count = 0

        def dying(function):
            def call(*arguments, **keywords):
                nonlocal count
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **keywords)

            return call

        names = ("open", "fsync", "replace", "mkdir", "unlink", "pwrite", "ftruncate", "close")
        for name in names:
            setattr(os, name, dying(getattr(os, name)))  # in the child alone
        work(folder)

    number, kills, status = 0, 0, -signal.SIGKILL
    while status == -signal.SIGKILL:
        number += 1
        folder = tmp_path / str(number)
        if existing:
            with opened(folder / "deep" / "store") as store:
                add(store, [1, 2])
            with open(folder / "deep" / "store" / "rows.bin", "ab") as file:
                file.write(b"x" * 50)
        status = waited(forked(lambda number=number, folder=folder: dies_at(number, folder)))
        kills += status != 0
        with opened(folder / "deep" / "store") as store:
            assert store.writable
            assert set(held(store)) >= ({1, 2} if existing else set())
            fill(store)
        with opened(folder / "deep" / "store") as store:
            assert store.complete
        assert sorted(os.listdir(folder / "deep" / "store")) == [".lock", "header.json", "rows.bin"]
    assert status == 0 and kills > (8 if existing else 12)
