"""The picture of a planned layout: what the memory of each rank has, and when each rank computes in a step."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.planning.timeline import Block, timeline
from training.report.planned import axes_text
from training.report.plots import BLUE, GREY, ORANGE, RED, figure
from training.report.terminal import human_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_MICRO_BATCHES = 16
"""The most micro-batches that the timeline draws."""
FORMATS: Mapping[str, Mapping[str, Any]] = {".svg": {"metadata": {"Date": None}}, ".png": {"dpi": 200}}
NEAR_LIMIT = 0.2
"""The limit is drawn if the fullest rank has more than this share of it. Otherwise the bars would be too short."""
SMALLEST_PART = 2e-3
"""Share of the peak below which a traced part is not drawn."""
STYLE: Mapping[str, Any] = {"font.size": 8, "axes.titlesize": 9, "hatch.linewidth": 0.6}
SKY, GREEN, PINK, YELLOW = "#56B4E9", "#009E73", "#CC79A7", "#F0E442"
"""More colours of Okabe and Ito's palette."""
STATE_COLOURS = {"weights": BLUE, "gradients": SKY, "moments": GREEN, "casts": YELLOW, "activations": ORANGE}
OTHER_COLOURS = (RED, PINK, "#a6761d", GREY, "#bbbbbb", "#444444", "#8dd3c7", "#bc80bd", "#b3de69")
PASS_COLOURS = {"forward": SKY, "backward": BLUE, "weights": GREEN}
PASS_LABELS = {"forward": "forward", "backward": "backward", "weights": "gradients of weights"}
WITHIN_PASSES = ("expert", "expert_tensor", "tensor", "context")
"""Axes whose communication belongs to the passes of a stage (`training.planning.timing`)."""


def plot_plan(found: Mapping[str, Any], path: Path) -> None:
    """Draw the best layout of a plan.

    The upper panel has a bar for each pipeline rank, by the formulas, and one for each traced rank. The lower panel has
    the blocks of one step by the schedule; white is idle time.

    Args:
        found: what `training.planning.answer.answer` returned, with the batch.
        path: the file to write, a .svg or a .png.

    Raises:
        OSError: the file cannot be written.
    """
    best, gpu = found["layouts"][0], found["gpu"]
    bars = memory_bars(best)
    ranks = best["axes"]["pipeline"]
    heights = [1.5 + 0.2 * len(bars) + 0.06 * len(_colours(bars.values())), 1.5 + 0.22 * ranks]
    with figure(path, 7, sum(heights) + 0.3, {path.suffix: FORMATS[path.suffix]}, STYLE) as canvas:
        upper, lower = canvas.subfigures(2, 1, height_ratios=heights, squeeze=False)[:, 0]
        title = f"{found['gpus']} x {gpu['name']}: {axes_text(best['axes'])}"
        canvas.suptitle(title, fontsize=9, fontweight="bold", parse_math=False)
        _draw_memory(upper.add_subplot(), bars, gpu["memory"] - gpu["reserved"], found["limit_bytes"])
        _draw_step(lower.add_subplot(), best)
        for panel in (upper, lower):
            panel.legend(fontsize=8, ncols=3, frameon=False, loc="outside lower center")


