"""Where figures go: the terminal, worklog.txt, metrics.jsonl, TensorBoard and, on request, Weights & Biases."""

import importlib.util
import json
import math
import sys
import time
from datetime import timedelta
from pathlib import Path

from tqdm import tqdm

from mdistiller import config
from mdistiller.errors import UserError
from mdistiller.files import link, write_atomic
from mdistiller.runs.events import Events
from mdistiller.runs.temperature import EpochBuffer
from mdistiller.terminal import columns, counted, say, shows_bars, unbroken


def line_of(row: dict, epochs: int, seconds_left: float, columns: int | None = None) -> str:
    """Return one epoch on one line, in so many `columns` what matters most; columns align from epoch to epoch."""
    width = len(str(epochs))
    speed, unit = row.get("images_per_second"), "img"
    if speed is None:
        speed, unit = row["tokens_per_second"], "tokens"
    parts = [  # each with its place among what is left out first
        (0, f"epoch {row['epoch']:>{width}}/{epochs}"),
        (7, f"lr {row['lr']:<7.5g}"),
        (4, f"loss {row['train_loss']:6.3f}"),
        (5, f"train {row['train_acc']:6.2f}" if "train_acc" in row else ""),
        (1, f"{'AP' if 'AP' in row else 'test'} {row['test_acc']:6.2f}"),
        (6, f"AP50 {row['AP50']:6.2f}" if "AP50" in row else ""),
        (1, f"loss {row['test_loss']:6.4f}, {row['bits_per_byte']:.4f} bits/byte" if "bits_per_byte" in row else ""),
        (6, "" if "bits_per_byte" in row or row.get("test_acc_top5") is None else f"top-5 {row['test_acc_top5']:6.2f}"),
        (3, f"ema {row['ema_acc']:6.2f}" if "ema_acc" in row else ""),
        (2, f"best {row['best_acc']:6.2f} @ {row['best_epoch']:<{width}}"),
        (9, f"{speed:>8,.0f} {unit}/s"),
        (8, f"{row['epoch_seconds']:6.1f} s"),
        (3, f"left {timedelta(seconds=round(seconds_left))}"),
        (1, f"skipped {counted(row['skipped_steps'], 'step')}" if row.get("skipped_steps") else ""),
    ]
    parts = [(rank, text) for rank, text in parts if text]
    while columns and len(parts) > 1 and sum(len(text) + 2 for _, text in parts) - 2 > columns:
        parts.remove(max(parts))
    return "  ".join(text for _, text in parts)


LEAST_SHARE = 0.025  # a student's temperature is half of both sides' sum where the two are alike


def temperature_lines(row: dict) -> list[str]:
    """Return an epoch's temperatures for the worklog: of each figure mean and deviation, extremes and quantiles."""
    t, lines = row["temperature"], []
    for name in ("t_student", "t_teacher", "sharpness_student", "sharpness_teacher"):
        f = t[name]
        quantiles = " ".join(f"{f[q]:7.3f}" for q in ("min", "q05", "q25", "q50", "q75", "q95", "max"))
        lines.append(
            f"epoch {row['epoch']} {name:<18} {f['mean']:7.3f} +- {f['std']:6.3f}  min, 5 .. 95 %, max {quantiles}"
        )
    correlations = (f"{side} {t[f'confidence_correlation_t_{side}']:.3f}" for side in ("student", "teacher"))
    lines.append(
        f"epoch {row['epoch']} fell back {100 * t['fell_back']:.2f} %  correlation with the teacher's confidence: T of "
        + ", of ".join(correlations)
    )
    return lines


def loses_scale(rows: list[dict]) -> bool:
    """Return whether the student's temperature has just fallen below LEAST_SHARE of both sides' sum, by epochs' rows: a
    rule that follows the student's scale then no longer holds it, and the student learns little.
    """
    means = [[row["temperature"][f"t_{side}"]["mean"] for side in ("student", "teacher")] for row in rows[-2:]]
    shares = [student / (student + teacher) for student, teacher in means]
    return len(shares) == 2 and shares[1] < LEAST_SHARE <= shares[0]


