"""The report of a sweep or of several runs: the results as a table, and the loss against what it costs.

Jobs that differ only in their seed are one *group*: a point with the mean of their losses and an error bar.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean, stdev
from textwrap import wrap
from typing import Any

from common.errors import expect
from common.text import shorten, show_value
from training.report.metrics import METRICS_FILE, Row
from training.report.page.curves import Figure, figure_layout, reduced, rounded
from training.report.page.gather import is_run, read_rows, series
from training.report.page.theme import COLOURS, GREY
from training.report.plots import is_number, thinned
from training.report.sweep import SweepRecord, result_rows, sweep_jobs

SEED = "run.seed"
MAX_LINES = 12
"""The most lines of the figures. With more, there are only points."""
MAX_SMALL, MAX_BEHIND, MAX_SMALL_POINTS = 36, 24, 120
"""The most small figures of the losses over the steps, of curves behind each, and of points of a curve."""
MAX_TITLE = 42
"""The most characters in a line of the title of a small figure."""
MAX_LABEL = 60
"""The most characters of the label of a group."""

COSTS = {
    "total": ("total_params", "Loss by total parameters", "total parameters"),
    "active": ("active_params", "Loss by active parameters", "active parameters per token"),
    "wall": ("wall_s", "Loss by wall-clock time", "seconds"),
}
"""Figure -> column, title, and x axis."""
COLUMNS = {
    "num_experts": ("experts", "d"),
    "top_k": ("top-k", "d"),
    "total_params": ("total", ",d"),
    "active_params": ("active", ",d"),
    "eval/loss": ("loss", ".4f"),
    "router/max_vio": ("MaxVio", ".3f"),
    "speed/tokens_per_s": ("tokens/s", ",.0f"),
    "wall_s": ("seconds", ",.1f"),
    "step": ("step", "d"),
    "status": ("status", ""),
}
"""Columns of the table besides the swept keys: header and format."""


@dataclass(frozen=True)
class Jobs:
    """The results of several runs."""

    directory: Path
    """Where the report belongs: links to the reports of the runs are relative to it."""
    names: list[str]
    runs: list[Path]
    results: list[dict[str, Any]]
    """As `training.report.sweep.result_rows` returns them."""
    keys: list[str]
    """The configuration keys in which the runs differ, besides the number of experts and top-k."""
    rows: list[list[Row]]
    """The rows of `metrics.jsonl` of each run."""
    notes: list[str]


def has_jobs(directory: Path) -> bool:
    """Return whether `directory` has jobs of a sweep and is no run itself."""
    return directory.is_dir() and not is_run(directory) and bool(sweep_jobs(directory))


def read_sweep(directory: Path) -> Jobs:
    """Read the jobs of a sweep, also of one that has not ended."""
    runs = sweep_jobs(directory)
    jobs = _read(directory, [run.name for run in runs], runs)
    try:
        total = SweepRecord.read(directory).total
    except OSError:
        total = None
    if isinstance(total, int) and total > len(runs):
        jobs.notes.append(f"{total - len(runs)} of {total} jobs of the sweep have not begun.")
    return jobs


def read_runs(runs: Sequence[Path], directory: Path) -> Jobs:
    """Read several runs to compare them.

    Args:
        directory: where the report will be.

    Raises:
        ConfigError: one of them is not a run.
    """
    for run in runs:
        expect(is_run(run), "runs", run, "directories of runs")
    return _read(directory, [str(run) for run in runs], list(runs))


def _read(directory: Path, names: list[str], runs: list[Path]) -> Jobs:
    results, keys = result_rows(runs)
    rows = [read_rows(run / METRICS_FILE, []) for run in runs]
    unfinished = sum(result["status"] != "finished" for result in results)
    notes = [f"{unfinished} of {len(runs)} runs are not finished."] if unfinished else []
    return Jobs(directory, names, runs, results, keys, rows, notes)


# ---------------------------------------------------------------------------------------------------------------- table


def table(jobs: Jobs) -> tuple[list[str], list[list[dict[str, Any]]]]:
    """Return the headers, and for each run its cells: `text`, a number `sort` if there is one, and a `link`."""
    body: list[list[dict[str, Any]]] = []
    for name, run, result in zip(jobs.names, jobs.runs, jobs.results, strict=True):
        cells: list[dict[str, Any]] = [
            {"text": name, "sort": int(name) if name.isdecimal() else None, "link": _link(run, jobs.directory)}
        ]
        cells += [_cell(result[key], "") for key in jobs.keys]
        cells += [_cell(result[key], form) for key, (_, form) in COLUMNS.items()]
        if result["error"]:
            cells[-1]["text"] += f": {shorten(str(result['error']).strip().partition(chr(10))[0], 160)}"
        body.append(cells)
    return ["run", *jobs.keys, *(header for header, _ in COLUMNS.values())], body


def _cell(value: Any, form: str) -> dict[str, Any]:
    number = value if is_number(value) and not isinstance(value, bool) else None
    if number is None or not form or (form.endswith("d") and not isinstance(value, int)):
        return {"text": "-" if value is None and form else show_value(value), "sort": number, "link": None}
    return {"text": format(value, form), "sort": number, "link": None}


def _link(run: Path, directory: Path) -> str | None:
    """Return the address of the report of a run that is below `directory`, relative to it."""
    page = run / "report.html"
    inside = page.is_file() and page.resolve().is_relative_to(directory.resolve())
    return page.resolve().relative_to(directory.resolve()).as_posix() if inside else None


# -------------------------------------------------------------------------------------------------------------- figures


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed."""

    label: str
    """The swept keys."""
    name: str
    """Experts and top-k."""
    line: str
    """What the points of one line have in common."""
    members: list[int]
    """Indices of the runs."""
    finished: bool


