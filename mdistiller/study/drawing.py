"""Charts as Vega-Lite specifications: vl-convert makes PNG and SVG of them, and the report's page draws them itself."""

import base64
import io
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import vl_convert
from PIL import Image

from mdistiller.study.charts import Chart, Panel, Series
from mdistiller.study.tables import printable

WIDTH, HEIGHT, SQUARE = 300, 220, 320  # of a panel, in pixels; on the page it is as wide as its place
MOST_NAMES = 20  # so many names fit along a matrix
IMAGE, IN_A_ROW = 64, 8  # pixels of a picture, and pictures
INK, SOFT, LINE = ({"expr": name} for name in ("ink", "soft", "line"))
COMMON = {
    "params": [  # the page sets these: the colours of its theme, and the groups that are switched off
        {"name": "ink", "value": "#1d2126"},
        {"name": "soft", "value": "#5c6570"},
        {"name": "line", "value": "#dfe2e6"},
        {"name": "hidden", "value": []},
    ],
    "config": {
        "aria": False,  # the page says what a plot shows; a label on every point would double the files
        "font": "system-ui, -apple-system, Segoe UI, Arial, sans-serif",
        "view": {"stroke": None},
        "axis": {
            "labelColor": SOFT, "titleColor": SOFT, "gridColor": LINE, "domainColor": LINE, "tickColor": LINE,
            "labelFontSize": 11, "titleFontSize": 12, "titleFontWeight": "normal", "labelLimit": 140,
            "labelFlush": False,
        },
        "legend": {"labelColor": INK, "labelFontSize": 11, "labelLimit": 0, "orient": "bottom", "symbolOpacity": 1},
        "title": {"color": INK, "anchor": "start", "fontSize": 12, "fontWeight": "normal"},
        "text": {"color": INK, "fontSize": 10},
    },
}  # fmt: skip
DASHED = {"condition": {"test": "datum.dashed", "value": [6, 4]}, "value": [1, 0]}
# an unseen point that is nearest to the pointer shows itself and says its values
POINTER = {"type": "point", "fields": ["number", "x", "y"], "nearest": True, "on": "pointerover", "clear": "pointerout"}
NEAREST = {
    "mark": {"type": "point", "filled": True, "size": 70},
    "params": [{"name": "near", "select": POINTER}],
    "encoding": {"opacity": {"condition": {"param": "near", "empty": False, "value": 1}, "value": 0}},
}
WITH_MARGIN = {"zero": False, "padding": 8}  # pixels, so that no point lies on an axis


def save(chart: Chart, folder: Path) -> None:
    """Write FOLDER/NAME.png and .svg."""
    spec = paper_spec(chart)
    (folder / f"{chart.name}.svg").write_text(vl_convert.vegalite_to_svg(spec), encoding="utf-8")
    picture = Image.open(io.BytesIO(vl_convert.vegalite_to_png(spec, scale=1.5)))
    picture.convert("RGB").save(folder / f"{chart.name}.png", optimize=True)


def page_spec(panel: Panel) -> dict:
    """Return the specification of one panel for the page: as wide as its place, and a pointer asks for values."""
    size = {"width": "container", "height": SQUARE if panel.square else HEIGHT, "padding": 2}
    fit = {"background": "transparent", "autosize": {"type": "fit-x", "contains": "padding"}}
    # the page itself says which colour is which group
    return COMMON | size | fit | panel_spec(panel, colours([panel]), panel.bare, hover=True)


def paper_spec(chart: Chart) -> dict:
    """Return the specification of the whole chart: title, panels side by side, and one legend for all."""
    title = [chart.title, *([chart.group.figures] if chart.group else [])]
    columns = min(len(chart.panels), chart.columns)
    across = max(45 * columns, 55 if chart.pictures else 40)  # letters of the title
    lines = [printable(line) for text in title for line in textwrap.wrap(text, across)]
    heading = {"text": lines, "fontSize": 14, "fontWeight": "bold", "offset": 12}
    paper = COMMON | {"background": "white", "padding": 12, "title": heading}
    if chart.pictures:
        return paper | {"vconcat": [pictures_spec(*block) for block in chart.pictures]}
    names, panels = colours(chart.panels), []
    for panel in chart.panels:
        size = {"width": SQUARE, "height": SQUARE} if panel.square else {"width": WIDTH, "height": HEIGHT}
        head = {"title": printable(panel.title)[:60]} | size
        panels.append(head | panel_spec(panel, names, len(names) > 1))
    return paper | {"concat": panels, "columns": columns, "resolve": {"scale": {"color": "shared"}}}


