"""Charts on the screen: the same panels as plotly figures."""

import html
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from mdistiller.analysis.charts import Panel, Series, colour

HEIGHT, SQUARE = 300, 420


def shown(text: object) -> str:
    """Text that plotly, which reads a little HTML, shows letter by letter."""
    return html.escape("".join(c if c.isprintable() else " " for c in str(text)), quote=False)


def figure_of(panel: Panel, figures: Sequence[str]) -> str:
    """The panel as plotly's JSON. Each trace carries its group's number as `meta`; colours of text and grid are left to
    the page, which knows whether it is dark. `figures`: of each group the accuracy that hovering shows with its name.
    """
    figure = go.Figure()
    if panel.matrix is not None:
        limit = max(float(np.abs(panel.matrix).max()), 1e-6)
        ticks = [shown(t) for t in panel.ticks]
        figure.add_heatmap(
            z=panel.matrix.astype(np.float32), x=ticks, y=ticks, zmin=-limit, zmax=limit, colorscale="RdBu",
            reversescale=True, colorbar={"thickness": 10, "len": 0.9, "nticks": 5},
            hovertemplate="%{y} and %{x}: %{z:.3f}<extra></extra>",
        )  # fmt: skip
        few = len(ticks) <= 20
        figure.update_xaxes(type="category", showticklabels=few)
        figure.update_yaxes(
            type="category", showticklabels=few, autorange="reversed", scaleanchor="x", constrain="domain"
        )
        figure.update_xaxes(constrain="domain")
    for series in panel.series:
        figure.add_traces(traces(series, panel, figures))
    if panel.diagonal:
        figure.add_shape(type="line", x0=0, y0=0, x1=1, y1=1, line={"color": "#999", "dash": "dot", "width": 1})
    if panel.whole and max(max(s.x) for s in panel.series) <= 10:
        figure.update_xaxes(dtick=1)
    square = panel.matrix is not None or panel.bare
    figure.update_layout(
        template="none", height=SQUARE if square else HEIGHT, margin={"l": 8, "r": 8, "t": 8, "b": 8}, autosize=True,
        showlegend=panel.bare, hovermode="closest", barmode="group", paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)", legend={"orientation": "h", "y": -0.04, "font": {"size": 11}},
        font={"family": "system-ui, sans-serif", "size": 12}, hoverlabel={"align": "left", "namelength": -1},
    )  # fmt: skip
    bare = {"showticklabels": False, "ticks": "", "showgrid": False, "showline": False}
    axis = {"automargin": True, "zeroline": False, "title_standoff": 8} | (bare if panel.bare else {})
    figure.update_xaxes(title_text=shown(panel.x_label), **axis)
    figure.update_yaxes(title_text=shown(panel.y_label), range=panel.y_range, **axis)
    return figure.to_json()


def traces(s: Series, panel: Panel, figures: Sequence[str]) -> list[go.Scatter | go.Bar]:
    """The series and, behind it, its bands: one closed outline each."""
    shade = s.colour or colour(s.group)
    named = isinstance(s.x[0], str) if len(s.x) else False
    x = [shown(v) for v in s.x] if named else np.asarray(s.x, np.float64)
    y = np.asarray(s.y, np.float64)
    name = shown(s.name) if s.group is None or panel.bare else f"{shown(s.name)}<br>{shown(figures[s.group])}"
    shared = {"name": name, "meta": s.group, "legendgroup": shown(s.name)}
    if s.kind == "bars":
        return [go.Bar(x=x, y=y, marker_color=shade, hovertemplate="%{x}: %{y:.2f}", **shared)]
    drawn = []
    for low, high in s.bands.values():
        outline = np.concatenate([np.asarray(high, np.float64), np.asarray(low, np.float64)[::-1]])
        drawn.append(
            go.Scatter(
                x=np.concatenate([x, x[::-1]]),
                y=outline,
                fill="toself",
                fillcolor=faded(shade),
                mode="none",
                hoverinfo="skip",
                showlegend=False,
                **shared,
            )  # fmt: skip
        )
    label = shown(panel.x_label or "x").split(" (")[0]
    template = "%{text}<br>" * bool(len(s.text)) + (
        "" if panel.bare else f"{'' if named else label + ' '}%{{x}}: %{{y:.4g}}"
    )
    mode = "markers" if s.kind == "points" else "lines+markers" if len(x) <= 25 else "lines"
    drawn.append(
        go.Scatter(
            x=x,
            y=y,
            mode=mode,
            text=[shown(t) for t in s.text] or None,
            hovertemplate=template,
            line={"color": shade, "width": 2, "dash": "dash" if s.dashed else "solid"},
            marker={"color": shade, "size": 6 if s.kind == "points" else 5, "opacity": 0.8},
            **shared,
        )  # fmt: skip
    )
    return drawn


def faded(shade: str) -> str:
    red, green, blue = (int(shade[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.16)"
