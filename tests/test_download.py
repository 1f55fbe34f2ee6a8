"""Downloads against a real server on this machine, whose manners each test sets; archives from an enemy."""

import contextlib
import errno
import fcntl
import gzip
import hashlib
import io
import json
import os
import pty
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import termios
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import requests
from helpers import ROOT, tool

from mdistiller import download, unpack
from mdistiller.dataset import load_dataset
from mdistiller.download import Archive, WrongBytes, fetch
from mdistiller.errors import UserError

TOOL = [sys.executable, str(ROOT / "tools" / "download.py")]
NAME = "cifar_teachers.tar"
RANDOM = random.Random(0)  # the same in every worker, as sizes stand in the names of tests
WEIGHTS = {f"cifar_teachers/{m}_vanilla/ckpt_epoch_240.pth": RANDOM.randbytes(150_000) for m in ("resnet56", "vgg13")}


def member(name, data=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def tar(members, mode="w", **options):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode, **options) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


TEACHERS = tar(member(name, data) for name, data in WEIGHTS.items())


class Server(ThreadingHTTPServer):
    """Serves `body` under any name ending in .tar or .tar.gz; `plan` holds one keyword set per request to come."""

    daemon_threads = True

    def __init__(self, body=b""):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.plan, self.log, self.sent, self.etag, self.always = body, [], [], [], '"one"', {}
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def handle_error(self, request, address):
        pass  # clients that go away are part of the tests


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *words):
        pass

    def do_GET(self):
        server = self.server
        server.log.append((self.path, dict(self.headers)))
        how = server.always | (server.plan.pop(0) if server.plan else {})
        body, first = how.get("body", server.body), 0
        status = how.get("status", 200)
        headers = {"ETag": server.etag} if server.etag else {}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        unchanged = self.headers.get("If-Range", server.etag) == server.etag or how.get("ignore_if_range")
        if status == 200 and asked and unchanged and not how.get("ignore_range"):
            first = int(asked[1])
            status = 206 if first < len(body) else 416
            headers["Content-Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
            if status == 416:
                headers["Content-Range"] = f"bytes */{len(body)}"
        rest = body[first:] if status in (200, 206) else b""
        headers["Content-Length"] = str(len(rest) + how.get("lie", 0))
        self.send_response(status)
        for key, value in (headers | how.get("headers", {})).items():
            if value is not None:
                self.send_header(key, value)
        self.end_headers()
        rest = rest[: how.get("cut", len(rest))]
        if "gate" in how:
            how["gate"].wait(60)
        pace = how.get("pace")
        for at in range(0, len(rest), pace or len(rest) or 1):
            self.wfile.write(rest[at : at + (pace or len(rest))])
            time.sleep(0.03 if pace else 0)
        server.sent.append(len(rest))
        if how.get("stall"):
            time.sleep(1)
        if how.get("reset"):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.close_connection = True


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download, "BACKOFF", 0.01)
    monkeypatch.setattr(download, "TIMEOUT", (2, 0.3))
    server = Server(TEACHERS)
    yield server
    server.shutdown()
    server.server_close()


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def files(folder):
    return {name: data for name, data in tree(folder).items() if data is not None}


def check_teachers(root):
    sha = hashlib.sha256(TEACHERS).hexdigest()
    assert files(root).keys() == {*WEIGHTS, f"{NAME}.sha256", f"{NAME}.json"}
    assert all((root / name).read_bytes() == data for name, data in WEIGHTS.items())
    assert (root / f"{NAME}.sha256").read_text() == f"{sha}  {NAME}\n"
    assert {p.stat().st_mode & 0o111 for p in root.rglob("*") if p.is_file()} == {0}


def run(root, server, *words, **options):
    return subprocess.run(
        [*TOOL, "teachers", "--to", root, "--mirror", server.url, *words], capture_output=True, text=True, **options
    )


def refused(call, says):
    """`call` raises a UserError of one line that says so."""
    with pytest.raises(UserError, match=says) as caught:
        call()
    assert len(caught.value.lines) == 1
    assert "\n" not in str(caught.value)
    return caught.value


