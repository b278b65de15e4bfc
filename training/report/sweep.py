"""What a sweep found: every job's `result.json` as one table, one CSV and one plot in the sweep directory."""

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from parallel.planning.auto import AUTO_AXES
from training.report.plots import plot_sweep
from training.report.terminal import human_count, show_line, show_table

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
_OWN_COLUMNS = ("model.num_experts", "model.top_k")
_PER_JOB = ("run.name", "run.root", "model.vocab_size")
"""Keys that differ between jobs although nobody swept them (a job that failed early never learnt its vocabulary)."""
_CHOSEN = tuple(f"parallel.{axis}" for axis in AUTO_AXES)
"""Keys whose `auto` becomes a number in a run; a job that failed early still has `auto`, and nobody swept it."""
_MAX_ERROR = 160


def sweep_table(sweep_dir: Path) -> list[dict[str, Any]]:
    """Print the table of a sweep and write `sweep.csv`, `sweep.svg` and `sweep.png` into `sweep_dir`.

    Jobs are the subdirectories named by a number; a gap in the numbers is a job too. A job without a readable
    `result.json` has the status `missing` or `unreadable`. A config key that was not the same in every job becomes a
    column, under its dotted name.

    Returns:
        A dict per job with the columns of the CSV; values that a job does not have are None.
    """
    numbers = [int(path.name) for path in sweep_dir.iterdir() if path.is_dir() and path.name.isdecimal()]
    jobs = range(max(numbers) + 1) if numbers else range(0)
    configs = [_config(sweep_dir / str(job)) for job in jobs]
    varying = _varying(configs)
    rows: list[dict[str, Any]] = []
    for job, config in zip(jobs, configs, strict=True):
        result = _result(sweep_dir / str(job))
        row: dict[str, Any] = {"job": job} | {key: config.get(key) for key in varying}
        row |= {key: result.get(key) for key in _RESULT_KEYS}
        for key in _OWN_COLUMNS:
            # A job that failed before it had a model still says in its config what was asked for.
            name = key.removeprefix("model.")
            row[name] = config.get(key) if row[name] is None else row[name]
        rows.append(row)
    _write_csv(sweep_dir / "sweep.csv", ["job", *varying, *_RESULT_KEYS], rows)
    plot_sweep(rows, sweep_dir / "sweep")
    _print(sweep_dir, rows, varying)
    return rows


def _result(job_dir: Path) -> dict[str, Any]:
    path = job_dir / "result.json"
    if not path.is_file():
        return {"status": "missing", "error": f"no {path.name}"}
    try:
        result = json.loads(path.read_text())
    except ValueError as error:
        return {"status": "unreadable", "error": f"{path.name}: {error}"}
    return result if isinstance(result, dict) else {"status": "unreadable", "error": f"{path.name}: no JSON object"}


def _config(job_dir: Path) -> dict[str, Any]:
    """The job's resolved config by dotted name; empty where it is missing or broken."""
    import yaml

    try:
        config = yaml.safe_load((job_dir / "config.yaml").read_text())
    except (OSError, yaml.YAMLError):
        return {}
    return dict(_flat(config, "")) if isinstance(config, dict) else {}


def _flat(section: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    items: list[tuple[str, Any]] = []
    for key, value in section.items():
        items += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return items


def _varying(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys, sorted, whose value is not the same in all configs that exist."""
    known = [config for config in configs if config]
    keys = sorted({key for config in known for key in config} - {*_OWN_COLUMNS, *_PER_JOB})
    found = {key: {repr(config.get(key)) for config in known} for key in keys}
    for key in _CHOSEN:
        found.get(key, set()).discard(repr("auto"))
    return [key for key in keys if len(found[key]) > 1]


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _print(sweep_dir: Path, rows: Sequence[Mapping[str, Any]], varying: Sequence[str]) -> None:
    table = [
        [
            str(row["job"]),
            *("" if row[key] is None else str(row[key]) for key in varying),
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
        f"Sweep: {finished} of {len(rows)} jobs finished (loss: held-out text, nats per token)",
        columns,
        table,
        left=["status"],
    )
    for row in rows:
        if row["error"]:
            show_line(f"job {row['job']} {row['status']}: {_first_line(row['error'])}")
    show_line(f"{sweep_dir / 'sweep.csv'}, sweep.svg, sweep.png")


def _experts(row: Mapping[str, Any]) -> tuple[str, str]:
    if row["num_experts"] is not None:
        return str(row["num_experts"]), str(row["top_k"])
    return ("dense", "-") if row["total_params"] is not None else ("-", "-")


def _number(value: Any, text: Callable[[float], str]) -> str:
    if value is None:
        return "-"
    return text(value) if isinstance(value, (int, float)) and math.isfinite(value) else str(value)


def _first_line(error: Any) -> str:
    line = str(error).strip().split("\n")[0]
    return line if len(line) <= _MAX_ERROR else line[: _MAX_ERROR - 3] + "..."
