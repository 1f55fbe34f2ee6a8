"""What tools/reproduce.py and tools/results.py do."""

import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from mdistiller.analysis.results import read_published
from mdistiller.campaign import ledger as book
from mdistiller.campaign import plan as plans
from mdistiller.campaign import tables
from mdistiller.campaign.conduct import Campaign
from mdistiller.campaign.estimate import Estimates
from mdistiller.campaign.executors import Local, Slurm
from mdistiller.campaign.ledger import Ledger
from mdistiller.campaign.plan import Cell, Plan
from mdistiller.campaign.view import Board, Plain, duration
from mdistiller.engine.folder import check_writable
from mdistiller.engine.terminal import say
from mdistiller.errors import UserError
from mdistiller.files import write_atomic

TIMES = {"d": 86400, "h": 3600, "m": 60, "s": 1}
MARKERS = re.compile(r"(<!-- results of (\S+) -->\n).*?(<!-- end of results -->)", re.S)


def parse_seeds(text: str) -> list[int]:
    """0-4 or 0,2,5 or both. Raises UserError otherwise."""
    seeds: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d{1,10})(?:-(\d{1,10}))?", part.strip())
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if not first <= last < min(first + 1000, 2**32):
            raise UserError(f"--seeds {text}: give a range such as 0-4, or seeds such as 0,2,5")
        seeds += range(first, last + 1)
    return list(dict.fromkeys(seeds))


