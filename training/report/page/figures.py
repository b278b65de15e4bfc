"""The figures of the router, and the numbers that `page.js` puts into them.

A figure has its axes, its colours and its text here. If what it shows depends on the chosen step, layer or expert, the
script fills in the values, from the numbers that `router_numbers` returns.

Shape suffixes: L MoE layers, E experts, F frames (logged steps that the page shows).
"""

import math
from collections.abc import Sequence
from typing import Any

from training.report.heatmap import scale_limit
from training.report.metrics import Row, expert_parallel_sizes, straggler_metrics
from training.report.page.curves import Figure, figure_layout, level_line, rounded
from training.report.page.gather import Frames, RunData, expert_frames, load_frames, series
from training.report.page.theme import BLUE, ORANGE

LOAD_TICKS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)
"""Relative loads with a label on the colour scale."""
MAX_RANKS = 64
"""The most expert-parallel ranks of which the straggler factor is shown."""
MAX_NAMED = 16
"""The most rows or columns of a heatmap that all have their number at the axis."""
MAX_GAPS = 64
"""The most rows or columns of cells with gaps between them."""


def router_numbers(data: RunData) -> dict[str, Any] | None:
    """Return what the script needs to draw the router at any step, or None for a run without loads.

    `values` are the relative loads of the experts, [F, L, E], and `steps` are the F steps. `norms` has the norms of the
    experts by name, with their own steps.
    """
    loads = load_frames(data.rows)
    if loads is None:
        return None
    norms = {
        title: _numbers(frames)
        for title, key in (("gradient norm", "experts/grad_norm"), ("weight norm", "experts/weight_norm"))
        if (frames := expert_frames(data.rows, key)) is not None
    }
    return {**_numbers(loads), "limit": math.log2(_limit(loads)), "norms": norms}


def _numbers(frames: Frames) -> dict[str, Any]:
    values = [[[rounded(value) for value in values_E] for values_E in values_LE] for values_LE in frames.values_FLE]
    return {"steps": frames.steps, "values": values}


def _limit(loads: Frames) -> float:
    return max(map(scale_limit, loads.values_FLE))


def router_figures(data: RunData) -> dict[str, Figure]:
    """Return identifier -> figure for a run with loads, else an empty dict."""
    loads = load_frames(data.rows)
    if loads is None:
        return {}
    layers, experts = len(loads.values_FLE[0]), len(loads.values_FLE[0][0])
    limit, size = _limit(loads), {"rows": layers, "columns": experts}
    time = {"rows": experts, "columns": len(loads.steps)}
    return {
        "load": load_map(limit, "Load of every expert (1 = balanced)", x="expert", y="MoE layer", **size),
        "history": load_map(limit, "Load of one layer over training", x="optimizer step", y="expert", **time),
        "expert-load": _line_figure("Load over training (1 = balanced)", level=1),
        "change": load_map(limit, "Change of the load between the two steps", x="expert", y="MoE layer", **size),
        **_norms(data),
        **_straggler(data, loads, experts),
    }


def load_map(limit: float, title: str, *, x: str, y: str, rows: int, columns: int) -> Figure:
    """Return an empty heatmap of relative loads, whose colours range from 1 / `limit` to `limit`.

    Args:
        rows, columns: the number of its cells. Many cells have no gaps between them.
    """
    ticks = [tick for tick in LOAD_TICKS if 1 / limit <= tick <= limit]
    colorbar = {
        "tickvals": [math.log2(tick) for tick in ticks],
        "ticktext": [f"{tick:.3g}" for tick in ticks],
        "thickness": 10,
        "len": 1,
    }
    trace = {
        "type": "heatmap",
        "zmin": -math.log2(limit),
        "zmax": math.log2(limit),
        "autocolorscale": True,
        "colorbar": colorbar,
        "xgap": int(columns <= MAX_GAPS),
        "ygap": int(rows <= MAX_GAPS),
        "hovertemplate": f"{x} %{{x}}, {y} %{{y}}<br>load %{{customdata:.3g}}<extra></extra>",
    }
    layout = figure_layout(title, x=x, y=y, height=max(250, min(100 + 24 * rows, 560)))
    layout["yaxis"] |= {"autorange": "reversed", "tickformat": "d", "showgrid": False, "zeroline": False}
    layout["xaxis"] |= {"tickformat": "d", "showgrid": False, "zeroline": False}
    if rows <= MAX_NAMED:
        layout["yaxis"] |= {"dtick": 1}
    if columns <= MAX_NAMED and x == "expert":
        layout["xaxis"] |= {"dtick": 1}
    return {"data": [trace], "layout": layout}


def _line_figure(title: str, level: float | None = None) -> Figure:
    layout = figure_layout(title, x="optimizer step", hovermode="x unified")
    if level is not None:
        layout["shapes"] = [level_line(level)]
    layout["yaxis"] |= {"rangemode": "tozero"}
    return {"data": [], "layout": layout}


def _norms(data: RunData) -> dict[str, Figure]:
    """An empty figure for the norms of one expert, if the run has them."""
    if not any(key.startswith(("experts/grad_norm/", "experts/weight_norm/")) for row in data.rows for key in row):
        return {}
    figure = _line_figure("Norms: gradient (left), weight (right)")
    # The script draws the traces in the colours of the palette, in this order.
    ticks = {"tickmode": "auto", "nticks": 5, "exponentformat": "power", "rangemode": "tozero"}
    figure["layout"]["yaxis"] |= {**ticks, "tickfont": {"color": BLUE}}
    figure["layout"]["yaxis2"] = {
        **ticks,
        "tickfont": {"color": ORANGE},
        "overlaying": "y",
        "side": "right",
        "showgrid": False,
    }
    return {"expert-norms": figure}


def _straggler(data: RunData, loads: Frames, experts: int) -> dict[str, Figure]:
    """The straggler factor by expert parallelism: that of the last row that has it, else that of the last loads."""
    sizes = [size for size in expert_parallel_sizes(experts) if size <= MAX_RANKS]
    rows: list[Row] = [row for row in data.rows if any(key.startswith("router/straggler/") for key in row)][-1:]
    if sizes and not rows:
        import torch  # A run without the metric, such as an older one.

        rows = [{"step": loads.steps[-1], **straggler_metrics(torch.tensor(loads.values_FLE[-1]))}]
    curves = []
    for name, key, colour in (
        ("in order", "router/straggler", BLUE),
        ("placed by load", "router/straggler_placed", ORANGE),
    ):
        points = [(size, values[-1]) for size in sizes if (values := series(rows, f"{key}/ep_{size}")[1])]
        if points:
            curves.append(_points(name, points, colour))
    if not curves:
        return {}
    layout = figure_layout("Straggler price (slowest rank / mean)", x="expert-parallel ranks", hovermode="x")
    layout["xaxis"] |= {"type": "category"}
    layout["yaxis"] |= {"rangemode": "tozero"}
    layout["shapes"] = [level_line(1)]
    return {"straggler": {"data": curves, "layout": layout}}


def _points(name: str, points: Sequence[tuple[int, float]], colour: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "name": name,
        "x": [str(size) for size, _ in points],
        "y": [rounded(value) for _, value in points],
        "mode": "lines+markers",
        "line": {"color": colour},
        "showlegend": True,
    }
