"""A study's groups as grouped bars: mean and deviation of the best and of the last epoch, the student alone beside."""

import re
from collections.abc import Sequence

import numpy as np

from mdistiller.distillers import distiller_dict
from mdistiller.study.charts import COLOURS, GREY, Chart, Panel, Series
from mdistiller.study.runs import Group, own_rule
from mdistiller.terminal import counted

MOST_LABELS = 14  # bars that can have their figure above them
Bar = tuple[str, str, Group]  # the series that it belongs to, its place on the axis, and its runs


def bar_charts(groups: Sequence[Group], title: str) -> list[Chart]:
    """Return the charts: for temperature rules one for each pair, with a place for each rule; for students with several
    teachers one for each student, with a place for each teacher; else one with a place for each pair.
    """
    shown = [group for group in groups if group.method != "NONE"]
    alone = {group.cfg.DISTILLER.STUDENT: group for group in groups if group.method == "NONE"}
    teachers: dict[str, set] = {}
    for group in shown:
        teachers.setdefault(group.cfg.DISTILLER.STUDENT, set()).add(_teacher(group))
    if not shown:
        return []
    ruled = any(group.rule != own_rule(group.cfg.DISTILLER.TYPE) for group in shown)
    if not ruled and len(teachers) > 1 and min(map(len, teachers.values())) == 1:
        bars = [(g.cfg.DISTILLER.TYPE, g.pair, g) for g in shown]
        pairs = {group.pair: group.cfg.DISTILLER.STUDENT for group in shown}
        singles = [("alone", pair, alone[student]) for pair, student in pairs.items() if student in alone]
        return [bar_chart([*singles, *bars], None, title, "chart", "")]
    charts: dict[tuple, list[Bar]] = {}
    for group in shown:
        names = group.cfg.DISTILLER
        key = (_teacher(group), names.STUDENT) if ruled else (names.STUDENT,)
        charts.setdefault(key, []).append((names.TYPE, group.rule if ruled else _teacher(group), group))
    axis = "rule" if ruled else "teacher"
    for bars in charts.values() if not ruled else ():
        bars.sort(key=lambda bar: _natural(bar[1]))
    return [
        bar_chart(bars, alone.get(key[-1]), f"{title}: {' → '.join(key)}", "-".join(["chart", *key]), axis)
        for key, bars in charts.items()
    ]


def _teacher(group: Group) -> str:
    return group.first.teacher_name if group.first.taught else "none"


def bar_chart(bars: Sequence[Bar], level: Group | None, title: str, name: str, axis: str) -> Chart:
    """Return one chart with a panel for the best and one for the last epoch; `level`: the student alone."""
    places = list(dict.fromkeys(place for _, place, _ in bars))
    methods = list(dict.fromkeys(method for method, _, _ in bars))
    counts = sorted({len(group.runs) for _, _, group in bars})
    least = f"{counts[0]}–" if counts[0] != counts[-1] else ""
    seeds = least + counted(counts[-1], "seed")
    chart = Chart(name, "", title, "", [], columns=1)
    figure = "AP (%)" if all(group.first.task == "detection" for *_, group in bars) else "top-1 (%)"
    for which in ("best", "last"):
        panel = Panel(f"{which} epoch, mean ± standard deviation over {seeds}", axis, figure)
        for method in methods:
            means = {place: getattr(group, which) for kind, place, group in bars if kind == method}
            y = np.array([means[place].mean if place in means else np.nan for place in places])
            sd = np.array([(means[place].std or 0.0) if place in means else np.nan for place in places])
            text = [f"{value:.1f}" for value in y] if len(places) * len(methods) <= MOST_LABELS else []
            bands = {("minus_sd", "plus_sd"): (y - sd, y + sd)}
            panel.series.append(Series(method, None, places, y, "bars", bands, text=text, colour=shade(method)))
        if level:
            mean = getattr(level, which)
            bands = {("minus_sd", "plus_sd"): tuple([mean.mean + sign * (mean.std or 0.0)] for sign in (-1, 1))}
            panel.series.append(
                Series(f"{level.pair} alone", None, [axis], [mean.mean], "level", bands, dashed=True, colour="#444444",
                       text=[f"{mean.mean:.1f}"])
            )  # fmt: skip
        ends = [v for s in panel.series for pair in s.bands.values() for values in pair for v in values if v == v]
        span = max(max(ends) - min(ends), 1.0)
        panel.y_range = (max(min(ends) - 0.3 * span, 0.0), max(ends) + 0.15 * span)  # bars that start at 0 look alike
        if panel.y_range[0] > 0:
            panel.y_label += ", axis cut"
        chart.panels.append(panel)
    return chart


def _natural(name: str) -> list:
    """Return a key that sorts resnet20 before resnet110."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def shade(method: str) -> str:
    """Return the method's own colour, whatever else is shown: darker ones once COLOURS are used up."""
    if method == "alone":
        return GREY
    first = ("KD", "DKD", "DTKD")
    order = [*first, *(name for name in distiller_dict if name not in ("NONE", *first))]
    turn, place = divmod(order.index(method) if method in order else len(order), len(COLOURS))
    parts = (int(COLOURS[place][i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{int(part * 0.6**turn):02x}" for part in parts)