def parse_time(text: str) -> float:
    """Seconds of 2h, 90m, 1h30m, 45s. Raises UserError otherwise."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([dhms])", text)
    if not parts or "".join(a + b for a, b in parts) != text:
        raise UserError(f"--budget {text}: give a time such as 2h, 90m or 1h30m")
    return sum(float(number) * TIMES[unit] for number, unit in parts)


def parse_parameters(words: Sequence[str]) -> dict[str, object]:
    """KEY=VALUE words, as YAML reads the values."""
    wrong = [word for word in words if "=" not in word]
    if wrong:
        raise UserError(f"--slurm {wrong[0]}: takes KEY=VALUE, such as slurm_partition=gpu")
    return {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in words)}


def reproduce(
    plan: str, seeds: str | None, only: list[str], dry_run: bool, budget: str | None, executor: str, slurm: list[str],
    results: Path | None, published: Path, folder: Path, opts: list[str],
) -> int:  # fmt: skip
    """Run the plan, or what `only` names of it; returns the exit status. `folder`: where plans lie."""
    begin = time.monotonic()
    seconds = parse_time(budget) if budget else None
    told = plans.load(plans.find(plan, folder), opts, parse_seeds(seeds) if seeds else None)
    cells = told.select(only)
    out = results or told.results
    figures = read_published(published if published.exists() else None)
    parameters = parse_parameters(slurm)
    ledger = Ledger(out / "runs.jsonl")
    ledger.records  # noqa: B018  (what is wrong with it is said before anything runs)
    estimates = Estimates(ledger)
    estimates.recall(cells)
    if dry_run:
        forecast(cells, ledger, estimates)
        return 0
    prefix = cells[0].trials[0].folder.parent
    check_writable(prefix, "LOG.PREFIX")
    check_writable(out, "--results")
    jobs = Local() if executor == "local" else Slurm(prefix / ".slurm", parameters)
    view = Board(told.title or told.name) if sys.stdout.isatty() else Plain()
    if seconds is not None:
        estimates.measure(cell for cell in _unfinished(cells, ledger) if estimates.epoch(cell) is None)
    deadline = None if seconds is None else begin + seconds
    campaign = Campaign(told.name, cells, ledger, jobs, estimates, view, deadline)
    kept = campaign.count("done")
    if kept:
        say(f"{kept} of {len(campaign.progress)} runs are on record in {ledger.path}; --results FOLDER starts another")
    status = campaign.run()
    say("")
    report = report_of(told, ledger, figures)
    report.write(out)
    say(report.markdown)
    for p in campaign.progress.values():
        if p.status not in ("done", "running"):
            say(f"{p.status:<8} {p.trial.name}" + f": {p.reason}" * bool(p.reason))
    say(f"{campaign.summary()}, in {duration(time.monotonic() - begin)}; tables and charts in {out / told.name}")
    if status:
        say("the same command goes on with what is left")
    return status


def _unfinished(cells: Sequence[Cell], ledger: Ledger) -> list[Cell]:
    return [cell for cell in cells if any(trial.hash not in ledger.records for trial in cell.trials)]


def forecast(cells: Sequence[Cell], ledger: Ledger, estimates: Estimates) -> None:
    """Say what would run, and about how long and how large it would be."""
    cells_left = _unfinished(cells, ledger)
    if cells_left:
        say(f"measuring a step of {len(cells_left)} cells")
    failed = estimates.measure(cells_left)
    total, disk, epochs_left = 0.0, 0, 0
    width = max(len(trial.name) for cell in cells for trial in cell.trials)
    say(f"{'run':<{width}}  {'state':<9}  {'epochs':>7}  {'s/epoch':>8}  {'left':>9}  {'disk':>8}")
    for cell in cells:
        for trial in cell.trials:
            if trial.hash in ledger.records:
                say(f"{trial.name:<{width}}  {'done':<9}  {trial.epochs:>3}/{trial.epochs}")
                continue
            state = book.state(trial)
            done = len(book.read_metrics(trial.folder)) if state in ("half-done", "in use", "finished") else 0
            epoch, left, size = estimates.epoch(cell), estimates.left(trial, done), estimates.disk(trial)
            cost = f"{epoch:>8.1f}" if epoch is not None else f"{'?':>8}"
            bytes_ = f"{size / 1e6:>5,.0f} MB" if size else f"{'?':>8}"
            say(
                f"{trial.name:<{width}}  {state:<9}  {done:>3}/{trial.epochs:<3}  {cost}  {duration(left):>9}  {bytes_}"
            )
            total, disk, epochs_left = total + (left or 0), disk + (size or 0), epochs_left + trial.epochs - done
    for name, why in failed.items():
        say(f"{name} could not be measured: {why}")
    count = sum(trial.hash not in ledger.records for cell in cells for trial in cell.trials)
    say(f"{count} runs, {epochs_left:,} epochs left: about {duration(total)} one after the other, {disk / 1e9:.2f} GB")


def report_of(plan: Plan, ledger: Ledger, published: dict) -> tables.Report:
    rows, notes = tables.of_plan(plan, ledger.records.values())
    return tables.report(rows, plan.title or plan.name, plan.name, published, [*[plan.note] * bool(plan.note), *notes])


def show(
    what: list[str], folder: Path, results: Path | None, out: Path | None, published: Path, only: list[str]
) -> str:
    """Write tables and charts of a plan, or of all runs in some runs.jsonl, into `out`; returns the table."""
    figures = read_published(published if published.exists() else None)
    files = [Path(word) for word in what if word.endswith(".jsonl")]
    if not files and len(what) == 1:
        plan = plans.load(plans.find(what[0], folder))
        plan.cells = plan.select(only)
        home = results or plan.results
        report = report_of(plan, Ledger(home / "runs.jsonl"), figures)
    elif len(files) == len(what):
        home, report = files[0].parent, _report_of_files(files, only, figures)
    else:
        raise UserError("give one plan, or files named *.jsonl")
    check_writable(out or home, "--out")
    report.write(out or home)
    return report.markdown


def _report_of_files(files: Sequence[Path], only: Sequence[str], published: dict) -> tables.Report:
    records: dict[str, dict] = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: is no file; pass the runs.jsonl of a campaign")
        records = Ledger(file).records | records
    chosen = [record for record in records.values() if not only or plans.matches(record["cell"], only)]
    if not chosen:
        raise UserError("nothing to show: no run on record" + f" matches --only {' '.join(only)}" * bool(only))
    return tables.report(tables.of_records(chosen), "Results", "all", published)


def fill(page: Path, folder: Path, published: Path, results: Path, write: bool = True) -> str:
    """The page with a plan's table and charts of today wherever it has `<!-- results of PLAN -->` and
    `<!-- end of results -->`; written there, and the files in `results` with it, if `write`.
    """
    figures = read_published(published)

    def filled(match: re.Match) -> str:
        report = report_of(plans.load(plans.find(match[2], folder)), Ledger(results / "runs.jsonl"), figures)
        if write:
            report.write(results)
        pictures = "".join(
            f"\n![{c.title.splitlines()[0]}](../results/{report.name}/{c.name}.png)\n" for c in report.charts
        )
        return f"{match[1]}\n{report.markdown}{pictures}\n{match[3]}"

    text = MARKERS.sub(filled, page.read_text(encoding="utf-8"))
    if write:
        write_atomic(page, text.encode())
    return text
