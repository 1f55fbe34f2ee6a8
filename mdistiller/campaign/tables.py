"""Records become tables (Markdown, LaTeX, CSV) and bar charts: every seed on record, and never two protocols."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from yacs.config import CfgNode

from mdistiller import config
from mdistiller.analysis import drawing, results
from mdistiller.analysis.charts import COLOURS, GREY, Chart, Panel, Series, Table, write_table
from mdistiller.analysis.runs import Group, Run, own_rule
from mdistiller.analysis.statistics import Mean
from mdistiller.campaign.identity import computing, differing, protocol, tree_of
from mdistiller.campaign.ledger import settings_of
from mdistiller.campaign.plan import Plan, Shipped
from mdistiller.distillers import distiller_dict
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
    "(~: read off a chart, and as far outside as that is uncertain). Neither above nor below means that it was not "
    "reproduced: with so few seeds an equally good run lies outside about half of the time (n = 3: 48 %, n = 2: 56 %)."
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
NO_MATTER = ("SEED", "DETERMINISTIC", "SOLVER.STEP", "SOLVER.AMP", "SOLVER.NAN_POLICY", "TEACHER_BANK")  # to figures
OTHER_PROTOCOL, OTHER_VALUES = "Not the published protocol", "Not the published hyperparameters"
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
    cfg = CfgNode(tree_of(config.leaves(CFG) | record["config"]))
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
        others: dict[str, list[int]] = {}
        for record, found in records:
            if found != wanted and (record["plan"], record["cell"]) == (plan.name, cell.name):
                others.setdefault(_apart(differing([found, wanted])), []).append(record["seed"])
        notes += [f"Left out: {cell.name} ({_seeds(of)}), run by another protocol: {k}." for k, of in others.items()]
    return rows, notes


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + "s" * (number != 1)


def _seeds(numbers: Iterable[int]) -> str:
    numbers = sorted(set(numbers))
    return f"seed{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


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


def _shared(record: Mapping) -> dict[str, object]:
    """What rows of one table have in common: data and solver, but for the learning rate, which is the student's."""
    own, _ = settings_of(record)
    kept = {k: v for k, v in own.items() if k.startswith(("SOLVER.", "DATASET.")) and k != "SOLVER.LR"}
    return kept | {"sha256 of the data": record["sha256"]["data"]}


