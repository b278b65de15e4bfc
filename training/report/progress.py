"""The progress of the training loop: a live bar on a terminal, one aligned line per logged step elsewhere."""

import sys
import textwrap
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, NamedTuple, Self

from rich import progress
from rich.columns import Columns
from rich.console import RenderableType
from rich.text import Text

from training.report.terminal import console, human_count, human_time, on_terminal, printable, show_line


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

LEGEND_WIDTH = 120
"""The legend breaks into lines of at most this many columns, and of the terminal's width if that is less."""
ETA_UPDATES = 20
"""The estimated time to the end of the run (ETA) uses the speed over this many updates."""


class Progress:
    """A context manager that shows the progress of the training loop on stdout.

    Args:
        total_steps: the optimizer steps of the whole run.
        start_step: the steps that a resumed run has done already.
        clock: returns monotonic seconds.
    """

    def __init__(self, total_steps: int, start_step: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self.total_steps = total_steps
        self.step = start_step
        self._clock = clock
        self._updates: deque[tuple[int, float]] = deque(maxlen=ETA_UPDATES + 1)
        self._bar: _Bar | None = None
        self._legend_shown = False

    def __enter__(self) -> Self:
        self._updates.append((self.step, self._clock()))
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
            log: whether to print a line where there is no bar.
        """
        self.step = step
        self._updates.append((step, self._clock()))
        metrics = [metric for metric in METRICS if row.get(metric.key) is not None]
        if not self._legend_shown and metrics and (log or self._bar is not None):
            self._legend_shown = True
            legend = "; ".join(f"{metric.label}: {metric.meaning}" for metric in metrics)
            self.print(textwrap.fill(legend, min(LEGEND_WIDTH, console().width)))
        values = [f"{metric.label} {row[metric.key]:{metric.form}}" for metric in metrics]
        if self._bar is not None:
            self._bar.update(
                progress.TaskID(0),
                completed=step,
                speed="  ".join(self._speed(row)).strip(),
                metrics=values,
                refresh=True,
            )
        elif log:
            width = len(str(self.total_steps))
            show_line("  ".join([f"step {step:>{width}}/{self.total_steps}", *values, *self._speed(row)]))

    def print(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(Text(printable(text)), soft_wrap=True)
        else:
            show_line(text)

    def eta(self) -> float | None:
        """Return the seconds to the end of the run at the speed of the last updates, or None before the first."""
        (first, then), (last, now) = self._updates[0], self._updates[-1]
        if last <= first:
            return None
        return (self.total_steps - last) * (now - then) / (last - first)

    def _speed(self, row: Mapping[str, Any]) -> list[str]:
        rate, eta = row.get("speed/tokens_per_s"), self.eta()
        fields = [] if rate is None else [f"{human_count(rate):>7} tokens/s"]
        return fields + ([] if eta is None else [f"ETA {human_time(eta)}"])


class _Bar(progress.Progress):
    """rich's progress bar, with the metrics of the last step below it."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            metrics = [Text(" ".join(metric.split()), style="dim") for metric in task.fields["metrics"]]
            yield Columns(metrics, padding=(0, 2))
