"""Which teachers and banks the students of a process use, and whether a bank pays."""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from yacs.config import CfgNode

from mdistiller.bank.inference import Inference
from mdistiller.bank.segments import Segments
from mdistiller.bank.streamed import EpochBanks, StreamedLogits
from mdistiller.bank.teacher import Bank, TeacherLogits, takes_logits
from mdistiller.bank.text import TextLogits, TextTeacher
from mdistiller.bank.topk import TopK
from mdistiller.config import teacher_names
from mdistiller.dataset import Batches, TokenBatches
from mdistiller.errors import UserError
from mdistiller.files import expand
from mdistiller.models import default_checkpoint
from mdistiller.runs import checkpoint
from mdistiller.runs.folder import check_writable
from mdistiller.terminal import counted

BANK_VERSION = 2  # raised where a view or a row comes to another number than before, or files to another form
BANK_PAYS_BELOW = 0.8  # auto makes a bank that leaves less than this share of the teacher's passes


class Choice(NamedTuple):
    mode: str  # full, lazy, none: no bank
    reason: str


def expected_distinct_views(views: int, draws: int, fill_first: bool) -> float:
    """Return how many of an image's `views` a bank comes to hold: all of them if it is filled first, else those that
    are met in so many `draws`.
    """
    return views if fill_first else views * (1 - (1 - 1 / views) ** draws)


def choose(wanted: str, views: int, draws: int, held: float, cuda: bool, sample: str = "an image") -> Choice:
    """Return what TEACHER_BANK `wanted` comes to where a `sample` has so many `views`, so many `draws` of them are to
    be met (epochs times students), and the bank holds the share `held` of those that matter.

    auto counts the teacher's passes: without a bank one for every draw; with one that is filled on use one for every
    view that is met for the first time; with one that is filled first one for every view. The latter is CUDA's way,
    for a look-up on the disk would stall it.
    """
    if wanted != "auto":
        return Choice(wanted, "")
    share = (1 - held) * expected_distinct_views(views, draws, cuda) / max(draws, 1)
    text = f"it saves {max(0.0, 100 * (1 - share)):.0f} %" if share < 1.05 else f"it takes {share:.1f} times"
    text = f"{text} of the teacher's passes; {sample} has {counted(views, 'view')} and is used {counted(draws, 'time')}"
    if share >= BANK_PAYS_BELOW:
        return Choice("none", f"a bank would not pay: {text}")
    return Choice("full" if cuda else "lazy", text)


def check_room(rows: Segments, wanted: int, device: torch.device) -> None:
    """Raise UserError where the disk does not take `wanted` rows, or the device's memory not all of them."""
    if rows.rows >= 2**29:
        raise UserError(f"TEACHER_BANK: {rows.rows:,} views are too many to keep; set TEACHER_BANK off")
    row_bytes = rows.width * rows.dtype.itemsize
    check_disk(rows.folder, max(0, wanted - rows.filled) * (8 + row_bytes))
    if device.type == "cuda" and rows.table is None:
        free, _ = torch.cuda.mem_get_info(device)
        if rows.rows * row_bytes > free // 2:
            raise UserError(
                f"TEACHER_BANK: {rows.rows * row_bytes / 2**30:.1f} GiB of logits are more than half of the device's "
                f"free {free / 2**30:.1f} GiB; set TEACHER_BANK off"
            )


def check_disk(folder: Path, needed: int) -> None:
    """Raise UserError where the disk of `folder` has no room for `needed` bytes."""
    parent = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    free = shutil.disk_usage(parent).free
    if needed > 0.95 * free:
        raise UserError(
            f"{folder}: needs {needed / 1e6:,.1f} MB of disk space, and {parent} has {free / 1e6:,.1f} MB free; "
            "set TEACHER_BANK_FOLDER to another disk, or TEACHER_BANK off"
        )


def check_form(cfg: CfgNode, batches: Batches) -> None:
    """Raise UserError where no bank on `batches` can have the form that `cfg` asks for."""
    if batches.streamed and cfg.TEACHER_BANK == "full":
        raise UserError("TEACHER_BANK: full is for views that can be counted, and pictures are streamed; set lazy")
    if cfg.TEACHER_BANK_TOP_K and not (batches.streamed or isinstance(batches, TokenBatches)):
        raise UserError("TEACHER_BANK_TOP_K: is for text and for streamed pictures; leave it out")
    if cfg.TEACHER_BANK_TOP_K and cfg.TEACHER_BANK == "off":
        raise UserError("TEACHER_BANK_TOP_K: TEACHER_BANK off keeps no logits; leave one of the two out")


