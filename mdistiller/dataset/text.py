"""Text: a file or a folder, or the source of Python's own library; by bytes, or by a byte-level BPE."""

import gzip
import hashlib
import io
import itertools
import math
import os
import sysconfig
import zlib
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from mdistiller.config import Check, Key, add_keys, at_least, between, one_of
from mdistiller.dataset._registry import register_dataset
from mdistiller.dataset._tokens import TokenSet, token_set
from mdistiller.errors import UserError
from mdistiller.files import expand, open_regular, write_atomic
from mdistiller.terminal import counted, say

READ_BY = {"DATASET.TYPE": ("text",)}
add_keys(
    {
        "DATASET.TEXT.TOKENIZER": Key(
            "bytes",
            "Text: bytes; bpe: a byte-level BPE, trained on the training part and kept beside the text; or the path of "
            "a tokenizer.json or of a folder that holds one, as that of a language model does.",
            Check(bool, "must be bytes, bpe or a path"),
            only=READ_BY,
        ),
        "DATASET.TEXT.VOCABULARY": Key(2048, "Text: entries of the bpe.", between(257, 2**20), only=READ_BY),
        "DATASET.TEXT.BLOCK": Key(
            256, "Text: tokens that a network sees at once: a sample.", between(2, 2**17), only=READ_BY
        ),
        "DATASET.TEXT.MEGABYTES": Key(
            0.0, "Text: how much of it, from its beginning; 0: all.", at_least(0), only=READ_BY
        ),
        "DATASET.TEXT.TEST": Key(
            "valid",
            "Text: the part to test on. The first 90 % are for training; valid: the next 5 %, to choose settings by; "
            "test: the last 5 %.",
            one_of(("valid", "test")),
            only=READ_BY,
        ),
    }
)

SHARES = (0.90, 0.95)  # where the training part ends, and the one for validation
PACKED = (".gz", ".dz")  # .dz: dictzip's, which gzip reads
WANTED = "DATASET.ROOT is a text file, or a folder of them"
ENCODED = 2**16  # bytes that are encoded at a time, cut at a line's end


@register_dataset("text", task="text")
def text(root: Path, options: Mapping) -> TokenSet:
    """Read the text file `root`, .gz and .dz unpacked, or all such files below a folder, in an order that their names
    alone decide.
    """
    root = root.absolute()  # the folder "." has no name
    if not root.exists():
        raise UserError(f"{root}: there is no such file or folder; {WANTED}")
    files = [root]
    if root.is_dir():
        below = ((path, path.relative_to(root).parts) for path in root.rglob("*") if path.is_file())
        files = [path for path, parts in below if not any(part.startswith(".") for part in parts)]
    return tokens_of(read_all(root, files, options), options, root.parent / root.name.split(".")[0])


@register_dataset("python", task="text")
def python(root: Path, options: Mapping) -> TokenSet:
    """Read the source of the library of the Python that runs, without its tests; a tokenizer is kept in `root`."""
    library = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    files = [path for path in library.rglob("*.py") if not left_out & {*path.relative_to(library).parts}]
    if not files:
        raise UserError(f"{library}: this Python has no source of its library; set DATASET.TYPE text with a file")
    return tokens_of(read_all(library, files, options), options, root / f"python{sysconfig.get_python_version()}")


def unpacked(path: Path) -> bytes:
    """Return a file's bytes. Raises UserError where it is no regular file, or cannot be unpacked."""
    try:
        with open_regular(path, "a text file as DATASET.ROOT, or a folder of them") as file:
            return gzip.decompress(file.read()) if path.suffix in PACKED else file.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be unpacked ({error}); mend or remove it") from None


def read_all(root: Path, files: list[Path], options: Mapping) -> bytes:
    """Return the contents of the text files among `files`, in the order of their names' digests, so that each part of a
    text has something of every folder, with a zero byte between them; no more of them than is asked for.
    """
    most = int(1e6 * options["TEXT"]["MEGABYTES"]) or None
    found, passed, left = [], [], most or math.inf
    for path in sorted(files, key=lambda path: hashlib.sha256(os.fsencode(path.relative_to(root))).digest()):
        content = unpacked(path)
        if b"\0" in content:
            passed.append(path)
        elif content:
            found.append(content)
            left -= len(content)
        if left <= 0:
            break
    if passed:
        say(
            f"{root}: {counted(len(passed), 'file')} with zero bytes passed over, such as {passed[0].relative_to(root)}"
        )
    if not found:
        raise UserError(f"{root}: holds no text; {WANTED}")
    return b"\0".join(found)[:most]


