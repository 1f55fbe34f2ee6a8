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
from collections.abc import Iterator
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
    archive = ARCHIVES[name]
    root = Path(root or archive.home).expanduser()
    folder = Path(os.path.realpath(root / archive.folder))
    part, stage = root / f"{archive.name}.part", folder.with_name(f".{folder.name}.unpacking")
    pin, manifest = root / f"{archive.name}.sha256", root / f"{archive.name}.json"
    url = _address(archive, mirror)
    new = [path for path in (root, *root.parents) if not path.exists()]
    try:
        if not part.exists() and _complete(archive, folder, manifest):  # a part beside it: a kill left things to remove
            return folder
        if file and not Path(file).is_file():
            raise UserError(f"--from: there is no file {file}")
        root.mkdir(parents=True, exist_ok=True)
        with _held(part) as partial:
            shutil.rmtree(stage, ignore_errors=True)
            if not _complete(archive, folder, manifest):
                try:
                    found = _verify(Path(file), file, archive, pin) if file else _download(name, url, partial, pin)
                    _room(root, sum(archive.files.values()) or _size(Path(file or part)))
                    names = unpack(Path(file or part), file or url, archive.folder, stage)
                    if not archive.digest:
                        write_atomic(pin, f"{found}  {archive.name}\n".encode())
                        say(f"SHA-256 {found}, pinned in {pin}")
                    _place(archive, stage / archive.folder, folder, names)
                    if not archive.files:
                        write_atomic(manifest, json.dumps(names, indent=1).encode() + b"\n")
                except WrongBytes:
                    if not file:
                        partial.truncate(0)
                    raise
                finally:
                    shutil.rmtree(stage, ignore_errors=True)
                _complete(archive, folder, manifest)
            partial.truncate(0)
    except OSError as error:
        raise UserError(f"{error.filename or root}: {error.strerror or error}") from None
    finally:
        for path in new:
            with suppress(OSError):  # not empty: then it is wanted
                path.rmdir()
    return folder


def say(text: str) -> None:
    print(text, flush=True)


