"""A frozen teacher's logits on the views of the training set: computed some steps ahead, or kept in a bank.

A view is what the augmentation makes of an image: CIFAR's has 81 crops times 2 flips. A logit method needs nothing
of the teacher but its logits on the views that it meets, so no view has to pass through the teacher twice.
"""

import os
import random
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mdistiller.bank.inference import Inference
from mdistiller.bank.segments import Segments
from mdistiller.bank.topk import TopK, rounded
from mdistiller.dataset import Batches
from mdistiller.errors import RunFailed, UserError
from mdistiller.terminal import say, shows_bars, unbroken

WINDOW = 1024  # views that are looked up together, some steps ahead
# A teacher's pass always has as many images: the bits of a row may depend on how many it is computed with, on a CPU
# never on which. So a bank that any run fills in any order holds the same numbers, and a graph has one shape.
CHUNK = {"cpu": 64}
LARGE_CHUNK = 1024
BLOCK = 2**16  # views that `fill` looks up together
COMMIT_EVERY_S = 30.0  # seconds of work that a killed process may lose while it fills a bank


def takes_logits(distiller: nn.Module) -> bool:
    """Return whether the method can do without a teacher's pass of its own on the batch: it says so, and its teacher
    neither learns nor leaves eval mode.
    """
    if not distiller.takes_teacher_logits:
        return False
    learns = not {*distiller.teacher.parameters()}.isdisjoint(distiller.get_learnable_parameters())
    return not learns and not distiller.train().teacher.training


class Bank:
    """The logits of one teacher on all views, which its students share: rows on disk, on CUDA in device memory too."""

    def __init__(self, rows: Segments):
        self.rows, self.folder = rows, rows.folder
        self.fill_first = False  # whether all rows are computed before the first step
        self.compared = False  # whether some rows were compared with the teacher's own
        self.grows = True  # until the disk refuses
        self._committed = time.monotonic()

    @property
    def share(self) -> float:
        """The share of all rows that is held."""
        return self.rows.filled / self.rows.rows

    def add(self, rows: Tensor, logits: Tensor) -> None:
        """Keep logits (n, K) of `rows` (n,), unless the disk has refused some."""
        if self.grows:
            self.rows.add(rows, logits.cpu())

    def is_due(self) -> bool:
        """Return whether the last commit is so long ago that there should be another."""
        return time.monotonic() - self._committed >= COMMIT_EVERY_S

    def commit(self, must: bool = False) -> None:
        """Write what was added to the disk. Where that refuses, the bank grows no further: say so, or raise RunFailed
        if it `must` grow.
        """
        if not self.grows:
            return
        self._committed = time.monotonic()
        try:
            self.rows.commit()
        except OSError as error:
            self.grows = False
            reason = f"{self.folder}: {error.strerror or error}"
            if must:
                raise RunFailed(
                    f"{reason}; what it holds stays; make room, or set TEACHER_BANK lazy or another TEACHER_BANK_FOLDER"
                ) from None
            say(f"warning: {reason}; the teacher bank grows no further")


