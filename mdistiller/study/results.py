"""What tools/results.py does: a study's finished runs as a table with its notes, bar charts, and in a page."""

import os
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mdistiller.errors import UserError
from mdistiller.files import write_atomic
from mdistiller.runs.folder import check_writable
from mdistiller.study import plan
from mdistiller.study.bars import bar_charts
from mdistiller.study.charts import Chart, write_table
from mdistiller.study.drawing import save
from mdistiller.study.groups import differing, group_runs
from mdistiller.study.plan import Shipped, Study
from mdistiller.study.published import DATA, changes, departures, published_figure, read_published, verdict
from mdistiller.study.records import read_records
from mdistiller.study.runs import Group, Run
from mdistiller.study.tables import Table, caption_of, latex, markdown, numbers, text_table
from mdistiller.terminal import columns, counted

HEAD = ("pair", "method", "n", "seeds", "last (%)", "best (%)")
BESIDE = ("published (%)", "best − published", "lies")
BESIDE_CAPTION = (
    " Published figures are best epochs; they lie inside, above or below our best epoch's mean ± standard deviation "
    "(~: read off a chart, and as far outside as that is uncertain). Neither above nor below means that it was not "
    "reproduced: with so few seeds an equally good run lies outside about half of the time (n = 3: 48 %, n = 2: 56 %)."
)
OTHER_PROTOCOL, OTHER_VALUES = "Not the published protocol", "Not the published hyperparameters"
EARLY = "{} epochs behind the best test accuracy, which flatters"
MARKERS = re.compile(r"(<!-- results of (\S+) -->\n).*?(<!-- end of results -->)", re.S)


@dataclass
class StudyResults:
    """A study's table, the notes below it and its charts, under the name that their folder has."""

    name: str
    title: str
    table: Table
    notes: list[str]
    charts: list[Chart]

    @property
    def markdown(self) -> str:
        table = markdown(self.table) if self.table.rows else "Nothing of it is on record yet.\n"
        return table + "".join(f"\n{line}\n" for line in self.notes)

    @property
    def text(self) -> str:
        """The table for a terminal of 80 columns, with the notes."""
        rows = [[*row[:3], *row[4:6], " ".join(filter(None, row[6::2]))] for row in self.table.rows]
        end = 6 if len(self.table.head) > len(HEAD) else 5
        short = replace(self.table, head=("pair", "method", "n", "last", "best", "published")[:end])
        short.rows = [row[:end] for row in rows]
        table = text_table(short, columns()) if rows else "Nothing of it is on record yet."
        notes = [textwrap.fill(line.replace("**", "").replace("`", ""), 80) for line in self.notes]
        return "\n\n".join(filter(None, [table, "\n".join(notes)]))

    def write(self, out: Path) -> None:
        """Write OUT/NAME/table.md, .tex and .csv, and the charts as PNG and SVG; nothing where nothing is on record."""
        if not self.table.rows:
            return
        folder = out / self.name
        folder.mkdir(parents=True, exist_ok=True)
        for old in (file for kind in ("png", "svg") for file in folder.glob(f"chart*.{kind}")):
            old.unlink()  # of a plan that had other pairs, perhaps
        write_atomic(folder / "table.md", f"# {self.title}\n\n{self.markdown}".encode())
        comments = "".join(f"% {line}\n" for note in self.notes for line in note.splitlines())
        titled = replace(self.table, caption=f"{' '.join(self.title.split())}. {self.table.caption}")
        write_atomic(folder / "table.tex", (comments + latex(titled)).encode())
        write_table(folder / "table.csv", numbers(self.table))
        for chart in self.charts:
            save(chart, folder)


