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

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from common.registry import Registry
from common.text import first_line
from training.report.alarms import Alarm
from training.report.metrics import Row


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
        return

    def go_back(self, step: int) -> bool:
        """Remove the rows after `step`, because the run repeats the steps after it. Return whether they are removed.

        If not, the tracker keeps its rows, and gets no row of a step that it has.
        """
        return False

    def alert(self, alarm: Alarm) -> None:
        """Receive what the run warns about, or the end of it (`alarm.ended`)."""
        return

    def summary(self, values: dict[str, Any]) -> None:
        """Receive values that describe the whole run: the content of `result.json`."""
        return

    def image(self, name: str, path: Path) -> None:
        """Receive a plot, which is the PNG file `path`."""
        return

    def finish(self) -> None:
        """Write what is still buffered, and close. Also called when training fails."""
        return


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
    sweep: str | None = None
    """The name of the sweep that the run is a job of; None: of none."""


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
        self._forward(lambda _, tracker: tracker.log(row, step), step)

    def alert(self, alarm: Alarm) -> None:
        self._forward(lambda _, tracker: tracker.alert(alarm))

    def summary(self, values: dict[str, Any]) -> None:
        self._forward(lambda _, tracker: tracker.summary(values))

    def image(self, name: str, path: Path) -> None:
        self._forward(lambda _, tracker: tracker.image(name, path))

    def finish(self) -> None:
        self._forward(lambda _, tracker: tracker.finish())

    def rewind(self, step: int, newest: int) -> None:
        """Follow a run that goes back to `step`, when `newest` is the last step that it has done.

        A tracker that cannot remove its rows gets no more rows up to step `newest`.
        """

        def go_back(name: str, tracker: Tracker) -> None:
            removed = tracker.go_back(step)
            self._seen[name] = () if removed else {*self._seen[name], *range(newest + 1)}

        self._forward(go_back)

    def _forward(self, call: Callable[[str, Tracker], object], step: int | None = None) -> None:
        """Call the trackers, without those that have the row of `step` already."""
        for name, tracker in list(self.running.items()):
            if step in self._seen[name]:
                continue
            try:
                call(name, tracker)
            except (Exception, SystemExit) as error:
                del self.running[name]
                self._warn(f"{name} stopped ({first_line(error)}); training continues, metrics.jsonl has every row")


def separate(row: Row, per_expert: bool) -> tuple[dict[str, float | int | str], dict[str, list[float]]]:
    """Separate the metrics of a row into single values, and lists with one value for each expert of a layer.

    Args:
        per_expert: whether the single values also have those of each expert, as `<name of the list>/expert_XX`.

    Returns:
        The values by name, and the lists by name. The names of lists are in the section `experts`:
        `router/load/layer_00` becomes `experts/load/layer_00`.
    """
    values: dict[str, float | int | str] = {}
    lists: dict[str, list[float]] = {}
    for name, value in row.items():
        if not isinstance(value, list):
            values[name] = value
            continue
        name = f"experts/{name.removeprefix('router/').removeprefix('experts/')}"
        lists[name] = value
        if per_expert:
            values |= {f"{name}/expert_{expert:02d}": number for expert, number in enumerate(value)}
    return values, lists