def alike(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """The rows that can stand in one table with most of the runs, and a line on each that cannot."""
    found = {row.name: [_shared(record) for record in row.records] for row in rows}
    every = [shared for some in found.values() for shared in some]
    most = max(every, key=every.count, default=None)
    odd = {name: differing([most, *some]) for name, some in found.items() if any(shared != most for shared in some)}
    notes = [
        f"Left out: {name}, of another protocol than the other rows: {_apart(keys)}." for name, keys in odd.items()
    ]
    return [row for row in rows if row.name not in odd], notes


def check_shared(rows: Sequence[Row]) -> None:
    """Raises UserError where runs differ in what rows of one table must have in common."""
    keys = differing(_shared(record) for row in rows for record in row.records)
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


def changes(group: Group, shipped: Shipped | None) -> list[str]:
    """The group's hyperparameters that are not those of its pair's YAML file, temperature rules apart: a row's name
    has those.
    """
    theirs = shipped.settings(group.cfg) if shipped else {}
    ignored = (*NO_MATTER, "TEMPERATURE.RULE", "DATASET.", "DISTILLER.", *PROTOCOL.values(), "SOLVER.LR")
    return [
        f"{key} {value} (published: {theirs[key]})"
        for key, value in computing(group.cfg).items()
        if theirs.get(key, value) != value and not key.startswith(ignored)
    ]


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


def table_of(
    rows: Sequence[Row], title: str, published: Mapping, shipped: Shipped | None = None
) -> tuple[Table, list[str]]:
    """The table and the notes below it. Nothing is compared with figures of another protocol, no row with figures of
    other hyperparameters.
    """
    filled = [(row, row.group) for row in rows if row.records]
    away = list(dict.fromkeys(line for _, group in filled for line in departures(group.cfg, published)))
    changed = {row.name: changes(group, shipped) for row, group in filled}
    figures = {r.name: None if changed[r.name] else published_of(group, published) for r, group in filled}
    compare = bool(published) and not away and any(figures.values())
    lines = []
    for row, group in filled:
        method = group.method if group.method.endswith("+LSKD") or "+" not in row.name else row.name.split(",")[0]
        line = [group.pair, method, len(row.records), group.seeds, group.last, group.best]
        if compare:
            figure, off = figures[row.name] or (None, 0.0)
            shown = f"{figure:.2f}" if figure is not None and not off else f"~{figure}" if off else None
            lies = None if figure is None else verdict(group.best, figure, off)
            line += [shown, None if figure is None else group.best.mean - figure, lies]
        lines.append(line)
    table = Table(
        "table", title, CAPTION + BESIDE_CAPTION * compare, HEAD + BESIDE * compare, lines, list(range(len(lines)))
    )
    return table, _notes(rows, away, changed)


def _notes(rows: Sequence[Row], away: Sequence[str], changed: Mapping[str, Sequence[str]]) -> list[str]:
    """Protocol, machine and code of the runs, and what is missing."""
    notes, records = [], [record for row in rows for record in row.records]
    if away:
        notes.append(f"**{OTHER_PROTOCOL}**: " + ", ".join(away) + ".")
    alike: dict[str, list[str]] = {}
    for name, keys in changed.items():
        alike.setdefault(", ".join(keys), []).append(name)
    notes += [f"**{OTHER_VALUES}**: {keys}, in {'; '.join(of)}." for keys, of in alike.items() if keys]
    if records:
        settings = [settings_of(record)[0] for record in records]
        first, students = settings[0], {s["DISTILLER.STUDENT"]: s["SOLVER.LR"] for s in settings}
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
        minutes = sum(r["seconds"] / r.get("students", 1) for r in records) / 60  # side by side they share them
        time = counted(round(minutes), "minute") if minutes < 120 else f"{minutes / 60:.1f} hours"
        notes.append(
            f"{counted(len(records), 'run')}, {time} of training and evaluation in all, on "
            f"{'; '.join(machines)}; commit{'s' * (len(commits) > 1)} {', '.join(commits) or 'unknown'}."
        )
    for row in rows:
        teachers = {record["teacher"]["sha256"] for record in row.records if record["teacher"]}
        if len(teachers) > 1:
            notes.append(f"{row.name}: its seeds learnt from {len(teachers)} trainings of the teacher.")
    missing = [f"{row.name} ({_seeds(row.missing)})" for row in rows if row.missing]
    if records and missing:
        notes.append(f"Not run yet: {'; '.join(missing)}.")
    return notes


def charts_of(rows: Sequence[Row], title: str, note: str = "") -> list[Chart]:
    """Grouped bars, a group for each teacher, a bar for each method, the student alone as a level: one chart for each
    student, where each has several teachers or there is one; else one chart with a group for each pair.
    """
    filled = [(row, row.group, row.group.cfg.DISTILLER) for row in rows if row.records]
    if any("+" in _method(row) for row, _, _ in filled):
        return _rule_charts(filled, f"{title} ({note})" if note else title)
    taught = [(row, group, names) for row, group, names in filled if names.TYPE != "NONE"]
    alone = {names.STUDENT: (row, group) for row, group, names in filled if names.TYPE == "NONE"}
    teachers: dict[str, set] = {}
    for _, _, names in taught:
        teachers.setdefault(names.STUDENT, set()).add(names.TEACHER)
    title += f" ({note})" * bool(note)
    if len(teachers) == 1 or (teachers and min(map(len, teachers.values())) > 1):
        charts = []
        for student in teachers:
            bars = [(_method(row), [names.TEACHER], group) for row, group, names in taught if names.STUDENT == student]
            _, level = alone.get(student, (None, None))
            bars.sort(key=lambda bar: _natural(bar[1][0]))
            charts.append(_chart(bars, level, f"{title}: {student}", f"chart-{student}", "teacher"))
        return charts
    bars = [(_method(row), [group.pair], group) for row, group, _ in taught]
    pairs = dict.fromkeys((names.STUDENT, group.pair) for _, group, names in taught)
    singles = [("alone", [pair for of, pair in pairs if of == student], g) for student, (_, g) in alone.items()]
    bars = [bar for bar in singles if bar[1]] + bars
    return [_chart(bars, None, title, "chart", "")] if bars else []


def _rule_charts(filled: Sequence[tuple], title: str) -> list[Chart]:
    """One for each pair: a group of bars for each temperature rule, a bar for each method."""
    alone = {names.STUDENT: group for _, group, names in filled if names.TYPE == "NONE"}
    pairs: dict[tuple, list] = {}
    for row, group, names in filled:
        if names.TYPE != "NONE":
            method, _, rule = _method(row).partition("+")
            bar = (method, [rule or own_rule(method)], group)
            pairs.setdefault((names.TEACHER, names.STUDENT), []).append(bar)
    return [
        _chart(bars, alone.get(student), f"{title}: {teacher} → {student}", f"chart-{teacher}-{student}", "rule")
        for (teacher, student), bars in pairs.items()
    ]


def _natural(name: str) -> list:
    """resnet20 before resnet110."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _chart(
    bars: Sequence[tuple[str, list[str], Group]], level: Group | None, title: str, name: str, axis: str
) -> Chart:
    """`bars`: of each the method, its places on the axis, and its runs."""
    places = list(dict.fromkeys(place for _, own, _ in bars for place in own))
    methods = sorted(dict.fromkeys(method for method, _, _ in bars), key=lambda name: name != "alone")
    counts = sorted({len(group.runs) for _, _, group in bars})
    seeds = "–".join(map(str, dict.fromkeys([counts[0], counts[-1]]))) + " seed" + "s" * (counts[-1] > 1)
    chart = Chart(name, "", title, "", [], wide=1)
    for which in ("best", "last"):
        panel = Panel(f"{which} epoch, mean ± standard deviation over {seeds}", axis, "top-1 (%)")
        for method in methods:
            means = {place: getattr(group, which) for kind, own, group in bars if kind == method for place in own}
            y = np.array([means[place].mean if place in means else np.nan for place in places])
            sd = np.array([(means[place].std or 0.0) if place in means else np.nan for place in places])
            text = [f"{value:.1f}" for value in y] if len(places) * len(methods) <= MOST_LABELS else []
            bands = {("minus_sd", "plus_sd"): (y - sd, y + sd)}
            panel.series.append(Series(method, None, places, y, "bars", bands, text=text, colour=_shade(method)))
        if level:
            mean = getattr(level, which)
            bands = {("minus_sd", "plus_sd"): tuple([mean.mean + sign * (mean.std or 0.0)] for sign in (-1, 1))}
            look = {"dashed": True, "colour": "#444444", "text": [f"{mean.mean:.1f}"]}
            panel.series.append(Series(f"{level.pair} alone", None, [axis], [mean.mean], "level", bands, **look))
        ends = [v for s in panel.series for pair in s.bands.values() for values in pair for v in values if v == v]
        span = max(max(ends) - min(ends), 1.0)
        panel.y_range = (max(min(ends) - 0.3 * span, 0.0), max(ends) + 0.15 * span)  # bars that start at 0 look alike
        panel.y_label += ", axis cut" * bool(panel.y_range[0] > 0)
        chart.panels.append(panel)
    return chart


def _shade(method: str) -> str:
    """A method's own colour, whatever else is shown: darker ones once COLOURS are used up."""
    if method == "alone":
        return GREY
    first = ("KD", "DKD", "DTKD")
    order = [*first, *(name for name in distiller_dict if name not in ("NONE", *first))]
    round_, place = divmod(order.index(method) if method in order else len(order), len(COLOURS))
    parts = (int(COLOURS[place][i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{int(part * 0.6**round_):02x}" for part in parts)


def _method(row: Row) -> str:
    return row.name.split(",")[0]


@dataclass
class Report:
    """A campaign's table, the notes below it and its charts, under the name that their files have."""

    name: str
    title: str
    table: Table
    notes: list[str]
    charts: list[Chart]

    @property
    def markdown(self) -> str:
        table = results.markdown(self.table) if self.table.rows else "Nothing of it is on record yet.\n"
        return table + "".join(f"\n{line}\n" for line in self.notes)

    def write(self, out: Path) -> None:
        """OUT/NAME/table.md, .tex and .csv, and the charts as PNG and SVG; nothing where nothing is on record."""
        if not self.table.rows:
            return
        folder = out / self.name
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "table.md", f"# {self.title}\n\n{self.markdown}".encode())
        comments = "".join(f"% {line}\n" for note in self.notes for line in note.splitlines())
        titled = replace(self.table, caption=f"{' '.join(self.title.split())}. {self.table.caption}")
        write_atomic(folder / "table.tex", (comments + results.latex(titled)).encode())
        write_csv(folder / "table.csv", self.table)
        made = {chart.name for chart in self.charts}
        for old in (file for kind in ("png", "svg") for file in folder.glob(f"chart*.{kind}")):
            if old.stem not in made:  # of a plan that had other pairs
                old.unlink()
        for chart in self.charts:
            drawing.draw(chart, folder, [])


def report(
    rows: Sequence[Row],
    title: str,
    name: str,
    published: Mapping,
    shipped: Shipped | None = None,
    notes: Sequence[str] = (),
) -> Report:
    """`shipped`: the YAML files with the published hyperparameters. Raises UserError where protocols would mix."""
    check_shared(rows)
    table, below = table_of(rows, title, published, shipped)
    said = [words for words in (OTHER_PROTOCOL, OTHER_VALUES) if any(line.startswith(f"**{words}**") for line in below)]
    away = said[0].lower() if said else ""
    return Report(name, title, table, [*below, *notes], charts_of(rows, title, away))


def write_csv(path: Path, table: Table) -> None:
    """Numbers in full: mean and deviation in columns of their own."""
    split = {i for row in table.rows for i, cell in enumerate(row) if isinstance(cell, Mean)}
    head = [h for i, name in enumerate(table.head) for h in ([name, f"{name} sd"] if i in split else [name])]
    rows = [
        [v for cell in row for v in (cell[:2] if isinstance(cell, Mean) else [_number(cell)])] for row in table.rows
    ]
    write_table(path, head, rows)


def _number(cell: object) -> object:
    """~59.1, which was read off a chart, is a number too."""
    return cell[1:] if isinstance(cell, str) and re.fullmatch(r"~[\d.]+", cell) else cell