def results_of(
    runs: Iterable[Run], published: Mapping, folder: Path, study: Study | None = None, only: Sequence[str] = ()
) -> StudyResults:
    """Return the results of the runs, or of those that `only` names; of a `study`, every seed on record of each of its
    groups. What does not fit the rest is left out and named. Nothing is compared with figures of another protocol, no
    row with figures of other hyperparameters, which the YAML files of that data set have, beside the `folder` of plans.
    """
    runs, shipped = list(runs), Shipped(folder.parent / str(published.get("dataset", DATA)))
    if study:
        groups, notes = _groups_of(study, runs)
    else:
        groups, notes = group_runs([run for run in runs if not only or plan.matches(run.cell, only)])
    groups, odd = _alike(groups)
    away = list(dict.fromkeys(line for group in groups for line in departures(group, published)))
    changed = [changes(group, shipped.settings(group.cfg)) for group in groups]
    figures = [None if keys else published_figure(g, published) for g, keys in zip(groups, changed, strict=True)]
    compare = any(figures) and not away
    rows = []
    for group, found in zip(groups, figures, strict=True):
        method = ", ".join(filter(None, [group.method_and_rule, group.extra]))
        row = [group.pair, method, len(group.runs), group.seeds, group.last, group.best]
        if found and compare:
            figure, off = found
            row += [f"~{figure}" if off else f"{figure:.2f}", group.best.mean - figure]
            row.append(verdict(group.best, figure, off))
        rows.append(row + [None] * (len(HEAD + BESIDE) - len(row)) if compare else row)
    head, caption = (HEAD + BESIDE, caption_of(groups) + BESIDE_CAPTION) if compare else (HEAD, caption_of(groups))
    by_change: dict[str, list[str]] = {}
    for group, keys in zip(groups, changed, strict=True):
        by_change.setdefault(", ".join(keys), []).append(group.name)
    said = [f"**{OTHER_PROTOCOL}**: {', '.join(away)}."] if away else []
    said += [f"**{OTHER_VALUES}**: {keys}, in {'; '.join(of)}." for keys, of in by_change.items() if keys]
    title, name = (study.title or study.name, study.name) if study else ("Results", "all")
    other = OTHER_PROTOCOL if away else OTHER_VALUES if said else ""
    charts = bar_charts(groups, f"{title} ({other.lower()})" if other else title)
    said += [_protocol_note(groups), _machine_note(groups)] if groups else []
    for group in groups:
        teachers = {run.environment["sha256"].get("teacher") for run in group.runs}
        if len(teachers) > 1:
            said.append(f"{group.name}: its seeds learnt from {len(teachers)} trainings of the teacher.")
        if any(run.stopped_early for run in group.runs):
            said.append(f"{group.name}: {group.schedule}, {EARLY.format(group.cfg.SOLVER.EARLY_STOP)}.")
    said += [*notes, *odd]
    if groups and study:
        said.append(f"Made by `python3 tools/reproduce.py {study.name}`.")
    return StudyResults(name, title, Table("table", title, caption, head, rows), said, charts)


def _groups_of(study: Study, runs: Sequence[Run]) -> tuple[list[Group], list[str]]:
    """Return what is on record of each of the study's groups, and lines on what is not, or by another protocol."""
    groups, missing, notes = [], [], []
    for group in study.groups:
        same = sorted((run for run in runs if run.protocol == group.first.protocol), key=lambda run: run.seed)
        groups += [Group(same)] if same else []
        absent = {run.seed for run in group.runs} - {run.seed for run in same}
        missing += [f"{group.name} ({_seeds(absent)})"] if absent else []
        others: dict[str, list[int]] = {}
        for run in runs:
            if run not in same and (run.study, run.cell) == (study.name, group.name):
                others.setdefault(_apart([run.protocol, group.first.protocol]), []).append(run.seed)
        notes += [f"Left out: {group.name} ({_seeds(of)}), run by another protocol: {k}." for k, of in others.items()]
    if groups and missing:
        notes.insert(0, f"Not run yet: {'; '.join(missing)}.")
    return groups, [study.note, *notes] if study.note else notes


def _alike(groups: Sequence[Group]) -> tuple[list[Group], list[str]]:
    """Return the groups that can stand in one table with most of the runs, and a line on each that cannot: data and
    solver have to be the same, but for the learning rate, which is the student's, and the trainer, the method's.
    """
    found = [[_shared(run) for run in group.runs] for group in groups]
    every = [shared for some in found for shared in some]
    most = max(every, key=every.count, default=None)
    kept, notes = [], []
    for group, some in zip(groups, found, strict=True):
        if all(shared == most for shared in some):
            kept.append(group)
        else:
            notes.append(f"Left out: {group.name}, of another protocol than the other rows: {_apart([most, *some])}.")
    return kept, notes


def _shared(run: Run) -> dict[str, object]:
    own = ("SOLVER.LR", "SOLVER.TRAINER", "SOLVER.DOT.DELTA")
    kept = {k: v for k, v in run.settings.items() if k.startswith(("SOLVER.", "DATASET.")) and k not in own}
    return kept | {"sha256 of the data": run.environment["sha256"]["data"]}


def _apart(protocols: Sequence[Mapping]) -> str:
    return ", ".join(f"{key} ({' / '.join(map(str, values))})" for key, values in differing(protocols).items())


def _seeds(numbers: Iterable[int]) -> str:
    numbers = sorted(set(numbers))
    return f"{'seed' if len(numbers) == 1 else 'seeds'} {', '.join(map(str, numbers))}"