def test_the_command(tmp_path, server):
    done = run(tmp_path / "x", server)
    assert (done.returncode, done.stderr) == (0, "")
    assert hashlib.sha256(TEACHERS).hexdigest() in done.stdout
    assert "\r" not in done.stdout
    check_teachers(tmp_path / "x")
    listed = json.loads((tmp_path / "x" / f"{NAME}.json").read_text())
    assert listed["vgg13_vanilla/ckpt_epoch_240.pth"][0] == 150_000
    again = run(tmp_path / "x", server)
    assert again.returncode == 0
    assert "complete, 2 files" in again.stdout
    assert [path for path, _ in server.log] == [f"/{NAME}"], "the second call makes no request"


def test_a_bar_on_a_terminal(tmp_path, server):
    server.plan = [{"pace": 20_000}]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with subprocess.Popen([*TOOL, "teachers", "--to", tmp_path, "--mirror", server.url], stdout=theirs) as process:
        os.close(theirs)
        seen = b""
        with contextlib.suppress(OSError):  # the terminal's end
            while data := os.read(ours, 4096):
                seen += data
    os.close(ours)
    assert process.returncode == 0
    assert re.search(rb"\d+%.*\[\d\d:\d\d<\d\d:\d\d,", seen), "time gone < time left"


@pytest.mark.parametrize("how", [{"cut": 100_000}, {"cut": 100_000, "reset": True}, {"cut": 100_000, "stall": True}])
def test_a_broken_transfer_goes_on_where_it_broke(tmp_path, server, how):
    server.plan = [how, how]
    fetch("teachers", tmp_path, server.url)
    check_teachers(tmp_path)
    starts = [int(headers.get("Range", "bytes=0-")[6:-1]) for _, headers in server.log]
    assert starts == sorted(starts) and starts[0] == 0
    assert starts[-1] > (0 if how.get("reset") else 60_000)  # a reset may take what lies in the kernel with it
    assert all(headers["If-Range"] == '"one"' for _, headers in server.log if "Range" in headers)
    assert server.sent[-1] == len(TEACHERS) - starts[-1], "only the rest is sent"


def test_ever_new_progress_is_never_too_many_tries(tmp_path, server, monkeypatch):
    monkeypatch.setattr(download, "TRIES", 3)
    server.plan = [{"cut": 30_000}] * 9
    fetch("teachers", tmp_path, server.url)
    check_teachers(tmp_path)


def test_no_progress_is_too_many_tries(tmp_path, server):
    server.always = {"ignore_range": True, "cut": 100_000}
    with pytest.raises(UserError, match="cannot be fetched"):
        fetch("teachers", tmp_path, server.url)
    assert len(server.log) == download.TRIES
    server.always = {}
    fetch("teachers", tmp_path, server.url)
    assert server.sent[-1] == len(TEACHERS) - 100_000, "the part was kept"


def test_a_server_that_ignores_ranges(tmp_path, server):
    server.plan = [{"cut": 100_000}, {"ignore_range": True}]
    fetch("teachers", tmp_path, server.url)
    check_teachers(tmp_path)
    assert server.sent == [100_000, len(TEACHERS)]


@pytest.mark.parametrize("how", [{}, {"ignore_if_range": True}])
def test_a_file_that_changes_between_requests_is_not_spliced(tmp_path, server, how):
    old = bytes(len(TEACHERS))
    server.plan = [{"body": old, "cut": 100_000, "headers": {"ETag": '"old"'}}, how]
    fetch("teachers", tmp_path, server.url)
    check_teachers(tmp_path)
    assert server.log[1][1]["If-Range"] == '"old"'


def test_without_a_validator_nothing_unverifiable_is_spliced(tmp_path, server):
    server.etag = None
    server.plan = [{"cut": 100_000}]
    fetch("teachers", tmp_path, server.url)
    assert ["Range" in headers for _, headers in server.log] == [False, False]
    check_teachers(tmp_path)


def test_the_date_validates_where_the_tag_is_weak(tmp_path, server):
    date = "Wed, 01 May 2024 00:00:00 GMT"
    server.etag = None
    server.always = {"headers": {"ETag": 'W/"x"', "Last-Modified": date}, "ignore_if_range": True}
    server.plan = [{"cut": 100_000}]
    fetch("teachers", tmp_path, server.url)
    assert server.log[1][1]["If-Range"] == date
    assert server.sent[1] == len(TEACHERS) - 100_000