def groups(jobs: Jobs, members: Iterable[int]) -> list[Group]:
    """Return the groups of some of the runs.

    Args:
        members: the indices of the runs.
    """
    swept = [key for key in jobs.keys if key != SEED]
    found: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index in members:
        found[tuple(show_value(jobs.results[index][key]) for key in ("num_experts", "top_k", *swept))].append(index)
    all_groups = []
    for (experts, top_k, *others), indices in found.items():
        dense, pairs = experts == "null", _pairs(swept, others)
        label = shorten(", ".join([_shape(experts, top_k), *pairs]), MAX_LABEL)
        line = shorten(", ".join(["dense" if dense else f"top-{top_k}", *pairs]), MAX_LABEL)
        finished = all(jobs.results[index]["status"] == "finished" for index in indices)
        all_groups.append(Group(label, "dense" if dense else f"{experts}x{top_k}", line, indices, finished))
    return all_groups


def _shape(experts: str, top_k: str) -> str:
    return "dense" if experts == "null" else f"{experts} experts, top-{top_k}"


def _pairs(keys: Sequence[str], values: Sequence[str]) -> list[str]:
    return [f"{key.rpartition('.')[2]}={value}" for key, value in zip(keys, values, strict=True)]


def job_figures(jobs: Jobs) -> dict[str, Figure]:
    """Return identifier -> figure: the losses against their costs, and those of each run over the steps."""
    found = groups(jobs, [i for i, result in enumerate(jobs.results) if is_number(result["eval/loss"])])
    costs = {
        f"cost-{name}": figure
        for name, (column, title, axis) in COSTS.items()
        if (figure := _cost(jobs, found, column, title, axis)) is not None
    }
    return costs | _small_multiples(jobs)


