"""The report: one HTML page that holds all it shows and asks nothing of the network."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from plotly.offline import get_plotlyjs

from mdistiller import __version__
from mdistiller.analysis import results
from mdistiller.analysis.charts import Chart, Table, colour
from mdistiller.analysis.interactive import figure_of
from mdistiller.analysis.runs import Group

HERE = Path(__file__).parent
GENERATOR = '<meta name="generator" content="mdistiller analyze">'
# The browser itself refuses whatever would leave the page, should a name in a run's folder slip through as code.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def escape(text: object) -> str:
    return html.escape("".join(c if c.isprintable() else " " for c in str(text)))


def page(
    groups: Sequence[Group],
    tables: Sequence[Table],
    charts: Sequence[Chart],
    notes: Sequence[str],
    date: str,
) -> str:
    """`notes`: what is not shown, and why."""
    figures: list[str] = []
    accuracy = [group.figures for group in groups]
    body = [table_of(table) for table in tables if table.name == "results"]
    for section in dict.fromkeys(chart.section for chart in charts):
        body.append(f"<section><h2>{escape(section)}</h2>")
        body += [table_of(table) for table in tables if table.name == section]
        whole = [chart for chart in charts if chart.section == section and chart.group is None]
        single = [chart for chart in charts if chart.section == section and chart.group is not None]
        body += [figure(chart, figures, accuracy) for chart in whole]
        body += [
            '<div class="pairs">',
            *(figure(chart, figures, accuracy) for chart in single),
            "</div></section>",
        ]
    if notes:
        lines = "".join(f"<li>{escape(note)}</li>" for note in notes)
        body.append(f'<section><h2>Not shown</h2><ul class="soft">{lines}</ul></section>')
    runs = sum(len(group.runs) for group in groups)
    chips = "".join(
        f'<label class="chip" style="--hue:{colour(i)}" title="{escape(g.label)}: {escape(g.figures)}"><input '
        f'type="checkbox" checked value="{i}"><span>{escape(g.label)}</span></label>'
        for i, g in enumerate(groups)
    )
    data = "[" + ",".join(figures).replace("<", "\\u003c").replace(">", "\\u003e") + "]"
    count = f"{runs} run{'s' * (runs != 1)} in {len(groups)} group{'s' * (len(groups) != 1)}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
{GENERATOR}
<link rel="icon" href="data:,">
<title>Distillation report: {count}</title>
<style>
{(HERE / "page.css").read_text()}</style>
</head>
<body>
<header><div><h1>Distillation report</h1><p class="soft">{count}, {escape(date)}, mdistiller {__version__}. Switch runs
on and off in the bar; hover a chart for its values.</p></div><button id="theme">Light / dark</button></header>
<nav id="runs" aria-label="Runs shown"><div>
<button data-all="1">All</button><button data-all="0">None</button>{chips}</div></nav>
<main>
<noscript><p class="card">The charts need JavaScript, which is in this file; the tables stand without it.</p></noscript>
{"".join(body)}
</main>
<footer>Every chart lies beside this page in figures/ as PNG, SVG and CSV.</footer>
<script type="application/json" id="figures">{data}</script>
<script>{get_plotlyjs()}</script>
<script>
{(HERE / "page.js").read_text()}</script>
</body>
</html>
"""


def figure(chart: Chart, figures: list[str], accuracy: Sequence[str]) -> str:
    """The chart as HTML; its panels' JSON goes to the end of `figures`."""
    wide = ' class="wide"' * (len(chart.panels) != 1)
    group = "" if chart.group is None else f' data-group="{chart.group}"'
    parts = []
    for panel in chart.panels:
        square = " square" if panel.matrix is not None or panel.bare else ""
        label = escape(f"{chart.title}: {panel.title}")
        parts.append(
            f'<div><h4>{escape(panel.title)}</h4><div class="plot{square}" role="img" aria-label="{label}" '
            f'data-figure="{len(figures)}"></div></div>'
        )
        figures.append(figure_of(panel, accuracy))
    blocks = "".join(pictures(*block) for block in chart.pictures)
    body = f'<div class="panels" style="--least:{1100 // chart.wide - 40}px">{"".join(parts)}</div>'
    return (
        f'<figure id="{escape(chart.name)}"{group}{wide}><h3>{escape(chart.title)}</h3>{body}{blocks}'
        f"<figcaption>{escape(chart.caption)}</figcaption></figure>"
    )


def pictures(heading: str, images: np.ndarray, texts: Sequence[str]) -> str:
    """uint8 images (M, H, W, 3), each above its text, whose first line is its name."""
    cells = []
    for image, text in zip(images, texts, strict=True):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG", optimize=True)
        data = base64.b64encode(file.getvalue()).decode()
        name, *rest = map(escape, text.split("\n"))
        cells.append(
            f'<div><img src="data:image/png;base64,{data}" alt="{name}"><b>{name}</b>{"<br>".join(rest)}</div>'
        )
    return f'<h4>{escape(heading)}</h4><div class="pictures">{"".join(cells)}</div>'


def table_of(table: Table) -> str:
    columns = list(zip(*table.rows, strict=True))
    numeric = [any(results.number(c) is not None for c in column) or not any(column) for column in columns]
    kind = [' class="number"' if is_number else "" for is_number in numeric]
    head = "".join(
        f'<th scope="col"{k}><button>{escape(name)}</button></th>' for k, name in zip(kind, table.head, strict=True)
    )
    rows = []
    for group, row, texts in zip(table.groups, table.rows, results.cells(table), strict=True):
        rows.append(f'<tr data-row="{group}">')
        for i, (cell, text) in enumerate(zip(row, texts, strict=True)):
            number = results.number(cell)
            value = number if number is not None else "" if cell is None else text
            style = "number " * numeric[i] + "wide " * (i == 0) + "empty" * (cell is None)
            swatch = f'<span class="swatch" style="--hue:{colour(group)}"></span>' if i == 0 else ""
            rows.append(
                f'<td class="{style.strip()}" data-head="{escape(table.head[i])}" data-value="{escape(value)}">'
                f"{swatch}{escape(text)}</td>"
            )
        rows.append("</tr>")
    level = "h2" if table.name == "results" else "h3"
    search = '<input type="search" placeholder="Filter: words of a row" aria-label="Filter the table">'
    return (
        f'<div class="card" id="table-{escape(table.name.lower().replace(" ", "-"))}"><{level}>{escape(table.title)}'
        f'</{level}><p class="soft">{escape(table.caption)}</p><div class="tools">{search}</div>'
        f'<div class="scroll"><table><thead><tr>{head}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div></div>"
    )
