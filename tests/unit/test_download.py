"""Downloads from a real server on this machine, whose manners each test sets."""

import hashlib
import tarfile
import threading
from dataclasses import replace

import helpers
import numpy as np
import pytest
from helpers import tree, wait_for
from webserver import FILES, NAME, TEACHERS, tar

from mdistiller import download
from mdistiller.dataset import load_dataset
from mdistiller.download import fetch


@pytest.fixture
def small_cifar(server, monkeypatch):
    """cifar100 with four records a file, of the published names; the server has it."""
    records = np.random.RandomState(0).randint(0, 20, (4, 3074)).astype(np.uint8).tobytes()
    sizes = dict.fromkeys(("train.bin", "test.bin"), len(records))
    server.body = tar(((f"cifar-100-binary/{name}", records) for name in sizes), "w:gz")
    digest = f"md5:{hashlib.md5(server.body).hexdigest()}"
    real, url = download.ARCHIVES["cifar100"], f"{server.url}/cifar-100-binary.tar.gz"
    small = replace(real, url=url, size=len(server.body), digest=digest, files=sizes)
    monkeypatch.setitem(download.ARCHIVES, "cifar100", small)


def check_teachers(root):
    """All has come, and nothing else is there."""
    found = tree(root)
    pinned = found.pop(f"{NAME}.sha256").decode()
    assert {name: data for name, data in found.items() if data is not None} == FILES
    digests = {NAME: TEACHERS, **FILES}
    assert sorted(pinned.splitlines()) == sorted(f"{hashlib.sha256(d).hexdigest()}  {n}" for n, d in digests.items())
    assert not list(root.glob("*.part")) and not list(root.glob(".*"))


def refused(says, *words, **named):
    """fetch raises a UserError of one line that says so."""
    with helpers.refused(says) as caught:
        fetch(*words, **named)
    return str(caught.value)


def test_what_is_complete_is_not_fetched_again(tmp_path, server):
    assert fetch("teachers", tmp_path / "x", server.url) == tmp_path / "x" / "cifar_teachers"
    check_teachers(tmp_path / "x")
    fetch("teachers", tmp_path / "x", f"{server.url}/{NAME}")
    assert [request["path"] for request in server.log] == [f"/{NAME}"]


@pytest.mark.parametrize("how", [{}, {"reset": True}, {"stall": True}])
def test_a_broken_transfer_goes_on_where_it_broke(tmp_path, server, how):
    server.plan = [{"cut": 150_000} | how]
    refused("type it again", "teachers", tmp_path, server.url)
    fetch("teachers", tmp_path, server.url)
    check_teachers(tmp_path)
    assert server.log[1]["If-Range"] == '"one"'
    start = int(server.log[1]["Range"][6:-1])
    assert start > (0 if how.get("reset") else 100_000)  # a reset may take what lies in the kernel with it
    assert server.sent[1] == len(TEACHERS) - start


@pytest.mark.parametrize("how", ["the file changed", "the server knows no ranges"])
def test_what_cannot_go_on_begins_anew(tmp_path, server, how):
    server.plan = [{"cut": 150_000}, {"ignore_range": how != "the file changed"}]
    if how == "the file changed":
        server.plan[0]["headers"] = {"ETag": '"other"'}
    refused("type it again", "teachers", tmp_path, server.url)
    fetch("teachers", tmp_path, server.url)
    check_teachers(tmp_path)
    assert server.sent == [150_000, len(TEACHERS)]


def test_what_has_come_is_unpacked_when_there_is_room_again(tmp_path, server, monkeypatch):
    with monkeypatch.context() as patch:
        full = OSError(28, "No space left on device")
        patch.setattr(tarfile.TarFile, "extractall", lambda *_, **__: (_ for _ in ()).throw(full))
        refused("No space left on device; mend that", "teachers", tmp_path, server.url)
    assert {name for name, data in tree(tmp_path).items() if data} == {f"{NAME}.part/archive", f"{NAME}.part/etag"}
    fetch("teachers", tmp_path, server.url)
    check_teachers(tmp_path)
    assert server.sent == [len(TEACHERS), 0]


@pytest.mark.parametrize("status", [403, 404, 503])
def test_a_server_that_has_nothing_leaves_nothing(tmp_path, server, status):
    server.plan = [{"status": status}]
    refused(f"{status}.*--mirror.*--from", "teachers", tmp_path / "x" / "y", server.url)
    assert not tree(tmp_path)


@pytest.mark.parametrize("url", ["file:///x", "ftp://a/b", "nothing", "http://", "http://[::1", "http://127.0.0.1:9"])
def test_a_mirror_that_is_none_leaves_nothing(tmp_path, server, url):
    refused("--mirror", "teachers", tmp_path / "x", url)
    assert not tree(tmp_path)