@pytest.mark.parametrize("size", [len(TEACHERS), len(TEACHERS) + 10])
def test_nothing_left_to_send(tmp_path, server, size):
    """A part as long as the file, of unknown size, is the file; a longer one is not."""
    (tmp_path / f"{NAME}.part").write_bytes((TEACHERS + bytes(10))[:size])
    note = {"url": f"{server.url}/{NAME}", "validator": '"one"', "size": None}
    (tmp_path / f"{NAME}.part.json").write_text(json.dumps(note))
    fetch("teachers", tmp_path, server.url)
    check_teachers(tmp_path)
    assert server.sent == ([0] if size == len(TEACHERS) else [0, len(TEACHERS)])


@pytest.mark.parametrize(("after", "low", "high"), [("0.2", 0, 0.15), ("1", 0.9, 3), ("9999", 0.2, 1.0)])
def test_a_busy_server_is_asked_again_when_it_says(tmp_path, server, monkeypatch, after, low, high):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr(download, "LONGEST_WAIT", 0.3 if after == "9999" else 60)
    server.plan = [{"status": 503, "headers": {"Retry-After": after}}, {"status": 429}, {"status": 500}]
    fetch("teachers", tmp_path, server.url)
    check_teachers(tmp_path)
    mine = [wait for wait in waits if wait]
    assert low <= mine[0] <= high
    assert mine[1:3] == [0.02, 0.04]


@pytest.mark.parametrize("status", [404, 403, 410])
def test_what_is_not_there_is_refused_at_once(tmp_path, server, status):
    server.always = {"status": status}
    refused(lambda: fetch("teachers", tmp_path / "x", server.url), f"{status}.*--mirror")
    assert len(server.log) == 1
    assert not (tmp_path / "x").exists()


def test_a_redirect_is_followed(tmp_path, server):
    server.plan = [{"status": 302, "headers": {"Location": "/elsewhere/x.tar"}}]
    fetch("teachers", tmp_path, f"{server.url}/{NAME}")
    check_teachers(tmp_path)
    assert [path for path, _ in server.log] == [f"/{NAME}", "/elsewhere/x.tar"]


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://[::1"])
def test_a_redirect_out_of_http_is_refused(tmp_path, server, location):
    server.plan = [{"status": 302, "headers": {"Location": location}}]
    refused(lambda: fetch("teachers", tmp_path, server.url), "less safe")


def test_a_redirect_to_nowhere_new_ends(tmp_path, server):
    server.always = {"status": 302, "headers": {"Location": "/loop"}}
    refused(lambda: fetch("teachers", tmp_path, server.url), "302")
    assert len(server.log) == download.REDIRECTS


def test_https_never_becomes_http():
    assert download._redirected("https://a/x", "/y") == "https://a/y"
    assert download._redirected("http://a/x", "https://b/y") == "https://b/y"
    refused(lambda: download._redirected("https://a/x", "http://a/x"), "less safe")


@pytest.mark.parametrize("url", ["file:///x", "ftp://a/b", "nothing", "http://", "http://[::1"])
def test_a_mirror_is_http(tmp_path, url):
    refused(lambda: fetch("teachers", tmp_path, url), "--mirror")
    assert download._address(download.ARCHIVES["teachers"], "http://a/b/") == f"http://a/b/{NAME}"


def test_the_length_lies(tmp_path, server):
    server.always = {"lie": 1000, "ignore_range": True}
    with pytest.raises(UserError, match="cannot be fetched"):
        fetch("teachers", tmp_path / "long", server.url)
    server.always = {"lie": -1000}  # the client reads no further; the archive lacks its end
    server.body = TEACHERS.rstrip(b"\0")
    refused(lambda: fetch("teachers", tmp_path / "short", server.url), "cannot be unpacked")
    assert not (tmp_path / "short").exists()


