"""Charts: one description gives PNG, SVG, the page's specification and the numbers."""

import csv
import json
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from mdistiller.study import drawing
from mdistiller.study.charts import COLOURS, GREY, Chart, Panel, Series, write_numbers

GROUP = SimpleNamespace(number=0, figures="last 1, best 2")
NASTY = "a $x^ <script>alert(1)</script> </style> \"'& \x07 ${{%s}} %{y} <b>|_,"
LINE = Series(
    "line",
    0,
    [1, 2, 3],
    [3, np.nan, 5],
    bands={("low", "high"): ([2, 3, 4], [4, 5, 6])},
    text=["a", "b", "c"],
    legend="line: last 1, best 2",
)
OTHER = Series("other", None, [1], [2])
LEVEL = Series("level", None, ["teacher"], [2.0], "level", {("lo", "hi"): ([1.0], [3.0])}, dashed=True, text=["2.0"])
BARS = Series("bars", 1, ["left", "right"], [1, 2], "bars", {("lo", "hi"): ([0, 1], [2, 3])}, text=["1.0", "2.0"])


def every_chart():
    points = Panel("", bare=True, series=[Series(f"class {i}", 0, [i, 2], [i, 1], "points") for i in range(3)])
    matrix = Panel("matrix", matrix=np.array([[0, -0.5], [0.25, 0]]), ticks=["cat", "dog"])
    image = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3)
    return [
        Chart("lines", "S", "Lines", "", [Panel("p", "epoch", "y", [LINE], diagonal=True), Panel("", series=[OTHER])]),
        Chart("bars", "S", "Bars", "", [Panel("p", "teacher", "%", [BARS, LEVEL], y_range=(0.5, 4))], columns=1),
        Chart("points", "S", "Points", "", [points, points], group=GROUP),
        Chart("matrix", "S", "Matrix", "", [matrix], group=GROUP),
        Chart("pictures", "S", "Pictures", "", [], GROUP, pictures=[("block", image, ["cat\n1.00", "dog\n2.00"])]),
        Chart("nasty", NASTY, NASTY, NASTY, [Panel(NASTY, NASTY, NASTY, [Series(NASTY, 0, [1], [2], text=[NASTY])])]),
    ]  # fmt: skip


def test_every_kind_of_chart_is_drawn(tmp_path):
    for chart in every_chart():
        drawing.save(chart, tmp_path)
        picture = Image.open(tmp_path / f"{chart.name}.png")
        assert min(picture.size) > 100 and len(picture.getcolors(2**24)) > 5, chart.name
        svg = (tmp_path / f"{chart.name}.svg").read_text()
        assert ElementTree.fromstring(svg).tag.endswith("svg"), chart.name
        assert "undefined" not in svg and "NaN" not in svg, chart.name
    lines, bars = ((tmp_path / f"{name}.svg").read_text() for name in ("lines", "bars"))
    assert COLOURS[0] in lines and "line: last 1, best 2" in lines
    assert all(shade in bars for shade in (COLOURS[1], GREY)) and ">2.0<" in bars
    assert "<script" not in (tmp_path / "nasty.svg").read_text()


def test_the_page_s_panel_switches_groups_and_says_values():
    lines, bars, points, matrix = every_chart()[:4]
    spec = drawing.page_spec(lines.panels[0])
    assert spec["width"] == "container" and {"name": "hidden", "value": []} in spec["params"]
    layer = spec["layer"][1]
    (row,) = layer["data"]["values"]
    assert (row["name"], row["group"], row["y"]) == ("line: last 1, best 2", 0, [3, None, 5])
    assert layer["transform"][0] == {"filter": "indexof(hidden, datum.group) < 0"}
    assert layer["layer"][-1] == drawing.NEAREST
    assert layer["encoding"]["color"]["legend"] is None, "the page's bar of runs is the legend"
    assert layer["encoding"]["x"]["axis"]["values"] == [1, 2, 3], "no tick between two epochs"
    spec = drawing.page_spec(points.panels[0])
    assert (
        spec["layer"][0]["encoding"]["color"]["legend"] and spec["layer"][0]["data"]["values"][0]["name"] == "class 0"
    )
    for chart in (lines, bars, points, matrix):
        json.dumps([drawing.page_spec(panel) for panel in chart.panels], allow_nan=False)


def test_the_numbers_behind_a_chart(tmp_path):
    lines, _, _, matrix, _, nasty = every_chart()
    rows = {}
    for chart in (lines, matrix, nasty):
        write_numbers(chart, tmp_path / "numbers.csv")
        rows[chart.name] = list(csv.reader((tmp_path / "numbers.csv").open()))
    assert rows["lines"][:3] == [
        ["panel", "series", "x", "y", "low", "high", "note"],
        ["p", "line", "1", "3", "2", "4", "a"],
        ["p", "line", "2", "", "3", "5", "b"],
    ]
    assert rows["matrix"][2] == ["matrix", "cat", "dog", "-0.5"]
    assert rows["nasty"][1][1:4] == [NASTY, "1", "2"]


def test_an_empty_chart_is_known():
    assert Chart("a", "", "", "", [Panel("p")]).empty
    assert not any(chart.empty for chart in every_chart())


def test_what_has_nothing_to_draw_is_left_out():
    nothing = Series("nothing", 0, [], []), Series("unknown", 0, [1, 2], [np.nan, np.nan])
    panels = [Panel("some", series=[LINE, *nothing]), Panel("none", series=[*nothing]), Panel("never tried")]
    chart = Chart("a", "", "A chart", "", panels)
    assert chart.drop_empty() == ["none"]
    assert [(panel.title, panel.series) for panel in chart.panels] == [("some", [LINE])]
    drawing.paper_spec(chart)
