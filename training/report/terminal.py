"""Output on stdout: lines, tables, numbers in a readable form, and the progress of the training loop.

On a terminal, the package `rich` draws. Elsewhere (a pipe, a file, a CI log), the same content is printed as aligned
plain lines without escape codes, which are never cut or wrapped. Only rank 0 prints.
"""

import math
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self, TextIO

from rich import box, progress
from rich.cells import cell_len
from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from common.text import escaped

PLAIN_WIDTH = 100_000
"""The width given to rich for plain output: more than any line needs, so that rich cuts and wraps nothing."""
LEGEND_WIDTH = 120
"""The legend breaks into lines of at most this many columns, and of the terminal's width if that is less."""
WORDS = re.compile(r"\S+(?:(?<=\d)\s(?=[^\W\d])\S+)?")
"""The parts of a cell that are not broken: words, and a number with its unit."""
FIRST_STEPS = 2
"""The first steps of a process do not count for the estimated time to the end (ETA): blocks are compiled in them, and
trackers start."""
PACE_STEPS = 500
"""The ETA uses the mean time of up to this many steps, with evaluations and checkpoints; after more, older steps count
exponentially less."""
HISTORY_LINES = 20
"""Above the progress bar, so many lines with the metrics stay on the terminal in a whole run, besides evaluations."""


def _stdout() -> TextIO:
    """Return the stream behind `sys.stdout`.

    While a progress bar is shown, `sys.stdout` is a proxy of rich's, whose `isatty` returns False.
    """
    stream: TextIO = getattr(sys.stdout, "rich_proxied_file", sys.stdout)
    return stream


def on_terminal() -> bool:
    """Return whether stdout is a terminal that can move its cursor."""
    return _stdout().isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def console() -> Console:
    """Return a rich console on the current stdout.

    If stdout is not a terminal, environment variables such as `FORCE_COLOR` have no effect: a log file gets no escape
    codes.
    """
    terminal = on_terminal()
    return Console(
        file=_stdout(),
        force_terminal=terminal,
        color_system="auto" if terminal else None,
        width=None if terminal else PLAIN_WIDTH,
        highlight=False,
        markup=False,
        emoji=False,
    )


def printable(text: str) -> str:
    """Return `text` with control characters, and characters that stdout cannot encode, as backslash escapes.

    Newlines and tabs stay. The text can come from a model, which can generate escape sequences that change the settings
    of a terminal.
    """
    encoding = _stdout().encoding or "utf-8"
    return escaped(text).encode(encoding, errors="backslashreplace").decode(encoding)


def show(renderable: RenderableType) -> None:
    """Print a rich renderable. Plain output gets no spaces at the ends of lines, which rich's tables would leave."""
    target = console()
    with target.capture() as captured:
        target.print(renderable, soft_wrap=isinstance(renderable, Text))
    text = captured.get()
    if not target.is_terminal:
        text = "".join(line.rstrip() + "\n" for line in text.splitlines())
    # sys.stdout, and not the console's file: while a progress bar is shown, it is rich's proxy, which prints above the
    # bar.
    sys.stdout.write(text)
    sys.stdout.flush()


def wrapped(text: str, indent: str = "") -> str:
    """Return `text` with line breaks between words, so that it fits into the width of the terminal.

    Plain output is not wrapped. A word that is longer than a line stays whole.

    Args:
        indent: what the lines after a break begin with.
    """
    if not on_terminal():
        return text
    fill = textwrap.TextWrapper(
        console().width,
        subsequent_indent=indent,
        expand_tabs=False,
        replace_whitespace=False,
        break_long_words=False,
        break_on_hyphens=False,
    ).fill
    return "\n".join(map(fill, text.split("\n")))


def show_line(text: str = "", style: str = "") -> None:
    """Print `text` without interpreting markup. A terminal breaks it between words."""
    _show_unwrapped(wrapped(printable(text)), style)


def _show_unwrapped(text: str, style: str = "") -> None:
    """Print `text`, which the terminal itself wraps, so that a command which is copied from it stays one line."""
    show(Text(text, style=style))


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ()) -> None:
    """Print an empty line, `title` and a table.

    On a terminal, cells break between words. If the words of all columns do not fit side by side, the table is printed
    in several parts, each with the first column.

    Args:
        title: the line above the table.
        columns: the names of the columns.
        rows: the cells of each row, as text.
        left: the names of the columns that are left-aligned, besides the first. The others are right-aligned.
    """
    drawn = on_terminal()
    cells = [[printable(cell) for cell in row] for row in rows]
    words = [[word for row in (columns, *cells) for word in WORDS.findall(row[index])] for index in range(len(columns))]
    narrowest = [max(map(cell_len, texts), default=0) for texts in words]
    widest = [max(cell_len(row[index]) for row in (columns, *cells)) for index in range(len(columns))]
    show_line()
    show_line(title, style="bold")
    for number, part in enumerate(_parts(narrowest, console().width)):
        if number:
            show_line()
        table = Table(
            box=box.SIMPLE_HEAD if drawn else None,
            show_edge=False,
            pad_edge=False,
            padding=(0, 1 if drawn else 2, 0, 0),
        )
        free = console().width - _width_of([narrowest[index] for index in part])
        for index in part:
            width = min(widest[index], narrowest[index] + max(0, free))
            free -= width - narrowest[index]
            table.add_column(
                Text(columns[index]),
                justify="left" if index == 0 or columns[index] in left else "right",
                overflow="fold",
                width=width if drawn else None,
            )
        for row in cells:
            table.add_row(*(Text(row[index]) for index in part))
        show(table)


