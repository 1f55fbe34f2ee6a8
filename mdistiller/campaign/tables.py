"""Records become tables (Markdown, LaTeX, CSV) and bar charts: every seed on record, and never two protocols."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mdistiller.analysis import drawing, results
from mdistiller.analysis.charts import COLOURS, Chart, Panel, Series, Table, write_table
from mdistiller.analysis.runs import Group, Run
from mdistiller.analysis.statistics import Mean
from mdistiller.campaign.identity import differing, protocol
from mdistiller.campaign.ledger import settings_of
from mdistiller.campaign.plan import Plan
from mdistiller.engine.cfg import CFG
from mdistiller.errors import UserError
from mdistiller.files import write_atomic

HEAD = ("pair", "method", "n", "seeds", "last (%)", "best (%)")
BESIDE = ("published (%)", "best − published", "published lies")
CAPTION = (
    "Top-1 accuracy on the test set: mean ± standard deviation (n − 1) over n seeds, of the last epoch and of each "
    "run's best one, which is chosen on the test set and therefore flatters."
)
BESIDE_CAPTION = (
    " Published figures are best epochs; they lie inside, above or below our best epoch's mean ± standard deviation "
    "(~: read off a chart, and as far outside as that is uncertain)."
)
# Published protocol: its key in the table of published figures, and ours
PROTOCOL = {
    "epochs": "SOLVER.EPOCHS",
    "batch_size": "SOLVER.BATCH_SIZE",
    "lr_decay_stages": "SOLVER.LR_DECAY_STAGES",
    "lr_decay_rate": "SOLVER.LR_DECAY_RATE",
    "weight_decay": "SOLVER.WEIGHT_DECAY",
    "momentum": "SOLVER.MOMENTUM",
}
SMALL_RATE = ("MobileNetV2", "ShuffleV1", "ShuffleV2")
MOST_LABELS = 14  # bars that can have their figure above them


@dataclass
class Row:
    """One cell's runs on record; `missing`: seeds of the plan that are not among them."""

    name: str
    records: list[dict]
    missing: list[int]

    @property
    def group(self) -> Group:
        return Group([_run_of(record) for record in self.records])


def _run_of(record: Mapping) -> Run:
    cfg = CFG.clone()
    for key, value in record["config"].items():
        *sections, leaf = key.split(".")
        node = cfg
        for section in sections:
            node = node[section]
        node[leaf] = value
    row = {"epoch": record["epochs"], "test_acc": record["last"], "best_acc": record["best"]}
    return Run(Path(record["cell"]), cfg, [row])


def of_plan(plan: Plan, records: Iterable[Mapping]) -> tuple[list[Row], list[str]]:
    """The plan's rows, with every seed on record, and lines on what is left out because its protocol is another."""
    rows, notes = [], []
    records = [(record, protocol(*settings_of(record))) for record in records]
    for cell in plan.cells:
        wanted = cell.protocol
        same = [record for record, found in records if found == wanted]
        seeds = {record["seed"] for record in same}
        missing = [trial.seed for trial in cell.trials if trial.seed not in seeds]
        rows.append(Row(cell.name, sorted(same, key=lambda record: record["seed"]), missing))
        for record, found in records:
            if found != wanted and (record["plan"], record["cell"]) == (plan.name, cell.name):
                keys = _apart(differing([found, wanted]))
                notes.append(f"left out: {cell.name}, seed {record['seed']}, run by another protocol: {keys}")
    return rows, notes


def of_records(records: Iterable[Mapping]) -> list[Row]:
    """A row for each cell. Raises UserError where runs of one cell differ in their protocol."""
    cells: dict[str, list] = {}
    for record in records:
        cells.setdefault(record["cell"], []).append(record)
    problems = []
    for name, some in cells.items():
        keys = differing(protocol(*settings_of(record)) for record in some)
        problems += [f"{name}: its runs differ in {_apart(keys)}; give the plan, or select with --only"] * bool(keys)
    if problems:
        raise UserError(*problems)
    return [Row(name, sorted(some, key=lambda record: record["seed"]), []) for name, some in cells.items()]


