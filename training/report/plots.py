"""Figures of a run, as SVG and PNG. matplotlib is imported where it draws; no pyplot, so no backend and no display.

The same numbers give the same SVG bytes (fixed hash salt, no date, default style whatever matplotlibrc says).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.report.heatmap import Load, relative_load, routed, scale_limit
from training.report.terminal import human_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: distinguishable with every common colour blindness.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#777777"

MAX_VECTOR_CELLS = 4096
"""Heatmaps with more cells are embedded in the SVG as pixels: viewers choke on that many paths."""


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator["Figure"]:
    """A figure of `width` x `height` inches, written to `path` with the suffixes .svg and .png when the block ends."""
    import matplotlib.style
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {"svg.hashsalt": "mixwright", "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.style.context(["default", settings]):
        canvas = Figure(figsize=(width, height), layout="constrained")
        yield canvas
        canvas.savefig(path.with_suffix(".svg"), metadata={"Date": None})
        canvas.savefig(path.with_suffix(".png"), dpi=140)


def plot_load(load_LE: Load, domains: Mapping[str, Load], path: Path) -> None:
    """Layer x expert heatmaps of load / balanced load: everything, then a small panel per domain.

    Args:
        load_LE: counts or shares of assignments, L layers of E experts.
        domains: the same for each domain alone; one without a token gets no panel.
        path: its suffix is replaced by .svg and .png.
    """
    from matplotlib.colors import LogNorm

    whole_LE = relative_load(load_LE)
    panels = {name: relative_load(domain_LE) for name, domain_LE in routed(domains).items()}
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
            axes.set_title(name, loc="left")
            if index % across:
                axes.set_ylabel("")
        bar = canvas.colorbar(mesh, cax=canvas.add_subplot(grid[-1, :]), orientation="horizontal", extend="both")
        ticks = [tick for tick in (1 / 8, 1 / 4, 1 / 2, 0.7, 1, 1.4, 2, 4, 8) if 1 / limit <= tick <= limit]
        bar.set_ticks(ticks, labels=[f"{tick:.3g}" for tick in ticks])
        bar.ax.minorticks_off()
        bar.set_label("load / balanced load  (1 = balance; x = no token)")


def _heatmap(axes: "Axes", relative_LE: Load, norm: Any, annotate: bool) -> Any:
    layers, experts = len(relative_LE), len(relative_LE[0])
    # A log scale has no place for 0; an expert without a token takes the lowest colour and a cross.
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
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    return mesh


def plot_curves(metrics_rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss, balance loss, MaxVio, learning rate and gradient norm over optimizer steps, from rows of metrics.jsonl."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    with figure(path, 10, 6.4) as canvas:
        ((loss, balance), (violation, optimizer)) = canvas.subplots(2, 2)
        loss.set_title("Loss (nats per token)", loc="left")
        _curve(loss, metrics_rows, "train/loss", "total: cross-entropy + auxiliary losses", GREY)
        _curve(loss, metrics_rows, "train/ce", "cross-entropy", BLUE)
        _curve(loss, metrics_rows, "eval/loss", "held-out cross-entropy", ORANGE, marker="o")
        balance.set_title("Balance loss (1 = balance)", loc="left")
        _curve(balance, metrics_rows, "router/balance_loss", "all layers", BLUE)
        violation.set_title("MaxVio (0 = balance)", loc="left")
        layers = sorted({key for row in metrics_rows for key in row if key.startswith("router/max_vio/")})
        for index, key in enumerate(layers):
            label = "single layers" if index == 0 else ""
            _curve(violation, metrics_rows, key, label, GREY, linewidth=0.6, alpha=0.6)
        _curve(violation, metrics_rows, "router/max_vio", "mean over layers", BLUE)
        optimizer.set_title("Learning rate and gradient norm", loc="left")
        _curve(optimizer, metrics_rows, "optim/lr", "learning rate", BLUE)
        optimizer.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        optimizer.set_ylabel("learning rate", color=BLUE)
        norm = optimizer.twinx()
        norm.spines["right"].set_visible(True)
        norm.set_ylabel("gradient norm before clipping", color=RED)
        _curve(norm, metrics_rows, "optim/grad_norm", "gradient norm", RED, linewidth=0.8)
        # The schedule is drawn over the noisy norm.
        optimizer.set_zorder(norm.get_zorder() + 1)
        optimizer.patch.set_visible(False)
        for axes in (loss, balance, violation, optimizer):
            axes.set_xlabel("optimizer step")
            axes.grid(alpha=0.25)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
            labelled = [line for line in axes.lines if not str(line.get_label()).startswith("_")]
            if not labelled:
                axes.text(0.5, 0.5, "no data (a dense model has no router)", ha="center", transform=axes.transAxes)
                axes.set(xticks=[], yticks=[])
            elif axes is not optimizer:
                axes.legend(handles=labelled, fontsize=8, framealpha=0.8)


def _curve(
    axes: "Axes", rows: Sequence[Mapping[str, Any]], key: str, label: str, color: str, marker: str = "", **style: Any
) -> None:
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    if points:
        # A line through one point is invisible.
        marker = marker or ("o" if len(points) < 3 else "")
        axes.plot(
            *zip(*points, strict=True), label=label or "_", color=color, marker=marker, markersize=4,
            **{"linewidth": 1.4, **style},
        )  # fmt: skip


def plot_sweep(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Held-out loss against total parameters, a point per job labelled experts x top-k, coloured by active parameters.

    Jobs that were interrupted are hollow: their loss is that of fewer steps. Jobs without a finite loss are counted in
    the title.

    Args:
        rows: as `training.report.sweep.sweep_table` returns them.
    """
    from matplotlib.colors import Normalize
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    shown = [row for row in rows if _finite(row.get("eval/loss")) and _finite(row.get("total_params"))]
    shown.sort(key=lambda row: (row["total_params"], row["eval/loss"]))
    with figure(path, 7.6, 5) as canvas:
        axes = canvas.add_subplot()
        missing = len(rows) - len(shown)
        note = f" ({missing} of {len(rows)} jobs have none)" if missing else ""
        axes.set_title(f"Held-out loss by model size{note}", loc="left", fontweight="bold")
        axes.set_xlabel("total parameters")
        axes.set_ylabel("held-out loss (nats per token)")
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
        scale = Normalize(min(active), max(active) * 1.0001)
        points = axes.scatter(totals, losses, c=active, norm=scale, cmap="viridis", s=70, zorder=3)
        hollow = [index for index, row in enumerate(shown) if row["status"] != "finished"]
        if hollow:
            axes.scatter(
                [totals[i] for i in hollow], [losses[i] for i in hollow], s=22, color="white", zorder=4
            )  # fmt: skip
            axes.set_xlabel("total parameters  (hollow: did not finish, loss of fewer steps)")
        for index, row in enumerate(shown):
            label = "dense" if row.get("num_experts") is None else f"{row['num_experts']}x{row['top_k']}"
            # Jobs of one size stand above each other: labels to alternating sides stay apart.
            left = index % 2 == 1
            axes.annotate(
                label, (totals[index], losses[index]), xytext=(-8 if left else 8, 0), textcoords="offset points",
                ha="right" if left else "left", va="center", fontsize=9,
            )  # fmt: skip
        bar = canvas.colorbar(points, ax=axes, format=FuncFormatter(lambda value, _: human_count(value)))
        bar.set_label("active parameters per token")


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