def _width_of(columns: Sequence[int]) -> int:
    """Return the width of a drawn table: its columns, and two blanks between neighbours."""
    return sum(columns) + 2 * (len(columns) - 1)


def _parts(widths: Sequence[int], limit: int) -> list[list[int]]:
    """Divide the columns of a table into parts that fit into `limit` characters. Each has the first column.

    Returns:
        The indices of each part's columns.
    """
    parts = [[0]]
    for index in range(1, len(widths)):
        if len(parts[-1]) > 1 and _width_of([widths[each] for each in [*parts[-1], index]]) > limit:
            parts.append([0])
        parts[-1].append(index)
    return parts


def show_fields(title: str, fields: Mapping[str, str], commands: Collection[str] = ()) -> None:
    """Print an empty line, `title`, and one line `name  value` for each field. A terminal breaks values between words.

    Args:
        commands: the names of the fields whose values are commands, which stay one line, so that they can be copied.
    """
    show_line()
    show_line(title, style="bold")
    width = max(map(len, fields))
    for name, value in fields.items():
        line = printable(f"  {name:<{width}}  {value}")
        _show_unwrapped(line if name in commands else wrapped(line, " " * (width + 4)))


def _scaled(value: float, units: Sequence[str]) -> str:
    """Return `value` in the largest unit that fits, with three significant digits; an integer below 1000 unchanged.

    Args:
        value: a number in the first unit.
        units: names of units, each 1000 times the one before.
    """
    if not math.isfinite(value):
        return str(value)
    power = 0
    # The limit is 999.5 and not 1000, because 999,950 rounded to three digits would be printed as "1000 k".
    while abs(value) >= 999.5 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    is_whole = power == 0 and float(value).is_integer()
    digits = 0 if is_whole or abs(value) >= 99.95 else 2 if abs(value) < 9.995 else 1
    return f"{value:.{digits}f} {units[power]}".rstrip()


def human_count(count: float) -> str:
    """Return a count with a unit: k for thousand, M for million, B for billion, T for trillion.

    >>> human_count(46_700_000_000)
    '46.7 B'
    """
    return _scaled(count, ("", "k", "M", "B", "T"))


def human_bytes(size: float) -> str:
    """Return a number of bytes with a decimal unit (1 kB = 1000 B).

    >>> human_bytes(21_700_000)
    '21.7 MB'
    """
    return _scaled(size, ("B", "kB", "MB", "GB", "TB", "PB"))


def human_time(seconds: float) -> str:
    """Return a duration in seconds as `0.42 s`, `12.3 s`, `3 min 12 s`, `1 h 02 min` or `2 d 03 h`.

    >>> human_time(192)
    '3 min 12 s'
    """
    if not math.isfinite(seconds):
        return str(seconds)
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"


class Metric(NamedTuple):
    """A metric that the progress shows."""

    label: str
    key: str
    """Its name in `metrics.jsonl`."""
    form: str
    """The format specification of its value."""
    meaning: str
    """Its explanation in the legend."""


METRICS = (
    Metric("loss", "train/loss", "7.4f", "ce plus auxiliary losses"),
    Metric("ce", "train/ce", "7.4f", "cross-entropy, nats per token"),
    Metric("balance", "router/balance_loss", "6.4f", "balance loss, 1 = balanced (as a mean over layers)"),
    Metric("MaxVio", "router/max_vio", "6.3f", "0 = balanced, 1 = the fullest expert gets twice its share"),
    Metric("dropped", "router/drop_rate", "5.1%", "assignments beyond the capacity of the experts"),
    Metric("lr", "optim/lr", "8.2e", "learning rate"),
    Metric("grad", "optim/grad_norm", "7.3f", "gradient norm before clipping"),
)
"""Metrics that a row lacks are left out: a dense model has none of the router's."""


def evaluation_line(row: Mapping[str, Any]) -> str:
    """Return the evaluation in a row of `metrics.jsonl` as one line.

    >>> evaluation_line({"train/loss": 2.5, "eval/loss": 2.25, "eval/bits_per_byte/code": 1.5})
    'held-out loss 2.2500; bits per byte: code 1.500'
    """
    prefix = "eval/bits_per_byte/"
    bits = [f"{key.removeprefix(prefix)} {value:.3f}" for key, value in row.items() if key.startswith(prefix)]
    return "; bits per byte: ".join([f"held-out loss {row['eval/loss']:.4f}", *([", ".join(bits)] if bits else [])])


