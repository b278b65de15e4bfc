"""The figures of a report as PNG or SVG files, in the width of one column of a paper.

matplotlib draws them from the same descriptions as the page. A figure whose values the page fills in shows one step
here, the last one if no other is chosen; of one that shows a single layer, there is a file for each layer.

Shapes: L MoE layers, E experts, G domains, W words.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from common.errors import expect
from training.report.page.curves import Figure, curve_figures
from training.report.page.figures import router_figures
from training.report.page.gather import Frames, RunData, load_frames
from training.report.page.heldout import HeldOut, frequent_ids, heldout_figures, read_heldout, shown_piece, word_numbers
from training.report.page.jobs import Jobs, job_figures
from training.report.plots import figure
from training.report.probe import coactivation, specialisation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Format = Literal["png", "svg"]
WIDTH, HEIGHT, DPI = 3.4, 2.3, 300
"""Inches of a column and of a usual figure, and dots per inch of a PNG."""
MAX_FILES = 400
"""The most files. A model of many layers has a few for each."""
SMALL_FONT = {"font.size": 7, "axes.titlesize": 8, "legend.fontsize": 6, "lines.linewidth": 1.2, "axes.linewidth": 0.6}


def write_run_figures(data: RunData, target: Path, suffix: Format, step: int | None = None) -> list[Path]:
    """Write the figures of a run into the directory `target`, and return the files.

    Args:
        step: what figures of one step show. Those of the probe show the last probed step up to it. None: the last step.

    Raises:
        ConfigError: the run has neither loads nor a probe of `step`.
        OSError: a file cannot be written.
    """
    loads = load_frames(data.rows)
    heldout = None if loads is None else read_heldout(data, _shape(loads), [])
    if step is not None:
        loaded = {int(row["step"]) for row in data.rows if load_frames([row]) is not None}  # type: ignore[arg-type]
        recorded = sorted(loaded.union(heldout.steps if heldout is not None else ()))
        near = f"the nearest is {min(recorded, key=lambda each: abs(each - step))}" if recorded else "there is none"
        expect(step in recorded, "step", step, f"a step of which the run has loads or a probe; {near}")
    return _write(_run_figures(data, loads, heldout, step), target, suffix)


def write_job_figures(jobs: Jobs, target: Path, suffix: Format) -> list[Path]:
    """Write the figures of a sweep, as `write_run_figures` does."""
    return _write(iter(job_figures(jobs).items()), target, suffix)


def _write(figures: Iterator[tuple[str, Figure]], target: Path, suffix: Format) -> list[Path]:
    options: dict[str, Any] = {"dpi": DPI} if suffix == "png" else {"metadata": {"Date": None}}
    written = []
    for (name, description), _ in zip(figures, range(MAX_FILES), strict=False):
        target.mkdir(parents=True, exist_ok=True)
        height = HEIGHT * max(1, description["layout"]["height"] / 300)
        with figure(target / name, WIDTH, height, {f".{suffix}": options}, SMALL_FONT) as canvas:
            _draw(canvas.add_subplot(), description)
        written.append(target / f"{name}.{suffix}")
    return written


def _run_figures(
    data: RunData, loads: Frames | None, heldout: HeldOut | None, step: int | None
) -> Iterator[tuple[str, Figure]]:
    """Yield name -> figure with all values."""
    yield from curve_figures(data).items()
    if loads is None:
        return
    router, (layers, experts) = router_figures(data), _shape(loads)
    until = [row for row in data.rows if step is None or int(row["step"]) <= step]  # type: ignore[arg-type]
    straggler = router_figures(replace(data, rows=until)).get("straggler")
    if straggler is not None:
        yield "straggler", straggler
    shown = load_frames([row for row in until if step is None or row["step"] == step])
    if shown is not None and _shape(shown) == (layers, experts):
        title = f"Load at step {shown.steps[-1]}"
        yield "load", _filled(router["load"], _log(shown.values_FLE[-1]), range(experts), range(layers), title)
    for layer in range(layers):
        values_EF = np.array([frame_LE[layer] for frame_LE in loads.values_FLE]).T
        title = f"Load over training, layer {layer}"
        yield f"history-{layer:02d}", _filled(router["history"], _log(values_EF), loads.steps, range(experts), title)
    if heldout is not None:
        yield from _heldout_figures(heldout, step)


def _shape(loads: Frames) -> tuple[int, int]:
    """Return the number of layers and of experts."""
    [values_LE, *_] = loads.values_FLE
    return len(values_LE), len(values_LE[0])


def _heldout_figures(heldout: HeldOut, step: int | None) -> Iterator[tuple[str, Figure]]:
    figures, probe = heldout_figures(heldout), heldout.probe
    yield from ((name, figures[name]) for name in ("churn", "saturation") if name in figures)
    probed = [index for index, each in enumerate(heldout.steps) if step is None or each <= step]
    if not probed:
        return
    routing, shown = heldout.routings[probed[-1]], heldout.steps[probed[-1]]
    ids, (layers, experts) = frequent_ids(probe), heldout.shape
    domains_LEG = specialisation(routing, probe.domain_T, len(probe.domains))
    words_LEW = specialisation(routing, word_numbers(probe, ids), len(ids) + 1)[..., :-1]
    names = [shown_piece(probe.pieces[int(np.argmax(probe.tokens_T == token))]) for token in ids]
    pairs_LEE = coactivation(routing)
    for layer in range(layers):
        columns, of_layer = range(experts), f", layer {layer}, step {shown}"
        yield (
            f"domains-{layer:02d}",
            _filled(figures["domains"], _log(domains_LEG[layer].T), columns, probe.domains, f"Domains{of_layer}", 2),
        )
        if ids:
            yield (
                f"words-{layer:02d}",
                _filled(figures["words"], _log(words_LEW[layer].T), columns, names, f"Token ids{of_layer}", 2),
            )
        pairs_EE = np.where(np.eye(experts, dtype=bool), np.nan, pairs_LEE[layer])
        yield f"pairs-{layer:02d}", _filled(figures["pairs"], pairs_EE, columns, columns, f"Co-activation{of_layer}")


def _log(values: ArrayLike) -> np.ndarray:
    return np.log2(np.maximum(values, 1e-9))


def _filled(
    prepared: Figure, z: np.ndarray, x: Sequence[Any], y: Sequence[Any], title: str, limit: float | None = None
) -> Figure:
    """Return a heatmap with its values.

    Args:
        z: logarithms to the base 2 if the map has a balance, which is 0 then.
        limit: the end of the colour scale; None: as prepared.
    """
    [trace] = prepared["data"]
    scale = {} if limit is None else {"zmin": -limit, "zmax": limit}
    layout = prepared["layout"] | {"title": {"text": title}}
    return {"data": [trace | {"z": z, "x": list(x), "y": list(y)} | scale], "layout": layout}


# --------------------------------------------------------------------------------------------------------- matplotlib


def _draw(axes: "Axes", description: Figure) -> None:
    """Draw the traces and the layout that the figures of a report use."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    layout, named = description["layout"], False
    for trace in description["data"]:
        if trace["type"] == "heatmap":
            _draw_map(axes, trace)
        else:
            named |= _draw_line(axes, trace)
    for shape in layout.get("shapes", ()):
        axes.axhline(shape["y0"], color=shape["line"]["color"], linewidth=0.8, linestyle=":")
    axes.set_title(unescape(layout["title"]["text"]), loc="left", parse_math=False)
    axes.set_xlabel(unescape(layout["xaxis"]["title"]["text"]), parse_math=False)
    axes.set_ylabel(unescape(layout["yaxis"]["title"]["text"]), parse_math=False)
    if layout["xaxis"].get("type") == "log":
        axes.set_xscale("log")
    elif layout["xaxis"]["title"]["text"] == "optimizer step" and description["data"][0]["type"] != "heatmap":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if layout["yaxis"].get("tickformat", "").endswith("%"):
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if layout["yaxis"].get("rangemode") == "tozero":
        axes.set_ylim(bottom=0)
    if named:
        axes.legend(frameon=False)
    if description["data"][0]["type"] != "heatmap":
        axes.grid(alpha=0.25, linewidth=0.5)


