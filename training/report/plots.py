"""The plots of a run or a sweep, as SVG and PNG files.

The functions import matplotlib when they are called, because the import takes long. They need no display, because they
do not use pyplot. The same numbers give the same bytes of SVG: the salt of the identifiers is fixed, the file has no
date, and the user's matplotlibrc is not used.
"""

import io
import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.files import write_atomically
from training.report.heatmap import Load, relative_load, routed, scale_limit
from training.report.metrics import layer_keys
from training.report.terminal import human_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.figure import Figure, SubFigure

BLUE, ORANGE, RED, GREY = "#0072B2", "#E69F00", "#D55E00", "#777777"
"""Colours of Okabe and Ito's palette, which people with any common colour blindness can distinguish; and a grey."""

MAX_VECTOR_CELLS = 4096
"""A heatmap with more cells is an image inside the SVG, because SVG viewers are slow with so many shapes."""
MAX_DOMAINS = 24
"""The most domains that the plot of the load shows. matplotlib cannot draw an image of more than 65,535 pixels."""
MAX_OVERVIEW_LAYERS = 6
"""The most MoE layers that the overview shows."""

BOTH_FORMATS: Mapping[str, Mapping[str, Any]] = {".svg": {"metadata": {"Date": None}}, ".png": {"dpi": 140}}
"""Suffix -> options of matplotlib's `savefig`."""
DEFAULT_STYLE: Mapping[str, Any] = {}


@contextmanager
def figure(
    path: Path,
    width: float,
    height: float,
    formats: Mapping[str, Mapping[str, Any]] = BOTH_FORMATS,
    style: Mapping[str, Any] = DEFAULT_STYLE,
) -> Iterator["Figure"]:
    """A context manager that gives a figure, and writes it when the block ends.

    Args:
        path: the file to write, once with each suffix of `formats`.
        width: in inches.
        height: in inches.
        formats: suffix -> options of `savefig`.
        style: settings of matplotlib, besides those of this project.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {"svg.hashsalt": "mixwright", "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.style.context(["default", settings, dict(style)]), warnings.catch_warnings():
        # The font does not have the characters of every language, and very long names leave no room.
        warnings.filterwarnings("ignore", "Glyph|constrained_layout", UserWarning)
        canvas = Figure(figsize=(width, height), layout="constrained")
        yield canvas
        for suffix, options in formats.items():
            drawn = io.BytesIO()  # A plot that a full disk has cut off would remain.
            canvas.savefig(drawn, format=suffix[1:], **options)
            write_atomically(path.with_suffix(suffix), drawn.getvalue())


def thinned(count: int, most: int) -> list[int]:
    """Return at most `most` of the indices 0 to `count` - 1, evenly spaced, with the first and the last."""
    if count <= most:
        return list(range(count))
    return sorted({round(index * (count - 1) / max(most - 1, 1)) for index in range(most)})


def plot_overview(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot the loss over training and, for an MoE model, the relative load of each expert beside it.

    Each heatmap is one MoE layer. A column is the load in one logged step, drawn from the logged step before it.

    Args:
        rows: the rows of `metrics.jsonl`.
        path: the file to write; its suffix is replaced by .svg and .png.
    """
    keys = layer_keys(rows, "router/load")
    keys = [keys[index] for index in thinned(len(keys), MAX_OVERVIEW_LAYERS)]
    with figure(path, 10 if keys else 5, 4.4) as canvas:
        left, *right = canvas.subfigures(1, 2 if keys else 1, width_ratios=[1, 1.3] if keys else None, squeeze=False)[0]
        loss = left.add_subplot()
        _curve(loss, rows, "train/ce", "training", BLUE)
        _curve(loss, rows, "eval/loss", "held-out text", ORANGE, marker="o")
        loss.set_ylabel("cross-entropy (nats per token)")
        loss.grid(alpha=0.25)
        _label_steps(loss)
        if loss.lines:
            loss.legend(frameon=False)
        if keys:
            _load_over_steps(right[0], rows, keys)


