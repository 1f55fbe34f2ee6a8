"""A frozen teacher's logits on the views of the training set: computed some steps ahead, or kept in a bank.

A view is what the augmentation makes of an image: CIFAR's has 81 crops times 2 flips. A logit method needs nothing
of the teacher but its logits on the views that it meets, so no view has to pass through the teacher twice.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from yacs.config import CfgNode

from mdistiller.bank.inference import Inference
from mdistiller.bank.store import RowStore, check_space
from mdistiller.dataset import Batches
from mdistiller.errors import RunFailed, UserError
from mdistiller.files import expand
from mdistiller.runs import checkpoint
from mdistiller.runs.folder import check_writable
from mdistiller.terminal import say, unbroken

WINDOW = 1024  # views that are looked up together, some steps ahead
# Images of a teacher's pass, always as many: the bits of a row may depend on how many it is computed with, on a CPU
# never on which, so that a bank filled in any order by any run holds the same numbers; and a graph has one shape.
CHUNK = {"cpu": 64}
LARGE_CHUNK = 1024
BLOCK = 2**16  # views that a precomputation looks up together
CODE = 1  # raised where a view or a row comes to another number than before
PAYS = 0.8  # a bank is made where it leaves less than this share of the teacher's passes
SECONDS_LOST = 30  # by an interrupted precomputation, at most


def takes_logits(distiller: nn.Module) -> bool:
    """Whether the method can do without a teacher's pass of its own on the batch: it says so, and its teacher neither
    learns nor leaves eval mode.
    """
    if not distiller.takes_teacher_logits:
        return False
    learns = not {*distiller.teacher.parameters()}.isdisjoint(distiller.get_learnable_parameters())
    return not learns and not distiller.train().teacher.training


class Bank:
    """Rows of logits on disk and, on CUDA, all of them in device memory. Shared by all students of a teacher."""

    def __init__(self, folder: Path, description: dict[str, str | int], shape: dict, device: torch.device):
        self.folder, self.description, self.shape, self.device = folder, description, shape, device
        self.store: RowStore | None = None
        self.table: Tensor | None = None
        self.full_disk = False
        self.whole = False  # whether it is filled before the first step
        self.sound = False  # whether it was compared with the teacher

    def find(self) -> None:
        """Open the store if it is there. Raises UserError where something else is."""
        if self.store is None and os.path.exists(self.folder):
            self.store = RowStore(self.folder, self.description, **self.shape)

    def make(self) -> None:
        """Open the store, made where there is none."""
        if self.store is None:
            self.store = RowStore(self.folder, self.description, **self.shape)
        self.store.announce("full" if self.whole else "lazy")

    def open(self) -> None:
        """Make the store where there is none; on CUDA what it holds goes into device memory."""
        self.make()
        if self.device.type == "cuda" and self.table is None:
            dtype = getattr(torch, self.shape["dtype"])
            self.table = torch.empty(self.shape["rows"], self.shape["width"], dtype=dtype, device=self.device)
            for rows, values in self.store.chunks():
                self.table[torch.from_numpy(rows).to(self.device)] = torch.from_numpy(values).to(self.device)
            torch.cuda.synchronize(self.device)  # it is read on another stream

    @property
    def share(self) -> float:
        """Of all rows, the part that is held."""
        return self.store.filled / self.store.rows if self.store else 0.0

    def share_of_draws(self, batches: Batches, epochs: int) -> float:
        """Of the views that `epochs` epochs will draw, the part that is held: other runs of a seed draw the same."""
        if not self.share:
            return 0.0
        some = range(1, epochs + 1, -(-epochs // 8))
        shares = [self.store.holds(batches.row_numbers(batches.plan(epoch)).numpy()).mean() for epoch in some]
        return float(np.mean(shares))

    def wait(self, check: Callable[[], None]) -> None:
        """Until it is complete, or this process may add to it, or the one that may does not mean to complete it."""
        said = False
        while self.whole and not (self.store.writable or self.store.complete):
            self.check_fillable()
            if self.store.holder == "lazy":
                say(f"another run adds to {self.folder} what it meets; this one computes what is missing")
                self.whole = False
                return
            if not said:
                say(f"another process fills {self.folder}; waiting for it")
                said = True
            for _ in range(100):  # opening reads it all
                time.sleep(0.1)
                check()
            self.store.close()
            self.store = None
            self.make()

    def check_fillable(self) -> None:
        """Raises UserError where neither this process nor another one can complete it."""
        if self.store is not None and not (self.store.complete or self.store.writable or self.store.busy):
            raise UserError(
                f"{self.folder}: is not complete and cannot be written; set TEACHER_BANK_FOLDER to a place of yours, "
                "or TEACHER_BANK lazy"
            )

    def check(self, rows: int) -> None:
        """Raises UserError where it could not be made, or not take `rows` rows, or not become whole as wanted."""
        if self.whole:
            self.check_fillable()
        if self.shape["rows"] >= 2**30:
            raise UserError(f"TEACHER_BANK: {self.shape['rows']:,} views are too many to keep; set TEACHER_BANK off")
        if self.store is None:
            check_writable(self.folder, "TEACHER_BANK_FOLDER")
        check_space(self.folder, **(self.shape | {"rows": rows}))
        if self.device.type == "cuda" and self.table is None:
            size = self.shape["rows"] * self.shape["width"] * np.dtype(self.shape["dtype"]).itemsize
            free, _ = torch.cuda.mem_get_info(self.device)
            if size > free // 2:
                raise UserError(
                    f"TEACHER_BANK: {size / 2**30:.1f} GiB of logits are more than half of the device's free "
                    f"{free / 2**30:.1f} GiB; set TEACHER_BANK off"
                )

    def close(self) -> None:
        self.commit()
        if self.store is not None:
            with contextlib.suppress(OSError):  # has been said
                self.store.close()
        self.store = self.table = None

    def read(self, rows: Tensor) -> Tensor:
        """Logits (n, K) of held rows (n,), both on the CPU or the former on the device."""
        if self.table is not None:
            return self.table[rows.to(self.device)]
        return torch.from_numpy(self.store.read(rows.numpy())).to(self.device)

    def add(self, rows: Tensor, logits: Tensor) -> None:
        """Keep logits (n, K) of rows (n,) that are not held; on a full disk the bank stays as it is."""
        if not self.store.writable or self.full_disk:
            return
        try:
            self.store.add(rows.numpy(), logits.cpu().numpy())
        except OSError as error:
            self.stay(error)
            return
        if self.table is not None:
            self.table[rows.to(self.device)] = logits

    def stay(self, error: OSError) -> None:
        self.full_disk = True
        say(f"warning: {self.folder}: {error.strerror or error}; the teacher bank grows no further")

    def commit(self) -> None:
        """What was added survives a power loss, unless the disk is full."""
        if self.store is not None and not self.full_disk:
            try:
                self.store.commit()
            except OSError as error:
                self.stay(error)


class TeacherLogits:
    """Called with a plan (4, n) on the CPU: the teacher's logits on its views, (n, K) float32 on the device.

    Rounded to `dtype`, whether or not a bank keeps them, so that a bank changes no number. `batches`: the views;
    `inference`: the teacher; `stream`: where all who share teacher and bank use them, one after the other. Raises
    RunFailed where `dtype` cannot hold a logit.
    """

    def __init__(
        self,
        batches: Batches,
        inference: Inference,
        dtype: torch.dtype = torch.float16,
        bank: Bank | None = None,
        stream: torch.cuda.Stream | None = None,
    ):
        self.stream = stream
        self.batches, self.inference, self.dtype, self.bank = batches, inference, dtype, bank
        self.device = batches.images.device
        self.chunk = CHUNK.get(self.device.type, LARGE_CHUNK)

    def __call__(self, plan: Tensor, check: Callable[[], None] = lambda: None) -> Tensor:
        """`check` is called after every pass of the teacher; what it raises loses nothing."""
        if self.stream is None:
            return self.look_up(plan, check)
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.stream):  # beside the steps that are queued: it needs nothing of them
            logits = self.look_up(plan, check)
        current.wait_stream(self.stream)
        logits.record_stream(current)
        return logits

    def look_up(self, plan: Tensor, check: Callable[[], None]) -> Tensor:
        rows = self.batches.row_numbers(plan)
        if self.bank is None:
            return torch.cat(list(self.compute(rows, check))).float()
        held = torch.from_numpy(self.bank.store.holds(rows.numpy()))
        if held.all():
            return self.bank.read(rows).float()
        missing, parts = rows[~held], []
        for part in self.compute(missing, check):
            parts.append(part)
        fresh = torch.cat(parts)
        logits = fresh.new_empty(len(rows), fresh.shape[1])
        logits[~held.to(self.device)] = fresh
        logits[held.to(self.device)] = self.bank.read(rows[held])
        self.bank.add(missing, fresh)
        return logits.float()

    @torch.no_grad()
    def compute(self, rows: Tensor, check: Callable[[], None] = lambda: None) -> Iterator[Tensor]:
        """The logits of `rows` (n,), see Batches.row_numbers, in parts of `chunk`, in `dtype`, on the device."""
        for part in rows.split(self.chunk):
            padded = torch.cat([part, part[-1:].expand(self.chunk - len(part))])
            plan = self.batches.plan_of(padded).to(self.device)
            exact = self.inference(self.batches.batch(plan).image)[: len(part)]
            logits = exact.to(self.dtype)
            if self.dtype == torch.float16 and bool((logits.isinf() & exact.isfinite()).any()):
                largest = float(exact[exact.isfinite()].abs().max())
                raise RunFailed(
                    f"the teacher's logits reach {largest:.3g}, more than float16 holds; set TEACHER_BANK_DTYPE float32"
                )
            yield logits
            check()

    def prepare(self, check: Callable[[], None]) -> None:
        """What has to be there before the first step."""
        if self.bank is None:
            return
        self.bank.make()
        self.bank.wait(check)
        self.bank.open()
        self.compare()
        if self.bank.whole and not self.bank.store.complete:
            with torch.cuda.stream(self.stream):  # nothing off CUDA, where it is None
                self.fill(check)

    @property
    def complete(self) -> bool:
        """Whether the teacher is asked no more."""
        return self.bank is not None and self.bank.share == 1

    def commit(self) -> None:
        """What the bank has gathered survives a power loss."""
        if self.bank is not None:
            self.bank.commit()

    @torch.no_grad()
    def compare(self) -> None:
        """A few rows of the bank with the teacher's own, once. Raises UserError where they differ: the teacher's code
        may have changed, which no digest of its weights tells.
        """
        if self.bank.sound or not self.bank.share:
            return
        store = self.bank.store
        held = np.flatnonzero(store.holds(np.arange(store.rows)))
        rows = torch.from_numpy(held[:: -(-len(held) // self.chunk)])
        there, own = self.bank.read(rows).float(), torch.cat(list(self.compute(rows))).float()
        rounding = 1e-2 if self.inference.amp == "none" else 5e-2  # other processors round otherwise
        if not bool((own - there).abs().max() <= rounding * own.abs().max()):
            raise UserError(
                f"{self.bank.folder}: holds other logits than this teacher gives, whose code may have changed; remove "
                "that folder, or set TEACHER_BANK_FOLDER to another one"
            )
        self.bank.sound = True

    def fill(self, check: Callable[[], None] = lambda: None) -> None:
        """Compute every row that the bank lacks; where `check` raises, what is done by then is kept."""
        store = self.bank.store
        title = f"teacher bank, {store.rows:,} views"
        begin = kept = time.monotonic()
        before = store.filled
        with kept_at_last(store), progress(store, title) as bar:
            for start in range(0, store.rows, BLOCK):
                rows = torch.from_numpy(store.missing(np.arange(start, min(start + BLOCK, store.rows))))
                if not len(rows):
                    continue
                for part, logits in zip(rows.split(self.chunk), self.compute(rows, check), strict=True):
                    store.add(part.numpy(), logits.cpu().numpy())
                    if self.bank.table is not None:
                        self.bank.table[part.to(self.device)] = logits
                    with unbroken():
                        bar.update(len(part))
                    if time.monotonic() - kept > SECONDS_LOST:
                        store.commit()
                        kept = time.monotonic()
                        if bar.disable:
                            left = (kept - begin) * (store.rows - store.filled) / (store.filled - before)
                            say(f"{title}: {100 * store.filled / store.rows:.1f} % done, {clock(left)} left")
        say(f"{title}: complete after {clock(time.monotonic() - begin)}, in {store.folder}")


@contextlib.contextmanager
def kept_at_last(store: RowStore) -> Iterator[None]:
    """What was added by the end is kept, whatever ends it. Raises RunFailed where the disk does not take it."""
    try:
        try:
            yield
        finally:
            store.commit()
    except OSError as error:  # it names no file
        raise RunFailed(
            f"{store.folder}: {error.strerror or error}; what it holds stays; make room, or set TEACHER_BANK lazy or "
            "another TEACHER_BANK_FOLDER"
        ) from None


@contextlib.contextmanager
def progress(store: RowStore, title: str) -> Iterator[tqdm]:
    """A bar of the rows held, on a terminal."""
    form = {"desc": title, "unit": "view", "unit_scale": True, "leave": False}
    with unbroken():
        bar = tqdm(total=store.rows, initial=store.filled, file=sys.stdout, disable=not sys.stdout.isatty(), **form)
    try:
        yield bar
    finally:
        with unbroken():
            bar.close()


def clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


class Choice(NamedTuple):
    mode: str  # full, lazy, none: no bank
    reason: str


def met(views: int, draws: int, whole: bool) -> float:
    """How many of an image's `views` a bank comes to hold: all if `whole`, else those met in `draws` draws."""
    return views if whole else views * (1 - (1 - 1 / views) ** draws)