def _apart(keys: Mapping[str, Sequence]) -> str:
    return ", ".join(f"{key} ({' / '.join(map(str, values))})" for key, values in keys.items())


def check_shared(rows: Sequence[Row]) -> None:
    """Raises UserError where rows of one table differ in data or solver, but for the learning rate, which is the
    student's.
    """
    shared = []
    for row in rows:
        for record in row.records:
            own, _ = settings_of(record)
            kept = {k: v for k, v in own.items() if k.startswith(("SOLVER.", "DATASET.")) and k != "SOLVER.LR"}
            shared.append(kept | {"sha256 of the data": record["sha256"]["data"]})
    keys = differing(shared)
    if keys:
        raise UserError(f"runs of different protocols in one table: {_apart(keys)}; select with --only, or give a plan")


def departures(cfg, published: Mapping) -> list[str]:
    """In what a run departs from the published protocol."""
    rule = published.get("protocol", {})
    found = []
    if cfg.DATASET.TYPE != published.get("dataset", results.PUBLISHED_DATA):
        found.append(f"DATASET.TYPE {cfg.DATASET.TYPE}")
    if cfg.DATASET.AUGMENT not in ("auto", "crop_flip"):
        found.append(f"DATASET.AUGMENT {cfg.DATASET.AUGMENT}")
    wanted = {ours: rule[key] for key, ours in PROTOCOL.items() if key in rule}
    rate = "lr_shuffle_mobilenet" if cfg.DISTILLER.STUDENT in SMALL_RATE else "lr"
    wanted |= {"SOLVER.LR": rule[rate]} if rate in rule else {}
    for key, theirs in wanted.items():
        section, leaf = key.split(".")
        if cfg[section][leaf] != theirs:
            found.append(f"{key} {cfg[section][leaf]} (published: {theirs})")
    return found


def published_of(group: Group, published: Mapping) -> tuple[float, float] | None:
    """The published figure and how far it may be off: those of the charts were read by eye."""
    figure = results.published_figure(group, published)
    if figure is not None:
        return figure, 0.0
    chart = published.get(f"dtkd_chart_{group.cfg.DISTILLER.STUDENT}", {})
    teacher, method = group.cfg.DISTILLER.TEACHER, group.published_name
    if group.cfg.DATASET.TYPE != results.PUBLISHED_DATA or method not in chart or teacher not in chart["teacher"]:
        return None
    return chart[method][chart["teacher"].index(teacher)], chart["read_by_eye_plus_minus"]


def verdict(ours: Mean, figure: float, off: float = 0.0) -> str:
    """Where `figure`, uncertain by `off`, lies: inside, above or below ours, mean ± standard deviation."""
    if ours.std is None:
        return "one seed"
    reach = ours.std + off
    return "above" if figure > ours.mean + reach else "below" if figure < ours.mean - reach else "inside"


def table_of(rows: Sequence[Row], title: str, published: Mapping) -> tuple[Table, list[str]]:
    """The table and the notes below it. Nothing is compared with figures of another protocol."""
    filled = [(row, row.group) for row in rows if row.records]
    away = list(dict.fromkeys(line for _, group in filled for line in departures(group.cfg, published)))
    compare = bool(published) and not away and any(published_of(group, published) for _, group in filled)
    lines = []
    for row, group in filled:
        method = group.method if group.method.endswith("+LSKD") or "+" not in row.name else row.name.split(",")[0]
        line = [group.pair, method, len(row.records), group.seeds, group.last, group.best]
        if compare:
            figure, off = published_of(group, published) or (None, 0.0)
            shown = f"{figure:.2f}" if figure is not None and not off else f"~{figure}" if off else None
            lies = None if figure is None else verdict(group.best, figure, off)
            line += [shown, None if figure is None else group.best.mean - figure, lies]
        lines.append(line)
    table = Table(
        "table", title, CAPTION + BESIDE_CAPTION * compare, HEAD + BESIDE * compare, lines, list(range(len(lines)))
    )
    return table, _notes(rows, away)