def _draw_line(axes: "Axes", trace: Mapping[str, Any]) -> bool:
    """Draw a curve, and return whether it is in the legend."""
    style = trace.get("line", {})
    color = style.get("color") or trace.get("marker", {}).get("color")
    if isinstance(color, str) and color.startswith("hsl"):
        color = _rgb(color)
    shown = bool(trace.get("showlegend"))
    axes.errorbar(
        trace["x"],
        trace["y"],
        yerr=trace.get("error_y", {}).get("array"),
        color=color,
        linestyle="-" if "lines" in trace["mode"] else "",
        marker="o" if "markers" in trace["mode"] else "",
        markersize=2.5,
        linewidth=style.get("width", 2) * 0.6,
        alpha=trace.get("opacity", 1),
        capsize=1.5,
        elinewidth=0.6,
        label=unescape(trace["name"]) if shown else "_",
    )
    for x, y, text in zip(trace["x"], trace["y"], trace.get("text", ()), strict=False):
        axes.annotate(text, (x, y), xytext=(2, 2), textcoords="offset points", fontsize=5)
    return shown


def _rgb(colour: str) -> tuple[float, float, float]:
    """Return the colour `hsl(H,S%,L%)` for matplotlib."""
    from colorsys import hls_to_rgb

    hue, saturation, lightness = (float(part.rstrip("%")) for part in colour[4:-1].split(","))
    return hls_to_rgb(hue / 360, lightness / 100, saturation / 100)


def _draw_map(axes: "Axes", trace: Mapping[str, Any]) -> None:
    z, x, y = np.asarray(trace["z"], dtype=float), trace["x"], trace["y"]
    low, high = trace.get("zmin"), trace.get("zmax")
    colours = "RdBu_r" if low is not None and low < 0 else "Blues"
    image = axes.imshow(z, aspect="auto", cmap=colours, vmin=low, vmax=high, interpolation="nearest")
    for axis, values, most in ((axes.xaxis, x, 8), (axes.yaxis, y, 12 if isinstance(y[0], int) else len(y))):
        ticks = range(0, len(values), max(1, math.ceil(len(values) / most)))
        axis.set_ticks(list(ticks), labels=[str(values[tick]) for tick in ticks], parse_math=False)
    axes.tick_params(length=0)
    bar = axes.figure.colorbar(image, ax=axes)
    if colours == "RdBu_r" and high is not None:
        ticks = range(-int(high), int(high) + 1)
        bar.set_ticks([float(tick) for tick in ticks], labels=[f"{2.0**tick:.3g}" for tick in ticks])