class TeacherPool:
    """The teachers of a process and their banks, which students that have one in common share.

    `num_classes` and `data_digest` are those of the data that all of them train on; `files` has the teacher's file of
    each student. `kept`: whether the banks stay when the runs have ended.
    """

    def __init__(self, num_classes: int, data_digest: str, kept: bool = True):
        self.num_classes, self.data_digest, self.kept = num_classes, data_digest, kept
        self.files: list[Path | None] = []
        self.inferences: dict[str, Inference] = {}  # by the digest of the teacher's weights
        self.banks: dict[Path, Bank | EpochBanks] = {}
        self.parameters: dict[str, list[nn.Parameter]] = {}
        self.stream: torch.cuda.Stream | None = None

    def logits_of(
        self, cfg: CfgNode, distiller: nn.Module, batches: Batches, file: Path | None, digest: str
    ) -> tuple[TeacherLogits | None, str]:
        """Return the logits of the teacher in `file`, whose weights have that `digest`, as TEACHER_BANK says, and a
        line that says what it has come to; (None, "") where the teacher runs within the step.

        Raises UserError where a bank is asked for that does not fit, or that is another teacher's.
        """
        if cfg.TEACHER_BANK == "off" or file is None:
            return None, ""
        if not takes_logits(distiller):
            reason = f"teacher bank: none ({cfg.DISTILLER.TYPE} needs more of its teacher than logits)"
            return None, reason if cfg.TEACHER_BANK != "auto" else ""
        text = isinstance(batches, TokenBatches)
        if text and not cfg.TEACHER_BANK_TOP_K:  # whole rows of a batch of tokens need not exist together
            return None, "teacher bank: none (set TEACHER_BANK_TOP_K 64 for one)" if cfg.SOLVER.EPOCHS > 1 else ""
        if batches.mixing is not None and batches.mixing.mixes:
            return None, "teacher bank: none (images are mixed)"
        logits = self.asked(cfg, distiller.teacher, batches, digest)
        if batches.streamed and cfg.TEACHER_BANK == "auto":
            return logits, "teacher bank: none (pictures are streamed; lazy keeps it for later runs of this SEED)"
        views = description(cfg, batches, digest, self.data_digest)
        beside = file
        if checkpoint.is_source(file):  # which lies nowhere
            beside = Path(default_checkpoint(cfg.DISTILLER.TEACHER, cfg.DATASET.TYPE)).with_name(f"{file}.pth")
        root = expand(cfg.TEACHER_BANK_FOLDER) if cfg.TEACHER_BANK_FOLDER else beside.absolute().parent
        stem = os.fsencode(beside.stem)[:237].decode(errors="ignore")  # a name has 255 bytes at most
        folder = root / f"{stem}.bank-{checkpoint.digest(views)[:12]}"
        if batches.streamed:
            return logits, self.open_epochs(cfg, logits, folder, views)
        try:
            mode, reason = self.open_bank(cfg, logits, folder, views, max(1, self.files.count(file)))
        except UserError as error:
            if cfg.TEACHER_BANK != "auto":
                raise
            mode, reason = "none", error.lines[0]
        if mode == "none":
            logits.bank = None
            return logits, f"teacher bank: none ({reason})"
        self.banks[folder] = logits.bank
        because = f" ({reason})" if reason else ""
        line = f"teacher bank: {mode}{because}, {100 * logits.bank.share:.1f} % held"
        return logits, f"{line}, in {folder}" if self.kept else line

    def asked(self, cfg: CfgNode, teacher: nn.Module, batches: Batches, digest: str) -> TeacherLogits:
        """Return what asks `teacher`, whose weights have that `digest`, for its logits, without a bank yet."""
        device, dtype = batches.images.device, getattr(torch, cfg.TEACHER_BANK_DTYPE)
        if device.type == "cuda" and self.stream is None:
            self.stream = torch.cuda.Stream(device)  # one for all, as a captured graph has one input and one output
        form, amp = TopK(cfg.TEACHER_BANK_TOP_K, self.num_classes, dtype, device), cfg.SOLVER.AMP
        if isinstance(batches, TokenBatches):
            return TextLogits(batches, TextTeacher(teacher, form, amp), None, self.stream)
        if digest not in self.inferences:
            self.inferences[digest] = Inference(teacher, device, amp, batches.images.shape[1], captured=True)
        given = batches, self.inferences[digest], dtype
        if batches.streamed:
            return StreamedLogits(*given, form if cfg.TEACHER_BANK_TOP_K else None, self.stream)
        return TeacherLogits(*given, None, self.stream)

    def open_bank(
        self, cfg: CfgNode, logits: TeacherLogits, folder: Path, views: dict[str, object], students: int
    ) -> Choice:
        """Give `logits` the bank in `folder`, whose rows are what `views` says, and return how `students` use it."""
        batches, device, epochs = logits.batches, logits.device, cfg.SOLVER.EPOCHS
        rows = batches.num_samples * batches.views
        logits.bank = bank = self.banks.get(folder) or Bank(
            Segments(folder, views, rows, logits.width or self.num_classes, logits.dtype)
        )
        logits.compare()
        cuda = device.type == "cuda"
        held = bank.share if cuda else share_of_draws(bank.rows, batches, epochs)
        choice = choose(cfg.TEACHER_BANK, batches.views, epochs * students, held, cuda, logits.sample)
        bank.fill_first = choice.mode == "full"
        if choice.mode != "none":
            if bank.share < 1 and (bank.fill_first or not os.path.exists(folder)):
                check_writable(folder, "TEACHER_BANK_FOLDER")
            each = expected_distinct_views(batches.views, epochs * students, bank.fill_first)
            check_room(bank.rows, int(batches.num_samples * each), device)
        return choice

    def open_epochs(self, cfg: CfgNode, logits: StreamedLogits, folder: Path, views: dict[str, object]) -> str:
        """Give `logits` of streamed pictures the banks in `folder`, one for each epoch, and return a line on them."""
        rows, epochs = logits.batches.num_samples, cfg.SOLVER.EPOCHS
        banks = EpochBanks(folder, views, rows, logits.width or self.num_classes, logits.dtype)
        begun = banks.begun(epochs)
        if begun < epochs:
            check_writable(folder, "TEACHER_BANK_FOLDER")
        check_disk(folder, (epochs - begun) * rows * (8 + banks.row_bytes))
        logits.banks = self.banks.setdefault(folder, banks)
        return f"teacher bank: lazy, {begun} of {counted(epochs, 'epoch')} there, in {folder}"

    def tie(self, teacher: nn.Module, digest: str) -> None:
        """Let teachers of one digest share the memory of their parameters, which nobody changes."""
        first = self.parameters.setdefault(digest, list(teacher.parameters()))
        for own, common in zip(teacher.parameters(), first, strict=True):
            own.data = common.data

    def close(self) -> None:
        """Write what the banks have gathered to the disk."""
        for bank in self.banks.values():
            bank.commit()


