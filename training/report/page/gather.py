"""What the files of a run contain, as far as they can be read. Nothing here writes.

Shape suffixes: L MoE layers, E experts, F frames (logged steps that the page shows).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import expect
from common.text import one_line, shorten, show_ranges
from training.report.alarms import ALARMS, Alarm, read_alarms
from training.report.heatmap import relative_load
from training.report.metrics import METRICS_FILE, Row, layer_keys, read_metrics
from training.report.plots import is_number, thinned
from training.run import CONFIG_FILE, RESULT_FILE, read_config, read_result

RUN_FILES = (METRICS_FILE, RESULT_FILE, CONFIG_FILE)
"""A directory with one of these files is a run's."""
MAX_CELLS = 600_000
"""The most cells of experts, layers and frames together that a page has."""
MAX_FRAMES = 240
"""The most steps that the slider can stop at."""
MAX_REASON = 300
"""The most characters of the reason why a run has ended early."""
MAX_ALARMS = 200
"""The most alarms that a page shows."""


@dataclass(frozen=True)
class Frames:
    """A quantity of every expert at some steps."""

    steps: list[int]
    values_FLE: list[list[list[float]]]


@dataclass(frozen=True)
class RunData:
    """The files of one run."""

    directory: Path
    name: str
    config: dict[str, Any]
    """`config.yaml` by dotted key, or empty."""
    result: dict[str, Any]
    """As `training.run.read_result` returns it."""
    rows: list[Row]
    """The rows of `metrics.jsonl`, sorted, one a step."""
    alarms: list[Alarm]
    notes: list[str]
    """What the run lacks, a sentence each."""

    @property
    def status(self) -> str:
        """`finished`, another status of `result.json`, or `not finished` without a readable one of the last step."""
        status = str(self.result.get("status"))
        return "not finished" if status in ("None", "missing", "unreadable") or self.continued else status

    @property
    def continued(self) -> bool:
        """Whether the run has done steps after the one of `result.json`, which an earlier launch has written then."""
        step = self.result.get("step")
        return bool(self.rows) and isinstance(step, int) and int(self.rows[-1]["step"]) > step  # type: ignore[arg-type]


def is_run(directory: Path) -> bool:
    """Return whether `directory` has the files of a run."""
    return any((directory / file).is_file() for file in RUN_FILES)


def read_run(directory: Path, key: str = "run", reason: str | None = None) -> RunData:
    """Read the files of a run. Files that are missing or damaged become notes.

    Args:
        key: the key that named the directory, for the message.
        reason: a sentence about why the run has no result; None: unknown.

    Raises:
        ConfigError: `directory` is not a run's.
    """
    expect(is_run(directory), key, directory, f"a run's directory, with {METRICS_FILE} or {RESULT_FILE}, or a sweep's")
    notes: list[str] = []
    config, result = read_config(directory), read_result(directory)
    if not config:
        notes.append(f"{CONFIG_FILE} is missing or cannot be read: the configuration is unknown.")
    rows = read_rows(directory / METRICS_FILE, notes)
    alarms = _alarms(directory, notes)
    name = result.get("name") or config.get("run.name") or directory.resolve().name
    data = RunData(directory, str(name), config, result, rows, alarms, notes)
    why = shorten(one_line(reason or "The run has not ended, or was killed."), MAX_REASON)
    if result.get("status") in ("missing", "unreadable"):
        notes.insert(0, f"{why} There is no readable {RESULT_FILE}: the last evaluation and the sample are missing.")
    elif data.continued:
        notes.insert(0, f"{why} {RESULT_FILE} is that of step {result['step']}.")
    elif result.get("error"):
        notes.insert(0, shorten(one_line(f"The run has failed: {result['error']}"), MAX_REASON))
    return data


def read_rows(path: Path, notes: list[str]) -> list[Row]:
    """Return the rows of a `metrics.jsonl`, sorted, one a step.

    Args:
        notes: receives a sentence about what is missing.
    """
    damaged: list[int] = []
    try:
        rows = read_metrics(path, damaged)
    except OSError as error:
        notes.append(f"{METRICS_FILE} cannot be read ({error.strerror}): there are no curves.")
        return []
    if damaged:
        notes.append(f"Damaged lines of {METRICS_FILE} are left out: {shorten(show_ranges(damaged), 80)}.")
    if not rows:
        notes.append(f"{METRICS_FILE} has no row: there are no curves.")
    by_step = {int(row["step"]): row for row in rows}  # type: ignore[arg-type]
    return [by_step[step] for step in sorted(by_step)]


def _alarms(directory: Path, notes: list[str]) -> list[Alarm]:
    """Return the first `MAX_ALARMS` alarms."""
    try:
        alarms = read_alarms(directory)
    except OSError as error:
        notes.append(f"{ALARMS} cannot be read ({error.strerror}).")
        return []
    if len(alarms) > MAX_ALARMS:
        notes.append(f"Only the first {MAX_ALARMS} of {len(alarms)} alarms are shown.")
    return alarms[:MAX_ALARMS]


def series(rows: Sequence[Row], key: str) -> tuple[list[int], list[float]]:
    """Return the steps and the values of the rows in which a metric is a finite number."""
    points = [(row["step"], row[key]) for row in rows if key in row and _is_finite(row[key])]
    return [int(step) for step, _ in points], [float(value) for _, value in points]  # type: ignore[arg-type]


def _is_finite(value: Any) -> bool:
    return not isinstance(value, bool) and is_number(value)


def expert_frames(rows: Sequence[Row], prefix: str) -> Frames | None:
    """Return a metric that has a list of one number per expert for each layer (`<prefix>/layer_XX`).

    Rows in which a layer is missing, or has another number of experts, are left out, and of many rows some.

    Returns:
        None if no row is complete.
    """
    keys = layer_keys(rows, prefix)
    shapes = [_shape(row, keys) for row in rows] if keys else []
    sizes = [size for size in shapes if size]
    if not sizes:
        return None
    experts = max(set(sizes), key=sizes.count)
    complete = [row for row, size in zip(rows, shapes, strict=True) if size == experts]
    most = max(2, min(MAX_FRAMES, MAX_CELLS // (experts * len(keys))))
    chosen = [complete[index] for index in thinned(len(complete), most)]
    return Frames([int(row["step"]) for row in chosen], [[row[key] for key in keys] for row in chosen])  # type: ignore[arg-type, misc]


def _shape(row: Row, keys: Sequence[str]) -> int | None:
    """Return the number of experts of every layer in the row, or None if they differ or one has something else."""
    sizes = set()
    for key in keys:
        value = row.get(key)
        if not isinstance(value, list) or not all(map(_is_finite, value)):
            return None
        sizes.add(len(value))
    return sizes.pop() if len(sizes) == 1 else None


def load_frames(rows: Sequence[Row]) -> Frames | None:
    """Return the relative load of every expert: 1 is balance, 0 an expert without a token."""
    shares = expert_frames(rows, "router/load")
    return None if shares is None else Frames(shares.steps, [relative_load(load_LE) for load_LE in shares.values_FLE])