def panel_spec(panel: Panel, names: dict[str, str], legend: bool, hover: bool = False) -> dict:
    """Return the layers of one panel. `names`: the colours of all series that its legend has."""
    if panel.matrix is not None:
        return matrix_spec(panel)
    scale = {"domain": list(names), "range": list(names.values())}
    legend = (
        {"title": None, "columns": 5 if max(map(len, names), default=0) < 10 else 1 + panel.bare} if legend else None
    )
    x, y = x_axis(panel), y_axis(panel)
    shared = {"y": y, "color": {"field": "name", "scale": scale, "legend": legend}, "detail": {"field": "number"}}
    if hover:
        shared["tooltip"] = tooltip(panel)
    layers = []
    if panel.diagonal:
        ends = {"values": [{"x": 0, "y": 0}, {"x": 1, "y": 1}]}
        mark = {"type": "line", "color": "#999", "strokeDash": [2, 3], "strokeWidth": 1}
        layers.append({"data": ends, "mark": mark, "encoding": {"x": x, "y": y}})
    for kind in dict.fromkeys(s.kind for s in panel.series):
        rows = [row_of(number, s) for number, s in enumerate(panel.series) if s.kind == kind]
        arrays = list(dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, list)))
        marks = layers_of(kind, y, arrays)
        layers.append({
            "data": {"values": [dict.fromkeys(arrays, []) | row for row in rows]},
            "transform": [{"filter": "indexof(hidden, datum.group) < 0"}, {"flatten": arrays}],
            "encoding": shared if kind == "level" else shared | {"x": x},
            "layer": [*marks, NEAREST] if hover and kind in ("line", "points") else marks,
        })  # fmt: skip
    return {"layer": layers}


def row_of(number: int, s: Series) -> dict:
    """Return a series as one row of data, whose lists the specification unfolds into points."""
    row = {"number": number, "name": label(s), "group": s.group, "dashed": s.dashed}
    row |= {"x": json_values(s.x), "y": json_values(s.y)} | ({"text": json_values(s.text)} if len(s.text) else {})
    for i, (low, high) in enumerate(s.bands.values()):
        row |= {f"low{i}": json_values(low), f"high{i}": json_values(high)}
    return row


def label(s: Series) -> str:
    return printable(s.legend or s.name)


def colours(panels: Sequence[Panel]) -> dict[str, str]:
    return {label(s): s.shade for panel in panels for s in panel.series}


def json_values(values: Sequence) -> list:
    """Return numbers of five digits, None for NaN, or printable texts."""
    if len(values) and isinstance(values[0], str):
        return [printable(value) for value in values]
    return [float(f"{v:.5g}") if np.isfinite(v) else None for v in np.asarray(values, float)]


def x_axis(panel: Panel) -> dict:
    first = panel.series[0].x
    axis = {"field": "x", "title": printable(panel.x_label) or None}
    if len(first) and isinstance(first[0], str):
        long = max(map(len, first)) * len(first) > 60
        return axis | {"type": "nominal", "sort": None, "axis": {"labelAngle": -40 if long else 0}}
    ticks = {"tickCount": 6}
    if all(np.asarray(s.x).dtype.kind in "iu" for s in panel.series):
        low, high = min(min(s.x) for s in panel.series), max(max(s.x) for s in panel.series)
        if high - low <= 10:  # no tick between two epochs
            ticks = {"values": list(range(low, high + 1)), "format": "d"}
    return axis | {"type": "quantitative", "scale": WITH_MARGIN, "axis": None if panel.bare else ticks}


def y_axis(panel: Panel) -> dict:
    scale = {"domain": list(panel.y_range)} if panel.y_range else WITH_MARGIN
    axis = {"field": "y", "type": "quantitative", "scale": scale, "title": printable(panel.y_label) or None}
    return axis | ({"axis": None} if panel.bare else {})


def tooltip(panel: Panel) -> dict:
    """Return what a pointer is told, as an expression: where points are nearest, `datum` is a cell around the point."""
    point = "(datum.datum || datum)"
    told = {"class" if panel.bare else "run": f"{point}.name"}
    if not panel.bare:
        told[printable(panel.x_label) or "of"] = f"{point}.x"
        told[printable(panel.y_label)] = f"format({point}.y, '.4~g')"
        if any(len(s.text) for s in panel.series):
            told["note"] = f"{point}.text"
    return {"value": {"expr": "{" + ", ".join(f"{json.dumps(name)}: {value}" for name, value in told.items()) + "}"}}