def share_of_draws(rows: Segments, batches: Batches, epochs: int) -> float:
    """Return the share that is held of the views which `epochs` epochs will draw, as other runs of the seed did."""
    some = range(1, epochs + 1, -(-epochs // 8))
    held = [rows.holds(batches.row_numbers(batches.plan(epoch))).float().mean() for epoch in some]
    return float(torch.stack(held).mean())


def description(cfg: CfgNode, batches: Batches, teacher_digest: str, data_digest: str) -> dict[str, str | int]:
    """Return all that a row's number depends on, and what it is rounded to."""
    mean = {"mean": cfg.DISTILLER.ENSEMBLE_MEAN} if cfg.DISTILLER.ENSEMBLE else {}
    if isinstance(batches, TokenBatches):  # the data's digest has text, tokenizer and blocks
        views = {"block": batches.images.shape[1], "top_k": cfg.TEACHER_BANK_TOP_K}
    else:
        views = {
            "augment": str(batches.augment),
            "views": batches.views,
            "padding": batches.padding,
            "scale": " ".join(f"{value:.9g}" for value in (*batches.scale.tolist(), *batches.shift.tolist())),
        }
    if batches.streamed:  # whose rows are those of an epoch
        views |= {"pixels": str(tuple(batches.images.shape[1:3])), "seed": cfg.SEED, "top_k": cfg.TEACHER_BANK_TOP_K}
    return {  # whose order is part of a bank's name
        **mean,
        "teacher": "+".join(teacher_names(cfg)),
        "weights": teacher_digest,
        "data": data_digest,
        "version": BANK_VERSION,
        **views,
        "precision": cfg.SOLVER.AMP,
        "stored": cfg.TEACHER_BANK_DTYPE,
        "device": batches.images.device.type,
        **({"size": cfg.DISTILLER.TEACHER_SIZE} if cfg.DISTILLER.TEACHER_SIZE else {}),
    }
