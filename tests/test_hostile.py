"""Broken and hostile input files, through the commands that users type: one line, status 2, nothing run or written."""

import importlib.util
import io
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import sklearn.datasets
import torch
from helpers import ROOT, digits_opts, tool

from mdistiller import config, registry
from mdistiller.engine.cfg import CFG, load
from mdistiller.engine.trainer import Trainer
from mdistiller.errors import UserError, run_command
from mdistiller.models import cifar_model_dict
from mdistiller.runs import checkpoint

SECONDS, MEGABYTES = 10, 250  # that a refusal may take, in a process that has imported everything
EVALUATE = ["eval", "-m", "resnet8", "-d", "digits", "-c", "x.pth"]
TRAIN = ["train_ours", *digits_opts(), "LOG.PREFIX", "out"]


class Case(NamedTuple):
    id: str
    make: Callable[[Path], None]  # writes the files into an empty folder, which the command runs in
    words: list[str]  # the tool and its arguments
    says: str  # in the first line: the file or the key


# building blocks


def content(name: str, data: bytes | str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)


def saved(name: str, state: Callable[[], object], legacy: bool = False) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(dumped(state(), legacy))


def dumped(state: object, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def sparse_file(name: str, size: int) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).touch()
        os.truncate(folder / name, size)

    return make


def nothing(folder: Path) -> None:
    pass


# what takes the place of any file
PLACES: dict[str, Callable[[str], Callable[[Path], None]]] = {
    "directory": lambda name: lambda folder: (folder / name).mkdir(),
    "fifo": lambda name: lambda folder: os.mkfifo(folder / name),
    "link-to-nowhere": lambda name: lambda folder: (folder / name).symlink_to("gone"),
    "link-loop": lambda name: lambda folder: (folder / name).symlink_to(name),
    "link-to-device": lambda name: lambda folder: (folder / name).symlink_to("/dev/zero"),
    "empty": lambda name: content(name, b""),
    "noise": lambda name: content(name, random.Random(0).randbytes(5000)),
    "text": lambda name: content(name, "SOLVER is not here: [\n"),
    "sparse-huge": lambda name: sparse_file(name, 2**40),
}


# checkpoints


@cache
def weights(name: str = "resnet8", classes: int = 10) -> dict:
    torch.manual_seed(0)
    return cifar_model_dict[name][0](num_classes=classes).state_dict()


def with_weight(change: Callable[[torch.Tensor], object], key: str = "fc.weight") -> Callable[[], dict]:
    return lambda: {"model": weights() | {key: change(weights()[key])}}


class Bomb:
    """Unpickled, it makes the folder `bomb`."""

    def __reduce__(self):
        return os.mkdir, ("bomb",)


def deep(levels: int = 100_000) -> bytes:
    return b"\x80\x02" + b"]" * levels + b"a" * (levels - 1) + b"."


