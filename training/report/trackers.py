"""Trackers: where the metrics of a run go besides `metrics.jsonl`, which stays the source of truth.

The key `tracking.wandb` chooses Weights & Biases. The key `tracking.trackers` names further trackers, which a plugin
registers in `TRACKERS`. A file `my_tracker.py` is enough:

    from training.report.trackers import TRACKERS, TrackedRun, Tracker

    @TRACKERS.register("loss_file")
    class LossFile(Tracker):
        def __init__(self, run: TrackedRun) -> None:
            self.file = open(run.directory / "loss.txt", "a")

        def log(self, row, step):
            print(step, row["train/loss"], file=self.file)

        def finish(self):
            self.file.close()

It is used by `python train.py plugins=[my_tracker.py] tracking.trackers=[loss_file]`. Only rank 0 has trackers. A
tracker that raises ends no run: `Trackers` prints one warning and does not call that tracker again.
"""

import math
import netrc
import os
import sys
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from common.errors import ConfigError, expect, require
from common.files import disk_errors, read_file
from common.registry import Registry
from common.strict import to_dict
from common.text import first_line
from training.config import Config, TrackingConfig
from training.report.metrics import MetricsRecord, MetricsWriter, Row, read_metrics
from training.report.terminal import Progress, evaluation_line
from training.report.wandb_files import logged_steps

MAX_BINS = 512
"""The most bins that W&B accepts in a histogram."""
INIT_TIMEOUT_S = 30
"""Seconds that W&B gets to start. The other ranks wait meanwhile, so this must be well below `parallel.timeout_s`."""


class Tracker(Protocol):
    """What receives the metrics of a run. A subclass inherits methods that do nothing, and overrides those it needs.

    The methods are called between optimizer steps, so the whole run waits for them. They can raise any exception.
    """

    def seen(self) -> Collection[int] | None:
        """Return the steps whose rows the tracker has already, when a run is resumed. None: all up to the checkpoint.

        It is called once, after the start. The tracker gets the rows of `metrics.jsonl` up to the checkpoint that it
        lacks, in order, and later no row of a step that it has.
        """
        return None

    def log(self, row: Row, step: int) -> None:
        """Receive the metrics of optimizer step `step`, under their names in `metrics.jsonl`. Must not change `row`."""

    def summary(self, values: dict[str, Any]) -> None:
        """Receive values that describe the whole run: the content of `result.json`."""

    def image(self, name: str, path: Path) -> None:
        """Receive a plot, which is the PNG file `path`."""

    def finish(self) -> None:
        """Write what is still buffered, and close. Also called when training fails."""


@dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker is started for."""

    name: str
    directory: Path
    """The run's directory, in which a tracker can write files."""
    config: dict[str, Any]
    """The resolved configuration as plain containers. It contains no secrets."""
    resumed_step: int | None
    """The step of the checkpoint that the run continues from, or None for a new run. Rows of later steps that were
    logged before are logged again, unless the tracker has `seen` them."""


TRACKERS: Registry[Callable[[TrackedRun], Tracker]] = Registry("tracking.trackers")
"""Trackers that plugins register, by the names that `tracking.trackers` takes."""


