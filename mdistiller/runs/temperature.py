"""The temperature record: what a temperature rule gave every training sample, epoch by epoch.

`temperatures.bin`, one file a run: a header of HEADER bytes (JSON, padded with spaces), then one block an epoch, the
SAVED fields as little-endian float16 (len(SAVED), N), sample n of the training set in column n. A block is only ever
appended, so the file can be read while training goes on: a last block that is not complete does not count.
"""

import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mdistiller.distillers.losses import Temperatures, bounded
from mdistiller.errors import UserError
from mdistiller.files import open_regular, write_atomic

HEADER = 4096
SAVED = ("t_student", "t_teacher", "max_student", "max_teacher")
FIELDS = (*SAVED, "sharpness_student", "sharpness_teacher", "confidence", "sound")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class EpochBuffer:
    """FIELDS of every training sample, on the device; nothing leaves it before `summary` or `append`."""

    def __init__(self, samples: int, device: torch.device):
        self.values = torch.full((len(FIELDS), samples), torch.nan, device=device)

    def reset(self) -> None:
        """Forget all; the tensor stays, so that a captured step goes on writing to it."""
        self.values.fill_(torch.nan)

    def put(self, index: Tensor, logits_student: Tensor, logits_teacher: Tensor, temperatures: Temperatures) -> None:
        """Take in a batch: index (B,), logits (B, K), temperatures (B, 1)."""
        with torch.no_grad():
            student, teacher = bounded(logits_student), bounded(logits_teacher)
            columns = (
                temperatures.student,
                temperatures.teacher,
                student.amax(1, keepdim=True),
                teacher.amax(1, keepdim=True),
                torch.logsumexp(student / temperatures.student, 1, keepdim=True),
                torch.logsumexp(teacher / temperatures.teacher, 1, keepdim=True),
                F.softmax(teacher, 1).amax(1, keepdim=True),
                temperatures.sound,
            )
            self.values[:, index] = torch.cat([column.float() for column in columns], 1).T

    def columns(self, *names: str) -> dict[str, np.ndarray]:
        """Return the named FIELDS of the samples that were seen, in finite logits, in float64; reads the device."""
        seen = self.values[:, self.values.isfinite().all(0)]
        return {name: seen[FIELDS.index(name)].cpu().double().numpy() for name in names}

    def summary(self) -> dict:
        """Return the epoch's figures, for one line of metrics.jsonl: of student and teacher temperature and sharpness
        mean, std, min, max and quantiles; the share of samples that fell back; the correlation of the temperatures with
        the teacher's confidence (0 where either does not vary). Samples that were not seen do not count.
        """
        data = self.columns(*FIELDS)
        if not data["sound"].size:
            return {}
        result = {name: spread(data[name]) for name in (*SAVED[:2], "sharpness_student", "sharpness_teacher")}
        result["fell_back"] = float(1 - data["sound"].mean())
        for side in SAVED[:2]:
            result[f"confidence_correlation_{side}"] = correlation(data[side], data["confidence"])
        return result


def spread(values: np.ndarray) -> dict[str, float]:
    quantiles = {
        f"q{round(100 * q):02d}": float(v) for q, v in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)
    }
    extremes = {"min": float(values.min()), "max": float(values.max())}
    return {"mean": float(values.mean()), "std": float(values.std())} | extremes | quantiles


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Return Pearson's correlation; 0 where either is constant."""
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 1e-12 * len(x) else 0.0


class RecordFile:
    """Appends epochs to the record at `path`. `done`: epochs that are finished; what a crash left behind them goes, and
    for those that are not in the file (`missing`: how many) stands NaN. A damaged file is kept under another name.
    """

    def __init__(self, path: Path, samples: int, done: int = 0):
        self.path, self.block, self.missing = path, 2 * len(SAVED) * samples, done
        if done and path.exists():
            try:
                record = read_record(path)
                if record.values.shape[1:] != (len(SAVED), samples):
                    raise UserError(f"{path}: is of other data")
                self.missing = max(done - len(record.values), 0)
            except UserError:
                os.replace(path, path.with_name(f"{path.name}.damaged"))
        if self.missing == done:
            header = json.dumps({"format": 1, "samples": samples, "fields": SAVED, "dtype": "<f2"})
            write_atomic(path, header.encode().ljust(HEADER))
        os.truncate(path, HEADER + (done - self.missing) * self.block)
        for _ in range(self.missing):
            self._add(np.full(self.block // 2, np.nan, "<f2"))

    def append(self, buffer: EpochBuffer) -> None:
        """Add an epoch. Values that float16 cannot hold become its largest; samples not seen are NaN."""
        limit = np.finfo(np.float16).max
        self._add(buffer.values[: len(SAVED)].clamp(-limit, limit).half().cpu().numpy().astype("<f2"))

    def _add(self, block: np.ndarray) -> None:
        with open(self.path, "ab") as file:
            file.write(block.tobytes())
            file.flush()
            os.fsync(file.fileno())


class Record(NamedTuple):
    fields: tuple[str, ...]
    values: np.ndarray  # (epochs, fields, N) float16, memory-mapped


def read_record(path: Path) -> Record:
    """Return the finished epochs of a record. Raises UserError where the file is missing or is none."""
    with open_regular(path, "a run recorded with LOG.TEMPERATURE samples") as file:
        try:
            header = json.loads(file.read(HEADER))
            fields, samples = header["fields"], header["samples"]
            if (header["format"], header["dtype"], type(samples), type(fields)) != (1, "<f2", int, list) or samples < 1:
                raise ValueError("unknown format")
            if not fields or not all(type(name) is str for name in fields):
                raise ValueError("its fields are no names")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path}: is no temperature record ({error})") from None
        epochs = (os.fstat(file.fileno()).st_size - HEADER) // (2 * len(fields) * samples)
    shape = (epochs, len(fields), samples)
    values = np.memmap(path, "<f2", "r", HEADER, shape) if epochs > 0 else np.empty((0, *shape[1:]), "<f2")
    return Record(tuple(fields), values)