def _load_over_steps(canvas: "SubFigure", rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> None:
    """Draw one heatmap of steps and experts for each of the metrics `keys`, below each other."""
    from matplotlib.colors import LogNorm

    rows = [row for row in rows if keys[0] in row]
    edges = [rows[0]["step"] - 1, *(row["step"] for row in rows)]
    loads = [relative_load([row[key] for row in rows]) for key in keys]
    limit = max(map(scale_limit, loads))
    panels = canvas.subplots(len(keys), 1, sharex=True, squeeze=False)[:, 0]
    for axes, key, load_SE in zip(panels, keys, loads, strict=True):
        experts = len(load_SE[0])
        mesh = axes.pcolormesh(
            edges,
            range(experts + 1),
            list(zip(*load_SE, strict=True)),
            cmap="RdBu_r",
            # A logarithmic scale has no 0, so an expert without a token gets the lowest colour.
            norm=LogNorm(1 / limit, limit, clip=True),
            rasterized=len(rows) * experts > MAX_VECTOR_CELLS,
        )
        axes.set(ylabel=f"layer {int(key.rpartition('_')[2])}", ylim=(experts, 0))
        axes.set_yticks([0.5, experts - 0.5], labels=["0", str(experts - 1)])
        axes.tick_params(length=0)
        axes.spines[:].set(visible=True, color="lightgrey")
    canvas.supylabel("expert, by MoE layer", fontsize="medium")
    _label_steps(axes)
    _load_scale(canvas.colorbar(mesh, ax=list(panels), extend="both"), limit)


def plot_load(load_LE: Load, domains: Mapping[str, Load], path: Path) -> None:
    """Plot heatmaps of the relative load by layer and expert: one of all domains, and a smaller one per domain.

    Args:
        load_LE: counts or shares of assignments over all domains.
        domains: counts or shares of each domain alone. A domain without assignments gets no heatmap. If there are more
            than `MAX_DOMAINS`, only those with the most assignments get one.
        path: the file to write; its suffix is replaced by .svg and .png.
    """
    from matplotlib.colors import LogNorm

    whole_LE = relative_load(load_LE)
    known = routed(domains)
    largest = sorted(known, key=lambda name: -sum(map(sum, known[name])))[:MAX_DOMAINS]
    panels = {name: relative_load(load) for name, load in known.items() if name in largest}
    layers, experts = len(whole_LE), len(whole_LE[0])
    limit = max(scale_limit(panel_LE) for panel_LE in (whole_LE, *panels.values()))
    norm = LogNorm(1 / limit, limit)
    across = min(max(len(panels), 1), 4 if experts <= 16 else 2)
    down = math.ceil(len(panels) / across)
    main, small = min(max(0.34 * layers, 1.6), 9.0), min(max(0.17 * layers, 1.3), 5.0)
    with figure(path, 9.6, main + 1.6 + down * (small + 0.8)) as canvas:
        grid = canvas.add_gridspec(2 + down, across, height_ratios=[main, *[small] * down, 0.16])
        top = canvas.add_subplot(grid[0, :])
        mesh = _heatmap(top, whole_LE, norm, annotate=experts <= 16 and layers <= 24)
        top.set_title("Expert load, all domains", loc="left", fontweight="bold")
        for index, (name, panel_LE) in enumerate(panels.items()):
            axes = canvas.add_subplot(grid[1 + index // across, index % across])
            _heatmap(axes, panel_LE, norm, annotate=False)
            axes.set_title(name, loc="left", parse_math=False)  # A `$` in a name is no formula.
            if index % across:
                axes.set_ylabel("")
        bar = canvas.colorbar(mesh, cax=canvas.add_subplot(grid[-1, :]), orientation="horizontal", extend="both")
        _load_scale(bar, limit, "; x = no token")


def _load_scale(bar: "Colorbar", limit: float, note: str = "") -> None:
    """Label the colour bar of relative loads, whose colours range from 1 / limit to limit."""
    ticks = [tick for tick in (1 / 8, 1 / 4, 1 / 2, 0.7, 1, 1.4, 2, 4, 8) if 1 / limit <= tick <= limit]
    bar.set_ticks(ticks, labels=[f"{tick:.3g}" for tick in ticks])
    bar.ax.minorticks_off()
    bar.set_label(f"load / balanced load  (1 = balanced{note})")


def _heatmap(axes: "Axes", relative_LE: Load, norm: Any, annotate: bool) -> Any:
    """Draw relative loads by layer and expert; with `annotate`, also as numbers. Returns matplotlib's mesh."""
    layers, experts = len(relative_LE), len(relative_LE[0])
    # A logarithmic scale has no 0, so an expert without a token gets the lowest colour, and a cross below.
    cells_LE = [[max(value, norm.vmin / 2) for value in row_E] for row_E in relative_LE]
    mesh = axes.pcolormesh(
        cells_LE,
        cmap="RdBu_r",
        norm=norm,
        edgecolors="white" if experts <= 16 else "none",
        linewidth=0.8 if experts <= 16 else 0,
        rasterized=layers * experts > MAX_VECTOR_CELLS,
    )
    dead = [(e + 0.5, y + 0.5) for y, row_E in enumerate(relative_LE) for e, value in enumerate(row_E) if value == 0]
    if dead:
        axes.scatter([e for e, _ in dead], [y for _, y in dead], marker="x", s=14, linewidths=1, color="white")
    if annotate:
        for layer, row_E in enumerate(relative_LE):
            for expert, value in enumerate(row_E):
                if value:
                    shade = abs(math.log(value)) / math.log(norm.vmax)
                    ink = "white" if shade > 0.65 else "black"
                    axes.text(
                        expert + 0.5, layer + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink
                    )
    axes.invert_yaxis()
    for axis, size, most in ((axes.xaxis, experts, 16), (axes.yaxis, layers, 8)):
        ticks = range(0, size, math.ceil(size / most))
        axis.set_ticks([tick + 0.5 for tick in ticks], labels=[str(tick) for tick in ticks])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="expert", ylabel="layer")
    return mesh


def plot_curves(metrics_rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot loss, balance loss, MaxVio, learning rate and gradient norm over the optimizer steps.

    Args:
        metrics_rows: the rows of `metrics.jsonl`.
        path: the file to write; its suffix is replaced by .svg and .png.
    """
    with figure(path, 10, 6.4) as canvas:
        ((loss, balance), (violation, optimizer)) = canvas.subplots(2, 2)
        _curve(loss, metrics_rows, "train/loss", "total: cross-entropy + auxiliary losses", GREY)
        _curve(loss, metrics_rows, "train/ce", "cross-entropy", BLUE)
        _curve(loss, metrics_rows, "eval/loss", "held-out cross-entropy", ORANGE, marker="o")
        _curve(balance, metrics_rows, "router/balance_loss", "all layers", BLUE)
        layers = layer_keys(metrics_rows, "router/max_vio")
        for index, key in enumerate(layers):
            _curve(violation, metrics_rows, key, "single layers" if index == 0 else "", GREY, linewidth=0.6, alpha=0.6)
        _curve(violation, metrics_rows, "router/max_vio", "mean over layers", BLUE)
        _curve(optimizer, metrics_rows, "optim/lr", "learning rate", BLUE)
        optimizer.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        optimizer.set_ylabel("learning rate", color=BLUE)
        norm = optimizer.twinx()
        norm.spines["right"].set_visible(True)
        norm.set_ylabel("gradient norm before clipping", color=RED)
        _curve(norm, metrics_rows, "optim/grad_norm", "gradient norm", RED, linewidth=0.8)
        # The learning rate is drawn above the noisy gradient norm.
        optimizer.set_zorder(norm.get_zorder() + 1)
        optimizer.patch.set_visible(False)
        titles = {
            loss: "Loss (nats per token)",
            balance: "Balance loss (1 = balanced, as a mean over layers)",
            violation: "MaxVio (0 = balanced, 1 = twice the share)",
            optimizer: "Learning rate and gradient norm",
        }
        for axes, title in titles.items():
            axes.set_title(title, loc="left")
            _label_steps(axes)
            axes.grid(alpha=0.25)
            labelled = [line for line in axes.lines if not str(line.get_label()).startswith("_")]
            if not labelled:
                axes.text(0.5, 0.5, "no data (a dense model has no router)", ha="center", transform=axes.transAxes)
                axes.set(xticks=[], yticks=[])
            elif axes is not optimizer:
                axes.legend(handles=labelled, fontsize=8, framealpha=0.8)


def _label_steps(axes: "Axes") -> None:
    """Label the x axis of optimizer steps, with ticks at integers only."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def _curve(
    axes: "Axes", rows: Sequence[Mapping[str, Any]], key: str, label: str, color: str, marker: str = "", **style: Any
) -> None:
    """Plot a metric over the steps of the rows that have it. An empty `label` keeps the curve out of the legend."""
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    if points:
        # A line through a single point would be invisible.
        marker = marker or ("o" if len(points) < 3 else "")
        axes.plot(
            *zip(*points, strict=True), label=label or "_", color=color, marker=marker, markersize=4,
            **{"linewidth": 1.4, **style},
        )  # fmt: skip


def plot_sweep(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot the held-out loss of each job of a sweep over its number of parameters.

    A point is labelled experts x top-k and coloured by the active parameters. A job that did not finish is hollow,
    because its loss is that of fewer steps. The title says how many jobs have no finite loss.

    Args:
        rows: the rows that `training.report.sweep.sweep_table` returns.
        path: the file to write; its suffix is replaced by .svg and .png.
    """
    from matplotlib.colors import Normalize
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    shown = [row for row in rows if is_number(row.get("eval/loss")) and is_number(row.get("total_params"))]
    shown.sort(key=lambda row: (row["total_params"], row["eval/loss"]))
    with figure(path, 7.6, 5) as canvas:
        axes = canvas.add_subplot()
        missing = len(rows) - len(shown)
        note = f" ({missing} of {len(rows)} jobs have none)" if missing else ""
        axes.set_title(f"Held-out loss by model size{note}", loc="left", fontweight="bold")
        axes.set(xlabel="total parameters", ylabel="held-out loss (nats per token)")
        axes.grid(alpha=0.25)
        axes.margins(0.14, 0.1)
        if not shown:
            return
        totals, losses = [row["total_params"] for row in shown], [row["eval/loss"] for row in shown]
        active = [row.get("active_params") or row["total_params"] for row in shown]
        if max(totals) > 4 * min(totals):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_count(value)))
        points = axes.scatter(
            totals, losses, c=active, norm=Normalize(min(active), max(active) * 1.0001), cmap="viridis", s=70, zorder=3
        )
        hollow = [index for index, row in enumerate(shown) if row["status"] != "finished"]
        if hollow:
            axes.scatter(
                [totals[i] for i in hollow], [losses[i] for i in hollow], s=22, color="white", zorder=4
            )  # fmt: skip
            axes.set_xlabel("total parameters  (hollow: did not finish, loss of fewer steps)")
        for index, row in enumerate(shown):
            label = "dense" if row.get("num_experts") is None else f"{row['num_experts']}x{row['top_k']}"
            # Jobs of the same size are above each other. Labels on alternating sides do not overlap.
            left = index % 2 == 1
            axes.annotate(
                label, (totals[index], losses[index]), xytext=(-8 if left else 8, 0), textcoords="offset points",
                ha="right" if left else "left", va="center", fontsize=9,
            )  # fmt: skip
        canvas.colorbar(points, ax=axes, format=FuncFormatter(lambda value, _: human_count(value))).set_label(
            "active parameters per token"
        )


def is_number(value: Any) -> bool:
    """Return whether `value`, which may come from a damaged file, is a finite number that a float can represent."""
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
