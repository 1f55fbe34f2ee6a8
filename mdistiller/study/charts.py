"""Charts as data: described once, drawn as PNG and SVG, shown in the report and written as numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from mdistiller.study.runs import Group

# Ten hues of one lightness, that read on white and on near-black alike; the groups take them in turn.
COLOURS = (
    "#3f7fd9", "#dd6b20", "#2a9d6a", "#b5489e", "#c0392b", "#7a5fd0", "#1795a8", "#a8801c", "#6b8e23", "#8c6d5a",
)  # fmt: skip
GREY = "#8a9099"


def colour(group: int | None) -> str:
    """Return the colour of a group; grey for what belongs to none."""
    return GREY if group is None else COLOURS[group % len(COLOURS)]


@dataclass
class Series:
    """One line, set of points, set of bars or level of the group number `group`; None: always shown, in grey.

    `x` holds numbers or names; `bands` maps the names of two columns to two arrays beside `y`, the widest band first:
    shaded beside a line or level, the error bars of bars. A level is one figure across the whole panel.
    """

    name: str
    group: int | None
    x: Sequence
    y: Sequence
    kind: str = "line"  # line, points, bars or level
    bands: dict[tuple[str, str], tuple[Sequence, Sequence]] = field(default_factory=dict)
    dashed: bool = False
    text: Sequence[str] = ()  # one for each point: shown on hover; above bars and levels
    colour: str = ""  # the group's where it is empty
    legend: str = ""  # what a legend has in the name's place

    @property
    def empty(self) -> bool:
        """Whether it has no point with a value."""
        return not np.isfinite(np.asarray(self.y, float)).any()

    @property
    def shade(self) -> str:
        return self.colour or colour(self.group)


@dataclass
class Panel:
    """One pair of axes. A `matrix` (K, K), whose K classes are called `ticks`, stands in place of series."""

    title: str
    x_label: str = ""
    y_label: str = ""
    series: list[Series] = field(default_factory=list)
    matrix: np.ndarray | None = None
    ticks: Sequence[str] = ()
    diagonal: bool = False
    bare: bool = False  # axes without meaning, as t-SNE's
    y_range: tuple[float, float] | None = None

    def add(self, group: Group, x: Sequence, y: Sequence, kind: str = "line", **more: object) -> None:
        """Add what is of one group, under its label and in its colour. `more`: other fields of the Series."""
        legend = f"{group.label}: {group.figures}"
        self.series.append(Series(group.label, group.number, x, y, kind, legend=legend, **more))

    @property
    def square(self) -> bool:
        return self.bare or self.matrix is not None


@dataclass
class Chart:
    """Panels side by side under one name, which is the file's too."""

    name: str
    section: str
    title: str
    caption: str
    panels: list[Panel]
    group: Group | None = None  # the one that it is of, if it is of one
    columns: int = 3  # panels in a row, at most
    # a chart of pictures has, in place of panels, blocks: a heading, uint8 images (M, H, W, 3) and a text for each
    pictures: list[tuple[str, np.ndarray, list[str]]] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        return not self.pictures and not any(panel.series or panel.matrix is not None for panel in self.panels)

    def drop_empty(self) -> list[str]:
        """Remove series without a value and panels that have nothing to show. Return the titles of the panels that had
        series, all of them empty.
        """
        tried = [panel for panel in self.panels if panel.series]
        for panel in tried:
            panel.series = [series for series in panel.series if not series.empty]
        self.panels = [panel for panel in self.panels if panel.series or panel.matrix is not None]
        return [panel.title for panel in tried if not panel.series]


def write_numbers(chart: Chart, path: Path) -> None:
    """Write the numbers behind the chart as CSV: one line for each point, cell of a matrix, or picture."""
    parts = [
        pd.DataFrame(
            {"panel": panel.title, "series": s.name, "x": s.x, "y": s.y}
            | {name: ends for pair, both in s.bands.items() for name, ends in zip(pair, both, strict=True)}
            | ({"note": s.text} if len(s.text) else {})
        )
        for panel in chart.panels for s in panel.series
    ]  # fmt: skip
    for panel in chart.panels:
        if panel.matrix is not None:
            names = {"series": np.repeat(panel.ticks, len(panel.ticks)), "x": np.tile(panel.ticks, len(panel.ticks))}
            parts.append(pd.DataFrame({"panel": panel.title} | names | {"y": panel.matrix.ravel()}))
    for heading, _, texts in chart.pictures:
        parts.append(pd.DataFrame({"panel": heading, "series": [text.replace("\n", ", ") for text in texts]}))
    write_table(path, pd.concat(parts))


def write_table(path: Path, frame: pd.DataFrame) -> None:
    """Write CSV; None and NaN become empty cells, numbers have six digits."""
    frame.to_csv(path, index=False, float_format="%.6g", lineterminator="\n")
