"""Where the figures of a run go: `metrics.jsonl` first, then W&B and the terminal. Only rank 0 records."""

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from common.strict import to_dict
from training.config import Config
from training.report.metrics import MetricsWriter
from training.report.progress import Progress
from training.report.trackers import start_tracking


class Recorder:
    """Context manager around the loop; a no-op on every rank but 0.

    Args:
        resumed_step: the checkpoint's step; rows after it are cut from `metrics.jsonl`. None: a new run.
    """

    def __init__(self, config: Config, directory: Path, name: str, *, active: bool, resumed_step: int | None) -> None:
        self.active = active
        self._stack = ExitStack()
        if not active:
            return
        self.progress = self._stack.enter_context(Progress(config.train.steps, resumed_step or 0))
        self.metrics = MetricsWriter(directory / "metrics.jsonl", resumed_step)
        self._stack.callback(self.metrics.close)
        self.tracker = start_tracking(
            config.tracking,
            name=name,
            directory=directory,
            resolved_config=to_dict(config),
            resumed_step=resumed_step,
        )

    def step(self, row: dict[str, Any], step: int, *, write: bool) -> None:
        """Show `row`; with `write`, also keep it."""
        if not self.active:
            return
        self.progress.update(row, step, log=write)
        if write:
            self.metrics.write({"step": step} | row)
            self.tracker.log(row, step)

    def saved(self, checkpoint: str) -> None:
        """Tell that a checkpoint has been committed."""
        if self.active:
            self.progress.print(f"saved {checkpoint}")

    def sync(self) -> None:
        """Bring the rows to the disk, before a checkpoint that stands for them."""
        if self.active:
            self.metrics.sync()

    def end_progress(self) -> None:
        """Take the bar off the terminal: what follows is printed below it."""
        if self.active:
            self.progress.__exit__(None, None, None)

    def finish(self, result: dict[str, Any], directory: Path) -> None:
        """Give W&B the run's last figures and its plots."""
        if self.active:
            self.tracker.summary(result)
            for plot in sorted(directory.glob("*.png")):
                self.tracker.image(plot.stem, plot)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.active:
            self.tracker.finish()
        self._stack.close()