class TeacherLogits:
    """Called with a plan (4, n) on the CPU: the teacher's logits on its views, (n, K) float32 on the device.

    They are rounded to `dtype`, whether or not a bank keeps them, so that a bank changes no number. `batches` has the
    views, `inference` the teacher; `stream` is where all who share teacher and bank use them, one after the other.
    Raises RunFailed where `dtype` cannot hold a logit.
    """

    sample, unit = "an image", "view"  # of what views there are, and what a row of a bank is of
    width = 0  # numbers of a row; 0: one for each class
    form: TopK | None = None  # packs the largest logits of a row; None: rows are whole

    def __init__(
        self,
        batches: Batches,
        inference: Inference,
        dtype: torch.dtype = torch.float16,
        bank: Bank | None = None,
        stream: torch.cuda.Stream | None = None,
    ):
        self.batches, self.inference, self.dtype, self.bank = batches, inference, dtype, bank
        self.stream, self.device = stream, batches.images.device
        self.chunk = CHUNK.get(self.device.type, LARGE_CHUNK)

    def __call__(self, plan: Tensor, check: Callable[[], None] = lambda: None) -> Tensor:
        """`check` is called after every pass of the teacher, and may raise."""
        rows = self.batches.row_numbers(plan)

        def own(missing: Tensor) -> Tensor:
            return torch.cat(list(self.run_teacher(rows[missing], check)))

        if self.stream is None:
            return self.given(self.look_up(rows, own))
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.stream):  # beside the steps that are queued: it needs nothing of them
            logits = self.look_up(rows, own)
        current.wait_stream(self.stream)
        logits.record_stream(current)
        return self.given(logits)

    def given(self, kept: Tensor) -> Tensor:
        """Return what a step is given of rows as a bank keeps them."""
        return self.form.unpack(kept) if self.form else kept.float()

    def comparable(self, kept: Tensor) -> Tensor:
        """Return numbers of rows as a bank keeps them that differ by roundings alone where the teacher is the same: of
        packed rows probabilities, for with other roundings another entry may be the k-th, which is then a small one.
        """
        logits = self.given(kept).float()
        return logits.softmax(1) if self.form else logits

    def look_up(self, rows: Tensor, own: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what the bank holds of `rows` (n,), (n, K), and for the others what `own` gives, the teacher's logits
        as the bank keeps them, of those that are `missing`, (n,) bool.
        """
        if self.bank is None:
            return own(torch.ones_like(rows, dtype=torch.bool))
        held = self.bank.rows.holds(rows)
        if held.all():
            return self.read(rows)
        fresh = own(~held)
        self.bank.add(rows[~held], fresh)
        logits = fresh.new_empty(len(rows), fresh.shape[1])
        logits[~held.to(self.device)] = fresh
        if held.any():
            logits[held.to(self.device)] = self.read(rows[held])
        return logits

    def read(self, rows: Tensor) -> Tensor:
        """Return what the bank holds of `rows` (n,), (n, K), on the device."""
        return self.bank.rows.read(rows).to(self.device)

    @torch.no_grad()
    def run_teacher(self, rows: Tensor, check: Callable[[], None] = lambda: None) -> Iterator[Tensor]:
        """Yield the teacher's own logits of `rows` (n,), see Batches.row_numbers, in `dtype`, in parts of `chunk`."""
        for part in rows.split(self.chunk):
            padded = torch.cat([part, part[-1:].expand(self.chunk - len(part))])
            plan = self.batches.plan_of(padded).to(self.device)
            yield rounded(self.inference(self.batches.batch(plan).image)[: len(part)], self.dtype)
            check()

    def prepare(self, check: Callable[[], None]) -> None:
        """See to what has to be there before an epoch: on CUDA the bank's rows in device memory; all of its rows, where
        it is filled first.
        """
        if self.bank is None:
            return
        if self.device.type == "cuda" and self.bank.rows.table is None:
            self.bank.rows.to_device(self.device)
            torch.cuda.synchronize(self.device)  # it is read on another stream
        with torch.cuda.stream(self.stream):  # off CUDA it is None, which changes nothing
            self.compare()
            if self.bank.fill_first and not self.complete:
                self.fill(check)

    @property
    def complete(self) -> bool:
        """Whether the teacher is asked no more."""
        return self.bank is not None and self.bank.share == 1

    def commit(self) -> None:
        """Write what the bank has gathered to the disk, where that was last done long enough ago."""
        if self.bank is not None and self.bank.is_due():
            with torch.cuda.stream(self.stream):  # where device memory is written and read
                self.bank.commit()

    def compare(self) -> None:
        """Compare a few rows of the bank with the teacher's own, once. Raises UserError where they differ: the
        teacher's code may have changed, which no digest of its weights tells.
        """
        if self.bank.compared or not self.bank.share:
            return
        held = self.bank.rows.holds(torch.arange(self.bank.rows.rows)).nonzero()[:, 0]
        rows = held[:: -(-len(held) // self.chunk)]
        self.check_same(self.read(rows), torch.cat(list(self.run_teacher(rows))))
        self.bank.compared = True

    def check_same(self, there: Tensor, own: Tensor) -> None:
        """Raise UserError where rows of the bank differ from the teacher's `own`, both as the bank keeps them."""
        there, own = self.comparable(there), self.comparable(own)
        rounding = 1e-2 if self.inference.amp == "none" else 5e-2  # other processors round otherwise
        if not bool((own - there).abs().max() <= rounding * own.abs().max()):
            raise UserError(
                f"{self.bank.folder}: holds other logits than this teacher gives, whose code may have changed; remove "
                "that folder, or set TEACHER_BANK_FOLDER to another one"
            )

    def fill(self, check: Callable[[], None]) -> None:
        """Compute every row that the bank lacks. Where `check` raises, what is done by then is kept. Raises RunFailed
        where the disk does not take it.
        """
        bank, rows = self.bank, self.bank.rows
        title, begin, before = f"teacher bank, {rows.rows:,} {self.unit}s", time.monotonic(), rows.filled
        blocks = torch.arange(rows.rows).split(BLOCK)
        first = random.Random(os.getpid()).randrange(len(blocks))  # processes that fill it together share the work
        form = {"desc": title, "unit": self.unit, "unit_scale": True, "leave": False, "disable": not shows_bars()}
        with unbroken():
            bar = tqdm(total=rows.rows, initial=before, file=sys.stdout, **form)
        try:
            for block in (*blocks[first:], *blocks[:first]):
                missing = block[~rows.holds(block)]
                if not len(missing):
                    continue
                for part, logits in zip(missing.split(self.chunk), self.run_teacher(missing, check), strict=True):
                    bank.add(part, logits)
                    with unbroken():
                        bar.update(len(part))
                    if bank.is_due():
                        bank.commit(must=True)
                        left = (rows.rows - rows.filled) * (time.monotonic() - begin) / (rows.filled - before)
                        if bar.disable:
                            say(f"{title}: {100 * bank.share:.1f} % done, {tqdm.format_interval(left)} left")
        finally:
            with unbroken():
                bar.close()
            bank.commit(must=True)
        say(f"{title}: complete after {tqdm.format_interval(time.monotonic() - begin)}")