def memory_bars(row: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Return bar -> part -> bytes: one bar for each pipeline rank by the formulas, and one for each traced rank.

    The parts of a bar add up to its peak, without very small traced ones. Gradients that replace activations in the
    backward pass count once.
    """
    bars: dict[str, dict[str, int]] = {}
    names = ("casts",) if row["stages"][0]["offloaded"] else ("weights", "gradients", "moments", "casts")
    for number, stage in enumerate(row["stages"]):
        parts = {name: stage[name] for name in names}
        parts["activations"] = max(0, stage["device"] - sum(parts.values()))
        bars[f"stage {number} (formulas)"] = parts
    for traced in row["traced"]:
        parts = traced["parts"]
        bars[f"rank {traced['rank']} (traced)"] = {
            part: size for part, size in parts.items() if size >= SMALLEST_PART * traced["peak_bytes"]
        }
    return bars


def _draw_memory(axes: "Axes", bars: Mapping[str, Mapping[str, int]], usable: float, limit: float) -> None:
    unit, name = _unit(max(sum(parts.values()) for parts in bars.values()), {"GB": 1e9, "MB": 1e6, "kB": 1e3})
    left = [0.0] * len(bars)
    for part, colour in _colours(bars.values()).items():
        sizes = [parts.get(part, 0) / unit for parts in bars.values()]
        places = range(len(bars))
        axes.barh(places, sizes, 0.7, left, color=colour, label=part, edgecolor="white", linewidth=0.4)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    title = "Who holds what"
    if max(sum(parts.values()) for parts in bars.values()) > NEAR_LIMIT * limit:
        axes.axvline(usable / unit, color="black", linewidth=1.2, label="memory of the device")
        axes.axvline(limit / unit, color="black", linewidth=0.8, linestyle=":", label="limit of the plan (margin)")
    else:
        title += f" (limit: {human_bytes(limit)}, not drawn)"
    axes.set_yticks(range(len(bars)), labels=list(bars))
    axes.invert_yaxis()
    axes.set_xlabel(f"memory of one rank at its peak ({name})")
    axes.set_title(title, loc="left")


def _unit(value: float, units: Mapping[str, float]) -> tuple[float, str]:
    """Return the first unit of which `value` has at least one, or the last unit; and its name."""
    name = next((name for name, unit in units.items() if value >= unit), list(units)[-1])
    return units[name], name


def _colours(bars: Any) -> dict[str, str]:
    """Return part -> colour, in the order in which the parts are stacked."""
    found = dict.fromkeys(part for parts in bars for part in parts)
    others = [part for part in found if part not in STATE_COLOURS]
    colours = {part: colour for part, colour in STATE_COLOURS.items() if part in found}
    return colours | {part: OTHER_COLOURS[number % len(OTHER_COLOURS)] for number, part in enumerate(others)}


def drawn_micro_batches(accumulation: int, ranks: int) -> int:
    """Return how many micro-batches are drawn: all, or the most that the schedules divide into groups."""
    most = min(accumulation, MAX_MICRO_BATCHES)
    return next(number for number in range(most, 0, -1) if number % max(1, number // ranks) == 0)


def _draw_step(axes: "Axes", row: Mapping[str, Any]) -> None:
    """Draw the blocks of each pipeline rank, and at the end what follows the passes."""
    ranks, accumulation, times = row["axes"]["pipeline"], row["accumulation"], row["times"]
    drawn = drawn_micro_batches(accumulation, ranks)
    waits = {axis: seconds for axis, seconds in times["exposed"].items() if axis in WITHIN_PASSES}
    computing = times["matmul"] + times["attention"] + times["memory-bound"]
    passes = computing + sum(waits.values()) + times["straggler"]
    forward = passes / accumulation * row["forward_share"]
    blocks = timeline(ranks, drawn, row["schedule"], forward, passes / accumulation - forward)
    end = max(block.end for of_rank in blocks for block in of_rank)
    unit, name = _unit(end, {"s": 1.0, "ms": 1e-3, "µs": 1e-6})
    shares = {
        "exchange of tokens (all-to-all)": waits.get("expert", 0.0) / passes,
        "other communication of a pass": sum(seconds for axis, seconds in waits.items() if axis != "expert") / passes,
        "wait for the fullest expert rank": times["straggler"] / passes,
    }
    for rank, of_rank in enumerate(blocks):
        _draw_blocks(axes, rank, of_rank, shares, unit)
    after = {
        "other exposed communication": sum(times["exposed"].values()) - sum(waits.values()),
        "update": times["update"],
    }
    for (label, seconds), colour in zip(after.items(), (GREY, PINK), strict=True):
        for rank in range(ranks if seconds else 0):
            start, length = end / unit, seconds / unit
            axes.barh(rank, length, 0.8, start, color=colour, label=label if not rank else "_", linewidth=0)
        end += seconds
    axes.set_yticks(range(ranks), labels=[f"stage {rank}" if ranks > 1 else "each rank" for rank in range(ranks)])
    axes.set_ylim(ranks - 0.4, -0.6)
    axes.set_xlim(0, end / unit)
    axes.set_xlabel(f"time ({name})")
    part = f", {drawn} of {accumulation} micro-batches" if drawn < accumulation else ""
    idle = f"; idle: {times['bubble'] / row['step_s']:.0%} of the whole step" if ranks > 1 else ""
    axes.set_title(f"One step of {row['step_s'] / unit:.3g} {name}{part}{idle}", loc="left")


def _draw_blocks(axes: "Axes", rank: int, blocks: Sequence[Block], shares: Mapping[str, float], unit: float) -> None:
    """Draw the blocks of a rank. What a pass waits for is drawn at its end, as long as it is in sum."""
    styles = ((ORANGE, "////"), (GREY, "\\\\\\\\"), (RED, "...."))
    for kind, colour in PASS_COLOURS.items():
        chosen = [block for block in blocks if block.of.kind == kind]
        if not chosen:
            continue
        label = PASS_LABELS[kind] if not rank else "_"
        spans = [(block.start / unit, (block.end - block.start) / unit) for block in chosen]
        axes.broken_barh(spans, (rank - 0.4, 0.8), facecolor=colour, edgecolor="white", linewidth=0.4, label=label)
    # Gradients of weights need no other rank.
    waiting = [block for block in blocks if block.of.kind != "weights"]
    end = 1.0
    for (label, share), (colour, hatch) in zip(shares.items(), styles, strict=True):
        if not share:
            continue
        spans = []
        for block in waiting:
            length = (block.end - block.start) / unit
            spans.append((block.start / unit + length * (end - share), length * share))
        axes.broken_barh(
            spans, (rank - 0.4, 0.8), facecolor="white", edgecolor=colour, hatch=hatch, linewidth=0.3,
            label=label if not rank else "_",
        )  # fmt: skip
        end -= share