def _complete(archive: Archive, folder: Path, manifest: Path) -> bool:
    """Whether the folder holds what it should; says so, and which files of the user's stand in for the archive's."""
    try:
        files = archive.files or {name: size for name, (size, _) in json.loads(manifest.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return False
    differ = [name for name, size in files.items() if not ((folder / name).is_file() and _size(folder / name) == size)]
    if not files or any(archive.files or not os.path.lexists(folder / name) for name in differ):
        return False
    for name in differ:
        say(f"{folder / name}: is not the archive's, and is kept; delete it and run this again for that one")
    say(f"{folder}: complete, {len(files)} files")
    return True


def _size(path: Path) -> int:
    return path.stat().st_size


@contextmanager
def _held(part: Path) -> Iterator[IO[bytes]]:
    """The partial file, open to append, held against other processes; removed in the end if it is empty then."""
    while True:
        with open(part, "a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"{part}: another process is at it; waiting until that ends")
                fcntl.flock(file, fcntl.LOCK_EX)
            # the other process may have removed the file, so that this lock is on one that has no name any more
            if not (part.exists() and os.path.samestat(os.fstat(file.fileno()), part.stat())):
                continue
            try:
                yield file
            finally:
                if not file.seek(0, os.SEEK_END):
                    _note(part).unlink(missing_ok=True)
                    part.unlink(missing_ok=True)
            return


def _note(part: Path) -> Path:
    """Where the partial file came from: {url, validator, size}."""
    return part.with_name(f"{part.name}.json")


def _verify(path: Path, origin: str | Path, archive: Archive, pin: Path) -> str:
    """The file's digest in hex. Raises WrongBytes where it or the size is not the expected one."""
    if archive.size and _size(path) != archive.size:
        raise WrongBytes(f"{origin}: {_size(path):,} bytes, expected {archive.size:,}")
    pinned = pin.read_text(errors="replace").split() if not archive.digest and pin.exists() else []
    algorithm, _, expected = (archive.digest or f"sha256:{''.join(pinned[:1])}").partition(":")
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        for chunk in chunks(file):
            digest.update(chunk)
    if expected not in ("", digest.hexdigest()):
        trust = f", pinned in {pin}; delete that file if you trust the change" if pinned else ""
        raise WrongBytes(f"{origin}: {algorithm} {digest.hexdigest()}, expected {expected}{trust}")
    return digest.hexdigest()


def _room(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise UserError(
            f"{folder}: {wanted:,} bytes are needed and {free:,} are free; make room, or choose another folder"
        )


def _place(archive: Archive, staged: Path, folder: Path, names: dict) -> None:
    """`staged` becomes `folder`; where that is shared and exists, what it lacks of `names` is added."""
    if archive.files and os.path.lexists(folder):
        aside = next(p for n in range(1, 10**6) if not (p := folder.with_name(f"{folder.name}~{n}")).exists())
        folder.rename(aside)
        say(f"{folder}: was not complete; it is kept as {aside.name}")
    if not folder.exists():
        staged.rename(folder)
    else:
        for name in names:
            if not os.path.lexists(folder / name):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (staged / name).rename(folder / name)
    sync_folder(folder.parent)


# The transfer


def _address(archive: Archive, mirror: str) -> str:
    """The archive's URL, or the mirror's. Raises UserError where that is no http or https URL."""
    url = mirror or archive.url
    with suppress(ValueError):  # what cannot be split is refused below
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname:
            return url if parts.path.endswith(f"/{archive.name}") else f"{url.rstrip('/')}/{archive.name}"
    raise UserError(f"--mirror: must be an http or https URL, got {url!r}; --from FILE takes a file")


def _redirected(url: str, location: str) -> str:
    """Where a redirection leads. Raises UserError for a way out of http and https, or from https to http."""
    target = urljoin(url, location)
    schemes = urlsplit(url).scheme, urlsplit(target).scheme
    if schemes not in (("http", "http"), ("http", "https"), ("https", "https")):
        raise UserError(f"{url}: redirects to {target!r}, which is less safe; --mirror URL names another place")
    return target


def _download(name: str, url: str, part: IO[bytes], pin: Path) -> str:
    """Fill `part` with the archive; returns its digest. Wrong bytes are fetched once more, in one go: where a file
    changes on the server, what came in two goes may be a mixture.
    """
    archive = ARCHIVES[name]
    for last in (False, True):
        try:
            _transfer(name, url, part)
            return _verify(Path(part.name), url, archive, pin)
        except WrongBytes as error:
            part.truncate(0)
            if last:
                raise
            say(f"{error}; once more from the start")


def _transfer(name: str, url: str, part: IO[bytes]) -> None:
    """Append to `part` what it lacks, in as many requests as it takes. Raises UserError when nothing more comes."""
    archive, note = ARCHIVES[name], _note(Path(part.name))
    failed, first = 0, part.seek(0, os.SEEK_END)
    furthest = first
    with requests.Session() as session:
        while True:
            try:
                _request(session, archive, url, part, note)
                return
            except _Again as error:
                have = part.seek(0, os.SEEK_END)
                failed = failed + 1 if have <= furthest else 1
                furthest = max(furthest, have)
                # nothing was ever reached: more likely no network than a hiccup
                if failed == TRIES or not error.reached and furthest == first:
                    raise UserError(*_unreachable(name, url, Path(part.name), str(error))) from None
                wait = min(BACKOFF * 2 ** (failed - 1) if error.wait is None else error.wait, LONGEST_WAIT)
                say(f"{error}; trying again from byte {have:,} in {wait:.0f} s")
            time.sleep(wait)


def _unreachable(name: str, url: str, part: Path, reason: str) -> list[str]:
    archive = ARCHIVES[name]
    command = f"python3 tools/download.py {name}"
    if part.parent != Path(archive.home):
        command += f" --to {shlex.quote(str(part.parent))}"
    return [
        f"{url}: cannot be fetched ({reason}); do one of these:",
        f"  again    {command}   (goes on with what has come)",
        f"  proxy    HTTPS_PROXY=http://HOST:PORT {command}",
        f"  mirror   {command} --mirror URL",
        f"  by hand  fetch {url} on another machine, then {command} --from {archive.name}",
    ]


def _request(session: requests.Session, archive: Archive, url: str, part: IO[bytes], note: Path) -> None:
    """One request for what `part` lacks. Raises _Again where another may bring more."""
    known = _read_note(note, url)
    size, have = archive.size or known.get("size"), part.seek(0, os.SEEK_END)
    if have and have == size:
        return
    headers = {"Accept-Encoding": "identity"}
    if have and (known.get("validator") or archive.digest):  # else a mixture of two files would pass for one
        headers["Range"] = f"bytes={have}-"
        if known.get("validator"):
            headers["If-Range"] = known["validator"]
    try:
        with _open(session, url, headers) as response:
            validator, length = _validator(response), response.headers.get("Content-Length", "")
            if response.status_code == 200:
                offered = int(length) if length.isdecimal() else None
                page = "html" in response.headers.get("Content-Type", "")  # a hotel's, say: what has come is kept
                if page or archive.size and offered not in (None, archive.size):
                    what = "a web page" if page else f"{offered:,} bytes, expected {archive.size:,}"
                    raise UserError(f"{url}: the server sends {what}; --mirror URL names another place")
                part.truncate(0)
                size, have = archive.size or offered, 0
                write_atomic(note, json.dumps({"url": url, "validator": validator, "size": size}).encode())
            else:
                start, total = _span(response)
                complete = response.status_code == 416 and total == have
                same = total in (None, size or total) and validator in (None, known.get("validator") or validator)
                if not same or start != have and not complete:
                    part.truncate(0)
                    raise _Again("the file on the server is another one now")
                if complete:
                    return
                size = size or total
            _receive(response, archive, part, have, size)
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        # MaxRetryError: no connection came about; ValueError: the URL or the proxy's is none
        unreached = isinstance(error, ValueError) or isinstance(
            (error.args or [None])[0], urllib3.exceptions.MaxRetryError
        )
        raise _Again(_reason(error), reached=not unreached) from None


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


def _read_note(note: Path, url: str) -> dict:
    """What is known of the partial file, if it comes from `url`: another server's validator says nothing."""
    try:
        known = json.loads(note.read_text())
        return known if known["url"] == url else {}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _validator(response: requests.Response) -> str | None:
    """What If-Range takes: a strong ETag, else the date."""
    etag = response.headers.get("ETag", "W/")
    return response.headers.get("Last-Modified") if etag.startswith("W/") else etag


def _open(session: requests.Session, url: str, headers: dict[str, str]) -> requests.Response:
    """The answer: 200, or to a Range 206 or 416. Raises _Again for what may pass, UserError for what will not."""
    for _ in range(REDIRECTS):
        response = session.get(url, headers=headers, stream=True, timeout=TIMEOUT, allow_redirects=False)
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


def _receive(response: requests.Response, archive: Archive, part: IO[bytes], have: int, size: int | None) -> None:
    """Append the response's body to `part`, which holds `have` bytes of `size`."""
    folder = Path(part.name).parent
    if size:
        _room(folder, size - have + (sum(archive.files.values()) or size))
    most = size or have + shutil.disk_usage(folder).free
    to_come = f"{size - have:,} of {size:,}" if size else "an unknown number of"
    say(f"{archive.name}: {to_come} bytes to come from {urlsplit(response.url).hostname}")
    # disable=None: the bar is for terminals only
    with tqdm(total=size, initial=have, unit="B", unit_scale=True, leave=False, file=sys.stdout, disable=None) as bar:
        while chunk := response.raw.read(CHUNK, decode_content=False):
            have += len(chunk)
            if have > most:
                raise WrongBytes(f"{response.url}: sends more than the {most:,} bytes expected")
            part.write(chunk)
            bar.update(len(chunk))
    part.flush()
    if size and have < size:
        raise _Again(f"the connection ended after {have:,} of {size:,} bytes")
