"""Live progress of a run: a bar on a terminal, aligned plain lines elsewhere."""

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from rich.columns import Columns
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from training.report.terminal import console, human_count, human_time, on_terminal, printable, show_line

_METRICS = (
    ("loss", "train/loss", "7.4f"),
    ("ce", "train/ce", "7.4f"),
    ("balance", "router/balance_loss", "6.4f"),
    ("MaxVio", "router/max_vio", "6.3f"),
    ("dropped", "router/drop_rate", "5.1%"),
    ("lr", "optim/lr", "8.2e"),
    ("grad", "optim/grad_norm", "7.3f"),
)
"""Label, name in metrics.jsonl, format. Metrics that a row lacks (the router's in a dense model) are left out."""

_RECENT = 20
"""Updates over which the time of a step is measured, for the ETA."""


class Progress:
    """Context manager around the training loop.

    Args:
        total_steps: optimizer steps of the whole run.
        start_step: steps already done (a resumed run).
        clock: seconds, monotonic.
    """

    def __init__(self, total_steps: int, start_step: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self.total_steps = total_steps
        self.step = start_step
        self._clock = clock
        self._recent: deque[tuple[int, float]] = deque(maxlen=_RECENT + 1)
        self._live: Live | None = None

    def __enter__(self) -> Self:
        self._recent.append((self.step, self._clock()))
        if on_terminal():
            # No refresh thread: the bar moves when a step ends. A stderr that goes to a file keeps going there.
            self._live = Live(self._bar({}), console=console(), auto_refresh=False, redirect_stderr=sys.stderr.isatty())
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self, row: Mapping[str, Any], step: int, log: bool = True) -> None:
        """Show the metrics `row` of `step` (optimizer steps done); off a terminal only if `log`."""
        self.step = step
        self._recent.append((step, self._clock()))
        if self._live is not None:
            self._live.update(self._bar(row), refresh=True)
        elif log:
            width = len(str(self.total_steps))
            fields = [f"step {step:>{width}}/{self.total_steps}", *self._metrics(row), *self._speed(row)]
            show_line("  ".join(fields))

    def print(self, text: str) -> None:
        """Print a line above the bar."""
        if self._live is not None:
            self._live.console.print(Text(printable(text)), soft_wrap=True)
        else:
            show_line(text)

    def eta(self) -> float | None:
        """Seconds to the end at the speed of the last steps; None before the first one."""
        (first, then), (last, now) = self._recent[0], self._recent[-1]
        if last <= first:
            return None
        return (self.total_steps - last) * (now - then) / (last - first)

    def _metrics(self, row: Mapping[str, Any]) -> list[str]:
        return [f"{label} {row[key]:{form}}" for label, key, form in _METRICS if row.get(key) is not None]

    def _speed(self, row: Mapping[str, Any]) -> list[str]:
        rate, eta = row.get("speed/tokens_per_s"), self.eta()
        fields = [] if rate is None else [f"{human_count(rate):>7} tokens/s"]
        return fields + ([] if eta is None else [f"ETA {human_time(eta)}"])

    def _bar(self, row: Mapping[str, Any]) -> Group:
        line = Table.grid(padding=(0, 1), expand=True)
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True)
        line.add_row(
            Text(f"step {self.step}/{self.total_steps}"),
            ProgressBar(total=max(self.total_steps, 1), completed=self.step),
            Text("  ".join(self._speed(row)).strip()),
        )
        metrics = [Text(" ".join(field.split()), style="dim") for field in self._metrics(row)]
        return Group(line, Columns(metrics, padding=(0, 2)))
