"""Archives from the net: a transfer that stops goes on where it stopped, wrong bytes are refused, and what is unpacked
is there whole or not at all.
"""

import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO
from urllib.parse import urljoin, urlsplit

import requests
import urllib3
from tqdm import tqdm

from mdistiller.errors import UserError
from mdistiller.files import sync_folder, write_atomic
from mdistiller.unpack import CHUNK, WrongBytes, chunks, unpack

TIMEOUT = (10.0, 60.0)  # seconds to connect, seconds without a byte
TRIES = 6  # requests in a row; one that brings something new is the first of a new row
BACKOFF, LONGEST_WAIT = 1.0, 60.0  # seconds; the wait doubles, and Retry-After is honoured up to the longest
REDIRECTS = 10


@dataclass(frozen=True)
class Archive:
    """What lies at `url` and unpacks to `folder`, by default in `home`.

    `files` {name in the folder: bytes} says what a complete folder holds. Without it the folder is shared with the
    user's own files, which stay as they are, and a manifest beside it says what came from the archive. Without `digest`
    (algorithm:hex) the first archive that unpacks pins its SHA-256.
    """

    url: str
    home: str
    folder: str
    size: int | None = None
    digest: str = ""
    files: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


_RELEASES = "https://github.com/megvii-research/mdistiller/releases/download/checkpoints"
_CIFAR = "https://www.cs.toronto.edu/~kriz"
_TEN = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
ARCHIVES = {
    "teachers": Archive(f"{_RELEASES}/cifar_teachers.tar", "download_ckpts", "cifar_teachers"),
    "cifar100": Archive(
        f"{_CIFAR}/cifar-100-binary.tar.gz", "data", "cifar-100-binary", 168_513_733,
        "md5:03b5dce01913d631647c71ecec9e9cb8", {"train.bin": 50_000 * 3074, "test.bin": 10_000 * 3074},
    ),
    "cifar10": Archive(
        f"{_CIFAR}/cifar-10-binary.tar.gz", "data", "cifar-10-batches-bin", 170_052_171,
        "sha256:c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd", dict.fromkeys(_TEN, 10_000 * 3073),
    ),
}  # fmt: skip


class _Again(Exception):
    """A request failed in a way that another may not; `wait` is what the server asked for, in seconds."""

    def __init__(self, reason: str, wait: float | None = None, reached: bool = True):
        super().__init__(reason)
        self.wait, self.reached = wait, reached


def fetch(name: str, root: str | Path | None = None, mirror: str = "", file: str | Path | None = None) -> Path:
    """ARCHIVES[name] unpacked in the folder `root` (its home by default); returns the unpacked folder.

    Does nothing where that is complete. `mirror` is another base URL, or the whole one; `file` an archive that was
    fetched elsewhere. Waits for another process that is at the same archive. Raises UserError, WrongBytes for the
    archive's own faults; what was there before stays as it was, and a part that has come stays for the next call.
    """
    job = _Job(name, root, mirror, file)
    new = [path for path in (job.root, *job.root.parents) if not path.exists()]
    try:
        if not job.part.exists() and _complete(job):  # a part beside it: a kill left things to remove
            return job.folder
        if job.file and not job.file.is_file():
            raise UserError(f"--from: there is no file {job.file}")
        job.root.mkdir(parents=True, exist_ok=True)
        with _held(job) as part:
            shutil.rmtree(job.stage, ignore_errors=True)
            if not _complete(job):
                try:
                    _install(job, part)
                except WrongBytes:
                    if not job.file:
                        part.truncate(0)
                    raise
                finally:
                    shutil.rmtree(job.stage, ignore_errors=True)
                _complete(job)
            part.truncate(0)
    except OSError as error:
        raise UserError(f"{error.filename or job.root}: {error.strerror or error}") from None
    finally:
        for path in new:
            with suppress(OSError):  # not empty: then it is wanted
                path.rmdir()
    return job.folder


