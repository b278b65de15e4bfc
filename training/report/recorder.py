"""The recorder of a run: shows every row and alarm, writes it to a file, and sends it to the trackers."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common.errors import ConfigError, expect, require
from common.files import disk_errors
from common.strict import to_dict
from training.config import Config, TrackingConfig
from training.owner import sweep_of
from training.report.alarms import Alarm, alarm_lines, append_alarms, cut_alarms
from training.report.csv_tracker import CsvTracker
from training.report.metrics import METRICS_FILE, MetricsRecord, MetricsWriter, Row, read_metrics
from training.report.tensorboard_tracker import TensorBoardTracker
from training.report.terminal import Progress, evaluation_line
from training.report.trackers import TRACKERS, TrackedRun, Trackers
from training.report.wandb_tracker import netrc_has_key, start_wandb


def check_tracking(config: TrackingConfig) -> None:
    """Check the section `tracking` before any process starts, without using the network.

    Raises:
        ConfigError: `wandb` is `online` and there is no API key, neither in `WANDB_API_KEY` nor in the netrc file; the
            package that `tensorboard` needs is missing; or a name in `trackers` is not registered.
    """
    require(
        config.wandb != "online" or os.environ.get("WANDB_API_KEY") or netrc_has_key(),
        ConfigError,
        "tracking.wandb=online: expected an API key in the environment variable WANDB_API_KEY or in ~/.netrc "
        "(`wandb login` writes it), or tracking.wandb=offline",
    )
    require(
        not config.tensorboard or find_spec("tensorboard") is not None,
        ConfigError,
        "tracking.tensorboard=true: expected the package tensorboard (pip install 'mixwright[tensorboard]')",
    )
    unknown = [name for name in config.trackers if name not in TRACKERS]
    expect(
        not unknown,
        "tracking.trackers",
        config.trackers,
        f"names that a module in plugins=[...] registers (registered: {', '.join(TRACKERS) or 'none'}), found "
        f"{', '.join(unknown)}",
    )


def start_tracking(
    config: TrackingConfig,
    *,
    name: str,
    directory: Path,
    resolved_config: dict[str, Any],
    resumed_step: int | None,
    rows: Sequence[Row] = (),
    warn: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> Trackers:
    """Start the trackers that the section `tracking` chooses. Call it on one rank.

    Neither this function nor W&B prints anything. W&B captures no console output and no code. It gets the git commit,
    whether there are uncommitted changes, and the versions of some packages.

    Args:
        config: the section `tracking`, which `check_tracking` has accepted.
        name: the name that trackers show for the run.
        directory: the run's directory. W&B writes its files to `directory/wandb`.
        resolved_config: the run's configuration without secrets, because trackers publish it.
        resumed_step: the checkpoint's step if the run is resumed, else None. A resumed run keeps its W&B id, which is
            in `wandb/run_id.txt`, and the step numbers of its rows. Offline, each resumption has its own directory.
        rows: the rows of `metrics.jsonl` up to `resumed_step`. A tracker gets those that it lacks.
        warn: receives one line for each tracker that fails, at its start or later.

    Returns:
        One tracker that forwards to all of them, and that never raises.
    """
    run = TrackedRun(name, directory, resolved_config, resumed_step, sweep_of(directory))
    trackers = Trackers(warn)
    if config.wandb != "disabled":
        trackers.start("W&B", lambda: start_wandb(config, run, warn), rows)
    if config.tensorboard:
        trackers.start("TensorBoard", lambda: TensorBoardTracker(config, run), rows)
    if config.csv:
        trackers.start("metrics.csv", lambda: CsvTracker(config, run), rows)
    for registered in dict.fromkeys(config.trackers):
        trackers.start(f"tracker {registered}", partial(TRACKERS[registered], run), rows)
    return trackers


class Recorder(ExitStack):
    """A context manager around the training loop. It does nothing on ranks other than 0.

    The trackers start after the first row has been shown and written, because W&B takes a second or more to start. At
    the end, the trackers are closed first, then `metrics.jsonl`, then the progress bar.

    Args:
        active: whether this is rank 0.
        state: that of the checkpoint that the run continues from. Rows of later steps are removed from `metrics.jsonl`,
            and rows that are missing are restored. None for a new run.
    """

    def __init__(
        self, config: Config, directory: Path, name: str, *, active: bool, state: Mapping[str, Any] | None
    ) -> None:
        super().__init__()
        self.active = active
        self._warned: set[str] = set()
        self.directory, self.warns = directory, config.checkpoint.on_error == "warn"
        if not active:
            return
        resumed_step = None if state is None else state["step"]
        self.progress = self.enter_context(Progress(config.train.steps, resumed_step or 0))
        path = directory / METRICS_FILE
        record = None if state is None else MetricsRecord.from_state(state.get("metrics"))
        self.metrics = MetricsWriter(path, resumed_step, record)
        self.callback(self.metrics.close)
        self.note(*self.metrics.problems)
        cut_alarms(directory, resumed_step or 0)
        self._rows = [] if resumed_step is None else read_metrics(path)
        self._start_tracking = partial(
            start_tracking,
            config.tracking,
            name=name,
            directory=directory,
            resolved_config=to_dict(config),
            resumed_step=resumed_step,
        )

    @cached_property
    def tracker(self) -> Trackers:
        """The trackers. The first access starts them."""
        rows, self._rows = self._rows, []  # Those of a long run are large.
        tracker = self._start_tracking(rows=rows)
        self.callback(tracker.finish)
        return tracker

    def step(self, row: dict[str, Any], step: int, *, write: bool) -> None:
        """Show the metrics of a step and its evaluation, and write them if `write`."""
        if not self.active:
            return
        self.progress.update(row, step, log=write)
        if write:
            with self.disk_errors(METRICS_FILE):
                self.metrics.write({"step": step} | row)
            self.tracker.log(row, step)
        if "eval/loss" in row and step < self.progress.total_steps:  # A table shows the last evaluation.
            self.progress.print(evaluation_line(row))

    def alarms(self, alarms: Sequence[Alarm], *, show: bool = True) -> None:
        """Print the alarms of a step, if `show`, write them to `alarms.jsonl`, and send them to the trackers."""
        if not self.active or not alarms:
            return
        if show:
            self.note(*alarm_lines(alarms))
        with self.disk_errors("alarms.jsonl"):
            append_alarms(self.directory, alarms)
        for alarm in alarms:
            self.tracker.alert(alarm)

    def note(self, *lines: str) -> None:
        """Print lines above the progress bar."""
        if self.active:
            for line in lines:
                self.progress.print(line)

    def record(self) -> dict[str, Any] | None:
        """Return what a checkpoint records about `metrics.jsonl`; None on ranks other than 0."""
        return self.metrics.record().to_state() if self.active else None

    def go_back(self, state: Mapping[str, Any]) -> None:
        """Remove the rows after the checkpoint of which `state` is the state; a tracker can keep its own."""
        if self.active:
            step = state["step"]
            self.metrics.go_back(step, MetricsRecord.from_state(state.get("metrics")))
            self.note(*self.metrics.problems)
            cut_alarms(self.directory, step)
            self.tracker.rewind(step, self.progress.step)
            self.progress.go_back(step)

    def sync(self) -> None:
        """Flush the rows to the disk. A checkpoint must not be newer than the rows of its steps."""
        if self.active:
            with self.disk_errors(METRICS_FILE):
                self.metrics.sync()

    def disk_errors(self, what: str) -> AbstractContextManager[None]:
        """Return a context manager for writing to the run's directory, which turns an error of the disk into one line.

        The run goes on after the line with `checkpoint.on_error=warn`.

        Args:
            what: what is written. A line about it is printed once.

        Raises:
            RunError: the disk refused to write, and the run must not go on.
        """

        def warn(line: str) -> None:
            if what not in self._warned:
                self._warned.add(what)
                self.note(f"warning: {what} cannot be written: {line} (checkpoint.on_error=warn)")

        return disk_errors(self.directory, warn if self.warns else None)

    def end_progress(self) -> None:
        """Remove the progress bar from the terminal, before anything is printed below it."""
        if self.active:
            self.progress.__exit__(None, None, None)

    def finish(self, result: dict[str, Any], directory: Path) -> None:
        """Send the run's result and the plots in its directory to W&B."""
        if self.active:
            self.tracker.summary(result)
            for plot in sorted(directory.glob("*.png")):
                self.tracker.image(plot.stem, plot)