def rezipped(change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    source, target = zipfile.ZipFile(io.BytesIO(dumped({"model": weights()}))), io.BytesIO()
    with zipfile.ZipFile(target, "w", compression) as file:
        for name in source.namelist():
            file.writestr(name, change(name, source.read(name)))
    return target.getvalue()


def of_numel(count: int, legacy: bool) -> bytes:
    """A checkpoint of five numbers that says it holds `count`."""
    data, size = dumped({"w": torch.arange(5.0)}, legacy), count.to_bytes(8, "little")
    large = b"\x8a\x08" + size

    def change(pickled: bytes) -> bytes:
        before, after = (b"K\x05N", b"K\x05\x85") if legacy else (b"K\x05t", b"K\x05\x85")
        assert before in pickled and after in pickled
        return pickled.replace(before, large + before[2:]).replace(after, large + after[2:])

    if legacy:
        return change(data)
    source, target = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    with zipfile.ZipFile(target, "w") as file:
        for name in source.namelist():
            file.writestr(name, change(source.read(name)) if name.endswith("data.pkl") else source.read(name))
    return target.getvalue()


def endless_key(levels: int = 60) -> bytes:
    """A dictionary with the key t = (t', t'), t' = (t'', t''), ...: 2**levels parts to hash."""
    pickled = b"\x80\x02}K\x00K\x01K\x02\x86q\x00s"
    for level in range(levels):
        pickled += bytes((75, level)) + b"h\x00h\x00\x86q\x00s"
    return pickled + b"h\x00K\x01s."


def overlapping() -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as file:
        file.writestr("archive/data/0", bytes(100_000))
        for number in range(1, 200):
            file.filelist.append(twin := zipfile.ZipInfo(f"archive/data/{number}"))
            for name in ("CRC", "compress_size", "file_size", "header_offset"):
                setattr(twin, name, getattr(file.filelist[0], name))
    return target.getvalue()


def named_twice() -> bytes:
    target = io.BytesIO(dumped({"model": weights()}))
    with zipfile.ZipFile(target, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("archive/data.pkl", pickle.dumps(Bomb()))
    return target.getvalue()


def itself() -> dict:
    state: dict = {"w": torch.ones(2)}
    return state | {"model": state | {"loop": state}}


def cyclic() -> dict:
    state: dict = {}
    state["model"] = state
    return state


BAD_STATES: dict[str, Callable[[], object]] = {
    "other-architecture": lambda: {"model": weights("resnet14")},
    "other-classes": lambda: {"model": weights("resnet8", 100)},
    "other-shape": with_weight(lambda w: w[:, :-1].clone()),
    "missing-key": lambda: {"model": {k: v for k, v in weights().items() if k != "fc.bias"}},
    "extra-key": lambda: {"model": weights() | {"extra": torch.ones(3)}},
    "nan": with_weight(lambda w: w * torch.nan),
    "inf-in-the-statistics": with_weight(lambda w: w + torch.inf, "bn1.running_var"),
    "integers": with_weight(lambda w: w.long()),
    "booleans": with_weight(lambda w: w > 0),
    "complex": with_weight(lambda w: w.to(torch.complex64)),
    "quantized": with_weight(lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8)),
    "sparse": with_weight(lambda w: w.to_sparse()),
    "sparse-rows": with_weight(lambda w: w.to_sparse_csr()),
    "float8": with_weight(lambda w: w.to(torch.float8_e4m3fn)),
    "without-data": with_weight(lambda w: w.to("meta")),
    "nested-tensor": with_weight(lambda w: torch.nested.nested_tensor([w[0], w[1, :3]])),
    "stride-0": with_weight(lambda w: torch.ones(1, 64).expand(10**12, 64)),
    "classes-beyond-counting": lambda: {"model": {"fc.weight": torch.ones(2**61, 0)}},
    "no-classes": lambda: {"model": {"fc.weight": torch.ones(0, 64)}},
    "list": lambda: [weights()],
    "number": lambda: 5,
    "tensor": lambda: torch.ones(3),
    "no-tensors": lambda: {"model": {"a": 1}},
    "model-is-text": lambda: {"model": "resnet8"},
    "model-is-cyclic": cyclic,
    "weights-hold-themselves": itself,
    "empty-dict": dict,
    "key-of-two-lines": lambda: {"model": weights() | {"a\nb": weights()["fc.bias"] * 1j}},
    "bomb": Bomb,
    "bomb-as-model": lambda: {"model": Bomb()},
    "bomb-beside-the-weights": lambda: {"model": weights(), "x": [[{"y": Bomb()}]]},
    "bomb-as-weight": lambda: {"model": weights() | {"fc.bias": Bomb()}},
}


def checkpoint_cases() -> Iterator[Case]:
    distil = [*TRAIN, "DISTILLER.TYPE", "KD", "DISTILLER.TEACHER", "resnet8", "DISTILLER.TEACHER_CKPT"]
    for id, state in BAD_STATES.items():
        yield Case(f"weights-{id}", saved("x.pth", state), EVALUATE, "x.pth")
        if "bomb" in id:
            yield Case(f"weights-legacy-{id}", saved("x.pth", state, True), EVALUATE, "x.pth")
            raw = lambda folder, state=state: (folder / "x.pth").write_bytes(pickle.dumps(state()))  # noqa: E731
            yield Case(f"weights-pickle-{id}", raw, EVALUATE, "x.pth")
        if id in ("other-classes", "nan", "sparse", "stride-0", "bomb", "list"):
            yield Case(f"teacher-{id}", saved("x.pth", state), [*distil, "x.pth"], "x.pth")
    for id, place in PLACES.items():
        yield Case(f"weights-{id}", place("x.pth"), EVALUATE, "x.pth")
        yield Case(f"teacher-{id}", place("x.pth"), [*distil, "x.pth"], "x.pth")
    files: dict[str, Callable[[], bytes]] = {
        "wrong-magic": lambda: b"PK\3\5" + dumped(weights())[4:],
        "nested-pickle": deep,
        "deflated-bomb": lambda: rezipped(lambda name, d: bytes(2**28) if "/0" in name else d, zipfile.ZIP_DEFLATED),
        "endless-key": lambda: rezipped(lambda name, d: endless_key() if name.endswith("data.pkl") else d),
        "endless-key-legacy": lambda: dumped({}, True).replace(pickle.dumps({}, 2), endless_key()),
        "endless-key-before-a-zip": lambda: dumped({}, True).replace(pickle.dumps({}, 2), endless_key()) + npz(),
        "overlapping-entries": overlapping,
        "twice-the-same-entry": named_twice,
        "numel": lambda: of_numel(10**12, False),
        "numel-legacy": lambda: of_numel(10**12, True),
        "numel-just-beyond": lambda: of_numel(6, False),
        "other-byteorder": lambda: rezipped(lambda name, d: b"huge" if "byteorder" in name else d),
        "torchscript": torchscript,
        "yaml": lambda: b"SOLVER: {LR: 1}\n",
        "tar": lambda: b"storages".ljust(257, b"\0") + b"ustar\x0000" + bytes(2000),
    }
    for id, make in files.items():
        write = lambda folder, make=make: (folder / "x.pth").write_bytes(make())  # noqa: E731
        yield Case(f"weights-{id}", write, EVALUATE, "x.pth")
    for legacy in (False, True):
        for part in (1e-5, 1e-4, 0.001, 0.01, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999, 0.9999):
            cut = lambda folder, part=part, legacy=legacy: truncate(folder / "x.pth", part, legacy)  # noqa: E731
            yield Case(f"weights-cut-{part}-{'legacy' * legacy}", cut, EVALUATE, "x.pth")
    yield Case("weights-device", nothing, [*EVALUATE[:-1], "/dev/zero"], "/dev/zero")
    yield Case("weights-name-of-two-lines", content("a\nb", b"x"), [*EVALUATE[:-1], "a\nb"], r"a\nb")
    yield Case("weights-name-with-nul", nothing, [*EVALUATE[:-1], "a\0b"], r"a\x00b")
    yield Case("weights-name-too-long", nothing, [*EVALUATE[:-1], "a" * 5000], "aaa")
    yield Case("weights-pretrain-missing", nothing, [*EVALUATE[:-1], "pretrain"], "resnet8_vanilla")


def torchscript() -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as file:
        for name, data in (("version", b"3\n"), ("constants.pkl", pickle.dumps(Bomb())), ("data.pkl", deep(3))):
            file.writestr(f"archive/{name}", data)
    return target.getvalue()


def truncate(path: Path, part: float, legacy: bool) -> None:
    data = dumped({"model": weights()}, legacy)
    path.write_bytes(data[: int(part * len(data))])


# arrays


def arrays(**changes) -> dict[str, np.ndarray]:
    images = np.random.default_rng(0).integers(0, 256, (12, 28, 28, 3)).astype(np.uint8)
    data = {"train_images": images[:8], "train_labels": np.arange(8) % 3}
    data |= {"test_images": images[8:], "test_labels": np.arange(4) % 3} | changes
    return {key: value for key, value in data.items() if value is not None}


def npz(**changes) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays(**changes))
    return buffer.getvalue()


