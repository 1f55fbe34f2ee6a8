"""Tables of results: last and best accuracy over seeds beside published figures, as Markdown, LaTeX, CSV and text."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import pandas as pd

from mdistiller.study.groups import told_apart
from mdistiller.study.published import EPOCHS, published_figure
from mdistiller.study.runs import Group, Run
from mdistiller.study.statistics import Mean, mean_and_std
from mdistiller.terminal import counted

BESIDE = ("published (%)", "last − published", "best − published")
HEAD = ("pair", "method", "rule", "data", "schedule", "seeds", "last (%)", "best (%)", *BESIDE)
CAPTION = (
    "Top-1 accuracy on the test set: mean ± standard deviation (n − 1) over n seeds, of the last epoch and of each "
    "run's best one, which is chosen on the test set and therefore flatters."
)
COMPARED = ("run", "method", "teacher", "student", "data", "seed", "epochs", "last", "best", "at epoch")
MORE = {  # figures beside accuracy, last and best, by task: their heads, and how they are written
    "classification": {},
    "text": {"test_loss": ("loss", "{:.4f}"), "bits_per_byte": ("bits/byte", "{:.4f}")},
    "detection": {key: (key, "{:.2f}") for key in ("AP50", "AP75", "APs", "APm", "APl")},
}
COMPARED_MORE = {**MORE, "detection": {"AP50": MORE["detection"]["AP50"]}}  # as many as fit beside each other
SHARED = ("data", "seed", "epochs")
TO_THE_RIGHT = (
    "%", "−", "seed", "epoch", "last", "best", "left", "loss", "parameters", "/s", "ms", "p95", "MB", "bits/byte", "KL",
    "AP",
)  # fmt: skip
LEAST_WIDTH = 8  # of a column of texts that is made narrower
SYMBOLS = {"→": r"$\to$", "±": r"$\pm$", "−": "$-$", "–": "--"}


@dataclass
class Table:
    """`rows`: one list of cells for each group in `groups`; a cell is a Mean, a number, a text or None."""

    name: str
    title: str
    caption: str
    head: Sequence[str]
    rows: list[list]
    groups: Sequence[int] = ()


def results_table(groups: list[Group], published: Mapping) -> Table:
    """Return a row for each group of a report. Differences are given only where the group ran the published number of
    epochs; without `published` the columns BESIDE are left out.
    """
    epochs = published.get("protocol", {}).get("epochs", EPOCHS)
    rows = []
    for group in groups:
        figure, _ = published_figure(group, published) or (None, 0)
        same = figure is not None and all(run.epochs == epochs for run in group.runs)
        beside = figure if same or figure is None else f"{figure:.2f} at {counted(epochs, 'epoch')}"
        off = [mean.mean - figure if same else None for mean in (group.last, group.best)]
        method = ", ".join(filter(None, [group.method, group.extra]))
        row = [group.pair, method, group.rule, group.cfg.DATASET.TYPE, group.schedule, group.seeds]
        rows.append([*row, group.last, group.best, beside, *off])
    head = HEAD if published else HEAD[: -len(BESIDE)]
    rows = [row[: len(head)] for row in rows]
    tasks = [group.first.task for group in groups]
    for task in [task for task in MORE if task in tasks]:
        head = [*head, *(f"{which} {name}" for name, _ in MORE[task].values() for which in ("last", "best"))]
        for row, group in zip(rows, groups, strict=True):
            row += [more_of(group, task, key, best) for key in MORE[task] for best in (False, True)]
    detects = {*tasks} == {"detection"}
    if detects:
        head = [name.replace(" (%)", " AP") if name in ("last (%)", "best (%)") else name for name in head]
    return Table("results", "Results", caption_of(groups), head, rows, list(range(len(groups))))


def caption_of(groups: Sequence[Group]) -> str:
    """Return what the figures in a table of these groups are."""
    detectors = any(group.first.task == "detection" for group in groups)
    of_them = "Top-1 accuracy, of detectors COCO's average precision (AP),"
    return CAPTION.replace("Top-1 accuracy", of_them) if detectors else CAPTION


def compared(runs: Sequence[Run]) -> Table:
    """Return a row for each run. What all of them share of SHARED stands in the caption, not in a column. Runs on text
    and of detectors have the columns of COMPARED_MORE too; the best epoch is that of the lowest loss on text, and of
    detectors that of the highest AP, which stands in the accuracy's place.
    """
    rows, figures = [], {key: of for run in runs for key, of in COMPARED_MORE[run.task].items()}
    head = [*COMPARED, *(f"{which} {name}" for name, _ in figures.values() for which in ("last", "best"))]
    if {run.task for run in runs} == {"detection"}:
        head = [f"{name} AP" if name in ("last", "best") else name for name in head]
    sets = told_apart(runs, "data", [run.cfg.DATASET.TYPE for run in runs])
    teachers = [run.teacher_name if run.taught else "-" for run in runs]
    teachers = told_apart(runs, "teacher checkpoint", teachers)
    for run, data, teacher in zip(runs, sets, teachers, strict=True):
        names, last = run.cfg.DISTILLER, run.rows[-1]
        row = [run.name, names.TYPE, teacher, names.STUDENT, data, run.seed]
        early = ", stopped early" if run.stopped_early else ""
        row += [f"{run.epochs}/{run.cfg.SOLVER.EPOCHS}{early}", float(last["test_acc"]), float(last["best_acc"])]
        both = (last, run.best_row) if figures else ()
        row += [last.get("best_epoch", "-")]
        row += [written(one.get(key), form) for key, (_, form) in figures.items() for one in both]
        rows.append(row)
    shared = ("teacher", "student", *SHARED) if figures else SHARED  # the table of a text is wide as it is
    alike = [COMPARED.index(name) for name in shared if len({row[COMPARED.index(name)] for row in rows}) == 1]
    caption = ", ".join(f"{COMPARED[place]} {rows[0][place]}" for place in alike)
    kept = [place for place in range(len(head)) if place not in alike]
    rows = [[row[place] for place in kept] for row in rows]
    return Table("compared", "", caption, [head[place] for place in kept], rows)


def more_of(group: Group, task: str, key: str, best: bool) -> str | None:
    """Return a figure of the last epochs, or of the best ones, of runs of that task; None of others."""
    if not all(run.task == task for run in group.runs):
        return None
    form, values = MORE[task][key][1], [(run.best_row if best else run.rows[-1]).get(key) for run in group.runs]
    if None in values:  # of a size that no object has
        return None
    mean, std, _ = mean_and_std(values)
    return " ± ".join(form.format(value) for value in (mean, std) if value is not None)


def written(value: float | None, form: str) -> str:
    """Return a figure as it is written, where there is one."""
    return "–" if value is None else form.format(value)


def text(cell: object, signed: bool = False) -> str:
    """Return a cell as people read it, on one line."""
    if cell is None:
        return "–"
    if isinstance(cell, float):
        rounded = round(cell, 2) + 0.0  # no minus before a zero
        return (f"{rounded:+.2f}" if signed else f"{rounded:.2f}").replace("-", "−")
    return printable(cell)


def printable(text: object) -> str:
    """Return the text with a space for each control character."""
    return "".join(c if c.isprintable() else " " for c in str(text))


def number(cell: object) -> float | None:
    """Return what a cell is sorted by; None where its text is."""
    value = cell.mean if isinstance(cell, Mean) else cell
    return float(value) if isinstance(value, (int, float)) else None


def cells(table: Table) -> list[list[str]]:
    """Return the rows as texts."""
    return [[text(c, "−" in head) for head, c in zip(table.head, row, strict=True)] for row in table.rows]


def markdown(table: Table) -> str:
    """Return the table and its caption as Markdown, columns aligned."""
    safe = _frame(table).map(lambda cell: cell.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;"))
    aligns = ["right" if _to_the_right(name) else "left" for name in table.head]
    lines = safe.to_markdown(index=False, tablefmt="pipe", disable_numparse=True, colalign=aligns)
    return f"{lines}\n\n{table.caption}\n"


def text_table(table: Table, columns: int | None = None) -> str:
    """Return the table as aligned text. Where it is wider than so many `columns`, its widest texts become several
    lines.
    """
    rows = [list(table.head), *cells(table)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    texts = [place for place, name in enumerate(table.head) if not _to_the_right(name)]
    if columns and sum(widths) + 2 * len(widths) - 2 > columns:  # heads of numbers become several lines first
        for place in set(range(len(widths))) - set(texts):
            words = re.split(r"(?<=[ /])", table.head[place])
            words += [word for row in rows[1:] for word in row[place].split(", ")]
            widths[place] = max(len(word.strip()) for word in words)
    while columns and sum(widths) + 2 * len(widths) - 2 > columns:
        widest = max(texts, key=lambda place: widths[place])
        if widths[widest] <= LEAST_WIDTH:
            break
        widths[widest] -= 1
    aligns = [str.ljust if place in texts else str.rjust for place in range(len(widths))]
    lines = ["  ".join("-" * width for width in widths)]
    for row in rows:
        parts = [_broken(cell, width) for cell, width in zip(row, widths, strict=True)]
        for line in zip_longest(*parts, fillvalue=""):
            cut = (align(part, width) for align, part, width in zip(aligns, line, widths, strict=True))
            lines.append("  ".join(cut).rstrip())
    heads = max(len(_broken(name, width)) for name, width in zip(table.head, widths, strict=True))
    return "\n".join([*lines[1 : heads + 1], lines[0], *lines[heads + 1 :]])


def _broken(cell: str, width: int) -> list[str]:
    """Return the parts of a text that is longer than `width`, which end behind a comma, plus, slash or space if any."""
    return [part.strip() for part in re.findall(rf".{{1,{width}}}(?:(?<=[,+/ ])|(?= )|$)|.{{1,{width}}}", cell)] or [""]


def latex(table: Table) -> str:
    """Return a table environment for the package booktabs."""
    styled = _frame(table).style.format(escape="latex").format_index(escape="latex", axis=1).hide(axis="index")
    kinds = "".join("r" if _to_the_right(name) else "l" for name in table.head)
    body = styled.to_latex(hrules=True, column_format=kinds, position_float="centering", caption="CAPTION")
    caption = table.caption.replace("&", r"\&").replace("%", r"\%").replace("_", r"\_")
    body = body.replace("CAPTION", caption, 1)
    return "% \\usepackage{booktabs}\n" + "".join(SYMBOLS.get(c, c) for c in body)


def numbers(table: Table) -> pd.DataFrame:
    """Return the table in full precision, as its CSV has it: mean and deviation stand in columns of their own."""
    columns: dict[str, list] = {}
    for place, name in enumerate(table.head):
        values = [row[place] for row in table.rows]
        columns[name] = [cell.mean if isinstance(cell, Mean) else cell for cell in values]
        if any(isinstance(cell, Mean) for cell in values):
            columns[f"{name} sd"] = [cell.std if isinstance(cell, Mean) else None for cell in values]
    return pd.DataFrame(columns)


def _frame(table: Table) -> pd.DataFrame:
    return pd.DataFrame(cells(table), columns=list(table.head), dtype=object)


def _to_the_right(name: str) -> bool:
    return any(part in name for part in TO_THE_RIGHT) and name != "seeds"