class Pace:
    """The smoothed time of a step.

    Args:
        clock: returns monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.seconds: float | None = None
        """Seconds per step, with what happens between steps; None in the first steps."""
        self._clock, self._uncounted, self._counted = clock, FIRST_STEPS, 0
        self._before: float | None = None

    def step(self) -> None:
        """Count the time since the last step."""
        now = self._clock()
        if self._uncounted:
            self._uncounted -= 1
        elif self._before is not None:
            self._counted += 1
            mean = self.seconds or 0.0
            self.seconds = mean + (now - self._before - mean) / min(self._counted, PACE_STEPS)
        self._before = now

    def pause(self) -> None:
        """Do not count the time until the next step."""
        self._before = None


class Progress:
    """A context manager that shows the progress of the training loop on stdout.

    Args:
        total_steps: the optimizer steps of the whole run.
        start_step: the steps that a resumed run has done already.
        clock: returns monotonic seconds.
    """

    def __init__(self, total_steps: int, start_step: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self.total_steps, self.step, self._pace = total_steps, start_step, Pace(clock)
        self._bar: _Bar | None = None
        self._legend_shown = False
        self._last_line: int | None = None

    def __enter__(self) -> Self:
        if on_terminal():
            self._bar = _Bar(
                progress.TextColumn("step {task.completed}/{task.total}", markup=False),
                progress.BarColumn(bar_width=None),
                progress.TextColumn("{task.fields[speed]}", markup=False),
                console=console(),
                expand=True,
                # The bar moves when a step ends, so it needs no thread.
                auto_refresh=False,
                # If stderr is redirected to a file, it must keep going there.
                redirect_stderr=sys.stderr.isatty(),
            )
            self._bar.add_task("", total=self.total_steps, completed=self.step, speed="", metrics=[])
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def update(self, row: Mapping[str, Any], step: int, log: bool = True) -> None:
        """Show the metrics of one optimizer step.

        Args:
            row: the metrics by their names in `metrics.jsonl`.
            step: the number of optimizer steps done.
            log: whether to print a line. Above a bar, only `HISTORY_LINES` of them are printed, and those of
                evaluations.
        """
        self.step = step
        self._pace.step()
        metrics = [metric for metric in METRICS if row.get(metric.key) is not None]
        if not self._legend_shown and metrics and (log or self._bar is not None):
            self._legend_shown = True
            legend = "; ".join(f"{metric.label}: {metric.meaning}" for metric in metrics)
            self.print(textwrap.fill(legend, min(LEGEND_WIDTH, console().width)))
        values = [f"{metric.label} {row[metric.key]:{metric.form}}" for metric in metrics]
        fields = [f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}", *values]
        if self._bar is None:
            if log:
                show_line("  ".join([*fields, *self._speed(row)]))
            return
        if log and self._is_history(row, step):
            self._last_line = step
            self.print(_fitting(fields, self._bar.console.width))
        self._bar.update(
            progress.TaskID(0), completed=step, speed="  ".join(self._speed(row)).strip(), metrics=values, refresh=True
        )

    def _is_history(self, row: Mapping[str, Any], step: int) -> bool:
        """Return whether the metrics of a step stay on the terminal, above the bar."""
        last = self._last_line
        far = last is None or step - last >= self.total_steps / HISTORY_LINES
        return far or "eval/loss" in row or step == self.total_steps

    def go_back(self, step: int) -> None:
        """Continue after `step`, an earlier one."""
        self.step, self._last_line = step, None
        self._pace.pause()

    def print(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(Text(wrapped(printable(text))), soft_wrap=True)
        else:
            show_line(text)

    def eta(self) -> float | None:
        """Return the seconds to the end of the run at the pace of the last steps, or None in the first ones."""
        return None if self._pace.seconds is None else (self.total_steps - self.step) * self._pace.seconds

    def _speed(self, row: Mapping[str, Any]) -> list[str]:
        rate, eta = row.get("speed/tokens_per_s"), self.eta()
        fields = [] if rate is None else [f"{human_count(rate):>7} tokens/s"]
        return fields + ([] if eta is None else [f"ETA {human_time(eta)}"])


def _fitting(fields: Sequence[str], width: int) -> str:
    """Return the first fields in one line of at most `width` characters."""
    kept = list(fields[:1])
    for field in fields[1:]:
        if len("  ".join([*kept, field])) > width:
            break
        kept.append(field)
    return "  ".join(kept)


class _Bar(progress.Progress):
    """rich's progress bar, with the metrics of the last step below it."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            metrics = [Text(" ".join(metric.split()), style="dim") for metric in task.fields["metrics"]]
            yield Columns(metrics, padding=(0, 2))