def test_no_room_is_said_first(tmp_path, server, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    refused(lambda: fetch("teachers", tmp_path, server.url), "1,000 are free")
    assert not list(tmp_path.iterdir())


def test_a_web_page_in_between_costs_no_part(tmp_path, server):
    server.plan = [{"cut": 100_000}, {"body": b"<html>log in</html>", "headers": {"Content-Type": "text/html"}}]
    server.plan[1]["ignore_range"] = True
    refused(lambda: fetch("teachers", tmp_path, server.url), "a web page")
    fetch("teachers", tmp_path, server.url)
    assert server.sent[-1] == len(TEACHERS) - 100_000


def test_a_pin_holds(tmp_path, server):
    fetch("teachers", tmp_path, server.url)
    victim = tmp_path / "cifar_teachers" / "vgg13_vanilla" / "ckpt_epoch_240.pth"
    victim.unlink()
    before = tree(tmp_path)
    server.body, server.log[:] = TEACHERS[:-1024] + b"x" * 1024, []
    error = refused(lambda: fetch("teachers", tmp_path, server.url), "delete that file if you trust the change")
    assert hashlib.sha256(server.body).hexdigest() in str(error)
    assert hashlib.sha256(TEACHERS).hexdigest() in str(error)
    assert len(server.log) == 2, "wrong bytes are fetched once more"
    assert tree(tmp_path) == before
    (tmp_path / f"{NAME}.sha256").unlink()
    fetch("teachers", tmp_path, server.url)
    assert victim.is_file()


def test_the_users_own_files_stay(tmp_path, server, capsys):
    own = tmp_path / "cifar_teachers" / "vgg13_vanilla" / "ckpt_epoch_240.pth"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"mine")
    (own.parent / "notes.txt").write_text("mine too")
    fetch("teachers", tmp_path, server.url)
    assert (own.read_bytes(), (own.parent / "notes.txt").read_text()) == (b"mine", "mine too")
    other = "cifar_teachers/resnet56_vanilla/ckpt_epoch_240.pth"
    assert (tmp_path / other).read_bytes() == WEIGHTS[other]
    assert f"{own}: is not the archive's, and is kept" in capsys.readouterr().out
    fetch("teachers", tmp_path, server.url)
    assert len(server.log) == 1