def _notes(rows: Sequence[Row], away: Sequence[str]) -> list[str]:
    """Protocol, machine and code of the runs, and what is missing."""
    notes, records = [], [record for row in rows for record in row.records]
    if away:
        notes.append("**Not the published protocol**: " + ", ".join(away) + ".")
    if records:
        first = records[0]["config"]
        students = {r["config"]["DISTILLER.STUDENT"]: r["config"]["SOLVER.LR"] for r in records}
        rates = {}
        for student, rate in students.items():
            rates.setdefault(rate, []).append(student)
        rate = " and ".join(
            f"{value:g} ({', '.join(names)})" if len(rates) > 1 else f"{value:g}" for value, names in rates.items()
        )
        falls = ", ".join(map(str, first["SOLVER.LR_DECAY_STAGES"]))
        data, epochs, batch = first["DATASET.TYPE"], first["SOLVER.EPOCHS"], first["SOLVER.BATCH_SIZE"]
        amp = {"none": "float32"}.get(first["SOLVER.AMP"], f"{first['SOLVER.AMP']} autocast")
        notes.append(
            f"Protocol: {data}, {epochs} epochs, batches of {batch}, learning rate {rate}, times "
            f"{first['SOLVER.LR_DECAY_RATE']:g} after epochs {falls}, weight decay {first['SOLVER.WEIGHT_DECAY']:g}, "
            f"{amp}."
        )
        machines = sorted({f"{r['device']}, torch {r['versions']['torch']}" for r in records})
        commits = sorted(
            {g["commit"][:12] + " (with changes)" * (not g["clean"]) for r in records for g in r["git"] if g}
        )
        hours = sum(r["seconds"] for r in records) / 3600
        notes.append(
            f"{len(records)} runs, {hours:.2f} hours of training and evaluation in all, on {'; '.join(machines)}; "
            f"commit{'s' * (len(commits) > 1)} {', '.join(commits) or 'unknown'}."
        )
    for row in rows:
        teachers = {record["teacher"]["sha256"] for record in row.records if record["teacher"]}
        if len(teachers) > 1:
            notes.append(f"{row.name}: its seeds learnt from {len(teachers)} trainings of the teacher.")
    missing = [
        f"{row.name} (seed{'s' * (len(row.missing) > 1)} {', '.join(map(str, row.missing))})"
        for row in rows
        if row.missing
    ]
    if missing:
        notes.append(f"Not run yet: {'; '.join(missing)}.")
    return notes


def chart_of(rows: Sequence[Row], title: str, name: str, note: str = "") -> list[Chart]:
    """Grouped bars, one chart for each student that several teachers share, else one of all pairs: a group of bars for
    each teacher, a bar for each method, the student alone as a level; error bars are one standard deviation.
    """
    filled = [(row, row.group) for row in rows if row.records]
    taught = [(row, group) for row, group in filled if group.method != "NONE"]
    alone = {group.cfg.DISTILLER.STUDENT: group for _, group in filled if group.method == "NONE"}
    students = list(dict.fromkeys(group.cfg.DISTILLER.STUDENT for _, group in taught))
    teachers = {s: {g.cfg.DISTILLER.TEACHER for _, g in taught if g.cfg.DISTILLER.STUDENT == s} for s in students}
    if len(students) == 1 or (teachers and min(map(len, teachers.values())) > 1):
        return [
            _chart(
                [(row, g) for row, g in taught if g.cfg.DISTILLER.STUDENT == s],
                [(g.cfg.DISTILLER.TEACHER, "") for row, g in taught if g.cfg.DISTILLER.STUDENT == s],
                alone.get(s), f"{title}: {s}", f"{name}-{s}", note, "teacher",
            )
            for s in students
        ]  # fmt: skip
    both = [(row, g) for row, g in filled if g.method != "NONE" or g.cfg.DISTILLER.STUDENT in teachers]
    places = []
    for _, g in both:
        s = g.cfg.DISTILLER.STUDENT
        places.append((f"{g.cfg.DISTILLER.TEACHER} → {s}", "") if g.method != "NONE" else ("", s))
    return [_chart(both, places, None, title, name, note, "")] if both else []


