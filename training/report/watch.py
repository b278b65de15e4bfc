"""A picture of a run in the terminal, from the lines that the run appends to `metrics.jsonl`.

Shape suffixes: L MoE layers, E experts.
"""

import itertools
import math
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from common.errors import RunError, expect
from common.files import open_binary
from common.text import parse_json
from training.owner import is_sweep, is_written
from training.report.alarms import ALARMS
from training.report.heatmap import load_lines, relative_load
from training.report.metrics import METRICS_FILE, Row, decode_row, layer_keys
from training.report.terminal import console, human_count, on_terminal, printable, show, wrapped
from training.run import finished_result, read_config

CURVES = {
    "loss": "train/loss",
    "held-out": "eval/loss",
    "balance": "router/balance_loss",
    "MaxVio": "router/max_vio",
    "dead": "router/dead",
    "dropped": "router/drop_rate",
    "grad": "optim/grad_norm",
    "lr": "optim/lr",
    "tokens/s": "speed/tokens_per_s",
}
"""Label -> metric of each curve. A metric that the run lacks has none."""
AROUND_LOAD = 4
"""The most lines of the heatmap besides its layers."""
SHOWN_ALARMS = 5
"""The newest alarms are shown."""
LEVELS, PLAIN_LEVELS = "▁▂▃▄▅▆▇█", "_.-=+*#@"


class Follower:
    """Reads the complete lines of a file that another process appends to. A torn last line is read when it is whole."""

    def __init__(self, path: Path) -> None:
        self.path, self._inode, self._position = path, 0, 0

    def new_lines(self) -> tuple[bool, list[bytes]]:
        """Return whether the file has been replaced or cut since the last call, and the lines that are new.

        After it has been replaced or cut, all its lines are new. A file that is missing has no lines.
        """
        try:
            file = open_binary(self.path)
        except FileNotFoundError:
            return False, []
        with file:
            status = os.fstat(file.fileno())
            replaced = status.st_ino != self._inode or status.st_size < self._position
            if replaced:
                self._inode, self._position = status.st_ino, 0
            file.seek(self._position)
            lines = []
            for line in file:
                if not line.endswith(b"\n"):
                    break
                lines.append(line)
                self._position += len(line)
        return replaced, lines


class Watch:
    """What a run has written so far.

    Args:
        directory: the run's directory.

    Raises:
        ConfigError: it is not the directory of a run that has begun.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.running = is_written(directory)
        """Whether a process had the run's lock when `poll` was called last."""
        hint = f"; {directory} is a sweep: name one of its jobs" if is_sweep(directory) else ""
        begun = (directory / METRICS_FILE).is_file() or self.running
        expect(begun and not hint, "run", directory, f"a run's directory with {METRICS_FILE}{hint}")
        self._metrics, self._alarms = Follower(directory / METRICS_FILE), Follower(directory / ALARMS)
        self.step = 0
        self.curves: dict[str, list[float]] = {label: [] for label in CURVES}
        self.load_LE: list[list[float]] = []
        """The shares of the last row that has them."""
        self.load_step = 0
        self.alarms: list[str] = []
        self.poll()

    def poll(self) -> bool:
        """Read what is new, and return whether anything is."""
        self.running = is_written(self.directory)  # First, so that the last rows of a run that ends now are read.
        replaced, lines = self._metrics.new_lines()
        if replaced:
            self.step, self.curves, self.load_LE = 0, {label: [] for label in CURVES}, []
        for line in lines:
            with suppress(RunError):  # A damaged line.
                self._add(decode_row(line, self._metrics.path, 0))
        replaced, alarms = self._alarms.new_lines()
        if replaced:
            self.alarms = []
        for line in alarms:
            with suppress(ValueError, KeyError, TypeError):
                alarm = parse_json(line)
                self.alarms.append(f"step {alarm['step']}: {alarm['message']}")
        return bool(lines or alarms)

    def _add(self, row: Row) -> None:
        self.step = int(row["step"])  # type: ignore[arg-type]
        for label, metric in CURVES.items():
            value = row.get(metric)
            if isinstance(value, int | float):
                self.curves[label].append(float(value))
        load_LE = [load_E for name in layer_keys([row], "router/load") if isinstance(load_E := row[name], list)]
        if load_LE:
            self.load_LE, self.load_step = load_LE, self.step

    def status(self) -> str:
        """Return in words whether the run goes on, and how it has ended."""
        if self.running:
            return "running" if self.step else "running, no step yet"
        result = finished_result(self.directory, self.step)
        if result is None:
            return "ended without a result (interrupted or killed); the same run.name resumes it"
        loss = result.get("eval/loss")
        return "finished" if loss is None else f"finished: held-out loss {loss:.4f}"


