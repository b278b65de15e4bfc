"""The results of a sweep: a table, a CSV file and a plot, made from the `result.json` of each job."""

import csv
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.files import read_file, write_atomically
from common.text import MAX_JSON, parse_json, shorten, show_value
from parallel.planning.auto import AUTO_AXES
from training.owner import SWEEP_RECORD
from training.report.plots import is_number, plot_sweep
from training.report.terminal import human_count, show_line, show_table
from training.run import read_config, read_result

_RESULT_KEYS = (
    "num_experts",
    "top_k",
    "total_params",
    "active_params",
    "eval/loss",
    "router/max_vio",
    "speed/tokens_per_s",
    "wall_s",
    "step",
    "status",
    "error",
)
"""The columns of the table that come from `result.json`."""
_MODEL_KEYS = ("model.num_experts", "model.top_k")
"""Configuration keys whose columns are among those of `result.json`, where they have no `model.` before them."""
_PER_JOB = ("run.name", "run.root", "model.vocab_size")
"""Configuration keys that are not swept although jobs differ in them. The vocabulary size is null in the configuration
of a job that failed before it read its tokenizer."""
_CHOSEN = {f"parallel.{axis}": "auto" for axis in AUTO_AXES} | dict.fromkeys(
    ("optim.schedule_start", "optim.schedule_steps")
)
"""Configuration keys -> the value that a run replaces by a number. A job that failed early still has the value."""
MAX_JOBS = 100_000
"""Directories with larger numbers are not jobs of the sweep."""
_MAX_ERROR = 160
"""The most characters of an error message that are printed."""


@dataclass
class SweepRecord:
    """What `sweep.jsonl` has."""

    launch: list[str] = field(default_factory=list)
    """The arguments of the last launch."""
    total: int | None = None
    """The number of jobs of the last launch; None: unknown."""
    jobs: dict[int, list[str]] = field(default_factory=dict)
    """Number of a job -> its arguments."""

    @classmethod
    def read(cls, sweep_dir: Path) -> "SweepRecord":
        """Read the file. Lines that are damaged are left out.

        Raises:
            UnusableFile: it is not a regular file, or is too large.
        """
        record, file = cls(), sweep_dir / SWEEP_RECORD
        for line in read_file(file, MAX_JSON).splitlines() if os.path.lexists(file) else ():
            try:
                entry = parse_json(line)
                arguments = [str(argument) for argument in entry["arguments"]]
                if "job" in entry:
                    record.jobs.setdefault(int(entry["job"]), arguments)
                else:
                    record.launch, record.total = arguments, entry["jobs"]
            except (ValueError, KeyError, TypeError):
                continue
        return record


def sweep_table(sweep_dir: Path) -> list[dict[str, Any]]:
    """Print the table of a sweep, and write `sweep.csv`, `sweep.svg` and `sweep.png` into `sweep_dir`.

    Returns:
        The rows of `sweep_rows`, with the columns of the CSV file.
    """
    rows, varying = sweep_rows(sweep_dir)
    write_sweep(sweep_dir, rows, varying)
    plot_sweep(rows, sweep_dir / "sweep")
    _print(sweep_dir, rows, varying)
    return rows


def write_sweep(sweep_dir: Path, rows: Sequence[Mapping[str, Any]], varying: Sequence[str]) -> None:
    """Write `sweep.csv` atomically. Jobs that run at the same time can call this at the same time."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ["job", *varying, *_RESULT_KEYS], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    # An error message in a job's `result.json` can have characters that UTF-8 cannot represent.
    write_atomically(sweep_dir / "sweep.csv", text.getvalue().encode(errors="backslashreplace"))


def best_line(rows: Sequence[Mapping[str, Any]], varying: Sequence[str]) -> str | None:
    """Return a line about the finished job with the lowest held-out loss and its parameters, or None if there is none.

    >>> job = {"job": 0, "status": "finished", "eval/loss": 3.5, "num_experts": 4, "top_k": 2, "optim.lr": 0.1}
    >>> best_line([job, job | {"job": 1, "eval/loss": 2.5, "num_experts": 8}], ["optim.lr"])
    'best: job 1, held-out loss 2.5000: optim.lr=0.1 num_experts=8'
    """
    finished = [row for row in rows if row["status"] == "finished" and is_number(row["eval/loss"])]
    if not finished:
        return None
    best = min(finished, key=lambda row: row["eval/loss"])
    # The number of experts and top-k are columns of every sweep. They are named if they differ.
    keys = [*varying, *(key for key in ("num_experts", "top_k") if len({row[key] for row in rows}) > 1)]
    parameters = " ".join(f"{key}={show_value(best[key])}" for key in keys)
    return f"best: job {best['job']}, held-out loss {best['eval/loss']:.4f}{': ' * bool(keys)}{parameters}"


def sweep_jobs(sweep_dir: Path) -> list[Path]:
    """Return the directories of the jobs of a sweep: the subdirectories whose name is a number.

    A number that is missing in between counts as a job, too, so a returned directory can be missing.

    Raises:
        OSError: `sweep_dir` cannot be read.
    """
    numbers = [int(path.name) for path in sweep_dir.iterdir() if path.is_dir() and path.name.isdecimal()]
    return [
        sweep_dir / str(job) for job in range(max((number for number in numbers if number < MAX_JOBS), default=-1) + 1)
    ]


def sweep_rows(sweep_dir: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return one row for each job of a sweep, and the configuration keys whose values differ between its jobs."""
    jobs = sweep_jobs(sweep_dir)
    rows, varying = result_rows(jobs)
    return [{"job": number} | row for number, row in enumerate(rows)], varying