def test_a_pin_holds_and_what_is_missing_is_added(tmp_path, server):
    fetch("teachers", tmp_path, server.url)
    own, gone = (tmp_path / name for name in FILES)
    own.write_bytes(b"mine")
    gone.unlink()
    before = tree(tmp_path)
    server.body = TEACHERS[:-1024] + b"x" * 1024
    says = refused("delete .* if you trust the change", "teachers", tmp_path, server.url)
    assert hashlib.sha256(server.body).hexdigest() in says and hashlib.sha256(TEACHERS).hexdigest() in says
    assert tree(tmp_path) == before
    server.body = TEACHERS
    fetch("teachers", tmp_path, server.url)
    assert (own.read_bytes(), gone.read_bytes()) == (b"mine", FILES[str(gone.relative_to(tmp_path))])


def test_a_file_fetched_elsewhere(tmp_path):
    (tmp_path / "my.tar").write_bytes(TEACHERS)
    fetch("teachers", tmp_path / "x", file=tmp_path / "my.tar")
    check_teachers(tmp_path / "x")
    refused("expected md5:03b5dce0", "cifar100", tmp_path / "y", file=tmp_path / "my.tar")
    refused("there is no file", "cifar10", tmp_path / "y", file=tmp_path / "gone.tar")
    assert {path.name for path in tmp_path.iterdir()} == {"my.tar", "x"}


def test_a_proxy_is_used(tmp_path, server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", server.url)
    monkeypatch.setenv("NO_PROXY", "")
    fetch("teachers", tmp_path, "http://archive.invalid/here")
    assert [request["path"] for request in server.log] == [f"http://archive.invalid/here/{NAME}"]


def test_two_at_once_make_one_request(tmp_path, server, monkeypatch, capsys):
    monkeypatch.setattr(download, "TIMEOUT", (60, 60))
    server.plan = [{"gate": (gate := threading.Event())}]
    both = [threading.Thread(target=fetch, args=("teachers", tmp_path, server.url)) for _ in range(2)]
    both[0].start()
    wait_for(lambda: server.log)
    both[1].start()
    wait_for(lambda: "waiting for another process" in capsys.readouterr().out)
    gate.set()
    for thread in both:
        thread.join()
    assert len(server.log) == 1
    check_teachers(tmp_path)


def test_cifar_is_fetched_when_training_needs_it(tmp_path, small_cifar, server):
    for _ in range(2):
        assert len(load_dataset("cifar100", tmp_path / "data").train_labels) == 4
    assert len(server.log) == 1
    whole = tree(tmp_path)
    assert whole.keys() == {"data", *(f"data/cifar-100-binary{name}" for name in ("", "/train.bin", "/test.bin"))}
    (tmp_path / "data/cifar-100-binary/test.bin").write_bytes(b"damaged")
    fetch("cifar100", tmp_path / "data")
    assert tree(tmp_path) == whole


@pytest.mark.parametrize("change", ["a bit", "the size"])
def test_other_bytes_than_the_published_are_refused(tmp_path, small_cifar, server, change):
    server.body = bytes([server.body[0] ^ 1]) + server.body[1:] if change == "a bit" else server.body + b"x"
    refused("expected", "cifar100", tmp_path / "x")
    assert not tree(tmp_path)


GOOD = ("cifar_teachers/a.pth", b"weights")
BAD = {
    "leads outside": lambda: tar([GOOD, ("../outside", b"x")]),
    "links outside": lambda: tar([GOOD, ("cifar_teachers/l", b"", {"type": tarfile.SYMTYPE, "linkname": "../../x"})]),
    "holds a device": lambda: tar([GOOD, ("cifar_teachers/d", b"", {"type": tarfile.CHRTYPE})]),
    "holds another folder": lambda: tar([("somewhere/a.pth", b"x")]),
    "is cut": lambda: TEACHERS[:100_000],
    "is a web page": lambda: b"<html>" * 1000,
}


@pytest.mark.parametrize("kind", BAD)
def test_an_archive_that_leaves_no_trace(tmp_path, server, kind):
    server.body = BAD[kind]()
    (tmp_path / "evil.tar").write_bytes(server.body)
    before = tree(tmp_path)
    assert "evil.tar" in refused("evil.tar", "teachers", tmp_path / "x", file=tmp_path / "evil.tar")
    refused("cannot be unpacked|holds no whole folder", "teachers", tmp_path / "x", server.url)
    assert tree(tmp_path) == before


def test_a_python_that_cannot_unpack_safely_says_so(tmp_path, monkeypatch):
    monkeypatch.delattr(tarfile, "data_filter")
    refused("3.10.12", "teachers", tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    refused("file.*: Not a directory|File exists", "teachers", tmp_path / "file" / "x")