def _protocol_note(groups: Sequence[Group]) -> str:
    """Return the protocol that the groups share, with the learning rate of each student."""
    rates: dict[float, list[str]] = {}
    for student, rate in {g.cfg.DISTILLER.STUDENT: g.cfg.SOLVER.LR for g in groups}.items():
        rates.setdefault(rate, []).append(student)
    texts = [f"{rate:g} ({', '.join(of)})" if len(rates) > 1 else f"{rate:g}" for rate, of in rates.items()]
    cfg, solver = groups[0].cfg, groups[0].cfg.SOLVER
    precision = "float32" if solver.AMP == "none" else f"{solver.AMP} autocast"
    return (
        f"Protocol: {cfg.DATASET.TYPE}, {counted(solver.EPOCHS, 'epoch')}, batches of {solver.BATCH_SIZE}, "
        f"{'' if solver.TYPE == 'SGD' else f'{solver.TYPE}, '}learning rate {' and '.join(texts)}, {_course(solver)}, "
        f"weight decay {solver.WEIGHT_DECAY:g}, {precision}."
    )


def _course(solver: Mapping) -> str:
    """Return how the learning rate goes on from its first value."""
    falls = ", ".join(str(stage) for stage in solver.LR_DECAY_STAGES if stage < solver.EPOCHS)
    course = f"times {solver.LR_DECAY_RATE:g} after epochs {falls}" if falls else "constant"
    course = "along a cosine to 0" if solver.SCHEDULE == "cosine" else course
    return f"{course}, warm-up {solver.WARMUP:g}" if solver.WARMUP else course


def _machine_note(groups: Sequence[Group]) -> str:
    """Return how many runs there are, how long they took, on which machines and by which commits."""
    runs = [run for group in groups for run in group.runs]
    machines = sorted({f"{run.environment['device']}, torch {run.environment['torch']}" for run in runs})
    commits = {c["commit"][:12] + ("" if c["clean"] else " (with changes)") for run in runs for c in run.commits}
    minutes = sum(run.seconds / run.students for run in runs) / 60  # students side by side share them
    taken = counted(round(minutes), "minute") if minutes < 120 else f"{minutes / 60:.1f} hours"
    return (
        f"{counted(len(runs), 'run')}, {taken} of training and evaluation in all, on {'; '.join(machines)}; "
        f"{'commits' if len(commits) > 1 else 'commit'} {', '.join(sorted(commits)) or 'unknown'}."
    )


def show(
    what: str, folder: Path, home: Path | None, out: Path | None, published: Path | None, only: Sequence[str]
) -> str:
    """Write tables and charts of a plan, or of all runs in a runs.jsonl, into `out`; return the table.

    `folder`: where plans lie, beside the pairs' YAML files. `home`: where a plan's runs.jsonl lies.
    """
    figures = read_published(published)
    study = None
    if what.endswith(".jsonl"):
        file = Path(what)
        if not file.is_file():
            raise UserError(f"{file}: is no file; pass a runs.jsonl")
    else:
        study = plan.load(plan.find(what, folder))
        study.groups = study.select(only)
        file = (home or study.results) / "runs.jsonl"
    found = results_of(read_records(file).values(), figures, folder, study, only)
    if not study and not found.table.rows:
        raise UserError(
            f"{file}: no run on record matches --only {' '.join(only)}" if only else f"{file}: holds no run"
        )
    if study and only and out is None:  # the plan's own table has all of it
        return found.markdown + "\nNothing is written of a part of a plan; give --out FOLDER.\n"
    check_writable(out or file.parent, "--out")
    found.write(out or file.parent)
    return found.markdown


def fill(page: Path, folder: Path, published: Path | None, home: Path, write: bool = True) -> str:
    """Return the page with a plan's table and charts of today wherever it has `<!-- results of PLAN -->` and
    `<!-- end of results -->`; with `write` it is written, and the plans' files into `home`.
    """
    figures = read_published(published)
    if not page.is_file():
        raise UserError(f"--page {page}: is no file; give a Markdown page")
    runs = read_records(home / "runs.jsonl").values()

    def filled(match: re.Match) -> str:
        found = results_of(runs, figures, folder, plan.load(plan.find(match[2], folder)))
        if write:
            found.write(home)
        place = Path(os.path.relpath(home / found.name, page.parent)).as_posix()
        pictures = "".join(f"\n![{c.title.splitlines()[0]}]({place}/{c.name}.png)\n" for c in found.charts)
        return f"{match[1]}\n{found.markdown}{pictures}\n{match[3]}"

    text, count = MARKERS.subn(filled, page.read_text(encoding="utf-8"))
    if not count:
        raise UserError(f"--page {page}: lacks <!-- results of PLAN --> and <!-- end of results -->, each on its line")
    if write:
        write_atomic(page, text.encode())
    return text