def npz_with(name: str, member: bytes, size: int | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A good file but for the bytes of one member, which may be said to be of another `size`."""
    source, target = zipfile.ZipFile(io.BytesIO(npz())), io.BytesIO()
    with zipfile.ZipFile(target, "w", compression) as file:
        for each in source.namelist():
            file.writestr(each, member if each == f"{name}.npy" else source.read(each))
            if size and each == f"{name}.npy":
                file.filelist[-1].file_size = file.filelist[-1].compress_size = size
    return target.getvalue()


def npy_header(shape: tuple, kind: str = "|u1") -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": kind, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def odd_header(text: str) -> bytes:
    return np.lib.format.MAGIC_PREFIX + b"\1\0" + len(text).to_bytes(2, "little") + text.encode()


def encrypted() -> bytes:
    data = bytearray(npz())
    for signature, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = data.find(signature)
        while at >= 0:
            data[at + place] |= 1
            at = data.find(signature, at + 1)
    return bytes(data)


def objects() -> bytes:
    bombs = np.empty(8, object)
    bombs[:] = [Bomb()] * 8
    return npz(train_labels=bombs)


TERA = npy_header((10**12 // 28**2, 28, 28))
BAD_ARRAYS: dict[str, Callable[[], bytes]] = {
    "objects": objects,
    "npy": lambda: np.lib.format.MAGIC_PREFIX + b"\1\0" + bytes(100),
    "header-declares-a-tera": lambda: npz_with("train_images", TERA),
    "header-and-zip-declare-a-tera": lambda: npz_with("train_images", TERA, len(TERA) + 10**12 // 28**2 * 28**2),
    "expands-1000-to-1": lambda: npz_with(
        "train_images", npy_header((10**5, 28, 28)) + bytes(10**5 * 784), compression=zipfile.ZIP_DEFLATED
    ),
    "header-and-member-differ": lambda: npz_with("train_images", npy_header((7, 28, 28, 3)) + bytes(8 * 28 * 28 * 3)),
    "negative-shape": lambda: npz_with("train_images", npy_header((-8, -28, 28, 3)) + bytes(8 * 28 * 28 * 3)),
    "huge-shape-of-nothing": lambda: npz_with("train_images", npy_header((2**70, 0, 28, 3))),
    "no-bytes-each": lambda: npz_with("train_labels", npy_header((10**15,), "|V0")),
    "code-in-header": lambda: npz_with("train_images", odd_header("{'descr': __import__('os').mkdir('bomb')}\n")),
    "deep-header": lambda: npz_with("train_images", odd_header("[" * 9000)),
    "format-9": lambda: npz_with("train_images", b"\x93NUMPY\x09\x00" + bytes(100)),
    "member-is-text": lambda: npz_with("test_labels", b"text"),
    "encrypted": encrypted,
    "name-not-utf8": lambda: npz().replace(b"test_images", b"test_\xff\xfeages"),
    "names-climb": lambda: npz().replace(b"test_images.npy", b"../../mages.npy"),
    "missing-member": lambda: npz(test_labels=None),
    "float-images": lambda: npz(train_images=np.zeros((8, 28, 28, 3), np.float32)),
    "two-channels": lambda: npz(train_images=np.zeros((8, 28, 28, 2), np.uint8)),
    "flat-images": lambda: npz(train_images=np.zeros((8, 784), np.uint8)),
    "no-images": lambda: npz(train_images=np.zeros((0, 28, 28, 3), np.uint8), train_labels=np.zeros(0, int)),
    "sizes-differ": lambda: npz(test_images=np.zeros((4, 32, 32, 3), np.uint8)),
    "negative-labels": lambda: npz(train_labels=np.full(8, -1)),
    "huge-labels": lambda: npz(train_labels=np.full(8, 2**40)),
    "labels-beyond-int64": lambda: npz(train_labels=np.full(8, 2**64 - 1, np.uint64)),
    "float-labels": lambda: npz(train_labels=np.zeros(8)),
    "text-labels": lambda: npz(train_labels=np.array(["a"] * 8)),
    "records": lambda: npz(train_labels=np.zeros(8, [("a", "i8"), ("b", "u1")])),
    "too-few-labels": lambda: npz(train_labels=np.zeros(7, int)),
    "scalar-labels": lambda: npz(train_labels=np.array(3)),
}


def array_cases() -> Iterator[Case]:
    train = [*TRAIN, "DATASET.TYPE", "npz", "DATASET.ROOT", "x.npz"]
    for id, make in BAD_ARRAYS.items():
        yield Case(f"npz-{id}", lambda folder, make=make: (folder / "x.npz").write_bytes(make()), train, "x.npz")
    for id, place in PLACES.items():
        yield Case(f"npz-{id}", place("x.npz"), train, "x.npz")
    for part in (0.0001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999):
        cut = lambda folder, part=part: (folder / "x.npz").write_bytes(npz()[: int(part * len(npz()))])  # noqa: E731
        yield Case(f"npz-cut-{part}", cut, train, "x.npz")
    yield Case("npz-device", nothing, [*train, "DATASET.ROOT", "/dev/zero"], "/dev/zero")
    evaluate = ["eval", "-m", "resnet8", "-c", "gone", "-d", "npz", "-r"]
    yield Case("npz-eval-no-such-user", nothing, [*evaluate, "~nosuchuser/x.npz"], "~nosuchuser")
    yield Case("npz-eval-nul", nothing, [*evaluate, "a\0b"], r"a\x00b")


# binary CIFAR


def records(count: int, label_bytes: int, label: int = 0) -> bytes:
    return (bytes([label]) * label_bytes + bytes(3072)) * count


def binary_cases() -> Iterator[Case]:
    sets = {"cifar100": (2, "train.bin", "test.bin"), "cifar10": (1, "data_batch_3.bin", "test_batch.bin")}
    for kind, (label_bytes, bad, test) in sets.items():
        names = [test, "train.bin"] if kind == "cifar100" else [test, *(f"data_batch_{i}.bin" for i in range(1, 6))]

        def around(damage, bad=bad, names=names, label_bytes=label_bytes):
            def make(folder: Path) -> None:
                for name in names:
                    if name != bad:
                        (folder / name).write_bytes(records(2, label_bytes))
                damage(folder)

            return make

        damages = {id: place(bad) for id, place in PLACES.items()} | {
            "missing": nothing,
            "not-a-multiple": content(bad, records(2, label_bytes)[:-1]),
            "label-out-of-range": content(bad, records(2, label_bytes, 255)),
            "sparse-of-whole-records": sparse_file(bad, (3072 + label_bytes) * 10**8),
            "the-test-file-alone-is-missing": lambda f, t=test, b=bad: shutil.move(f / t, f / b),
            "the-test-file-is-a-folder": lambda f, t=test, b=bad: (shutil.move(f / t, f / b), (f / t).mkdir()),
        }
        for id, damage in damages.items():
            says = test if "the-test" in id else bad
            yield Case(f"{kind}-{id}", around(damage), [*TRAIN, "DATASET.TYPE", kind, "DATASET.ROOT", "."], says)


# configurations


def bomb_of_lists(levels: int = 9) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    return "\n".join(lines + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)])


def bomb_of_maps(levels: int = 30, merge: bool = False) -> str:
    lines = ["a0: &a0 {x: 1, y: 2}"]
    for i in range(1, levels):
        inner = f"<<: [*a{i - 1}, *a{i - 1}]" if merge else f"x: *a{i - 1}, y: *a{i - 1}"
        lines.append(f"a{i}: &a{i} {{{inner}}}")
    return "\n".join(lines)


LEAVES = {key: value for key, value in config.leaves(CFG).items() if key.split(".")[0] not in ("OFD", "RKD")}
BAD_YAML: dict[str, str | bytes] = {
    "tab": "SOLVER:\n\tLR: 1",
    "unclosed": "SOLVER: {LR: 1",
    "unclosed-quote": "SOLVER: {TYPE: 'SGD",
    "twice": "SOLVER: {LR: 1, LR: 2}",
    "section-twice": "SOLVER: {LR: 1}\nSOLVER: {LR: 2}",
    "python-object": "!!python/object/apply:os.mkdir ['bomb']",
    "python-name": "SOLVER: {LR: !!python/name:os.mkdir }",
    "python-tuple": "FITNET: {INPUT_SIZE: !!python/tuple [32, 32]}",
    "unknown-tag": "SOLVER: !mine {LR: 1}",
    "bomb-of-lists": bomb_of_lists(),
    "bomb-of-lists-deep": bomb_of_lists(40),
    "bomb-of-maps": bomb_of_maps(),
    "bomb-of-merges": bomb_of_maps(merge=True),
    "recursive-list": "EXPERIMENT: {PLUGINS: &a [*a]}",
    "recursive-map": "SOLVER: &a {LR: *a}",
    "recursive-merge": "SOLVER: &a {<<: *a}",
    "merge-of-text": "SOLVER: {<<: text}",
    "deep-list": "[" * 10**5,
    "deep-map": "{a: " * 10**4,
    "deep-lines": "\n".join(" " * i + "a:" for i in range(400)),
    "just-too-deep": "EXPERIMENT: {PLUGINS: " + "[" * 40 + "]" * 40 + "}",
    "many-keys": "\n".join(f"key{i}: 1" for i in range(9000)),
    "many-plug-ins": "EXPERIMENT: {PLUGINS: [" + "x.py, " * 9000 + "]}",
    "long-key": "k" * 100_000 + ": 1",
    "long-text": f"DISTILLER: {{TYPE: {'K' * 100_000}}}",
    "too-long": "# " + "x" * 2**20,
    "latin": b"EXPERIMENT: {TAG: \xe9}",
    "utf16": "SOLVER: {LR: 1}".encode("utf-16"),
    "nul": b"SOLVER: {LR: 1}\0",
    "control": "EXPERIMENT: {TAG: a\x07b}",
    "two-documents": "SEED: 1\n---\nSEED: 2",
    "number-key": "1: 2",
    "null-key": "? \n: 2",
    "float-key": ".nan: 2",
    "bool-key": "SOLVER: {on: 2}",
    "number-key-deep": "SOLVER: {1: {2: 3}}",
    "list-key": "? [a, b]\n: 2",
    "map-key": "? {a: b}\n: 2",
    "list": "- SOLVER",
    "number": "5",
    "word": "text",
    "date": "2024-01-01",
    "binary": "EXPERIMENT: {TAG: !!binary aGVsbG8=}",
    "set": "SOLVER: !!set {LR, EPOCHS}",
    "ordered": "SOLVER: !!omap [LR: 1]",
    "digits": f"SEED: {'1' * 5000}",
    "empty-int": "SEED: !!int ''",
    "odd-bool": "LOG: {WANDB: !!bool maybe}",
    "base-60": "SOLVER: {EPOCHS: 4:00}",
    "base-60-float": "SOLVER: {LR: 1:30.5}",
    "base-60-bomb": "SEED: 1" + ":1" * 50_000,
    "odd-anchor": "SOLVER: *gone",
    "directive": "%YAML 9.9\n---\nSEED: 1",
    "base-is-a-folder": "_BASE_: .",
    "base-is-a-device": "_BASE_: /dev/zero",
    "base-is-missing": "_BASE_: gone.yaml",
    "base-is-a-number": "_BASE_: 5",
    "base-is-a-map": "_BASE_: {a: b}",
    "base-is-itself": "_BASE_: x.yaml",
    "base-is-itself-in-other-words": "_BASE_: ./././x.yaml",
    "base-has-nul": '_BASE_: "a\\0b"',
    "base-is-too-long": f"_BASE_: {'a' * 5000}",
}
BAD_VALUES = {  # where the file is right and a value is not, its key is named
    "date": ("SEED", "2024-01-01"),
    "date-for-list": ("SOLVER.LR_DECAY_STAGES", "[2024-01-01]"),
    "hex-digits": ("SEED", "0x" + "f" * 5000),
    "hex-digits-in-a-list": ("SOLVER.LR_DECAY_STAGES", f"[0x{'f' * 5000}]"),
    "rate-of-400-digits": ("SOLVER.LR", "9" * 400),
    "rate-float32-cannot-hold": ("SOLVER.LR", "1.0e+60"),
    "inf": ("SOLVER.LR", ".inf"),
    "nan": ("SOLVER.LR", ".nan"),
    "nan-in-a-list": ("MLKD.TEMPERATURES", "[1.0, .nan]"),
    "batch": ("SOLVER.BATCH_SIZE", str(10**30)),
    "test-batch": ("DATASET.TEST.BATCH_SIZE", str(2**63 - 1)),
    "epochs": ("SOLVER.EPOCHS", str(10**12)),
    "stages": ("SOLVER.LR_DECAY_STAGES", f"[{10**40}]"),
    "workers": ("DATASET.NUM_WORKERS", str(2**70)),
    "negatives": ("CRD.NCE.K", str(10**9)),
    "dimension": ("CRD.FEAT.DIM", str(10**12)),
    "image-size": ("FITNET.INPUT_SIZE", "[100000, 100000]"),
    "section-is-a-list": ("SOLVER", "[1, 2]"),
    "section-is-text": ("DATASET.TEST", "yes please"),
    "value-is-a-map": ("SOLVER.LR", "{a: 1}"),
    "list-of-maps": ("SOLVER.LR_DECAY_STAGES", "[{a: 1}]"),
    "empty-temperatures": ("MLKD.TEMPERATURES", "[]"),
    "nul-in-root": ("DATASET.ROOT", r'"a\0b"'),
    "nul-in-name": ("EXPERIMENT.NAME", r'"a\0b"'),
    "nul-in-prefix": ("LOG.PREFIX", r'"a\0b"'),
    "nul-in-teacher": ("DISTILLER.TEACHER_CKPT", r'"a\0b"'),
    "escape-in-tag": ("EXPERIMENT.TAG", r'"\e[31mred"'),
    "surrogate-in-name": ("EXPERIMENT.NAME", r'"\uD800"'),
    "no-such-user-prefix": ("LOG.PREFIX", "~nosuchuser/x"),
    "no-such-user-root": ("DATASET.ROOT", "~nosuchuser/x"),
    "no-such-user-teacher": ("DISTILLER.TEACHER_CKPT", "~nosuchuser/x"),
    "absolute-project": ("EXPERIMENT.PROJECT", "/x"),
    "climbing-project": ("EXPERIMENT.PROJECT", "a/../../x"),
    "climbing-name": ("EXPERIMENT.NAME", ".."),
    "long-project": ("EXPERIMENT.PROJECT", "a" * 300),
    "long-name": ("EXPERIMENT.NAME", "é" * 200),
    "long-prefix": ("LOG.PREFIX", "a/" * 2100),
    "plug-in-is-a-list": ("EXPERIMENT.PLUGINS", "[[a]]"),
    "plug-in-is-a-number": ("EXPERIMENT.PLUGINS", "5"),
    "device": ("DEVICE", "cuda:" + "9" * 50),
}


def nested(key: str, value: str) -> str:
    *sections, last = key.split(".")
    return "".join(f"{' ' * i}{name}:\n" for i, name in enumerate(sections)) + f"{' ' * len(sections)}{last}: {value}\n"


def config_cases() -> Iterator[Case]:
    train = ["train_ours", "--cfg", "x.yaml", "LOG.PREFIX", "out", "DATASET.TYPE", "digits"]
    for id, text in BAD_YAML.items():
        says = {"many-plug-ins": "PLUGINS", "many-keys": "key0", "long-key": "kkk", "long-text": "DISTILLER.TYPE"}
        yield Case(f"yaml-{id}", content("x.yaml", text), train, says.get(id, "x.yaml"))
    for id, (key, value) in BAD_VALUES.items():
        words = [word for word in train if word not in ("LOG.PREFIX", "out")] if key == "LOG.PREFIX" else train
        yield Case(f"value-{id}", content("x.yaml", nested(key, value)), words, key)
    for key in LEAVES:
        if key != "LOG.PREFIX" and key != "DATASET.TYPE":
            yield Case(f"null-{key}", content("x.yaml", nested(key, "null")), train, key)
    for id, place in PLACES.items():
        if id != "empty":
            yield Case(f"yaml-{id}", place("x.yaml"), train, "x.yaml")

    def fan(folder: Path) -> None:
        for i in range(40):
            (folder / f"{i}.yaml").write_text(f"_BASE_: [{i + 1}.yaml, {i + 1}.yaml]\n" if i < 39 else "SEED: 1\n")

    yield Case("yaml-bases-multiply", fan, ["train_ours", "--cfg", "0.yaml"], ".yaml: _BASE_ brings in more than")


# plug-ins

REGISTER = "from mdistiller.distillers import register_distiller\nfrom mdistiller.distillers.KD import KD\n"
BAD_PLUGINS: dict[str, str | bytes] = {
    "not-utf8": b"# \xff\xfe\nx = '\xe9'\n",
    "syntax": "def f(:\n",
    "raises": "raise ValueError('two\\nlines')\n",
    "exits": "import sys\nsys.exit(0)\n",
    "own-base-exception": "class Stop(BaseException): pass\nraise Stop('stop')\n",
    "generator-exit": "raise GeneratorExit\n",
    "recursion": "def f(): f()\nf()\n",
    "name-in-use": f"{REGISTER}@register_distiller('DTKD')\nclass Mine(KD): pass\n",
    "section-in-use": f"{REGISTER}@register_distiller('SOLVER', defaults={{'A': 1}})\nclass Mine(KD): pass\n",
    "default-none": f"{REGISTER}@register_distiller('MYNONE', defaults={{'T': None}})\nclass Mine(KD): pass\n",
    "default-object": f"{REGISTER}@register_distiller('MYOBJ', defaults={{'T': object()}})\nclass Mine(KD): pass\n",
    "bytecode": b"\xa7\r\r\n\0\0\0\0" + bytes(range(256)),
    "nul": "x = 1\0\n",
    "missing-import": "import no_such_module\n",
    "relative-import": "from ..nowhere import x\n",
}


def plugin_cases() -> Iterator[Case]:
    words = [*TRAIN, "EXPERIMENT.PLUGINS"]
    for id, text in BAD_PLUGINS.items():
        yield Case(f"plug-in-{id}", content("mine.py", text), [*words, "mine.py"], "EXPERIMENT.PLUGINS: mine.py fails")
    for id, place in PLACES.items():
        if id not in ("empty", "sparse-huge"):
            yield Case(f"plug-in-{id}", place("mine.py"), [*words, "mine.py"], "EXPERIMENT.PLUGINS")
    for id, name in {"missing": "gone.py", "nul": "a\0.py", "long": "a" * 5000 + ".py", "yaml": "x.yaml"}.items():
        yield Case(f"plug-in-named-{id}", nothing, [*words, name], "EXPERIMENT.PLUGINS")


# run folders


def write_run(folder: Path) -> None:
    run = folder / "run"
    run.mkdir()
    (run / "config.yaml").write_text(load(None, digits_opts(DISTILLER__TYPE="KD", DISTILLER__TEACHER="resnet8")).dump())
    row = {"epoch": 1, "test_acc": 50.0, "best_acc": 50.0, "train_acc": 50.0, "train_loss": 1.0, "best_epoch": 1}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")


def row_with(**changes) -> str:
    row = {"epoch": 1, "test_acc": 50.0, "best_acc": 50.0, "train_acc": 50.0, "train_loss": 1.0, "best_epoch": 1}
    return json.dumps({k: v for k, v in (row | changes).items() if v is not None}) + "\n"


BAD_METRICS = {
    "no-json": "epoch 1\n",
    "no-object": "[1, 2]\n",
    "a-number": "5\n",
    "lacks-keys": '{"epoch": 1}\n',
    "lacks-accuracy": row_with(test_acc=None),
    "nan": row_with(test_acc=float("nan")),
    "inf": row_with(train_loss=float("inf")),
    "text": row_with(best_acc="high"),
    "list": row_with(epoch=[1]),
    "digits": row_with(test_acc=10**400),
    "more-digits": row_with().replace("50.0", "5" * 5000),
    "epoch-1.0": row_with(epoch=1.0),
    "epoch-7": row_with(epoch=7),
    "epoch-twice": row_with() * 2,
    "deep": "[" * 100_000 + "\n",
    "not-utf8": b"\xff\xfe\n",
}
BAD_RUN_CONFIGS = {
    "unclosed": "SOLVER: {",
    "list": "[1]",
    "empty": "",
    "bomb": bomb_of_lists(),
    "number-keys": "SOLVER: {1: {2: 3}}",
    "python": "!!python/object/apply:os.mkdir ['bomb']",
    "section-is-a-number": "SOLVER: 5\nSEED: 0\nDEVICE: auto",
    "not-utf8": b"\xff",
}


def run_cases() -> Iterator[Case]:
    commands = {"compare": ["compare", "run"], "analyze": ["analyze", "run", "-o", "out"]}

    def damaged(name: str, damage: Callable[[Path], None]) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            write_run(folder)
            (folder / "run" / name).unlink(missing_ok=True)
            damage(folder / "run")

        return make

    for command, words in commands.items():
        bad = {f"metrics-{id}": ("metrics.jsonl", content("metrics.jsonl", t)) for id, t in BAD_METRICS.items()}
        bad |= {f"config-{id}": ("config.yaml", content("config.yaml", t)) for id, t in BAD_RUN_CONFIGS.items()}
        for name in ("metrics.jsonl", "config.yaml"):
            bad |= {f"{name}-{id}": (name, place(name)) for id, place in PLACES.items()}
            bad[f"{name}-missing"] = (name, nothing)
        for key, value in (("SEED", "[1]"), ("SOLVER.EPOCHS", "many"), ("DISTILLER.TYPE", "['KD']"), ("LOG", "5")):
            bad[f"config-{key}"] = (None, (key, value))
        for id, (name, damage) in bad.items():
            if name is None:
                make = lambda folder, key=damage[0], value=damage[1]: write_run_with(folder, key, value)  # noqa: E731
            else:
                make = damaged(name, damage)
            yield Case(f"{command}-{id}", make, words, "run")
        for name in ("gone", "a" * 5000, "a\0b"):
            yield Case(f"{command}-folder-{name[:4]!r}", nothing, [command, name, *words[2:]], ascii(name)[1:4])
    for id in ("noise", "text", "fifo", "empty"):
        if id != "fifo":
            weights_file = damaged("student_latest", PLACES[id]("student_latest"))
            yield Case(f"analyze-student-{id}", weights_file, commands["analyze"], "student_latest")
            record = damaged("temperatures.bin", PLACES[id]("temperatures.bin"))
            yield Case(f"analyze-record-{id}", record, commands["analyze"], "temperatures.bin")
    headers = {"negative": -5, "text": "many", "none": None, "nan": float("nan")}
    for id, samples in headers.items():
        header = {"format": 1, "samples": samples, "dtype": "<f2"}
        header["fields"] = ["t_student", "t_teacher", "max_student", "max_teacher"]
        data = json.dumps(header).encode().ljust(4096) + bytes(800)
        record = damaged("temperatures.bin", content("temperatures.bin", data))
        yield Case(f"analyze-record-samples-{id}", record, commands["analyze"], "temperatures.bin")
    yield Case("analyze-out-is-a-file", lambda f: (write_run(f), (f / "out").touch()), commands["analyze"], "-o out")


def write_run_with(folder: Path, key: str, value: str) -> None:
    write_run(folder)
    tree = config.read(folder / "run" / "config.yaml")
    *sections, last = key.split(".")
    node = config.get(tree, ".".join(sections)) if sections else tree
    node[last] = config._decode(value)
    (folder / "run" / "config.yaml").write_text(tree.dump())


# command lines

COMMANDS: dict[str, tuple[list[str], str]] = {
    "odd-pairs": ([*TRAIN, "SEED"], "'SEED' has no value"),
    "unknown-option": ([*TRAIN, "--lr", "3"], "--lr"),
    "single-dash": ([*TRAIN, "-lr", "3"], "-lr"),
    "set": ([*TRAIN, "SEED", "{1}"], "SEED"),
    "unhashable": ([*TRAIN, "SEED", "{[]: 1}"], "SEED"),
    "bytes": ([*TRAIN, "SOLVER.LR", "b'1'"], "SOLVER.LR"),
    "complex": ([*TRAIN, "SOLVER.LR", "1j"], "SOLVER.LR"),
    "call": ([*TRAIN, "SOLVER.LR", "__import__('os').mkdir('bomb')"], "SOLVER.LR"),
    "warned-of": ([*TRAIN, "SOLVER.LR", "[1](2)"], "SOLVER.LR"),
    "brackets": ([*TRAIN, "SOLVER.LR_DECAY_STAGES", "[" * 50_000], "SOLVER.LR_DECAY_STAGES"),
    "minuses": ([*TRAIN, "SEED", " " + "-" * 50_000 + "1"], "SEED"),
    "digits": ([*TRAIN, "SEED", "9" * 5000], "SEED"),
    "exponent": ([*TRAIN, "SOLVER.LR", "1e400"], "SOLVER.LR"),
    "dots": ([*TRAIN, "SOLVER" + ".X" * 5000, "1"], "SOLVER.X"),
    "only-dots": ([*TRAIN, "...", "1"], "unknown"),
    "empty-key": ([*TRAIN, "", "1"], "unknown"),
    "not-text": ([*TRAIN, "EXPERIMENT.TAG", "a\udcffb"], "EXPERIMENT.TAG"),
    "two-lines": ([*TRAIN, "a\nb", "1"], r"a\nb"),
    "resume-nothing": ([*TRAIN, "--resume"], "--resume"),
    "cfg-nul": (["train_ours", "--cfg", "a\0b"], r"a\x00b"),
    "cfg-long": (["train_ours", "--cfg", "a" * 5000], "aaa"),
    "cfg-device": (["train_ours", "--cfg", "/dev/zero"], "/dev/zero"),
    "cfg-stdin-terminal": (["train_ours", "--cfg", "/dev/null"], "/dev/null"),
    "eval-model": (["eval", "-m", "a\nb", "-c", "x", "-d", "digits"], r"a\nb"),
    "eval-device": ([*EVALUATE, "--device", "meta"], "DEVICE"),
    "eval-device-number": ([*EVALUATE, "--device", "cuda:" + "9" * 30], "DEVICE"),
    "eval-batch": ([*EVALUATE, "-bs", "-5"], "-bs"),
    "eval-batch-huge": ([*EVALUATE, "-bs", str(10**30)], "-bs"),
    "analyze-opts": (["analyze", "x", "-o", "out", "--opts", "SOLVER.LR", "1"], "--opts"),
}


def command_cases() -> Iterator[Case]:
    for id, (words, says) in COMMANDS.items():
        yield Case(f"command-{id}", nothing, words, says)


FAMILIES = (
    checkpoint_cases, array_cases, binary_cases, config_cases, plugin_cases, run_cases, command_cases,
)  # fmt: skip
CASES = [case for family in FAMILIES for case in family()]


def test_the_corpus_is_no_smaller_than_it_was():
    assert len(CASES) >= 570
    assert len({case.id for case in CASES}) == len(CASES)


# the contract


load_digits = cache(sklearn.datasets.load_digits)  # the same for every case


@cache
def main_of(name: str) -> Callable[[], None]:
    spec = importlib.util.spec_from_file_location(f"hostile_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def tree(folder: Path) -> dict[str, tuple]:
    """Every name below `folder` with its kind, size and time of change."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        status = path.lstat()
        found[str(path)] = (status.st_mode, status.st_size, status.st_mtime_ns)
    return found


@contextmanager
def within(seconds: int, megabytes: int) -> Iterator[None]:
    """Fails where the block takes longer, or more memory on top of what the process holds."""

    def late(_signal, _frame):
        raise TimeoutError(f"no answer in {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    start = resident("VmRSS")
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert resident("VmHWM") - start < megabytes * 1024


def resident(name: str) -> int:
    """Kilobytes, from the kernel's books."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0])


def check_refusal(stderr: str, says: str) -> None:
    lines = [line for line in stderr.splitlines() if not line.startswith("run: the ")]  # the progress of analyze.py
    assert "Traceback" not in stderr
    assert 0 < len(lines) <= 21, stderr[:3000]
    assert all(line.startswith("error: ") and len(line) < 1100 for line in lines), stderr[:3000]
    assert any(says in line for line in lines), stderr[:3000]


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_bad_input_is_refused(tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry.distillers, "data", dict(registry.distillers.data))
    monkeypatch.setattr(sklearn.datasets, "load_digits", load_digits)
    monkeypatch.setattr(Trainer, "fit", lambda *_: pytest.fail("training began"))
    case.make(tmp_path)
    before = tree(tmp_path)
    name, *arguments = case.words
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    main = main_of(name)
    with within(SECONDS, MEGABYTES), pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code == 2
    check_refusal(capsys.readouterr().err, case.says)
    assert tree(tmp_path) == before


# what a real process does: nothing of this is caught by the test's own
IN_A_PROCESS = (
    "weights-bomb", "weights-fifo", "teacher-nan", "npz-objects", "cifar100-sparse-huge", "yaml-bomb-of-lists",
    "plug-in-exits", "compare-metrics-deep",
)  # fmt: skip


@pytest.mark.parametrize("case", [case for case in CASES if case.id in IN_A_PROCESS], ids=lambda case: case.id)
def test_a_bad_input_is_refused_in_a_process_of_its_own(tmp_path, case):
    case.make(tmp_path)
    before = tree(tmp_path)
    done = tool(*case.words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    check_refusal(done.stderr, case.says)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_bytes_are_refused_or_give_finite_weights(tmp_path, legacy):
    data, file = dumped({"model": weights(), "epoch": 3}, legacy), tmp_path / "x.pth"
    model = cifar_model_dict["resnet8"][0](num_classes=10)
    refused = []
    for seed in range(80):
        rng, damaged = random.Random(seed), bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 5, 20))):
            # anywhere, among the first bytes (pickles), or among the last (the zip's directory)
            start, stop = rng.choice(((0, len(data)), (0, 12_000), (len(data) - 9000, len(data))))
            damaged[rng.randrange(start, stop)] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        try:
            checkpoint.load_weights(model, "resnet8", 10, file)
        except UserError as error:
            refused.append(error.lines)
        else:
            assert all(value.isfinite().all() for value in model.state_dict().values())
    assert 20 < len(refused) < 80
    assert all(len(lines) == 1 and "x.pth" in lines[0] for lines in refused)


def test_a_reader_that_stops_early_ends_a_tool_quietly(tmp_path):
    write_run(tmp_path)
    command = [sys.executable, str(ROOT / "tools" / "compare.py"), "run"]
    tool = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    tool.stdout.close()
    assert tool.stderr.read() == b""
    tool.stderr.close()
    assert tool.wait(60) == 141


def test_names_that_are_no_text_are_shown(tmp_path):
    write_run(tmp_path)
    (tmp_path / "run").rename(tmp_path / os.fsdecode(b"r\xffn"))
    done = tool("compare", os.fsdecode(b"r\xffn"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert r"r\udcffn" in done.stdout


def test_merge_keys_and_aliases_work_within_limits(tmp_path):
    text = "DKD: &d {T: 3.0, ALPHA: 2.0}\nDTKD: {<<: *d, ALPHA: 5.0}\nSEED: &n 4\nCRD: {FEAT: {DIM: *n}}\n"
    (tmp_path / "x.yaml").write_text(text)
    cfg = load(tmp_path / "x.yaml")
    assert (cfg.DTKD.T, cfg.DTKD.ALPHA, cfg.SEED, cfg.CRD.FEAT.DIM) == (3.0, 5.0, 4, 4)