class _Job:
    """One call of fetch: which archive, from where, and every path that it touches."""

    def __init__(self, name: str, root: str | Path | None, mirror: str, file: str | Path | None):
        self.archive = archive = ARCHIVES[name]
        self.root = Path(root or archive.home).expanduser()
        self.url = _address(archive, mirror)
        self.file = Path(file).expanduser() if file else None
        self.origin = self.file or self.url
        self.part = self.root / f"{archive.name}.part"
        self.note = self.root / f"{archive.name}.part.json"  # where the part came from: {url, validator, size}
        self.pin = self.root / f"{archive.name}.sha256"
        self.manifest = self.root / f"{archive.name}.json"  # {name: (bytes, SHA-256)}
        self.folder = Path(os.path.realpath(self.root / archive.folder))
        self.stage = self.folder.with_name(f".{self.folder.name}.unpacking")
        elsewhere = f" --to {shlex.quote(str(self.root))}" if self.root != Path(archive.home) else ""
        self.command = f"python3 tools/download.py {name}{elsewhere}"


def say(text: str) -> None:
    print(text, flush=True)


def _complete(job: _Job) -> bool:
    """Whether the folder holds what it should; says so, and which files of the user's stand in for the archive's."""
    own = job.archive.files
    try:
        files = own or {name: size for name, (size, _) in json.loads(job.manifest.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return False
    paths = {job.folder / name: size for name, size in files.items()}
    differ = [path for path, size in paths.items() if not (path.is_file() and path.stat().st_size == size)]
    if not files or any(own or not os.path.lexists(path) for path in differ):
        return False
    for path in differ:
        say(f"{path}: is not the archive's, and is kept; delete it and run this again for that one")
    say(f"{job.folder}: complete, {len(files)} files")
    return True


@contextmanager
def _held(job: _Job) -> Iterator[IO[bytes]]:
    """The partial file, open to append, held against other processes; removed in the end if it is empty then."""
    while True:
        with open(job.part, "a+b") as part:
            try:
                fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"{job.part}: another process is at it; waiting until that ends")
                fcntl.flock(part, fcntl.LOCK_EX)
            # the other process may have removed the file, so that this lock is on one that has no name any more
            with open(job.part, "ab") as named:
                if not os.path.sameopenfile(part.fileno(), named.fileno()):
                    continue
            try:
                yield part
            finally:
                if not part.seek(0, os.SEEK_END):
                    job.note.unlink(missing_ok=True)
                    job.part.unlink(missing_ok=True)
            return


def _install(job: _Job, part: IO[bytes]) -> None:
    """Get the archive, verify it, unpack it and put it where it belongs."""
    digest = _verify(job) if job.file else _download(job, part)
    path = job.file or job.part
    _room(job.root, sum(job.archive.files.values()) or path.stat().st_size)
    names = unpack(path, job.origin, job.archive.folder, job.stage)
    if not job.archive.digest:
        write_atomic(job.pin, f"{digest}  {job.archive.name}\n".encode())
        say(f"SHA-256 {digest}, pinned in {job.pin}")
    _place(job, names)
    if not job.archive.files:
        write_atomic(job.manifest, json.dumps(names, indent=1).encode() + b"\n")


def _verify(job: _Job) -> str:
    """The archive's digest in hex. Raises WrongBytes where it or the size is not the expected one."""
    path, size = job.file or job.part, job.archive.size
    if size and path.stat().st_size != size:
        raise WrongBytes(f"{job.origin}: {path.stat().st_size:,} bytes, expected {size:,}")
    expected, trust = job.archive.digest, ""
    if not expected and job.pin.exists():
        expected = "sha256:" + "".join(job.pin.read_text(errors="replace").split()[:1])
        trust = f", pinned in {job.pin}; delete that file if you trust the change"
    digest = hashlib.new(expected.partition(":")[0] or "sha256", usedforsecurity=False)
    with open(path, "rb") as file:
        for chunk in chunks(file):
            digest.update(chunk)
    found = f"{digest.name}:{digest.hexdigest()}"
    if expected not in ("", found):
        raise WrongBytes(f"{job.origin}: {found}, expected {expected}{trust}")
    return digest.hexdigest()


def _room(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise UserError(f"{folder}: takes {wanted:,} bytes, {free:,} are free; make room, or choose another folder")


def _place(job: _Job, names: Iterable[str]) -> None:
    """What is staged becomes the folder; where that is shared and exists, what it lacks of `names` is added."""
    staged, folder = job.stage / job.archive.folder, job.folder
    if job.archive.files and os.path.lexists(folder):
        aside = next(p for n in range(1, 10**6) if not os.path.lexists(p := folder.with_name(f"{folder.name}~{n}")))
        folder.rename(aside)
        say(f"{folder}: was not complete; it is kept as {aside.name}")
    if not folder.exists():
        staged.rename(folder)
    else:
        for name in names:
            if not os.path.lexists(folder / name):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (staged / name).rename(folder / name)
                sync_folder((folder / name).parent)
    sync_folder(folder.parent)


# The transfer


def _address(archive: Archive, mirror: str) -> str:
    """The archive's URL, or the mirror's. Raises UserError where that is no http or https URL."""
    url = mirror or archive.url
    with suppress(ValueError):  # what cannot be split is refused below
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and url.isprintable():
            return url if parts.path.endswith(f"/{archive.name}") else f"{url.rstrip('/')}/{archive.name}"
    raise UserError(f"--mirror: must be an http or https URL, got {url!r}; --from FILE takes a file")


class _Session(requests.Session):
    """Leaves redirections to _open: requests reads their bodies, however long, even where it is not to follow them."""

    def get_redirect_target(self, resp: requests.Response) -> None:
        return None


def _redirected(url: str, location: str) -> str:
    """Where a redirection leads. Raises UserError for a way out of http and https, or from https to http."""
    with suppress(ValueError):  # what cannot be split is refused below
        target = urljoin(url, location)
        schemes = urlsplit(url).scheme, urlsplit(target).scheme
        if schemes in (("http", "http"), ("http", "https"), ("https", "https")):
            return target
    raise UserError(f"{url}: redirects to {location!r}, which is less safe; --mirror URL names another place")


def _download(job: _Job, part: IO[bytes]) -> str:
    """Fill `part` with the archive; returns its digest. Wrong bytes are fetched once more, in one go: where a file
    changes on the server, what came in two goes may be a mixture.
    """
    for last in (False, True):
        try:
            _transfer(job, part)
            return _verify(job)
        except WrongBytes as error:
            part.truncate(0)
            if last:
                raise
            say(f"{error}; once more from the start")


def _transfer(job: _Job, part: IO[bytes]) -> None:
    """Append to `part` what it lacks, in as many requests as it takes. Raises UserError when nothing more comes."""
    first = furthest = part.seek(0, os.SEEK_END)
    failed = 0
    with _Session() as session:
        while True:
            try:
                return _request(session, job, part)
            except _Again as error:
                have = part.seek(0, os.SEEK_END)
                failed = failed + 1 if have <= furthest else 1
                furthest = max(furthest, have)
                # where nothing was ever reached there is no network, more likely than a hiccup
                if failed == TRIES or not error.reached and furthest == first:
                    raise UserError(*_unreachable(job, str(error))) from None
                wait = min(BACKOFF * 2 ** (failed - 1) if error.wait is None else error.wait, LONGEST_WAIT)
                say(f"{error}; trying again from byte {have:,} in {wait:.0f} s")
            time.sleep(wait)


def _unreachable(job: _Job, reason: str) -> list[str]:
    return [
        f"{job.url}: cannot be fetched ({reason}); do one of these:",
        f"  again    {job.command}   (goes on with what has come)",
        f"  proxy    HTTPS_PROXY=http://HOST:PORT {job.command}",
        f"  mirror   {job.command} --mirror URL",
        f"  by hand  fetch {job.url} on another machine, then {job.command} --from {job.archive.name}",
    ]


def _request(session: requests.Session, job: _Job, part: IO[bytes]) -> None:
    """One request for what `part` lacks. Raises _Again where another may bring more."""
    known, have = _known(job), part.seek(0, os.SEEK_END)
    size, validator = known.get("size"), known.get("validator")
    if have and have == size:
        return
    headers = {"Accept-Encoding": "identity"}
    if have and (validator or job.archive.digest):  # else a mixture of two files would pass for one
        headers["Range"] = f"bytes={have}-"
        if validator:
            headers["If-Range"] = validator
    try:
        with _open(session, job.url, headers) as response:
            if response.status_code == 200:
                size, have = _begin(job, part, response), 0
            else:
                (start, total), now = _span(response), _validator(response)
                changed = size and total and size != total or validator and now and validator != now
                complete = response.status_code == 416 and total == have
                if changed or not (complete or start == have):
                    part.truncate(0)
                    raise _Again("the file on the server is another one now")
                if complete:
                    return
                size = size or total
            _receive(response, job, part, have, size)
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        cause = (error.args or [None])[0]
        # MaxRetryError: no connection came about; ValueError: the URL or the proxy's is none
        unreached = isinstance(cause, urllib3.exceptions.MaxRetryError) or isinstance(error, ValueError)
        raise _Again(_reason(error), reached=not unreached) from None


def _known(job: _Job) -> dict:
    """{size, validator} of the partial file, as far as known; another server's say nothing."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        note = json.loads(job.note.read_text())
        if note["url"] == job.url:
            return note
    return {"size": job.archive.size}


def _begin(job: _Job, part: IO[bytes], response: requests.Response) -> int | None:
    """Empty `part` for a response that carries the whole file; returns the file's size. Raises UserError, with `part`
    as it was, where the response is about something else.
    """
    length, size = response.headers.get("Content-Length", ""), job.archive.size
    offered = int(length) if length.isdecimal() else None
    if "html" in response.headers.get("Content-Type", ""):  # a hotel's page, say
        raise UserError(f"{job.url}: the server sends a web page; --mirror URL names another place")
    if size and offered not in (None, size):
        raise UserError(f"{job.url}: the server has {offered:,} bytes, expected {size:,}; try --mirror URL")
    part.truncate(0)
    size = size or offered
    write_atomic(job.note, json.dumps({"url": job.url, "validator": _validator(response), "size": size}).encode())
    return size


def _reason(error: Exception) -> str:
    """What the innermost of nested network errors says."""
    while isinstance(inner := getattr(error, "reason", None) or (error.args or [None])[0], Exception):
        error = inner
    text = inner if isinstance(inner, str) else str(error) or type(error).__name__
    return re.sub(r"^\S*HTTPS?Connection.*?: ", "", text)


def _span(response: requests.Response) -> tuple[int | None, int | None]:
    """First byte and size of the whole file, from a 206's or a 416's Content-Range."""
    span = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", ""))
    return tuple(int(text) if text and text != "*" else None for text in span.groups()) if span else (None, None)


def _validator(response: requests.Response) -> str | None:
    """What If-Range takes: a strong ETag, else the date."""
    etag = response.headers.get("ETag", "W/")
    return response.headers.get("Last-Modified") if etag.startswith("W/") else etag


def _open(session: requests.Session, url: str, headers: dict[str, str]) -> requests.Response:
    """The answer: 200, or to a Range 206 or 416. Raises _Again for what may pass, UserError for what will not."""
    for _ in range(REDIRECTS):
        response = session.get(url, headers=headers, stream=True, timeout=TIMEOUT)
        if not response.is_redirect:
            break
        url = _redirected(url, response.headers["Location"])
        response.close()
    status = f"{response.status_code} {response.reason}"
    if response.status_code == 200 or response.status_code in (206, 416) and "Range" in headers:
        return response
    response.close()
    if response.status_code in (408, 429) or response.status_code >= 500:
        raise _Again(f"the server says {status}", urllib3.Retry().get_retry_after(response.raw))
    raise UserError(f"{url}: the server says {status}; --mirror URL names another place, --from FILE takes a file")


def _receive(response: requests.Response, job: _Job, part: IO[bytes], have: int, size: int | None) -> None:
    """Append the response's body to `part`, which holds `have` bytes of `size`."""
    if size:
        _room(job.root, size - have + (sum(job.archive.files.values()) or size))
    most = size or have + shutil.disk_usage(job.root).free
    to_come = f"{size - have:,} of {size:,}" if size else "an unknown number of"
    say(f"{job.archive.name}: {to_come} bytes to come from {urlsplit(response.url).hostname}")
    # disable=None: the bar is for terminals only
    with tqdm(total=size, initial=have, unit="B", unit_scale=True, leave=False, file=sys.stdout, disable=None) as bar:
        while chunk := response.raw.read(CHUNK, decode_content=False):
            have += len(chunk)
            if have > most:
                raise WrongBytes(f"{job.url}: the server sends more than the {most:,} bytes expected")
            part.write(chunk)
            bar.update(len(chunk))
    part.flush()
    if size and have < size:
        raise _Again(f"the connection ended after {have:,} of {size:,} bytes")