def _cost(jobs: Jobs, found: Sequence[Group], column: str, title: str, axis: str) -> Figure | None:
    """The mean loss of each group against one of its columns."""
    lines: dict[str, list[tuple[float, Group]]] = defaultdict(list)
    for group in found:
        costs = [jobs.results[member][column] for member in group.members]
        if all(map(is_number, costs)):
            lines[group.line].append((fmean(costs), group))
    if not lines:
        return None
    joined = len(lines) <= MAX_LINES
    traces: list[dict[str, Any]] = []
    for number, (line, points) in enumerate(sorted(lines.items())):
        points.sort(key=lambda point: point[0])
        losses = [[jobs.results[member]["eval/loss"] for member in group.members] for _, group in points]
        trace = {
            "type": "scatter",
            "name": escape(line, quote=False),
            "x": [rounded(cost) for cost, _ in points],
            "y": [rounded(fmean(values)) for values in losses],
            "customdata": [escape(_hover(jobs, group), quote=False) for _, group in points],
            "hovertemplate": f"%{{customdata}}<br>{axis} %{{x}}<br>loss %{{y}}<extra></extra>",
            "mode": "lines+markers+text" if joined else "markers",
            "text": [group.name for _, group in points],
            "textposition": "top right",
            "textfont": {"size": 9},
            "line": {"color": COLOURS[number % len(COLOURS)], "width": 1.5},
            "marker": {"size": 8, "symbol": ["circle" if group.finished else "circle-open" for _, group in points]},
            "showlegend": joined,
        }
        if any(len(values) > 1 for values in losses):
            spread = [rounded(stdev(values)) if len(values) > 1 else 0 for values in losses]
            trace["error_y"] = {"type": "data", "array": spread, "thickness": 1, "width": 4}
        traces.append(trace)
    layout = figure_layout(f"{title} (nats per token)", x=axis, y="held-out loss", height=360)
    values = [value for trace in traces for value in trace["x"]]
    if min(values) > 0 and max(values) > 4 * min(values):
        layout["xaxis"] |= {"type": "log", "dtick": "D2"}
    return {"data": traces, "layout": layout}


def _hover(jobs: Jobs, group: Group) -> str:
    many = len(group.members) > 1
    names = ", ".join(jobs.names[member] for member in group.members[:8])
    return f"{group.label} ({f'mean of {len(group.members)} runs' if many else 'run'} {names})"


def _small_multiples(jobs: Jobs) -> dict[str, Figure]:
    """One small figure a group: its losses over the steps, in front of those of other groups, with the same axes."""
    curves = {}
    for index, rows in enumerate(jobs.rows):
        steps, values = series(rows, "train/ce")
        if steps:
            curves[index] = reduced(steps, values, MAX_SMALL_POINTS)
    figures: dict[str, Figure] = {}
    if not curves:
        return figures
    found = groups(jobs, curves)
    everything = [value for _, values in curves.values() for value in values]
    first_of_each = [group.members[0] for group in found]
    others = [first_of_each[index] for index in thinned(len(found), MAX_BEHIND)]
    for number, group in enumerate(found[:MAX_SMALL]):
        behind = [_loss(jobs, curves, index, GREY) for index in others if index not in group.members]
        front = [_loss(jobs, curves, index, COLOURS[0]) for index in group.members]
        layout = figure_layout(group.label, x="optimizer step", height=200)
        lines = wrap(group.label, MAX_TITLE, break_on_hyphens=False)
        layout["title"]["text"] = "<br>".join(escape(line, quote=False) for line in lines)
        layout["margin"] |= {"t": 30 + 16 * len(lines)}
        layout["yaxis"] |= {"range": [min(everything), max(everything)]}
        evaluated = [_evaluations(jobs, index) for index in group.members]
        figures[f"small-{number}"] = {"data": [*behind, *front, *evaluated], "layout": layout}
    return figures


def _loss(jobs: Jobs, curves: Mapping[int, tuple[list[int], list[float]]], index: int, colour: str) -> dict[str, Any]:
    steps, values = curves[index]
    behind = colour == GREY
    return {
        "type": "scatter",
        "mode": "lines",
        "name": escape(jobs.names[index], quote=False),
        "x": steps,
        "y": [rounded(value) for value in values],
        "line": {"color": colour, "width": 0.7 if behind else 1.5},
        "opacity": 0.4 if behind else 1,
        "hoverinfo": "skip" if behind else "all",
        "showlegend": False,
    }


def _evaluations(jobs: Jobs, index: int) -> dict[str, Any]:
    steps, values = series(jobs.rows[index], "eval/loss")
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "held-out text",
        "x": steps,
        "y": [rounded(value) for value in values],
        "marker": {"color": COLOURS[1], "size": 6},
        "showlegend": False,
    }