class Trackers(Tracker):
    """Several trackers as one. Methods never raise.

    Args:
        warn: receives one line for each tracker that fails, when it fails.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self.running: dict[str, Tracker] = {}
        """The trackers that have not failed, by their names in warnings."""
        self._seen: dict[str, Collection[int]] = {}

    def start(self, name: str, factory: Callable[[], Tracker], rows: Sequence[Row] = ()) -> None:
        """Add the tracker that `factory` returns, and send it the rows that it lacks. Warn if it raises.

        Args:
            rows: the rows of `metrics.jsonl` up to the checkpoint that the run continues from.
        """
        try:
            tracker = factory()
            seen = tracker.seen()
            missing = [] if seen is None else [row for row in rows if row["step"] not in seen]
            for row in missing:
                tracker.log({key: value for key, value in row.items() if key != "step"}, int(row["step"]))  # type: ignore[arg-type]
            self.running[name], self._seen[name] = tracker, seen or ()
        except (Exception, SystemExit) as error:  # A tracker can fail in any way: no network, a full disk, a plugin.
            self._warn(f"{name} did not start ({first_line(error)}); training continues, metrics.jsonl has every row")

    def log(self, row: Row, step: int) -> None:
        self._forward(lambda tracker: tracker.log(row, step), step)

    def summary(self, values: dict[str, Any]) -> None:
        self._forward(lambda tracker: tracker.summary(values))

    def image(self, name: str, path: Path) -> None:
        self._forward(lambda tracker: tracker.image(name, path))

    def finish(self) -> None:
        self._forward(lambda tracker: tracker.finish())

    def go_back(self, newest: int) -> None:
        """Send the trackers no more rows up to step `newest`: they have had these, and the run repeats the steps."""
        for name, seen in self._seen.items():
            self._seen[name] = {*seen, *range(newest + 1)}

    def _forward(self, call: Callable[[Tracker], None], step: int | None = None) -> None:
        """Call the trackers, without those that have the row of `step` already."""
        for name, tracker in list(self.running.items()):
            if step in self._seen[name]:
                continue
            try:
                call(tracker)
            except (Exception, SystemExit) as error:
                del self.running[name]
                self._warn(f"{name} stopped ({first_line(error)}); training continues, metrics.jsonl has every row")


class WandbTracker(Tracker):
    """A W&B run. A list (the load of E experts) becomes E scalars, `<name>/expert_XX`, and one histogram.

    Args:
        seen: the steps whose rows W&B has from earlier launches of this run.
        step: the last step of the run that has a row.
    """

    def __init__(
        self, wandb: Any, run: Any, warn: Callable[[str], None], seen: Collection[int] = (), step: int | None = None
    ) -> None:
        self._wandb, self._run, self._warn, self._seen, self._step = wandb, run, warn, seen, step
        self._images = find_spec("PIL") is not None

    def seen(self) -> Collection[int]:
        return self._seen

    def log(self, row: Row, step: int) -> None:
        self._step = step
        with self._connection():
            # W&B writes the row when it gets one of a later step. Until then, `image` adds to it.
            self._run.log(self._expand(row), step=step)

    def summary(self, values: dict[str, Any]) -> None:
        with self._connection():
            self._run.summary.update(values)

    def image(self, name: str, path: Path) -> None:
        """Add a PNG file to the row of the last step. Without the package pillow, warn and leave the image out."""
        if not self._images:
            self._warn(f"W&B does not get the image {name} ({path}): the package pillow is not installed")
            return
        with self._connection():
            self._run.log({name: self._wandb.Image(str(path))}, step=self._step)

    def finish(self) -> None:
        """Finish the run, and wait for the end of W&B's service.

        `Run.finish` returns before the service has written the last rows to the file of an offline run. If this process
        were the last of a container, they would be lost. A worker process skips the exit hook in which W&B waits.
        """
        with self._connection():
            self._run.finish()
            self._wandb.teardown()

    @contextmanager
    def _connection(self) -> Iterator[None]:
        """Remove W&B's exit hook if the connection to W&B's service is lost, and raise the error again."""
        try:
            yield
        except ConnectionError:
            # The hook would end the process with the traceback of the same error.
            with suppress(Exception):
                self._wandb.teardown(exit_code=0)
            raise

    def _expand(self, row: Row) -> dict[str, Any]:
        expanded: dict[str, Any] = {}
        for name, value in row.items():
            if not isinstance(value, list):
                expanded[name] = value
                continue
            for expert, share in enumerate(value):
                expanded[f"{name}/expert_{expert:02d}"] = share
            if all(math.isfinite(share) for share in value):
                expanded[name] = self._wandb.Histogram(np_histogram=load_histogram(value))
        return expanded


def load_histogram(load_E: list[float]) -> tuple[list[float], list[float]]:
    """Return the heights and the edges of a histogram over the expert index.

    Each expert has a bin; beyond 512 experts, neighbouring experts share one.
    """
    import numpy as np

    num_experts = len(load_E)
    heights, edges = np.histogram(
        np.arange(num_experts) + 0.5,
        bins=min(num_experts, MAX_BINS),
        range=(0, num_experts),
        weights=np.asarray(load_E),
    )
    return heights.tolist(), edges.tolist()


def check_tracking(config: TrackingConfig) -> None:
    """Check the section `tracking` before any process starts, without using the network.

    Raises:
        ConfigError: `wandb` is `online` and there is no API key, neither in `WANDB_API_KEY` nor in the netrc file; or a
            name in `trackers` is not registered.
    """
    require(
        config.wandb != "online" or os.environ.get("WANDB_API_KEY") or _netrc_has_key(),
        ConfigError,
        "tracking.wandb=online: expected an API key in the environment variable WANDB_API_KEY or in ~/.netrc "
        "(`wandb login` writes it), or tracking.wandb=offline",
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
    """Start W&B, unless `tracking.wandb` is `disabled`, and each tracker in `tracking.trackers`. Call it on one rank.

    Neither this function nor W&B prints anything. W&B captures no console output, code, git state or list of packages.

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
    run = TrackedRun(name, directory, resolved_config, resumed_step)
    trackers = Trackers(warn)
    if config.wandb != "disabled":
        trackers.start("W&B", lambda: _start_wandb(config, run, warn), rows)
    for registered in dict.fromkeys(config.trackers):
        trackers.start(f"tracker {registered}", partial(TRACKERS[registered], run), rows)
    return trackers