class Recorder:
    """Writes a run's figures into its folder. `done`: epochs that are finished already; `log`: bytes of worklog.txt at
    the checkpoint that the run goes on from. What a crash left behind them goes, so that nothing stands twice.
    `label` stands before a line in the terminal, `bar_row` is its bar's, from 0, where several runs share a terminal.
    `kept`: whether the folder stays. `unit`: what the bar counts.
    """

    label, bar_row, kept, unit = "", 0, True, "img"

    def __init__(self, folder: Path, epochs: int, done: int = 0, log: int = 0, wandb_run=None):
        self.folder, self.epochs, self.wandb = folder, epochs, wandb_run
        self.rows = [row for row in read_metrics(folder) if row["epoch"] <= done]
        if len(self.rows) < done:
            lost = counted(done - len(self.rows), "finished epoch")
            say(f"warning: {folder / 'metrics.jsonl'} lacks the rows of {lost}")
            if (folder / "metrics.jsonl").exists():
                link(folder / "metrics.jsonl", folder / "metrics.jsonl.damaged")
        worklog = folder / "worklog.txt"
        self.text = worklog.read_bytes()[:log].decode(errors="replace") if log and worklog.exists() else ""
        self._write_rows()
        self.log()
        self.events = Events(folder / "train.events")
        self.bar: tqdm | None = None
        self._bar_time = 0.0

    def log(self, *lines: str) -> None:
        """Add to worklog.txt."""
        self.text += "".join(line + "\n" for line in lines)
        data = self.text.encode()
        write_atomic(self.folder / "worklog.txt", data)
        self.size = len(data)

    def flush(self) -> None:
        """Let a look at the run see all of TensorBoard's figures."""
        self.events.flush()

    def _write_rows(self) -> None:
        write_atomic(self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows).encode())

    def say(self, text: str) -> None:
        """Print to the terminal and write to the worklog."""
        say(self.label + text)
        self.log(text)

    def start_epoch(self, epoch: int, samples: int, done: int = 0) -> None:
        with unbroken():
            if shows_bars():
                self.bar = tqdm(
                    total=samples,
                    initial=done,
                    desc=f"{self.label}epoch {epoch}/{self.epochs}",
                    position=self.bar_row,
                    unit=self.unit,
                    unit_scale=True,
                    leave=False,
                    file=sys.stdout,
                )

    def step(self, samples: int, read_means) -> None:
        """Advance the bar; `read_means()`, which waits for the device, is called at most twice a second."""
        if self.bar is None:
            return
        if time.monotonic() - self._bar_time > 0.5:
            means = read_means()
            right = f", top-1 {100 * means['correct']:.1f}" if "correct" in means else ""
            self.bar.set_postfix_str(f"loss {means['loss']:.3f}{right}", refresh=False)
            self._bar_time = time.monotonic()
        with unbroken():
            self.bar.update(samples)

    def progress(self, epoch: int, step: int, steps: int, read_means) -> None:
        """Print how far the epoch is, where no bar shows it. `read_means()` waits for the device."""
        if self.bar is None:
            means, epochs, width = read_means(), self.epochs, len(str(steps))
            say(
                f"{self.label}epoch {epoch:>{len(str(epochs))}}/{epochs}  step {step:>{width}}/{steps}  "
                f"loss {means['loss']:6.3f}" + (f"  train {100 * means['correct']:6.2f}" if "correct" in means else "")
            )

    def point(self, step: int, means: dict[str, float]) -> None:
        """Write a point inside an epoch, for TensorBoard alone: means from the epoch's start to here."""
        if math.isfinite(means["loss"]):  # NaN: every step so far was skipped
            self.events.scalar("step/train_loss", means["loss"], step)
            self.events.flush()  # a look at the run while it trains

    def histograms(self, epoch: int, temperatures: EpochBuffer) -> None:
        """Write both temperatures of every sample, for TensorBoard."""
        for name, values in temperatures.columns("t_student", "t_teacher").items():
            if values.size:  # a method may leave its rule unused
                self.events.histogram(f"temperature/{name}", values, epoch)

    def end_epoch(self, row: dict, seconds_left: float) -> None:
        """Record `row`, the figures of one epoch: it becomes a line of metrics.jsonl."""
        self._close_bar()
        self.rows.append(row)
        self._write_rows()
        lines = [line_of(row, self.epochs, seconds_left)]
        width = columns()
        say(self.label + line_of(row, self.epochs, seconds_left, width and width - len(self.label)))
        scalars = {k: v for k, v in row.items() if isinstance(v, float)} | row["train_losses"]
        if row.get("skipped_steps"):
            scalars["skipped_steps"] = row["skipped_steps"]
        if row.get("temperature"):
            lines += temperature_lines(row)
            if loses_scale([one for one in self.rows if one.get("temperature")]):
                self.say(
                    "warning: the student's logits lose their scale, which its temperature follows "
                    "(docs/temperature.md); TEMPERATURE.FACTOR tau2 holds it better"
                )
            scalars |= {f"temperature/{k}": v for k, v in config.leaves(row["temperature"], "").items()}
        self.log(*lines)
        for name, value in scalars.items():
            self.events.scalar(name, value, row["epoch"])
        self.events.flush()
        if self.wandb:
            self.wandb.log(scalars, step=row["epoch"])

    def finish(self, result: dict) -> None:
        early = f", stopped early at epoch {result['epochs']} of {self.epochs}" if result.get("stopped_early") else ""
        early += f", {result['ema_acc']:.2f} of the average of weights" if "ema_acc" in result else ""
        losses = ""
        if "last_loss" in result:
            losses = f"test loss {result['last_loss']:.4f} last, {result['best_loss']:.4f} best; "
        place = f", in {self.folder}" if self.kept else ""
        figure = "AP" if any("AP" in row for row in self.rows) else "test top-1"
        self.say(
            f"result: {losses}{figure} {result['last_acc']:.2f} last (epoch {result['epochs']}), "
            f"{result['best_acc']:.2f} best (epoch {result['best_epoch']}){early}{place}"
        )

    def _close_bar(self) -> None:
        if self.bar is not None:
            with unbroken():
                self.bar.close()
            self.bar = None

    def close(self) -> None:
        self._close_bar()
        if self.wandb:
            self.wandb.finish()


class Unrecorded:
    """Stands in for a Recorder in a process whose figures another one records, and keeps this process's rows."""

    size, bar_row = 0, 0

    def __init__(self):
        self.rows: list[dict] = []

    def end_epoch(self, row: dict, seconds_left: float) -> None:
        self.rows.append(row)

    def nothing(self, *_args: object, **_more: object) -> None:
        """Do nothing, in the place of all else that a Recorder does."""

    log = say = start_epoch = step = progress = point = histograms = finish = flush = close = nothing


def read_metrics(folder: Path) -> list[dict]:
    """Return the rows of metrics.jsonl; lines that are none, such as one that a crash cut short, are left out."""
    file = folder / "metrics.jsonl"
    rows = []
    for line in file.read_text(errors="replace").splitlines() if file.exists() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("epoch")) is int:
            rows.append(row)
    return rows


def require_wandb() -> None:
    """Raise UserError if Weights & Biases is not installed."""
    if importlib.util.find_spec("wandb") is None:
        raise UserError("LOG.WANDB is True, but wandb is not installed: pip install wandb, or set LOG.WANDB False")


def start_wandb(project: str, name: str, config: dict):
    """Start and return a Weights & Biases run."""
    import wandb

    return wandb.init(project=project, name=name, config=config)
