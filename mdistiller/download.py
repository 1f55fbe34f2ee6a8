"""Archives from the net: fetched once, resumed after a break, verified, and unpacked as a whole or not at all."""

import hashlib
import shutil
import sys
import tarfile
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import requests
from tqdm import tqdm

from mdistiller.errors import UserError
from mdistiller.files import FileLock, expand, is_locked, write_atomic
from mdistiller.terminal import say, shows_bars

TIMEOUT = (10, 60)  # seconds to connect, seconds without a byte
CHUNK = 2**14  # bytes that are waited for before they are written
ELSEWHERE = "--mirror URL takes another server, --from FILE an archive that was fetched elsewhere"


@dataclass(frozen=True)
class Archive:
    """The tar file at `url`, which unpacks to `folder`, by default in `home`.

    Its publisher says `size`, `digest` (algorithm:hex) and `files` {name: bytes}. Without them the SHA-256 of the first
    archive that comes is pinned in a file beside the folder, with the names and SHA-256 of its files.
    """

    url: str
    home: str
    folder: str
    size: int = 0
    digest: str = ""
    files: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


_CIFAR = "https://www.cs.toronto.edu/~kriz"
_TEN = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
ARCHIVES = {
    "teachers": Archive(
        "https://github.com/megvii-research/mdistiller/releases/download/checkpoints/cifar_teachers.tar",
        "download_ckpts", "cifar_teachers",
    ),
    "cifar100": Archive(
        f"{_CIFAR}/cifar-100-binary.tar.gz", "data", "cifar-100-binary", 168_513_733,
        "md5:03b5dce01913d631647c71ecec9e9cb8", {"train.bin": 50_000 * 3074, "test.bin": 10_000 * 3074},
    ),
    "cifar10": Archive(
        f"{_CIFAR}/cifar-10-binary.tar.gz", "data", "cifar-10-batches-bin", 170_052_171,
        "sha256:c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd", dict.fromkeys(_TEN, 10_000 * 3073),
    ),
}  # fmt: skip


def fetch(name: str, root: str | Path | None = None, mirror: str = "", file: str | Path | None = None) -> Path:
    """Unpack ARCHIVES[name] in the folder `root`, by default its home, and return the unpacked folder.

    Do nothing where that is complete. Files that are there stay, but for those of another than the published size.
    `mirror` is another server's folder or the archive's whole URL, `file` an archive that was fetched elsewhere. Wait
    for another process that fetches the same. Raises UserError; what has come of a download stays for the next call.
    """
    archive, root = ARCHIVES[name], expand(root or ARCHIVES[name].home)
    work, lock_file = root / f"{archive.name}.part", root / f".{archive.name}.lock"
    new = [path for path in (work, *work.parents) if not path.exists()]
    if _is_complete(archive, root):
        shutil.rmtree(work, ignore_errors=True)  # what a kill after the last step has left
        return root / archive.folder
    if not hasattr(tarfile, "data_filter"):
        raise UserError("this Python's tarfile is not safe; use Python 3.10.12, 3.11.4 or newer, or unpack it by hand")
    if file and not Path(file).is_file():
        raise UserError(f"--from: there is no file {file}")
    try:
        root.mkdir(parents=True, exist_ok=True)
        if is_locked(lock_file):
            say(f"waiting for another process that fetches {archive.name}")
        lock = FileLock(lock_file, wait=True)
        try:
            if not _is_complete(archive, root):
                work.mkdir(exist_ok=True)
                _install(archive, root, work, mirror or archive.url, file)
            shutil.rmtree(work, ignore_errors=True)
        finally:
            lock_file.unlink()
            lock.close()
    except OSError as error:
        raise UserError(f"{error.filename or root}: {error.strerror or error}; mend that and type it again") from None
    finally:
        for path in new:
            with suppress(OSError):  # not empty: then it is wanted
                path.rmdir()
    return root / archive.folder


def _is_complete(archive: Archive, root: Path) -> bool:
    """Return whether all of the archive's files are there, and say so."""
    sizes: dict[str, int | None] = {f"{archive.folder}/{name}": size for name, size in archive.files.items()}
    pin = root / f"{archive.name}.sha256"
    if not sizes and pin.is_file():
        sizes = dict.fromkeys(line[66:] for line in pin.read_text().splitlines()[1:])
    if not sizes or any(_is_wanted(root / name, size) for name, size in sizes.items()):
        return False
    say(f"{root / archive.folder}: complete, {len(sizes)} files")
    return True


