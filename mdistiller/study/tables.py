"""Tables of results: last and best accuracy over seeds beside published figures, as Markdown, LaTeX, CSV and text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from mdistiller.study.published import EPOCHS, published_figure
from mdistiller.study.runs import Group, Run
from mdistiller.study.statistics import Mean

BESIDE = ("published (%)", "last − published", "best − published")
HEAD = ("pair", "method", "rule", "data", "schedule", "seeds", "last (%)", "best (%)", *BESIDE)
CAPTION = (
    "Top-1 accuracy on the test set: mean ± standard deviation (n − 1) over n seeds, of the last epoch and of each "
    "run's best one, which is chosen on the test set and therefore flatters."
)
COMPARED = ("run", "method", "teacher", "student", "data", "seed", "epochs", "last", "best", "at epoch")
TO_THE_RIGHT = ("%", "−", "seed", "epoch", "last", "best", "left")
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
        same = figure is not None and group.first.epochs == epochs
        beside = figure if same or figure is None else f"{figure:.2f} at {epochs} epochs"
        off = [mean.mean - figure if same else None for mean in (group.last, group.best)]
        method = ", ".join(filter(None, [group.method, group.extra]))
        row = [group.pair, method, group.rule, group.cfg.DATASET.TYPE, group.schedule, group.seeds]
        rows.append([*row, group.last, group.best, beside, *off])
    head = HEAD if published else HEAD[: -len(BESIDE)]
    rows = [row[: len(head)] for row in rows]
    return Table("results", "Results", CAPTION, head, rows, list(range(len(groups))))


def compared(runs: Sequence[Run]) -> Table:
    """Return a row for each run."""
    rows = []
    for run in runs:
        names, last = run.cfg.DISTILLER, run.rows[-1]
        teacher = names.TEACHER if run.taught else "-"
        row = [run.name, names.TYPE, teacher, names.STUDENT, run.cfg.DATASET.TYPE, run.seed]
        row += [f"{run.epochs}/{run.cfg.SOLVER.EPOCHS}", float(last["test_acc"]), float(last["best_acc"])]
        rows.append([*row, last.get("best_epoch", "-")])
    return Table("compared", "", "", COMPARED, rows)


def counted(number: int, noun: str) -> str:
    """Return 1 run, 2,000 runs."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def text(cell: object, signed: bool = False) -> str:
    """Return a cell as people read it, on one line."""
    if cell is None:
        return "–"
    if isinstance(cell, float):
        rounded = round(cell, 2) + 0.0  # no minus before a zero
        return (f"{rounded:+.2f}" if signed else f"{rounded:.2f}").replace("-", "−")
    return "".join(c if c.isprintable() else " " for c in str(cell))


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
    return f"{_tabulated(safe, 'pipe')}\n\n{table.caption}\n"


def text_table(table: Table) -> str:
    """Return the table as aligned text for a terminal."""
    return _tabulated(_frame(table), "simple")


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


def _tabulated(frame: pd.DataFrame, style: str) -> str:
    aligns = ["right" if _to_the_right(name) else "left" for name in frame.columns]
    return frame.to_markdown(index=False, tablefmt=style, disable_numparse=True, colalign=aligns)


def _to_the_right(name: str) -> bool:
    return any(part in name for part in TO_THE_RIGHT) and name != "seeds"
