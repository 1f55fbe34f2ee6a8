"""What tools/reproduce.py and tools/results.py do."""

import os
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
from mdistiller.campaign.conduct import Campaign, lost_teachers
from mdistiller.campaign.estimate import Estimates
from mdistiller.campaign.executors import Local, Slurm
from mdistiller.campaign.ledger import Ledger
from mdistiller.campaign.plan import Cell, Plan
from mdistiller.campaign.view import Board, Plain, duration
from mdistiller.errors import UserError
from mdistiller.files import write_atomic
from mdistiller.runs.folder import check_writable
from mdistiller.terminal import say

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
        raise UserError(
            f"--slurm {wrong[0]}: takes KEY=VALUE, such as slurm_partition=gpu; KEY VALUE pairs stand before --slurm"
        )
    try:
        return {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in words)}
    except yaml.YAMLError:
        raise UserError(f"--slurm {' '.join(words)}: takes values as YAML has them; quote what is none") from None


def reproduce(
    plan: str, seeds: str | None, only: list[str], dry_run: bool, budget: str | None, executor: str, slurm: list[str],
    results: Path | None, published: Path | None, folder: Path, opts: list[str],
) -> int:  # fmt: skip
    """Run the plan, or what `only` names of it; returns the exit status. `folder`: where plans lie."""
    begin = time.monotonic()
    seconds = None if budget is None else parse_time(budget)
    told = plans.load(plans.find(plan, folder), opts, None if seeds is None else parse_seeds(seeds))
    cells = told.select(only)
    out = results or told.results
    figures = read_published(published)
    parameters = parse_parameters(slurm)
    if slurm and executor != "slurm":
        raise UserError("--slurm: add --executor slurm")
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
    check_data(_unfinished(cells, ledger))
    jobs = Local() if executor == "local" else Slurm(prefix / ".slurm", parameters)
    view = Board(told.title or told.name) if sys.stdout.isatty() else Plain()
    if seconds is not None:
        unknown = [cell for cell in _unfinished(cells, ledger) if estimates.epoch(cell) is None]
        if unknown:
            say(f"measuring a step of {tables.counted(len(unknown), 'cell')}")
        for name, why in estimates.measure(unknown).items():
            say(f"{name} could not be measured: {why}")
    deadline = None if seconds is None else begin + seconds
    campaign = Campaign(told.name, cells, ledger, jobs, estimates, view, deadline)
    kept = campaign.count("done")
    if kept:
        say(f"{kept} of {len(campaign.progress)} runs are on record in {ledger.path}; --results FOLDER starts another")
    status = campaign.run()
    say("")
    report = report_of(told, ledger, figures, folder)
    report.write(out)
    say(report.markdown)
    for p in campaign.progress.values():
        if p.status not in ("done", "running"):
            say(f"{p.status:<8} {p.trial.name}" + f": {p.reason}" * bool(p.reason))
    written = f"; tables and charts in {out / told.name}" * bool(report.table.rows)
    say(f"{campaign.summary()}, in {duration(time.monotonic() - begin)}{written}")
    if status:
        say("the same command goes on with what is left")
    return status


def _unfinished(cells: Sequence[Cell], ledger: Ledger) -> list[Cell]:
    lost = lost_teachers(cells, ledger)
    return [c for c in cells if any(t.hash not in ledger.records or t.name in lost for t in c.trials)]


def check_data(cells: Sequence[Cell]) -> None:
    """Raises UserError where a data set that the cells need cannot be had."""
    for kind, root in dict.fromkeys((cell.cfg.DATASET.TYPE, cell.cfg.DATASET.ROOT) for cell in cells):
        book.train_images(kind, root)


def forecast(cells: Sequence[Cell], ledger: Ledger, estimates: Estimates) -> None:
    """Say what would run, and about how long and how large it would be."""
    lost = lost_teachers(cells, ledger)
    kept = {t.name for c in cells for t in c.trials if t.hash in ledger.records} - lost
    states = {t.name: "done" if t.name in kept else book.state(t) for c in cells for t in c.trials}
    cells_left = [c for c in cells if any(states[t.name] not in ("done", "finished") for t in c.trials)]
    if cells_left:
        say(f"measuring a step of {tables.counted(len(cells_left), 'cell')}")
    failed = estimates.measure(cells_left)
    total, disk, epochs_left = 0.0, 0, 0
    width = max(len(trial.name) for cell in cells for trial in cell.trials)
    say(f"{'run':<{width}}  {'state':<9}  {'epochs':>7}  {'s/epoch':>8}  {'left':>9}  {'disk':>8}")
    count = 0
    for cell in cells:
        for trial in cell.trials:
            state = states[trial.name]
            if state in ("done", "finished"):
                say(f"{trial.name:<{width}}  {state:<9}  {trial.epochs:>3}/{trial.epochs}")
                continue
            done = len(book.read_metrics(trial.folder)) if state in ("half-done", "in use") else 0
            epoch, left, size = estimates.epoch(cell), estimates.left(trial, done), estimates.disk(trial)
            cost = f"{epoch:>8.1f}" if epoch is not None else f"{'?':>8}"
            bytes_ = f"{size / 1e6:>5,.0f} MB" if size else f"{'?':>8}"
            say(
                f"{trial.name:<{width}}  {state:<9}  {done:>3}/{trial.epochs:<3}  {cost}  {duration(left):>9}  {bytes_}"
            )
            total, disk, epochs_left = total + (left or 0), disk + (size or 0), epochs_left + trial.epochs - done
            count += 1
    for name, why in failed.items():
        say(f"{name} could not be measured: {why}")
    for name in sorted(lost):
        say(f"{name} is on record, but its network is gone: its students need it trained again")
    banks, filling = estimates.banks(cells_left), sum(map(estimates.filling, cells_left))
    filled = f" ({duration(filling)} of it for teachers' banks)" * bool(filling)
    space = f"{disk / 1e9:.2f} GB" + f", and {banks / 1e9:.1f} GB of teachers' banks" * bool(banks)
    what = f"{tables.counted(count, 'run')}, {tables.counted(epochs_left, 'epoch')} left"
    say(f"{what}: about {duration(total + filling)} one after the other{filled}, {space}")


