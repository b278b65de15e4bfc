"""Writes the metrics of a run: first to `metrics.jsonl`, then to the terminal and to W&B. Only rank 0 records."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from common.strict import to_dict
from training.config import Config
from training.report.metrics import MetricsWriter
from training.report.progress import Progress
from training.report.trackers import start_tracking


class Recorder(ExitStack):
    """A context manager around the training loop. It does nothing on ranks other than 0.

    At the end it closes the tracker first, then `metrics.jsonl`, then the progress bar.

    Args:
        active: whether this is rank 0.
        resumed_step: the step of the checkpoint; later rows are removed from `metrics.jsonl`. None for a new run.
    """

    def __init__(self, config: Config, directory: Path, name: str, *, active: bool, resumed_step: int | None) -> None:
        super().__init__()
        self.active = active
        if not active:
            return
        self.progress = self.enter_context(Progress(config.train.steps, resumed_step or 0))
        self.metrics = MetricsWriter(directory / "metrics.jsonl", resumed_step)
        self.callback(self.metrics.close)
        self.tracker = start_tracking(
            config.tracking,
            name=name,
            directory=directory,
            resolved_config=to_dict(config),
            resumed_step=resumed_step,
        )
        self.callback(self.tracker.finish)

    def step(self, row: dict[str, Any], step: int, *, write: bool) -> None:
        """Show the metrics of a step, and write them if `write`."""
        if not self.active:
            return
        self.progress.update(row, step, log=write)
        if write:
            self.metrics.write({"step": step} | row)
            self.tracker.log(row, step)

    def saved(self, checkpoint: str) -> None:
        """Print that a checkpoint has been written."""
        if self.active:
            self.progress.print(f"saved {checkpoint}")

    def sync(self) -> None:
        """Flush the rows to the disk. A checkpoint must not be newer than the rows of its steps."""
        if self.active:
            self.metrics.sync()

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
