"""The metrics over the steps: one small figure for each group of metrics that a run has.

The figures are plotly's, as JSON values. Every metric of `metrics.jsonl` that is a number is in one of them: those that
this file does not name, such as those of a plugin, have a figure each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape, unescape
from typing import Any

from training.report.metrics import Row, layer_keys
from training.report.page.gather import RunData, series
from training.report.page.theme import BLUE, COLOURS, GREY, ORANGE, RED

MAX_POINTS, MAX_LAYER_POINTS = 1600, 300
"""The most points of a curve, and of the curve of a single layer."""
MAX_NAMED_LAYERS = 8
"""With more layers, their curves do not say their values under the cursor."""
MAX_CURVES = 80
"""The most figures of metrics that this file does not name."""

Figure = dict[str, Any]
"""A figure of plotly as JSON values: `data` and `layout`."""


@dataclass(frozen=True)
class Chart:
    """What one figure shows.

    Args:
        title: with the unit.
        metrics: metric -> name of its curve.
        prefix: all metrics that begin with it have a curve, too.
        layers: a metric with one value for each layer, in `<layers>/layer_XX`.
        level: a value that is drawn as a line, and what it is.
        tickformat: of the values, in d3's notation.
    """

    title: str
    metrics: Mapping[str, str]
    prefix: str | None = None
    layers: str | None = None
    level: tuple[float, str] | None = None
    tickformat: str | None = None


def charts(data: RunData) -> dict[str, Chart]:
    """Return identifier -> chart, for all metrics that this project logs."""
    experts, top_k = data.config.get("model.num_experts"), data.config.get("model.top_k")
    ceiling = (experts / top_k - 1, "ceiling: all tokens to k experts") if experts and top_k else None

    def router(title: str, name: str, level: tuple[float, str] | None = None) -> Chart:
        return Chart(title, {f"router/{name}": "all layers"}, layers=f"router/{name}", level=level)

    return {
        "loss": Chart(
            "Loss (nats per token)",
            {"train/loss": "+ auxiliary", "train/ce": "training", "eval/loss": "held-out"},
        ),
        "bits": Chart("Held-out text, bits per byte", {}, prefix="eval/bits_per_byte/"),
        "lr": Chart("Learning rate", {"optim/lr": "learning rate"}),
        "grad": Chart("Gradient norm before clipping", {"optim/grad_norm": "gradient norm"}),
        "speed": Chart("Training speed (tokens per second)", {"speed/tokens_per_s": "tokens/s"}),
        "mfu": Chart("Model FLOPs utilisation", {"speed/mfu": "MFU"}, tickformat=".1%"),
        "max_vio": router("MaxVio (0 = balanced)", "max_vio", ceiling),
        "balance": router("Balance loss (1 = balanced)", "balance_loss"),
        "z_loss": router("Router z-loss", "z_loss"),
        "entropy": router("Entropy of probabilities (1 = uniform)", "entropy"),
        "load_entropy": router("Entropy of the load (1 = balanced)", "load_entropy"),
        "margin": router("Margin: k-th minus next probability", "margin"),
        "logit_range": router("Range of the router's logits", "logit_range"),
        "dead": router("Experts without a token", "dead"),
        "drop_rate": router("Dropped assignments (share)", "drop_rate"),
        "rank_load_max": router("Fullest expert-parallel rank (1 = balanced)", "rank_load_max"),
        "straggler": Chart("Straggler price by expert-parallel ranks", {}, prefix="router/straggler/ep_"),
        "router_grad": router("Gradient norm of the router", "grad_norm"),
        "router_weight": router("Weight norm of the router", "weight_norm"),
    }


METRIC_COLOURS = {"train/loss": GREY, "train/ce": BLUE, "eval/loss": ORANGE}
"""The colours of some metrics. Others take those of the palette in order."""
SHOWN_ELSEWHERE = ("alarm/", "router/load/", "router/straggler", "router/churn", "experts/")
"""Metrics with these prefixes are in other figures."""


def curve_figures(data: RunData) -> dict[str, Figure]:
    """Return identifier -> figure, for the charts of which the run has at least one value."""
    named, figures = charts(data), dict[str, Figure]()
    for name, chart in named.items():
        figure = _figure(data.rows, chart)
        if figure is not None:
            figures[f"curve-{name}"] = figure
    bits = figures.get("curve-bits")
    if bits is not None:
        _add_baselines(bits, data)
    for number, key in enumerate(_other_metrics(data.rows, named)[:MAX_CURVES]):
        figure = _figure(data.rows, Chart(key, {key: key}, layers=key))
        assert figure is not None
        figures[f"curve-other-{number}"] = figure
    return figures


def _other_metrics(rows: Sequence[Row], named: Mapping[str, Chart]) -> list[str]:
    """Return the metrics that no chart names and that have a value, without those of single layers."""
    known = {key for chart in named.values() for key in chart.metrics}
    prefixes = (*SHOWN_ELSEWHERE, *(chart.prefix for chart in named.values() if chart.prefix))
    keys = {key for row in rows for key in row} - known - {"step"}
    keys = {key for key in keys if not key.startswith(prefixes) and "/layer_" not in key}
    return sorted(key for key in keys if series(rows, key)[0])


def _figure(rows: Sequence[Row], chart: Chart) -> Figure | None:
    """Return the figure of a chart, or None if no row has one of its metrics."""
    names = dict(chart.metrics)
    if chart.prefix:
        prefixed = {key for row in rows for key in row if key.startswith(chart.prefix)}
        found = sorted(prefixed, key=lambda key: (len(key), key))  # ep_8 before ep_16
        names |= {key: key.removeprefix(chart.prefix) for key in found}
    curves = [(label, *series(rows, key)) for key, label in names.items()]
    colours = {
        label: METRIC_COLOURS.get(key, COLOURS[index % len(COLOURS)])
        for index, (key, label) in enumerate(names.items())
    }
    curves = [curve for curve in curves if curve[1]]
    layers = [] if chart.layers is None else [(key, *series(rows, key)) for key in layer_keys(rows, chart.layers)]
    layers = [curve for curve in layers if curve[1]]
    if not curves and not layers:
        return None
    quiet = len(layers) > MAX_NAMED_LAYERS
    traces = [
        _line(
            f"layer {int(key.rpartition('_')[2])}",
            steps,
            values,
            MAX_LAYER_POINTS,
            line={"width": 1, "color": layer_colour(index, len(layers))},
            opacity=0.75,
            showlegend=False,
            hoverinfo="skip" if quiet else "all",
        )
        for index, (key, steps, values) in enumerate(layers)
    ]
    for label, steps, values in curves:
        line = {"width": 2, "color": colours[label]}
        traces.append(_line(label, steps, values, MAX_POINTS, line=line, showlegend=len(curves) > 1))
    layout = figure_layout(chart.title, x="optimizer step", tickformat=chart.tickformat, hovermode="x unified")
    if min(min(values) for _, _, values in (*curves, *layers)) >= 0:
        layout["yaxis"] |= {"rangemode": "nonnegative"}
    if chart.level is not None:
        level, what = chart.level
        highest = max(max(values) for _, _, values in (*curves, *layers))
        if highest > level / 3:  # Else the line would press the curves together.
            layout["shapes"] = [level_line(level)]
            layout["annotations"] = [level_label(level, what)]
    return {"data": traces, "layout": layout}


def _line(name: str, steps: list[int], values: list[float], most: int, **style: Any) -> dict[str, Any]:
    steps, values = reduced(steps, values, most)
    mode = "lines+markers" if len(steps) < 25 else "lines"
    return {
        "type": "scatter",
        "name": escape(name, quote=False),
        "x": steps,
        "y": [rounded(value) for value in values],
        "mode": mode,
        "marker": {"size": 4},
        **style,
    }


def reduced(steps: list[int], values: list[float], most: int) -> tuple[list[int], list[float]]:
    """Return a curve of at most `most` points. Of each interval of steps the lowest and the highest value stay."""
    count = len(steps)
    if count <= most:
        return steps, values
    kept, buckets = {0, count - 1}, most // 2 - 1
    for bucket in range(buckets):
        indices = range(bucket * count // buckets, (bucket + 1) * count // buckets)
        kept |= {min(indices, key=values.__getitem__), max(indices, key=values.__getitem__)}
    chosen = sorted(kept)
    return [steps[index] for index in chosen], [values[index] for index in chosen]


def rounded(value: float) -> float:
    """Return the value with 5 significant digits, which is more than a screen shows."""
    return float(f"{value:.5g}")


def layer_colour(index: int, count: int) -> str:
    """Return the colour of a layer, from violet for the first to green for the last."""
    return f"hsl({280 - round(150 * index / max(count - 1, 1))},45%,55%)"


def figure_layout(
    title: str, *, x: str = "", y: str = "", height: int = 230, tickformat: str | None = None, **more: Any
) -> dict[str, Any]:
    """Return the layout of a figure, with the text of its title and axes."""
    return {
        "title": {"text": escape(title, quote=False)},
        "height": height,
        "margin": {"l": 44, "r": 12, "t": 46, "b": 36},
        "xaxis": {"title": {"text": escape(x, quote=False)}},
        "yaxis": {"title": {"text": escape(y, quote=False)}, **({"tickformat": tickformat} if tickformat else {})},
        **more,
    }


def level_line(level: float) -> dict[str, Any]:
    """Return a horizontal line at a value."""
    line = {"color": RED, "width": 1, "dash": "dot"}
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": level, "y1": level, "line": line}


def level_label(level: float, text: str) -> dict[str, Any]:
    """Return the text at a horizontal line."""
    place = {"xref": "paper", "x": 1, "xanchor": "right", "y": level, "yanchor": "bottom", "showarrow": False}
    return {**place, "text": escape(text, quote=False), "font": {"size": 10, "color": RED}}


def _add_baselines(figure: Figure, data: RunData) -> None:
    """Draw what gzip needs for the held-out text of each domain, in the colour of the domain's curve."""
    baselines = data.result.get("baselines")
    shapes = []
    for trace in figure["data"]:
        domain = baselines.get(unescape(trace["name"])) if isinstance(baselines, dict) else None
        gzip = domain.get("gzip_bits_per_byte") if isinstance(domain, dict) else None
        if isinstance(gzip, float):
            shapes.append(level_line(gzip) | {"line": {"color": trace["line"]["color"], "width": 1, "dash": "dot"}})
    if shapes:
        figure["layout"]["shapes"] = shapes
        figure["layout"]["title"]["text"] += ", dotted: gzip"