def follow(directory: Path, every: float, once: bool) -> None:
    """Show a run until it ends. Without a terminal, print a picture each time that there is something new.

    Args:
        every: seconds between readings of the files.
        once: print one picture and return.

    Raises:
        ConfigError: `directory` is not that of a run.
    """
    watch = Watch(directory)
    if once or not on_terminal():
        show(picture(watch))
        while watch.running and not once:
            time.sleep(every)
            if watch.poll() or not watch.running:
                show(picture(watch))
        return
    target = console()
    with Live(picture(watch, target.height - 1), console=target, auto_refresh=False) as live:
        while watch.running:
            time.sleep(every)
            watch.poll()
            live.update(picture(watch, target.height - 1), refresh=True)


def picture(watch: Watch, height: int | None = None) -> Group:
    """Return the curves, the load of every expert, and the newest alarms.

    Args:
        height: the most lines; of many layers, those with the least balanced load are shown. None: all layers.
    """
    total = read_config(watch.directory).get("train.steps")
    steps = f"step {watch.step}" if total is None else f"step {watch.step}/{total}"
    lines = [Text(wrapped(printable(f"{watch.directory}  {steps}  {watch.status()}")), style="bold")]
    curves = {label: values for label, values in watch.curves.items() if values}
    alarms = [Text(wrapped(printable(line)), style="yellow") for line in watch.alarms[-SHOWN_ALARMS:]]
    if watch.alarms:
        alarms.insert(0, Text(f"Alarms: {len(watch.alarms)}", style="bold"))
    load: list[Text] = []
    if watch.load_LE:
        used = sum(len(line.plain.split("\n")) for line in (*lines, *alarms)) + len(curves) + AROUND_LOAD
        rows = len(watch.load_LE) if height is None else max(1, height - used)
        load = [Text(f"Load of the experts at step {watch.load_step}, 1.00 = balance", style="bold")]
        load += load_lines(relative_load(watch.load_LE), rows)
    return Group(*lines, _curve_table(curves), *load, *alarms)


def _curve_table(curves: dict[str, list[float]]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    target = console()
    width = min(60, (target.width if target.is_terminal else 80) - 44)
    for justify in ("left", "left", "right", "left"):
        table.add_column(justify=justify, no_wrap=True)
    for label, values in curves.items():
        finite = [value for value in values if math.isfinite(value)]
        span = f"{_short(min(finite))} to {_short(max(finite))}" if finite else ""
        table.add_row(label, sparkline(values, max(8, width)), _short(values[-1]), Text(span, style="dim"))
    return table


def _short(value: float) -> str:
    return human_count(value) if abs(value) >= 1000 else f"{value:.4g}"


def sparkline(values: Sequence[float], width: int) -> str:
    """Return at most `width` characters whose heights are the means of equally many neighbouring values.

    >>> sparkline([1, 2, 3, 4], 2), sparkline([0.0, float("nan"), 7.0], 8)
    ('▁█', '▁ █')
    """
    count = min(width, len(values))
    edges = [len(values) * index // count for index in range(count + 1)] if count else [0]
    parts = [values[start:stop] for start, stop in itertools.pairwise(edges)]
    means = [sum(part) / len(part) for part in parts]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    utf = (console().encoding or "").lower().startswith("utf")
    levels = LEVELS if utf else PLAIN_LEVELS
    scale = (len(levels) - 1) / (high - low) if high > low else 0.0
    return "".join(levels[round((mean - low) * scale)] if math.isfinite(mean) else " " for mean in means)