def layers_of(kind: str, y: dict, arrays: Sequence[str]) -> list[dict]:
    """Return the marks of all series of a kind, whose data have the columns `arrays`."""
    if kind == "points":
        return [{"mark": {"type": "point", "filled": True, "size": 30, "opacity": 0.8}}]
    if kind == "line":
        line = {"mark": {"type": "line", "strokeWidth": 2, "point": {"size": 22}}, "encoding": {"strokeDash": DASHED}}
        return [*bands({"type": "area", "opacity": 0.16}, y, arrays), line]
    if kind == "level":  # a line from edge to edge with its text at the right
        text = {"x": {"value": "width"}, "text": {"field": "text"}, "color": {"value": INK}}
        return [
            *bands({"type": "rect", "opacity": 0.13}, y, arrays),
            {"mark": "rule", "encoding": {"strokeDash": DASHED}},
            {"mark": {"type": "text", "align": "right", "dy": -7}, "encoding": text},
        ]
    # bars side by side, with an error bar on each and its text above it
    layers = [{"mark": {"type": "bar", "clip": True}}, *bands({"type": "rule"}, y, arrays, {"color": {"value": INK}})]
    if "text" in arrays:
        text = {"y": y | {"field": "high0" if "high0" in arrays else "y"}, "text": {"field": "text"}}
        layers.append({"mark": {"type": "text", "dy": -7}, "encoding": text | {"color": {"value": INK}}})
    beside = {"xOffset": {"field": "number", "type": "ordinal"}}
    return [layer | {"encoding": layer.get("encoding", {}) | beside} for layer in layers]


def bands(mark: dict, y: dict, arrays: Sequence[str], more: dict | None = None) -> list[dict]:
    """Return a layer for each pair low0 and high0, low1 and high1, ... of the arrays, the widest first."""
    pairs = [(name, name.replace("low", "high")) for name in arrays if name.startswith("low")]
    return [{"mark": mark, "encoding": {"y": y | {"field": a}, "y2": {"field": b}} | (more or {})} for a, b in pairs]


def matrix_spec(panel: Panel) -> dict:
    ticks, limit = [printable(tick) for tick in panel.ticks], max(float(np.abs(panel.matrix).max()), 1e-6)
    table = {"x": ticks, "y": ticks, "value": [json_values(row) for row in panel.matrix.round(4)]}
    axis = {"labels": len(ticks) <= MOST_NAMES, "ticks": False, "labelAngle": 0}
    named = {"type": "nominal", "sort": None, "title": None, "axis": axis}
    scale = {"scheme": "redblue", "reverse": True, "domain": [-limit, limit]}
    if panel.matrix.min() >= 0:
        scale = {"scheme": "blues", "domain": [0, limit]}
    legend = {"title": None, "gradientLength": 200, "tickCount": 5}
    return {
        "data": {"values": [table]},
        "transform": [{"flatten": ["y", "value"]}, {"flatten": ["x", "value"]}],
        "mark": {"type": "rect", "width": {"band": 1.04}, "height": {"band": 1.04}},  # no seam between two cells
        "encoding": {
            "x": named | {"field": "x"},
            "y": named | {"field": "y"},
            "color": {"field": "value", "type": "quantitative", "scale": scale, "legend": legend},
            "tooltip": [{"field": "y", "title": "class"}, {"field": "x", "title": "and"}, {"field": "value"}],
        },
    }


def data_url(image: np.ndarray) -> str:
    """Return a uint8 image (H, W, 3) as a PNG inside its own address."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def pictures_spec(heading: str, images: np.ndarray, texts: Sequence[str]) -> dict:
    """Return pictures in rows, each above the lines of its text; a picture alone is as large as it is."""
    height, width = images.shape[1:3] if len(images) == 1 else (IMAGE, IMAGE)
    rows = [
        {"url": data_url(image), "text": json_values(text.split("\n")), "row": i // IN_A_ROW, "column": i % IN_A_ROW}
        for i, (image, text) in enumerate(zip(images, texts, strict=True))
    ]
    place = {"type": "ordinal", "axis": None}
    image = {"type": "image", "width": width, "height": height, "smooth": False, "yOffset": -20}
    text = {"type": "text", "yOffset": height // 2 - 12, "limit": width + 8}
    return {
        "title": printable(heading),
        "width": {"step": width + 12},
        "height": {"step": height + 50},
        "data": {"values": rows},
        "encoding": {"x": place | {"field": "column"}, "y": place | {"field": "row"}},
        "layer": [
            {"mark": image, "encoding": {"url": {"field": "url"}}},
            {"mark": text, "encoding": {"text": {"field": "text"}}},
        ],
    }