def _chart(some, places, baseline: Group | None, title: str, name: str, note: str, axis: str) -> Chart:
    """`places`: of each cell its place on the axis; or, of a student alone, "" and the student, for all its places."""
    names = list(dict.fromkeys(place for place, _ in places if place))
    methods = list(dict.fromkeys(_method(row) for row, _ in some))
    panels = []
    for which in ("best", "last"):
        panel = Panel(f"{which} epoch", axis, "top-1 (%)")
        for number, method in enumerate(methods):
            means = {}
            for (row, group), (place, student) in zip(some, places, strict=True):
                if _method(row) == method:
                    own = [place] if place else [n for n in names if n.endswith(f"→ {student}")]
                    means |= dict.fromkeys(own, getattr(group, which))
            y = np.array([means[n].mean if n in means else np.nan for n in names])
            sd = np.array([(means[n].std or 0.0) if n in means else np.nan for n in names])
            few = len(names) * len(methods) <= MOST_LABELS
            text = [f"{value:.1f}" for value in y] if few else []
            label = "the student alone" if method == "NONE" else method
            bands = {("minus_sd", "plus_sd"): (y - sd, y + sd)}
            panel.series.append(Series(label, None, names, y, "bars", bands, text=text, colour=COLOURS[number]))
        if baseline:
            mean = getattr(baseline, which)
            sd = mean.std or 0.0
            bands = {("minus_sd", "plus_sd"): ([mean.mean - sd], [mean.mean + sd])}
            label = f"{baseline.cfg.DISTILLER.STUDENT} alone"
            panel.series.append(Series(label, None, [axis], [mean.mean], "level", bands, dashed=True, colour="#444444"))
        ends = np.concatenate([np.asarray(v, float) for s in panel.series for pair in s.bands.values() for v in pair])
        ends = ends[np.isfinite(ends)]
        low, high = float(ends.min()), float(ends.max())
        span = max(high - low, 1.0)
        panel.y_range = (max(low - 0.3 * span, 0.0), high + 0.15 * span)
        panels.append(panel)
    seeds = sorted({len(row.records) for row, _ in some})
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    heading = (
        f"{title}\nmean ± standard deviation over {count} seed{'s' * (seeds[-1] > 1)}; the axis does not start at 0"
    )
    chart = Chart(name, "", heading + f"\n{note}" * bool(note), "", panels)
    chart.wide = 1
    return chart


def _method(row: Row) -> str:
    return row.name.split(",")[0]


def write(rows: Sequence[Row], title: str, out: Path, name: str, published: Mapping, notes: Sequence[str] = ()) -> str:
    """OUT/NAME.md, .tex, .csv, and the charts; returns the Markdown. Raises UserError where protocols would mix."""
    check_shared(rows)
    table, below = table_of(rows, title, published)
    text = markdown(table, [*below, *notes])
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / f"{name}.md", f"# {title}\n\n{text}".encode())
    comments = "".join(f"% {line}\n" for line in (*below, *notes))
    write_atomic(out / f"{name}.tex", (comments + results.latex(table)).encode())
    write_csv(out / f"{name}.csv", table)
    away = next((line.replace("**", "") for line in below if line.startswith("**")), "")
    for chart in chart_of(rows, title, name, away):
        drawing.draw(chart, out, [])
    return text


def markdown(table: Table, notes: Sequence[str]) -> str:
    return results.markdown(table) + "".join(f"\n{line}\n" for line in notes) if table.rows else _nothing(notes)


def _nothing(notes: Sequence[str]) -> str:
    return "Nothing of this is on record yet.\n" + "".join(f"\n{line}\n" for line in notes)


def write_csv(path: Path, table: Table) -> None:
    """Numbers in full: mean and deviation in columns of their own."""
    split = {i for row in table.rows for i, cell in enumerate(row) if isinstance(cell, Mean)}
    head = [h for i, name in enumerate(table.head) for h in ([name, f"{name} sd"] if i in split else [name])]
    rows = [[v for cell in row for v in (cell[:2] if isinstance(cell, Mean) else [cell])] for row in table.rows]
    write_table(path, head, rows)
