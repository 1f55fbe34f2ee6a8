"""Charts on paper: PNG and SVG by matplotlib, without a display."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from mdistiller.analysis.charts import Chart, Panel, Series, colour

STYLE = {
    "font.size": 9, "axes.titlesize": 10, "axes.labelsize": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#e6e6e6", "grid.linewidth": 0.7, "axes.axisbelow": True, "axes.edgecolor": "#888",
    "xtick.color": "#444", "ytick.color": "#444", "axes.labelcolor": "#222", "legend.frameon": False,
    "lines.linewidth": 1.7, "svg.hashsalt": "mdistiller",
}  # fmt: skip
# of a figure that stands among bars and lines
FIGURE = {"fontsize": 6.5, "bbox": {"facecolor": "white", "linewidth": 0, "pad": 0.4}}
MOST_NAMES = 12  # so many names fit beside points and along a matrix


def plain(text: object, width: int = 0) -> str:
    """Text as matplotlib shows it letter by letter: no mathematics, no control characters; cut to `width`."""
    clean = "".join(c if c.isprintable() else " " for c in str(text))
    if width and len(clean) > width:
        clean = clean[: width - 1] + "…"
    return clean.replace("$", r"\$")


def save(figure: Figure, folder: Path, name: str) -> None:
    FigureCanvasAgg(figure)
    for kind in ("png", "svg"):
        # no date: the same numbers give the same file
        figure.savefig(folder / f"{name}.{kind}", dpi=150, metadata={"Date": None} if kind == "svg" else None)


def draw(chart: Chart, folder: Path, figures: Sequence[str]) -> None:
    """FOLDER/NAME.png and .svg. `figures`: of each group the accuracy that stands beside its name."""
    square = any(panel.matrix is not None or panel.bare for panel in chart.panels)
    columns = min(len(chart.panels), chart.wide)
    rows = -(-len(chart.panels) // columns)
    width, height = (4.6, 4.4) if square else (4.4, 3.1)
    names = legend_of(chart, figures)
    across = max(width * columns, 6.4)
    side_by_side = max(int(across / (0.5 + 0.062 * max((len(n) for n, _ in names), default=1))), 1)
    title = [chart.title] if chart.group is None else [chart.title, figures[chart.group]]
    lines = [plain(line) for part in title for line in textwrap.wrap(part, int(10.5 * across))]
    with rc_context(STYLE):
        size = (across, height * rows + 0.3 + 0.2 * len(lines) + 0.19 * -(-len(names) // side_by_side))
        figure = Figure(size, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, panel in zip(grid.flat, chart.panels, strict=False):
            draw_panel(axes, panel)
        for axes in list(grid.flat)[len(chart.panels) :]:
            axes.set_axis_off()
        figure.suptitle("\n".join(lines), fontsize=11, x=0.01, ha="left", fontweight="bold")
        if names:
            handles = [handle for _, handle in names]
            texts = [plain(name, int(15 * across)) for name, _ in names]
            figure.legend(handles, texts, loc="outside lower left", ncols=side_by_side, fontsize=8)
        save(figure, folder, chart.name)


def legend_of(chart: Chart, figures: Sequence[str]) -> list[tuple[str, Line2D]]:
    """One entry for each name and look; panels that share a name share its entry."""
    entries: dict[tuple, Line2D] = {}
    for panel in chart.panels:
        for s in panel.series:
            look = {"line": "-", "points": "", "bars": "", "level": "-"}[s.kind] if not s.dashed else "--"
            marker = "" if s.kind in ("line", "level") else "o" if s.kind == "points" else "s"
            shade = s.colour or colour(s.group)
            name = s.name if s.group is None or chart.group is not None else f"{s.name}: {figures[s.group]}"
            entries[name, shade, look] = Line2D([], [], color=shade, linestyle=look or "none", marker=marker)
    return [(name, handle) for (name, *_), handle in entries.items()] if len(entries) > 1 else []


def draw_panel(axes: Axes, panel: Panel) -> None:
    axes.set_title(plain(panel.title, 70), loc="left")
    axes.set_xlabel(plain(panel.x_label))
    axes.set_ylabel(plain(panel.y_label))
    if panel.matrix is not None:
        draw_matrix(axes, panel)
        return
    bars = [s for s in panel.series if s.kind == "bars"]
    for s in panel.series:
        if s.kind == "bars":
            draw_bars(axes, s, bars.index(s), len(bars))
        elif s.kind == "level":
            draw_level(axes, s)
        else:
            draw_series(axes, s)
    if panel.diagonal:
        axes.plot([0, 1], [0, 1], color="#999", linewidth=1, linestyle=":", zorder=0)
    if panel.y_range:
        axes.set_ylim(*panel.y_range)
    named = bool(panel.series) and len(panel.series[0].x) and isinstance(panel.series[0].x[0], str)
    if named and max(map(len, panel.series[0].x)) * len(panel.series[0].x) > 90:
        axes.set_xticks(range(len(panel.series[0].x)), [plain(x) for x in panel.series[0].x])
        axes.tick_params(axis="x", rotation=40, labelsize=8)
        for tick in axes.get_xticklabels():
            tick.set_ha("right")
            tick.set_rotation_mode("anchor")
    if panel.whole:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if panel.bare:
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(True)


def places(x: Sequence) -> np.ndarray:
    return np.arange(len(x)) if len(x) and isinstance(x[0], str) else np.asarray(x, float)


def draw_series(axes: Axes, s: Series) -> None:
    shade, x = s.colour or colour(s.group), places(s.x)
    for (low, high), alpha in zip(s.bands.values(), (0.13, 0.2, 0.2), strict=False):
        axes.fill_between(x, low, high, color=shade, alpha=alpha, linewidth=0)
    if s.kind == "points":
        size = 9 if len(x) > 60 else 22
        axes.scatter(x, s.y, s=size, color=shade, alpha=0.8, linewidths=0, rasterized=len(x) > 500)
        if 0 < len(s.text) <= MOST_NAMES and not s.dashed:
            for a, b, text in zip(x, s.y, s.text, strict=True):
                axes.annotate(plain(text, 18), (a, b), (3, 3), textcoords="offset points", fontsize=7, color="#555")
        return
    marker = "o" if len(x) <= 25 else ""
    axes.plot(x, s.y, color=shade, linestyle="--" if s.dashed else "-", marker=marker, markersize=3)


def draw_bars(axes: Axes, s: Series, number: int, count: int) -> None:
    width = 0.8 / count
    x = places(s.x)
    step = 1.0 if isinstance(s.x[0], str) else float(np.diff(x).min()) if len(x) > 1 else 1.0
    x_bar, y = x + (number - (count - 1) / 2) * width * step, np.asarray(s.y, float)
    errors = [np.abs(y - np.asarray(ends, float)) for ends in next(iter(s.bands.values()), ())] or None
    look = {"ecolor": "#333", "capsize": 2, "error_kw": {"linewidth": 1}}
    axes.bar(x_bar, y, width * step, color=s.colour or colour(s.group), yerr=errors, **look)
    tops = y if errors is None else y + np.nan_to_num(errors[1])
    for place, top, text in zip(x_bar, tops, s.text, strict=False):
        if np.isfinite(top):
            axes.annotate(plain(text), (place, top), (0, 2), textcoords="offset points", ha="center", **FIGURE)
    if isinstance(s.x[0], str):
        axes.set_xticks(x, [plain(name) for name in s.x])


def draw_level(axes: Axes, s: Series) -> None:
    shade = s.colour or colour(s.group)
    axes.axhline(s.y[0], color=shade, linewidth=1.2, linestyle="--" if s.dashed else "-", zorder=1.5)  # bars are at 1
    for low, high in s.bands.values():
        axes.axhspan(low[0], high[0], color=shade, alpha=0.13, linewidth=0)
    for text in s.text:
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right"}
        axes.annotate(plain(text), (1, s.y[0]), (-2, 3), **place, **FIGURE)


def draw_matrix(axes: Axes, panel: Panel) -> None:
    limit = max(float(np.abs(panel.matrix).max()), 1e-6)
    picture = axes.imshow(panel.matrix, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    axes.figure.colorbar(picture, ax=axes, shrink=0.82)
    axes.grid(False)
    if len(panel.ticks) <= MOST_NAMES:
        axes.set_xticks(range(len(panel.ticks)), [plain(t, 12) for t in panel.ticks], rotation=45, fontsize=7)
        axes.set_yticks(range(len(panel.ticks)), [plain(t, 12) for t in panel.ticks], fontsize=7)


def draw_images(
    path: Path, name: str, title: str, rows: Sequence[tuple[str, np.ndarray, Sequence[str]]], columns: int = 8
) -> None:
    """Blocks of pictures: each a heading, uint8 images (M, H, W, 3) and one text for each of them."""
    heights = [-(-len(images) // columns) for _, images, _ in rows]
    with rc_context(STYLE):
        figure = Figure((9.2, 1.55 * sum(heights) + 0.4 * len(rows) + 0.4), layout="constrained")
        parts = np.atleast_1d(figure.subfigures(len(rows), 1, height_ratios=[h + 0.3 for h in heights]))
        figure.suptitle(plain(title, 95), fontsize=11, x=0.01, ha="left", fontweight="bold")
        for part, (heading, images, texts), height in zip(parts, rows, heights, strict=True):
            part.suptitle(plain(heading, 120), fontsize=9, x=0.01, ha="left")
            grid = part.subplots(height, columns, squeeze=False)
            for axes in grid.flat:
                axes.set_axis_off()
            for axes, image, text in zip(grid.flat, images, texts, strict=False):
                axes.imshow(image, interpolation="nearest")
                axes.set_title("\n".join(plain(line, 22) for line in text.split("\n")), fontsize=7, pad=3)
        save(figure, path, name)