def _start_wandb(config: TrackingConfig, run: TrackedRun, warn: Callable[[str], None]) -> WandbTracker:
    import wandb

    run_id = _run_id(run.directory / "wandb" / "run_id.txt", run.resumed_step)
    settings = wandb.Settings(
        mode=config.wandb,
        silent=True,
        console="off",
        disable_git=True,
        disable_code=True,
        disable_job_creation=True,
        x_save_requirements=False,
        init_timeout=INIT_TIMEOUT_S,
    )
    # This must come before init, which would otherwise print where it found the API key.
    wandb.setup(settings=settings)
    wandb_run = wandb.init(
        project=config.project,
        entity=config.entity,
        name=run.name,
        id=run_id,
        # `wandb sync` appends the rows of an offline run to those of earlier launches if the run says so.
        resume=None if run.resumed_step is None else "allow",
        dir=str(run.directory),
        config=run.config,
        settings=settings,
    )
    if run.resumed_step is None:
        return WandbTracker(wandb, wandb_run, warn)
    # The service has all rows before the step that it expects next. It refuses earlier steps.
    online = config.wandb == "online"
    seen = range(wandb_run.starting_step) if online else logged_steps(run.directory / "wandb", run_id)
    return WandbTracker(wandb, wandb_run, warn, seen, run.resumed_step)


def _run_id(file: Path, resumed_step: int | None) -> str:
    if resumed_step is not None and file.is_file():
        return read_file(file, 256).decode().strip()
    run_id = uuid.uuid4().hex[:12]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(run_id + "\n", encoding="utf-8")
    return run_id


def _netrc_has_key() -> bool:
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


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
        path = directory / "metrics.jsonl"
        record = None if state is None else MetricsRecord.from_state(state.get("metrics"))
        self.metrics = MetricsWriter(path, resumed_step, record)
        self.callback(self.metrics.close)
        self.note(*self.metrics.problems)
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
            with self.disk_errors("metrics.jsonl"):
                self.metrics.write({"step": step} | row)
            self.tracker.log(row, step)
        if "eval/loss" in row and step < self.progress.total_steps:  # A table shows the last evaluation.
            self.progress.print(evaluation_line(row))

    def note(self, *lines: str) -> None:
        """Print lines above the progress bar."""
        if self.active:
            for line in lines:
                self.progress.print(line)

    def record(self) -> dict[str, Any] | None:
        """Return what a checkpoint records about `metrics.jsonl`; None on ranks other than 0."""
        return self.metrics.record().to_state() if self.active else None

    def go_back(self, state: Mapping[str, Any]) -> None:
        """Remove the rows after the checkpoint of which `state` is the state. Trackers keep those that they have."""
        if self.active:
            step = state["step"]
            self.metrics.go_back(step, MetricsRecord.from_state(state.get("metrics")))
            self.note(*self.metrics.problems)
            self.tracker.go_back(self.progress.step)
            self.progress.go_back(step)

    def sync(self) -> None:
        """Flush the rows to the disk. A checkpoint must not be newer than the rows of its steps."""
        if self.active:
            with self.disk_errors("metrics.jsonl"):
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