def choose(wanted: str, views: int, draws: int, held: float, cuda: bool) -> Choice:
    """What TEACHER_BANK `wanted` comes to where `draws` views of each image are to be met (epochs times students), out
    of `views` different ones, and the bank holds the share `held` of those that matter.

    auto counts the teacher's passes: without a bank one for every draw; filled on use one for every view that is met
    for the first time; filled beforehand one for every view, which is CUDA's way, for a look-up would stall it.
    """
    if wanted != "auto":
        return Choice(wanted, "")
    share = (1 - held) * met(views, draws, cuda) / max(draws, 1)
    text = f"{100 * share:.0f} % of the teacher's passes" if share <= 1 else f"{share:.1f} times the teacher's passes"
    text = f"{draws} draws from an image's {views} views leave {text}"
    if share >= PAYS:
        return Choice("none", f"a bank would not pay: {text}")
    return Choice("full" if cuda else "lazy", text)


class Shared:
    """The teachers and banks of a process, by file: students that have one in common share it."""

    def __init__(self):
        self.files: list[Path | None] = []  # the teacher's, of each student
        self.inferences: dict[str, Inference] = {}
        self.banks: dict[Path, Bank] = {}
        self.parameters: dict[str, list[nn.Parameter]] = {}
        self.stream: torch.cuda.Stream | None = None

    def logits_of(
        self,
        cfg: CfgNode,
        distiller: nn.Module,
        batches: Batches,
        file: Path | None,
        origin: dict[str, str],
        epochs: int,
        classes: int,
    ) -> tuple[TeacherLogits | None, str]:
        """The logits of the teacher in `file` for `epochs` epochs of each student, as TEACHER_BANK says, and a line
        that says what it has come to; (None, "") where the teacher runs within the step. `origin`: digests of its
        weights ("teacher") and of the data ("data"), of so many `classes`.

        Raises UserError where a bank is asked for that does not fit, or that is another teacher's.
        """
        if cfg.TEACHER_BANK == "off" or file is None:
            return None, ""
        if not takes_logits(distiller):
            asked = cfg.TEACHER_BANK != "auto"
            return None, f"teacher bank: none ({cfg.DISTILLER.TYPE} needs more of its teacher than logits)" * asked
        device, dtype = batches.images.device, getattr(torch, cfg.TEACHER_BANK_DTYPE)
        if origin["teacher"] not in self.inferences:
            self.inferences[origin["teacher"]] = Inference(distiller.teacher, device, cfg.SOLVER.AMP)
        inference = self.inferences[origin["teacher"]]
        shape = {"rows": batches.num_samples * batches.views, "width": classes, "dtype": cfg.TEACHER_BANK_DTYPE}
        key = description(cfg, batches, origin)
        root = expand(cfg.TEACHER_BANK_FOLDER) if cfg.TEACHER_BANK_FOLDER else file.absolute().parent
        stem = os.fsencode(file.stem)[:237].decode(errors="ignore")  # a name has 255 bytes at most
        folder = root / f"{stem}.bank-{checkpoint.digest(key)[:12]}"
        bank = self.banks.setdefault(folder, Bank(folder, key, shape, device))
        logits = TeacherLogits(batches, inference, dtype, bank, self.stream_on(device))
        draws, cuda, auto = epochs * max(1, self.files.count(file)), device.type == "cuda", cfg.TEACHER_BANK == "auto"
        try:
            bank.find()
            logits.compare()
            held = bank.share if cuda else bank.share_of_draws(batches, epochs)
            mode, reason = choose(cfg.TEACHER_BANK, batches.views, draws, held, cuda)
            if mode != "none":
                bank.whole = mode == "full"
                bank.check(int(batches.num_samples * met(batches.views, draws, bank.whole)))
        except UserError as error:
            if not auto:
                raise
            mode, reason = "none", error.lines[0]
        if mode == "none":
            bank.close()  # another process may want to add to it
            logits.bank = None
            return logits, f"teacher bank: none ({reason})"
        text = f"teacher bank: {mode}{f' ({reason})' * bool(reason)}, {100 * bank.share:.1f} % held, in {folder}"
        if bank.store is not None and not bank.store.writable:
            text += "; another process adds to it, this one only reads" if bank.store.busy else "; it is only read"
        return logits, text

    def stream_on(self, device: torch.device) -> torch.cuda.Stream | None:
        """The one stream of all that is shared, on CUDA: a captured graph has one input and one output."""
        if device.type == "cuda" and self.stream is None:
            self.stream = torch.cuda.Stream(device)
        return self.stream

    def tie(self, teacher: nn.Module, digest: str) -> None:
        """Let teachers of one digest share a copy of their parameters, which nobody changes."""
        first = self.parameters.setdefault(digest, list(teacher.parameters()))
        for own, common in zip(teacher.parameters(), first, strict=True):
            own.data = common.data

    def close(self) -> None:
        for bank in self.banks.values():
            bank.close()


def description(cfg: CfgNode, batches: Batches, origin: dict[str, str]) -> dict[str, str | int]:
    """All that a row's number depends on, and what it is rounded to."""
    return {
        "teacher": cfg.DISTILLER.TEACHER,
        "weights": origin["teacher"],
        "data": origin["data"],
        "code": CODE,
        "augment": str(batches.augment),
        "views": batches.views,
        "padding": batches.padding,
        "scale": " ".join(f"{value:.9g}" for value in (*batches.scale.tolist(), *batches.shift.tolist())),
        "precision": cfg.SOLVER.AMP,
        "stored": cfg.TEACHER_BANK_DTYPE,
        "device": batches.images.device.type,
    }
