"""Files that others made are opened only if they are files; ours appear whole; one process at a time holds a lock."""

import os

import pytest
from helpers import forked, killed, refused

from mdistiller.errors import UserError
from mdistiller.files import FileLock, expand, is_locked, open_regular, write_atomic

NOT_FILES = {
    "missing": lambda path: None,
    "directory": lambda path: path.mkdir(),
    "fifo": os.mkfifo,
    "link to nowhere": lambda path: path.symlink_to("gone"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "larger than the memory": lambda path: (path.touch(), os.truncate(path, 2**42)),
    "unreadable": lambda path: path.touch(0),
}


@pytest.mark.parametrize("kind", NOT_FILES)
def test_what_is_no_file_is_refused_at_once(tmp_path, kind):
    if kind == "unreadable" and os.geteuid() == 0:
        pytest.skip("root reads everything")
    NOT_FILES[kind](tmp_path / "x")
    with refused(r"/x: "):
        open_regular(tmp_path / "x", "a checkpoint")


@pytest.mark.parametrize("name", ["a\0b", "a\nb", "a" * 5000])
def test_a_name_that_is_none_is_refused_in_one_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with refused("pass a checkpoint") as caught:
        open_regular(name, "a checkpoint")
    assert str(caught.value).isprintable()


def test_a_file_is_opened(tmp_path):
    (tmp_path / "x").write_bytes(b"data")
    (tmp_path / "link").symlink_to("x")
    with open_regular(tmp_path / "link", "a checkpoint") as file:
        assert file.read() == b"data"


def test_an_unknown_home_is_refused():
    with pytest.raises(UserError, match="no such user"):
        expand("~nosuchuser/x")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "x"
    write_atomic(file, b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomic(file, b"new")
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_lock_is_held_once_and_names_its_holder(tmp_path):
    assert not is_locked(tmp_path / "lock")
    lock = FileLock(tmp_path / "lock")
    assert is_locked(tmp_path / "lock")
    with pytest.raises(BlockingIOError) as caught:
        FileLock(tmp_path / "lock")
    assert caught.value.strerror.startswith(f"process {os.getpid()} on ")
    lock.close()
    assert not is_locked(tmp_path / "lock")
    FileLock(tmp_path / "lock").close()


def test_a_lock_whose_file_was_removed_is_taken_anew(tmp_path):
    path = tmp_path / "lock"
    first = FileLock(path)
    path.rename(tmp_path / "moved")
    second = FileLock(path)
    assert is_locked(path)
    first.close()
    assert is_locked(path)
    second.close()


def test_a_lock_is_waited_for_and_ends_with_its_process(tmp_path):
    path = tmp_path / "lock"
    read, write = os.pipe()

    def hold_and_die():
        FileLock(path)
        os.write(write, b"x")
        os.kill(os.getpid(), 9)

    child = forked(hold_and_die)
    os.read(read, 1)
    FileLock(path, wait=True).close()
    assert killed(child)