def tokens_of(content: bytes, options: Mapping, beside: Path) -> TokenSet:
    """Return the tokens of a text, cut into its parts by position, at the ends of lines. `options`: the section
    DATASET. What is trained and encoded for it is kept in files beside `beside`, hidden ones, which are no text.
    """
    own = options["TEXT"]
    ends = (int(share * len(content)) for share in SHARES)
    cuts = [0, *(content.find(b"\n", end) + 1 or end for end in ends), len(content)]
    parts = dict(zip(("train", "valid", "test"), (content[a:b] for a, b in pairwise(cuts)), strict=True))
    ids, vocabulary, digest = encoded(parts, own, beside)
    key = f"{hashlib.sha256(content).hexdigest()} {digest} {own['BLOCK']}"
    test, source = own["TEST"], hashlib.sha256(key.encode()).hexdigest()
    bytes_a_token = len(parts[test]) / max(1, len(ids[test]))
    streams = (torch.from_numpy(ids[name]) for name in ("train", test))
    return token_set(*streams, own["BLOCK"], vocabulary, source, bytes_a_token, digest)


def encoded(parts: Mapping[str, bytes], own: Mapping, beside: Path) -> tuple[dict[str, np.ndarray], int, str]:
    """Return the ids of each part, the number of entries of the vocabulary and the tokenizer's digest."""
    kind = own["TOKENIZER"]
    if kind == "bytes":
        return {name: np.frombuffer(part, np.uint8).astype(np.int32) for name, part in parts.items()}, 256, kind
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UserError(
            f"DATASET.TEXT.TOKENIZER: {kind} needs the package tokenizers: pip install tokenizers; or set bytes"
        ) from None
    digest = hashlib.sha256(b"".join(parts.values())).hexdigest()[:12]
    if kind == "bpe":
        path = beside.with_name(f".{beside.name}.bpe{own['VOCABULARY']}-{digest}.json")
        if not path.is_file():
            keep(path, train_bpe(parts["train"], own["VOCABULARY"]))
    else:
        path = expand(kind)
        path = path / "tokenizer.json" if path.is_dir() else path
    with open_regular(path, "bytes, bpe or the path of a tokenizer.json as DATASET.TEXT.TOKENIZER") as file:
        saved = file.read()
    try:
        tokenizer = Tokenizer.from_buffer(saved)
    except Exception as error:  # whatever the library raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"DATASET.TEXT.TOKENIZER: {path} cannot be read as a tokenizer.json ({reason}); set bytes, bpe, or "
            "the path of one"
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    name = hashlib.sha256(saved).hexdigest()
    kept = beside.with_name(f".{beside.name}.{name[:12]}-{digest}.npz")
    if kept.is_file():
        with np.load(kept, allow_pickle=False) as held:
            return {part: held[part] for part in parts}, tokenizer.get_vocab_size(), name
    say(f"encoding {sum(map(len, parts.values())) / 1e6:.1f} MB of text")
    ids = {part: encode(tokenizer, content) for part, content in parts.items()}
    memory = io.BytesIO()
    np.savez(memory, **ids)
    keep(kept, memory.getvalue())
    return ids, tokenizer.get_vocab_size(), name


def keep(path: Path, content: bytes) -> None:
    """Write a file that later runs read. Raises UserError where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror or error}; tokenizer and tokens are kept there, let DATASET.ROOT be where you "
            "may write"
        ) from None


def train_bpe(content: bytes, vocabulary: int) -> bytes:
    """Return the tokenizer.json of a byte-level BPE trained on a text; the same for the same text and library."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    say(f"training a BPE of {vocabulary:,} entries on {len(content) / 1e6:.1f} MB of text")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(lines(content), trainer)
    return tokenizer.to_str().encode()


def lines(content: bytes) -> Iterator[str]:
    """Yield a text in pieces of about ENCODED bytes that end where a line ends."""
    start = 0
    while start < len(content):
        stop = content.find(b"\n", start + ENCODED) + 1 or len(content)
        yield content[start:stop].decode(errors="replace")
        start = stop


def encode(tokenizer, content: bytes) -> np.ndarray:
    """Return the ids of a text, (N,) int32, without the special ones that a model's tokenizer adds."""
    pieces, found = lines(content), [np.zeros(0, np.int32)]
    while some := [*itertools.islice(pieces, 64)]:  # what the library returns takes a hundred bytes a token
        found += [np.array(piece.ids, np.int32) for piece in tokenizer.encode_batch(some, add_special_tokens=False)]
    return np.concatenate(found)