def result_rows(runs: Sequence[Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the results of several runs as the rows of a table.

    A run without a `result.json` has the status `missing`, and one whose `result.json` is no JSON object has the status
    `unreadable`. Each configuration key whose value differs between the runs has a column, under its dotted name.

    Args:
        runs: the directories of the runs.

    Returns:
        For each run a dict with a value for each column, which is None if the run does not have it; and the keys that
        differ, sorted.
    """
    configs = [read_config(run) for run in runs]
    varying = _varying(configs)
    rows: list[dict[str, Any]] = []
    for run, config in zip(runs, configs, strict=True):
        result = read_result(run)
        row = {key: config.get(key) for key in varying} | {key: result.get(key) for key in _RESULT_KEYS}
        for key in _MODEL_KEYS:
            # If the job failed before it built a model, the configuration has the values that it would have used.
            name = key.removeprefix("model.")
            row[name] = config.get(key) if row[name] is None else row[name]
        rows.append(row)
    return rows, varying


def _varying(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys, sorted, whose values differ between the jobs that have a configuration."""
    readable = [config for config in configs if config]
    keys = sorted({key for config in readable for key in config} - {*_MODEL_KEYS, *_PER_JOB})
    values = {key: {repr(config.get(key)) for config in readable} for key in keys}
    for key, unset in _CHOSEN.items():
        values.get(key, set()).discard(repr(unset))
    return [key for key in keys if len(values[key]) > 1]


def _print(sweep_dir: Path, rows: Sequence[Mapping[str, Any]], varying: Sequence[str]) -> None:
    table = [
        [
            str(row["job"]),
            *(_cell(row[key]) for key in varying),
            *_experts(row),
            _number(row["total_params"], human_count),
            _number(row["active_params"], human_count),
            _number(row["eval/loss"], "{:.4f}".format),
            _number(row["router/max_vio"], "{:.3f}".format),
            _number(row["speed/tokens_per_s"], human_count),
            str(row["status"]),
        ]
        for row in rows
    ]
    columns = ["job", *varying, "experts", "top-k", "total", "active", "loss", "MaxVio", "tokens/s", "status"]
    finished = sum(row["status"] == "finished" for row in rows)
    show_table(
        f"Sweep: {finished} of {len(rows)} jobs finished (loss: held-out text, nats per token; MaxVio: 0 = balanced)",
        columns,
        table,
        left=["status"],
    )
    if best := best_line(rows, varying):
        show_line(best, style="bold")
    for row in rows:
        if row["error"]:
            first = str(row["error"]).strip().split("\n")[0]
            show_line(f"job {row['job']} {row['status']}: {shorten(first, _MAX_ERROR)}")
    show_line(f"{sweep_dir / 'sweep.csv'}, sweep.svg, sweep.png")


def _cell(value: Any) -> str:
    """Return the value of a configuration key as text, a number with at most four digits."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _experts(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return the cells `experts` and `top-k`."""
    if row["num_experts"] is not None:
        return str(row["num_experts"]), str(row["top_k"])
    return ("dense", "-") if row["total_params"] is not None else ("-", "-")


def _number(value: Any, text: Callable[[float], str]) -> str:
    """Return `text(value)` if the value is a finite number, `-` if it is None, and else the value itself as text."""
    if value is None:
        return "-"
    return text(value) if is_number(value) else shorten(str(value), _MAX_ERROR)