def report_of(plan: Plan, ledger: Ledger, published: dict, folder: Path) -> tables.Report:
    """`folder`: where plans lie, beside the pairs' YAML files."""
    rows, left_out = tables.of_plan(plan, ledger.records.values())
    rows, odd = tables.alike(rows)
    notes = [*[plan.note] * bool(plan.note), *left_out, *odd]
    if any(row.records for row in rows):
        notes.append(f"Made by `python3 tools/reproduce.py {plan.name}`.")
    title = plan.title or plan.name
    return tables.report(rows, title, plan.name, published, plans.Shipped(folder.parent / "cifar100"), notes)


def show(
    what: list[str], folder: Path, results: Path | None, out: Path | None, published: Path | None, only: list[str]
) -> str:
    """Write tables and charts of a plan, or of all runs in some runs.jsonl, into `out`; returns the table."""
    figures = read_published(published)
    files = [Path(word) for word in what if word.endswith(".jsonl")]
    if not files and len(what) == 1:
        plan = plans.load(plans.find(what[0], folder))
        plan.cells = plan.select(only)
        home = results or plan.results
        report = report_of(plan, Ledger(home / "runs.jsonl"), figures, folder)
        if only and out is None:  # the plan's own table has all of it
            return report.markdown + "\nNothing is written of a part of a plan; give --out FOLDER.\n"
    elif len(files) == len(what):
        home, report = files[0].parent, _report_of_files(files, only, figures, folder)
    else:
        raise UserError("give one plan, or files named *.jsonl")
    check_writable(out or home, "--out")
    report.write(out or home)
    return report.markdown


def _report_of_files(files: Sequence[Path], only: Sequence[str], published: dict, folder: Path) -> tables.Report:
    found: dict[str, tuple[dict, Path]] = {}
    problems = []
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: is no file; pass the runs.jsonl of a campaign")
        for key, record in Ledger(file).records.items():
            first, home = found.setdefault(key, (record, file))
            if first["curve"] != record["curve"]:
                name = f"{record['cell']}, seed {record['seed']}"
                problems.append(f"{name}: is another run in {home} than in {file}; give one of them")
    if problems:
        raise UserError(*problems)
    records = [record for record, _ in found.values()]
    chosen = [record for record in records if not only or plans.matches(record["cell"], only)]
    if not chosen:
        raise UserError("nothing to show: no run on record" + f" matches --only {' '.join(only)}" * bool(only))
    shipped = plans.Shipped(folder.parent / "cifar100")
    return tables.report(tables.of_records(chosen), "Results", "all", published, shipped)


def fill(page: Path, folder: Path, published: Path | None, results: Path, write: bool = True) -> str:
    """The page with a plan's table and charts of today wherever it has `<!-- results of PLAN -->` and
    `<!-- end of results -->`; written there, and the files in `results` with it, if `write`.
    """
    figures = read_published(published)
    if not page.is_file():
        raise UserError(f"--page {page}: is no file; give a Markdown page")

    def filled(match: re.Match) -> str:
        plan = plans.load(plans.find(match[2], folder))
        report = report_of(plan, Ledger(results / "runs.jsonl"), figures, folder)
        if write:
            report.write(results)
        place = Path(os.path.relpath(results / report.name, page.parent)).as_posix()
        pictures = "".join(f"\n![{c.title.splitlines()[0]}]({place}/{c.name}.png)\n" for c in report.charts)
        return f"{match[1]}\n{report.markdown}{pictures}\n{match[3]}"

    text, count = MARKERS.subn(filled, page.read_text(encoding="utf-8"))
    if not count:
        raise UserError(f"--page {page}: lacks <!-- results of PLAN --> and <!-- end of results -->, each on its line")
    if write:
        write_atomic(page, text.encode())
    return text