def test_a_file_fetched_elsewhere(tmp_path):
    (tmp_path / "my.tar").write_bytes(TEACHERS)
    done = tool("download", "teachers", "--from", "my.tar", "--to", "x", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    check_teachers(tmp_path / "x")
    assert (tmp_path / "my.tar").read_bytes() == TEACHERS
    done = tool("download", "cifar100", "--from", "my.tar", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "expected 168,513,733" in done.stderr
    done = tool("download", "cifar10", "--from", "gone.tar", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "error: --from: there is no file gone.tar\n")
    assert {p.name for p in tmp_path.iterdir()} == {"my.tar", "x"}


def test_offline_says_what_to_do(tmp_path):
    env = os.environ | {"HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "NO_PROXY": ""}
    done = subprocess.run([*TOOL, "teachers"], capture_output=True, text=True, cwd=tmp_path, env=env, timeout=20)
    assert done.returncode == 2
    assert all(line.startswith("error: ") for line in done.stderr.splitlines())
    for words in (download.ARCHIVES["teachers"].url, f"--from {NAME}", "HTTPS_PROXY", "--mirror"):
        assert words in done.stderr
    assert not list(tmp_path.iterdir())


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_download_goes_on(tmp_path, server, number):
    server.plan = [{"pace": 10_000}]
    command = [*TOOL, "teachers", "--to", str(tmp_path), "--mirror", server.url]
    victim = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    part = tmp_path / f"{NAME}.part"
    wait_for(lambda: part.exists() and part.stat().st_size > 60_000)
    victim.send_signal(number)
    _, errors = victim.communicate()
    if number == signal.SIGINT:
        assert victim.returncode == 130
        assert "goes on from there" in errors and errors.count("\n") == 1
    have = part.stat().st_size
    assert 0 < have < len(TEACHERS)
    stage = tmp_path / ".cifar_teachers.unpacking"  # as a kill during the unpacking would leave it
    stage.mkdir()
    (stage / "half").write_bytes(b"x")
    fetch("teachers", tmp_path, server.url)
    check_teachers(tmp_path)
    assert not stage.exists()
    assert server.sent[-1] == len(TEACHERS) - have


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_interrupted_unpacking_leaves_the_archive_and_no_half_folder(tmp_path, server, monkeypatch, error):
    write = unpack._write

    def once(source, target):
        if "vgg13" in str(target):
            raise error
        return write(source, target)

    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, UserError)):
        patch.setattr(unpack, "_write", once)
        fetch("teachers", tmp_path, server.url)
    assert files(tmp_path).keys() == {f"{NAME}.part", f"{NAME}.part.json"}
    fetch("teachers", tmp_path, server.url)
    assert len(server.log) == 1, "what has come is not fetched again"
    check_teachers(tmp_path)


def test_leftovers_of_a_kill_after_the_last_step_go(tmp_path, server):
    fetch("teachers", tmp_path, server.url)
    for name in ("cifar_teachers.tar.part", "cifar_teachers.tar.part.json", ".cifar_teachers.unpacking/half"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    fetch("teachers", tmp_path, server.url)
    assert len(server.log) == 1
    check_teachers(tmp_path)
    assert not (tmp_path / ".cifar_teachers.unpacking").exists()


def test_two_at_once(tmp_path, server, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", (60, 60))
    server.plan = [{"gate": threading.Event()}]
    gate = server.plan[0]["gate"]
    first = threading.Thread(target=fetch, args=("teachers", tmp_path, server.url))
    first.start()
    wait_for(lambda: server.log)
    command = [*TOOL, "teachers", "--to", str(tmp_path), "--mirror", server.url]
    second = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "waiting" in second.stdout.readline()
    gate.set()
    first.join()
    said, errors = second.communicate(timeout=60)
    assert (second.returncode, errors) == (0, "")
    assert "complete, 2 files" in said
    assert len(server.log) == 1
    check_teachers(tmp_path)


class Proxy(Handler):
    def do_GET(self):
        self.server.log.append((self.path, dict(self.headers)))
        with requests.Session() as session:
            session.trust_env = False
            answer = session.get(self.path.replace("archive.invalid", self.server.upstream))
        self.send_response(answer.status_code)
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content)


def test_a_proxy_is_used(tmp_path, server, monkeypatch):
    proxy = Server()
    proxy.RequestHandlerClass, proxy.upstream = Proxy, server.url.removeprefix("http://")
    monkeypatch.setenv("HTTP_PROXY", proxy.url)
    monkeypatch.setenv("NO_PROXY", "")
    fetch("teachers", tmp_path, "http://archive.invalid/here")
    proxy.shutdown()
    proxy.server_close()
    check_teachers(tmp_path)
    assert [path for path, _ in proxy.log] == [f"http://archive.invalid/here/{NAME}"]


@pytest.fixture
def tiny_cifar(monkeypatch):
    """cifar100 with four records a file, pinned."""
    records = np.random.RandomState(0).randint(0, 20, (4, 3074)).astype(np.uint8).tobytes()
    names = ("train.bin", "test.bin")
    body = tar((member(f"cifar-100-binary/{name}", records, mode=0o755) for name in names), "w:gz")
    real = download.ARCHIVES["cifar100"]
    digest = "md5:" + hashlib.md5(body).hexdigest()
    archive = Archive(real.url, real.home, real.folder, len(body), digest, dict.fromkeys(names, len(records)))
    monkeypatch.setitem(download.ARCHIVES, "cifar100", archive)
    return body


def test_cifar_is_fetched_when_training_needs_it(tmp_path, server, monkeypatch, tiny_cifar):
    server.body = tiny_cifar
    moved = Archive(**{**vars(download.ARCHIVES["cifar100"]), "url": f"{server.url}/cifar-100-binary.tar.gz"})
    monkeypatch.setitem(download.ARCHIVES, "cifar100", moved)
    assert len(load_dataset("cifar100", tmp_path / "data").train_labels) == 4
    load_dataset("cifar100", tmp_path / "data")
    assert len(server.log) == 1
    assert files(tmp_path / "data").keys() == {"cifar-100-binary/train.bin", "cifar-100-binary/test.bin"}


def test_the_python_version_is_read_where_it_lies(tmp_path):
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python" / "train").write_bytes(b"not the pickle")
    refused(lambda: load_dataset("cifar100", tmp_path), "download.py cifar100 --to")


def test_an_incomplete_cifar_is_moved_aside(tmp_path, server, tiny_cifar, capsys):
    server.body = tiny_cifar
    old = tmp_path / "cifar-100-binary"
    old.mkdir()
    (old / "test.bin").write_bytes(b"half")
    server.plan = [{"status": 404}]
    refused(lambda: fetch("cifar100", tmp_path, server.url), "404")
    assert files(tmp_path) == {"cifar-100-binary/test.bin": b"half"}
    fetch("cifar100", tmp_path, server.url)
    assert (tmp_path / "cifar-100-binary~1" / "test.bin").read_bytes() == b"half"
    assert "is kept as cifar-100-binary~1" in capsys.readouterr().out


def test_wrong_bytes_after_a_splice_are_fetched_afresh(tmp_path, server, tiny_cifar):
    """A pinned archive resumes without a validator: its digest tells."""
    server.body, server.etag = tiny_cifar, None
    part = tmp_path / "cifar-100-binary.tar.gz.part"
    part.write_bytes(b"x" * 1000)
    fetch("cifar100", tmp_path, server.url)
    assert server.sent == [len(tiny_cifar) - 1000, len(tiny_cifar)]
    assert files(tmp_path).keys() == {"cifar-100-binary/train.bin", "cifar-100-binary/test.bin"}


def test_a_pinned_archive_goes_on_from_another_server(tmp_path, server, tiny_cifar):
    server.body, server.plan = tiny_cifar, [{"cut": 1000, "headers": {"ETag": '"of one"'}}, {"status": 404}]
    refused(lambda: fetch("cifar100", tmp_path, server.url), "404")
    fetch("cifar100", tmp_path, f"{server.url}/another")
    assert server.sent[-1] == len(tiny_cifar) - 1000
    assert "If-Range" not in server.log[-1][1]


@pytest.mark.parametrize("flip", [True, False])
def test_wrong_bytes_are_refused(tmp_path, server, tiny_cifar, flip):
    server.body = bytes([tiny_cifar[0] ^ 1]) + tiny_cifar[1:] if flip else tiny_cifar + b"x"
    error = refused(lambda: fetch("cifar100", tmp_path / "x", server.url), "expected")
    assert not flip or hashlib.md5(tiny_cifar).hexdigest() in str(error)
    assert not (tmp_path / "x").exists()


def test_more_than_was_declared_is_not_taken(tmp_path, server, tiny_cifar):
    part = tmp_path / "cifar-100-binary.tar.gz.part"
    part.write_bytes(tiny_cifar[:1000])
    server.always = {"headers": {"Content-Range": f"bytes 1000-{len(tiny_cifar) - 1}/{len(tiny_cifar)}"}, "status": 206}
    server.always["body"] = b"x" * (len(tiny_cifar) + 5000)
    with pytest.raises(UserError):
        fetch("cifar100", tmp_path, server.url)
    assert not list(tmp_path.iterdir())


INSIDE = "cifar_teachers/a.pth"
GOOD = member(INSIDE, b"weights")
LINKS = {"symlink": tarfile.SYMTYPE, "hardlink": tarfile.LNKTYPE}


def link(name, to, kind):
    return member(name, type=LINKS[kind], linkname=to)


def raw_header(name=INSIDE, size=b"00000000007", kind=b"0"):
    """A header as an enemy writes it, its checksum right."""
    head = name.encode().ljust(100, b"\0") + b"0000644\0" * 3 + size.ljust(12, b"\0") + b"00000000000\0"
    head += b" " * 8 + kind + bytes(100) + b"ustar\x0000"
    head = head.ljust(512, b"\0")
    return head[:148] + b"%06o\0 " % sum(head) + head[156:]


def hostile():
    """name: archive, built when asked for."""
    packed = gzip.compress(TEACHERS)
    cases = {
        "traversal": lambda: tar([GOOD, member("../x", b"x")]),
        "inner traversal": lambda: tar([member("cifar_teachers/../../x", b"x")]),
        "dots": lambda: tar([member("..", type=tarfile.DIRTYPE)]),
        "absolute": lambda: tar([member("/mdistiller-escaped", b"x")]),
        "symlink": lambda: tar([GOOD, link("cifar_teachers/l", "../../x", "symlink")]),
        "hardlink": lambda: tar([GOOD, link("cifar_teachers/l", INSIDE, "hardlink")]),
        "through a link": lambda: tar(
            [link("cifar_teachers/l", "../..", "symlink"), member("cifar_teachers/l/x", b"x")]
        ),
        "device": lambda: tar([member("cifar_teachers/d", type=tarfile.CHRTYPE, devmajor=1, devminor=3)]),
        "block device": lambda: tar([member("cifar_teachers/d", type=tarfile.BLKTYPE)]),
        "fifo": lambda: tar([member("cifar_teachers/f", type=tarfile.FIFOTYPE)]),
        "unknown type": lambda: tar([member("cifar_teachers/f", type=b"Z")]),
        "duplicate": lambda: tar([GOOD, member(INSIDE, b"other")]),
        "duplicate in disguise": lambda: tar([GOOD, member("./cifar_teachers//a.pth", b"other")]),
        "file as folder": lambda: tar([GOOD, member(f"{INSIDE}/x", b"x")]),
        "folder as file": lambda: tar([member(f"{INSIDE}/x", b"x"), GOOD]),
        "no name": lambda: tar([GOOD, member("", b"x")]),
        "bomb": lambda: gzip.compress(tar([member(INSIDE, bytes(2**25))]), 1),
        "bomb behind the end": lambda: gzip.compress(tar([GOOD]) + bytes(2**25), 1),
        "bomb in a header": lambda: tar([member(INSIDE, pax_headers={"comment": "x" * 2**20})]),
        "sparse": lambda: tar([member(INSIDE, pax_headers={"GNU.sparse.map": "0,0", "GNU.sparse.size": str(2**40)})]),
        "no tar": lambda: os.urandom(5000),
        "web page": lambda: b"<html>" * 1000,
        "empty": lambda: b"",
        "zeros": lambda: bytes(10240),
        "newline": lambda: tar([GOOD, member("cifar_teachers/a\nerror: b", b"x")]),
        "escape code": lambda: tar([GOOD, member("cifar_teachers/\x1b[2J", b"x")]),
        "not UTF-8": lambda: tar([GOOD, member("cifar_teachers/\udcff", b"x")], errors="surrogateescape",
                                 format=tarfile.GNU_FORMAT),
        "long name": lambda: tar([GOOD, member("cifar_teachers/" + "n" * 300, b"x")]),
        "deep": lambda: tar([member("cifar_teachers/" + "d/" * 3000 + "x", b"x")]),
        "too many": lambda: tar(member(f"cifar_teachers/{i}") for i in range(200)),
        "another folder": lambda: tar([member("somewhere/a.pth", b"x")]),
        "damaged header": lambda: tar([GOOD]).rstrip(b"\0").ljust(1024, b"\0") + b"x" * 512 + tar([GOOD]),
        "negative size": lambda: raw_header(size=b"\xff" * 12) + bytes(2048),
        "huge size": lambda: raw_header(size=b"77777777777") + bytes(2048),
        "headers without end": lambda: (raw_header(kind=b"x", size=b"0") * 3000) + bytes(1024),
        "damaged gzip": lambda: packed[:1000] + b"\0\0\0\0" + packed[1004:],
        "wrong gzip checksum": lambda: packed[:-8] + b"1234" + packed[-4:],
        "rubbish behind gzip": lambda: packed + b"rubbish",
    }  # fmt: skip
    first = 512 + 150_016  # where the second member begins
    for at in (1, 100, 512, 513, 5000, first - 1, first, first + 100, first + 512, first + 150_016 + 512 + 300):
        cases[f"cut at {at}"] = lambda at=at: TEACHERS[:at]
    for at in (2, 12, 1000, len(packed) // 2, len(packed) - 9, len(packed) - 4, len(packed) - 1):
        cases[f"gzip cut at {at}"] = lambda at=at: packed[:at]
    return cases


HOSTILE = hostile()


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archives_leave_no_trace(tmp_path, monkeypatch, capsys, case):
    monkeypatch.setattr("mdistiller.unpack.MEMBERS", 100)
    (tmp_path / "evil.tar").write_bytes(HOSTILE[case]())
    kept = tmp_path / "to" / "cifar_teachers" / "own.pth"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"own")
    before = tree(tmp_path)
    most = watch_disk(tmp_path, monkeypatch)
    error = refused(lambda: fetch("teachers", tmp_path / "to", file=tmp_path / "evil.tar"), "evil.tar")
    assert isinstance(error, WrongBytes)
    assert str(error).isprintable()
    assert capsys.readouterr().out == ""
    assert tree(tmp_path) == before
    assert not os.path.lexists("/mdistiller-escaped")
    assert sum(most) <= 2 * len(before["evil.tar"]) + 2**20


def watch_disk(folder, monkeypatch):
    """Sizes of the files that unpacking writes, all of which must lie in its own folder."""
    sizes, write = [], unpack._write

    def watched(source, target):
        assert folder / "to" / ".cifar_teachers.unpacking" in target.resolve().parents
        sizes.append(0)
        try:
            return write(source, target)
        finally:
            sizes[-1] = target.stat().st_size

    monkeypatch.setattr(unpack, "_write", watched)
    return sizes


def test_a_hostile_archive_from_the_net_leaves_no_part(tmp_path, server):
    server.body = HOSTILE["symlink"]()
    done = run(tmp_path / "x", server)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert not (tmp_path / "x").exists()
