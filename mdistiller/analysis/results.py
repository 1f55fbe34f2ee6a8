"""The results table: last and best accuracy over seeds, beside published figures; for the page, LaTeX and Markdown."""

import json
from collections.abc import Mapping
from pathlib import Path

from mdistiller.analysis.charts import Table
from mdistiller.analysis.runs import Group
from mdistiller.analysis.statistics import Mean
from mdistiller.errors import UserError

BESIDE = ("published (%)", "last − published", "best − published")
HEAD = ("pair", "method", "rule", "data", "schedule", "seeds", "last (%)", "best (%)", *BESIDE)
PUBLISHED_EPOCHS, PUBLISHED_DATA = 240, "cifar100"


def read_published(file: Path | None) -> dict:
    """{METHOD: {"teacher/student": figure}} as JSON; other entries may stand beside them. "protocol": {"epochs": n} and
    "dataset" say what the figures are for; without them 240 epochs of cifar100. Raises UserError for other files.
    """
    if file is None:
        return {}
    try:
        table = json.loads(file.read_text())
    except OSError as error:
        raise UserError(f"--published {file}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError among them
        raise UserError(f"--published {file}: is no JSON ({error})") from None
    if not isinstance(table, dict) or not any(isinstance(value, dict) for value in table.values()):
        raise UserError(f'--published {file}: expected {{"METHOD": {{"teacher/student": figure}}}}')
    return table


def published_epochs(published: Mapping) -> object:
    protocol = published.get("protocol")
    return protocol.get("epochs", PUBLISHED_EPOCHS) if isinstance(protocol, dict) else PUBLISHED_EPOCHS


def published_figure(group: Group, published: Mapping) -> float | None:
    """The figure of the group's method and pair; None where there is none, or where it is for another data set."""
    if group.cfg.DATASET.TYPE != published.get("dataset", PUBLISHED_DATA) or group.published_name is None:
        return None
    if group.method == "NONE":
        names, pair = ("NONE", "teachers_and_students_alone"), group.cfg.DISTILLER.STUDENT
    else:
        names, pair = (group.published_name,), f"{group.cfg.DISTILLER.TEACHER}/{group.cfg.DISTILLER.STUDENT}"
    for name in names:
        figures = published.get(name)
        figure = figures.get(pair) if isinstance(figures, dict) else None
        if isinstance(figure, (int, float)) and not isinstance(figure, bool):
            return float(figure)
    return None


def results_table(groups: list[Group], published: Mapping) -> Table:
    """A row for each group. Differences are given only where the group ran the published number of epochs;
    without `published` the columns BESIDE are left out.
    """
    epochs = published_epochs(published)
    rows = []
    for group in groups:
        figure = published_figure(group, published)
        same = group.first.epochs == epochs
        beside = None if figure is None else figure if same else f"{figure:.2f} at {epochs} epochs"
        off = [m.mean - figure if figure is not None and same else None for m in (group.last, group.best)]
        method = group.method + f", {group.extra}" * bool(group.extra)
        data = group.cfg.DATASET.TYPE
        rows.append(
            [group.pair, method, group.rule, data, group.schedule, group.seeds, group.last, group.best, beside, *off]
        )
    head = HEAD if published else HEAD[: -len(BESIDE)]
    rows = [row[: len(head)] for row in rows]
    caption = (
        "Top-1 accuracy on the test set: mean ± standard deviation over the seeds (n − 1), of the last epoch and of "
        "each run's best one, which is chosen on the test set and therefore flatters."
    )
    return Table("results", "Results", caption, head, rows, list(range(len(groups))))


def text(cell: object, signed: bool = False) -> str:
    """A cell as people read it."""
    if cell is None:
        return "–"
    if isinstance(cell, float):
        rounded = round(cell, 2) + 0.0  # no minus before a zero
        return (f"{rounded:+.2f}" if signed else f"{rounded:.2f}").replace("-", "−")
    return str(cell)


def number(cell: object) -> float | None:
    """What a cell is sorted by, None where its text is."""
    value = cell.mean if isinstance(cell, Mean) else cell
    return float(value) if isinstance(value, (int, float)) else None


def cells(table: Table) -> list[list[str]]:
    return [[text(c, "−" in head) for head, c in zip(table.head, row, strict=True)] for row in table.rows]


def markdown(table: Table) -> str:
    def line(row: list[str]) -> str:
        return "| " + " | ".join(cell.replace("\\", "\\\\").replace("|", "\\|") for cell in row) + " |"

    safe = [[_flat(cell).replace("<", "&lt;") for cell in row] for row in cells(table)]
    rule = ["---:" if "%" in head or "−" in head else "---" for head in table.head]
    return (
        "\n".join([line(list(table.head)), "| " + " | ".join(rule) + " |", *map(line, safe)]) + f"\n\n{table.caption}\n"
    )


LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "→": r"$\to$", "±": r"$\pm$", "−": "$-$", "–": "--",
}  # fmt: skip


def latex(table: Table) -> str:
    """A table environment for the package booktabs."""

    def line(row: list[str]) -> str:
        return " & ".join("".join(LATEX.get(c, c) for c in _flat(cell)) for cell in row) + r" \\"

    kinds = "".join("r" if "%" in head or "−" in head else "l" for head in table.head)
    body = [line(row) for row in cells(table)]
    caption = "".join(LATEX.get(c, c) for c in table.caption)
    top = [r"% \usepackage{booktabs}", r"\begin{table}", r"\centering", rf"\caption{{{caption}}}"]
    return "\n".join(
        [*top, rf"\begin{{tabular}}{{{kinds}}}", r"\toprule", line(list(table.head)), r"\midrule", *body]
        + [r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]
    )


def _flat(cell: str) -> str:
    return "".join(c if c.isprintable() else " " for c in cell)