def _is_wanted(path: Path, size: int | None) -> bool:
    return not path.is_file() or size not in (None, path.stat().st_size)


def _install(archive: Archive, root: Path, work: Path, url: str, file: str | Path | None) -> None:
    """Get the archive into the folder `work`, verify it, unpack it, and pin its digest where none is published."""
    pin, path = root / f"{archive.name}.sha256", Path(file or work / "archive")
    expected, advice = archive.digest, ELSEWHERE
    if not expected and pin.exists():
        expected, advice = f"sha256:{pin.read_text()[:64]}", f"delete {pin} if you trust the change"
    if not file:
        url = url if url.endswith(f"/{archive.name}") else f"{url.rstrip('/')}/{archive.name}"
        _download(url, path, archive.size)
    try:
        found = _digest(path, expected.partition(":")[0] or "sha256")
        if expected not in ("", found):
            raise UserError(f"{file or url}: {path.stat().st_size:,} bytes, {found}; expected {expected}; {advice}")
        digests = {archive.name: found} | _unpack(path, archive, root, work)
    except UserError:
        shutil.rmtree(work)  # what is wrong is not gone on with
        raise
    if not archive.digest:
        write_atomic(pin, "".join(f"{digest[7:]}  {name}\n" for name, digest in digests.items()).encode())
        say(f"{found}, pinned in {pin}")


def _digest(path: Path, algorithm: str = "sha256") -> str:
    hasher = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            hasher.update(chunk)
    return f"{algorithm}:{hasher.hexdigest()}"


def _unpack(path: Path, archive: Archive, root: Path, work: Path) -> dict[str, str]:
    """Unpack `path` in `work`, move what is wanted of it to `root`, and return {name: digest} of all its files."""
    with tempfile.TemporaryDirectory(dir=work) as stage:
        try:
            with tarfile.open(path, "r:gz" if archive.name.endswith(".gz") else "r:") as tar:
                tar.extractall(stage, filter="data")
        except (tarfile.TarError, ValueError) as error:
            raise UserError(f"{path}: cannot be unpacked ({error}); {ELSEWHERE}") from None
        files = [file for file in Path(stage, archive.folder).rglob("*") if file.is_file() and not file.is_symlink()]
        if not files or archive.files.keys() - {file.name for file in files}:
            raise UserError(f"{path}: holds no whole folder {archive.folder}; {ELSEWHERE}")
        digests = {str(file.relative_to(stage)): _digest(file) for file in files}
        for file in files:
            target = root / file.relative_to(stage)
            if _is_wanted(target, archive.files.get(target.name)):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(file, target)
    return digests


def _download(url: str, part: Path, size: int) -> None:
    """Append to `part` what it lacks of the file at `url`, of `size` bytes where that is not 0, in one request."""
    tag, have, headers = part.with_name("etag"), 0, {"Accept-Encoding": "identity"}
    if part.exists() and tag.exists():
        have = part.stat().st_size
        headers |= {"Range": f"bytes={have}-", "If-Range": tag.read_text()}  # another file comes as a whole
    try:
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            if response.status_code == 416 and response.headers.get("Content-Range") == f"bytes */{have}":
                return  # all of it has come
            response.raise_for_status()
            have = have if response.status_code == 206 else 0
            total = have + int(response.headers.get("Content-Length", size - have))
            if size and total != size:
                raise UserError(f"{url}: the server has {total:,} bytes, expected {size:,}; {ELSEWHERE}")
            tag.write_text(response.headers.get("ETag") or response.headers.get("Last-Modified", "none"))
            hidden = not shows_bars(sys.stderr)
            bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, leave=False, disable=hidden)
            with open(part, "ab" if have else "wb") as out, bar:
                for chunk in response.iter_content(CHUNK):
                    out.write(chunk)
                    bar.update(len(chunk))
    except requests.RequestException as error:
        while isinstance(inner := getattr(error, "reason", None) or (error.args or [None])[0], Exception):
            error = inner
        raise UserError(
            f"{url}: {error}; type it again to go on, or with HTTPS_PROXY set; tools/download.py: {ELSEWHERE}"
        ) from None
