"""What a campaign shows while it runs: a live table on a terminal, plain lines anywhere else."""

import contextlib
import sys
import time
from datetime import timedelta

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mdistiller.campaign.conduct import Campaign, Progress
from mdistiller.terminal import say

MINUTE = 60.0  # seconds between two plain lines about what runs
REDRAW = 0.5
STYLE = {"done": "green", "failed": "bold red", "blocked": "red", "running": "bold", "in use": "yellow"}
URGENT = ("running", "failed", "in use", "blocked")


def duration(seconds: float | None) -> str:
    return "?" if seconds is None else str(timedelta(seconds=round(seconds)))


def figures(p: Progress) -> tuple[str, str, str, str]:
    """epoch, last, best, images/s."""
    row, runs = p.rows[-1] if p.rows else {}, p.status in ("running", "in use")
    last, best = (f"{row[key]:.2f}" if row else "" for key in ("test_acc", "best_acc"))
    speed = f"{row['images_per_second']:,.0f}" if row and runs else ""
    return f"{p.epochs}/{p.trial.epochs}" if row or runs else "", last, best, speed


class Plain:
    """A line for each thing that happens, and one a minute for each run that trains."""

    def __init__(self):
        self._time = time.monotonic()

    def __enter__(self) -> "Plain":
        return self

    def __exit__(self, *_) -> None:
        pass

    def say(self, text: str) -> None:
        say(f"{time.strftime('%H:%M:%S')} {text}")

    def update(self, campaign: Campaign) -> None:
        if time.monotonic() - self._time < MINUTE:
            return
        self._time = time.monotonic()
        for p in campaign.progress.values():
            if p.active:
                epoch, last, best, speed = figures(p)
                self.say(
                    f"epoch    {p.trial.name}: {epoch}, last {last or '-'}, best {best or '-'}, {speed or '-'} img/s, "
                    f"left {duration(campaign.job_left(p))}; the plan {duration(campaign.total_left())}"
                )


class Board:
    """A table that is drawn anew in its place; what happened stands above it."""

    def __init__(self, title: str, console: Console | None = None):
        self.title, self.console = title, console or Console(file=sys.stdout)
        self.live = Live(console=self.console, auto_refresh=False)
        self._time = -REDRAW
        self._shown: Campaign | None = None

    def __enter__(self) -> "Board":
        self.live.start()
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone
            if self._shown:
                self.live.update(self.draw(self._shown))
            self.live.stop()

    def say(self, text: str) -> None:
        with contextlib.suppress(OSError):
            style = STYLE.get(text.split()[0].lower(), "")
            self.console.print(Text(f"{time.strftime('%H:%M:%S')} {text}", style=style), soft_wrap=True)

    def update(self, campaign: Campaign) -> None:
        if time.monotonic() - self._time < REDRAW:
            return
        self._time, self._shown = time.monotonic(), campaign
        with contextlib.suppress(OSError):
            self.live.update(self.draw(campaign), refresh=True)

    def draw(self, campaign: Campaign) -> Group:
        """As many runs as the terminal has lines for: those that train, then what failed, the latest done, the next."""
        rows = list(campaign.progress.values())
        room = max(self.console.height - 8, 3)
        done, waiting = ([p for p in rows if p.status == status] for status in ("done", "waiting"))
        shown = [p for status in URGENT for p in rows if p.status == status][:room]
        rest = room - len(shown)
        soon = waiting[: max(rest - len(done), rest // 2)]
        shown += soon + done[len(done) - min(rest - len(soon), len(done)) :]
        kept = {id(p) for p in shown}
        table = Table(box=None, pad_edge=False, header_style="dim", expand=False)
        table.add_column(
            "run", no_wrap=True, overflow="fold", min_width=max((len(p.trial.name) for p in shown), default=3)
        )
        for name in ("epoch", "last", "best", "img/s", "left"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True, overflow="ellipsis")  # reasons stand above the table in full
        for p in (p for p in rows if id(p) in kept):
            queued = p.status == "running" and not p.active
            style = "" if queued else STYLE.get(p.status, "dim")
            left = duration(campaign.job_left(p)) if p.status in ("running", "waiting", "in use") else ""
            others = any(q.active for q in rows if q.trial.cell is p.trial.cell)
            note = ("takes turns" if others else "starting") if queued and p.rows == [] else p.reason or p.status
            table.add_row(Text(p.trial.name), *figures(p), left, Text(note), style=style)
        hidden = f", {len(rows) - len(kept)} not shown" if len(rows) > len(kept) else ""
        head = Text(f"{self.title}: {len(done)} of {len(rows)} runs done", style="bold")
        foot = Text(f"{campaign.summary()}{hidden}; left for the plan: about {duration(campaign.total_left())}")
        return Group(Text(""), head, table, foot)
