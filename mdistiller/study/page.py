"""The report's page: report.html filled in by jinja2, with its style, its script and Vega inside."""

from collections.abc import Sequence
from pathlib import Path

import jinja2
import vl_convert
from markupsafe import Markup

from mdistiller import __version__
from mdistiller.study.charts import Chart, colour
from mdistiller.study.drawing import data_url, page_spec
from mdistiller.study.runs import Group
from mdistiller.study.tables import Table, cells, number, printable
from mdistiller.terminal import counted

GENERATOR = '<meta name="generator" content="mdistiller analyze">'


def report_page(
    groups: Sequence[Group], tables: Sequence[Table], charts: Sequence[Chart], notes: Sequence[str], date: str
) -> str:
    """Return the page as HTML. `notes`: what is not shown, and why."""
    runs = sum(len(group.runs) for group in groups)
    count = f"{counted(runs, 'run')} in {counted(len(groups), 'group')}"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, (int, Markup)) else printable(value),
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment.get_template("report.html").render(
        groups=groups, tables=tables, charts=charts, notes=notes, date=date, count=count, version=__version__,
        sections=list(dict.fromkeys(chart.section for chart in charts)),
        generator=Markup(GENERATOR), library=Markup(vl_convert.javascript_bundle()),
        columns_and_rows=columns_and_rows, colour=colour, data_url=data_url,
        spec_of=page_spec,
    )  # fmt: skip


def columns_and_rows(table: Table) -> tuple[list, list]:
    """Return each column's name and kind (number, text or wide), and each row's group and cells: what a cell shows and
    what it is sorted by, "" where it is unknown.
    """
    numbers = [[number(cell) for cell in row] for row in table.rows]
    kinds = ["text" if all(n is None for n in column) else "number" for column in zip(*numbers, strict=True)]
    columns = list(zip(table.head, ["wide", *kinds[1:]], strict=True))
    rows = []
    for group, row, texts, sorted_by in zip(table.groups, table.rows, cells(table), numbers, strict=True):
        values = ["" if c is None else t if n is None else n for c, t, n in zip(row, texts, sorted_by, strict=True)]
        rows.append((group, list(zip(texts, values, strict=True))))
    return columns, rows
