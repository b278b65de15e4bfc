"""The tracker that writes event files for TensorBoard, and what such files have."""

import os
import struct
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from common.files import open_binary
from common.text import flat, show_value
from training.config import TrackingConfig
from training.report.alarms import Alarm
from training.report.code_state import code_state
from training.report.metrics import Row
from training.report.trackers import TrackedRun, Tracker, separate

DIRECTORY = "tensorboard"
LENGTH = struct.Struct("<Q")
CHECKSUM_BYTES = 4
"""A record is its length, the checksum of the length, the content, and the checksum of the content."""
MAX_RECORD_BYTES = 2**26
LAST_OF_ROW = "train/loss"
"""The metric that is written last. A row without it is incomplete, because the process was killed."""


class TensorBoardTracker(Tracker):
    """Writes event files into the directory `tensorboard` of the run.

    A single value is a scalar. The values of a layer's experts are a histogram with one bin for each expert, which
    TensorBoard draws over the steps; with `tracking.per_expert` they are scalars, too. Texts and alarms are under
    *Text*, plots under *Images*.

    Args:
        config: the section `tracking`.
        run: if it is resumed, the events up to its checkpoint are kept, and later ones removed.

    Raises:
        OSError: the files cannot be written.
    """

    def __init__(self, config: TrackingConfig, run: TrackedRun) -> None:
        self._per_expert, self._directory = config.per_expert, run.directory / DIRECTORY
        self._step = run.resumed_step or 0
        self._steps = remove_events(self._directory, after=-1 if run.resumed_step is None else run.resumed_step)
        self._config: str | None = _as_table(run.config | {"code": code_state()})
        self._open()

    def seen(self) -> Collection[int]:
        return self._steps

    def log(self, row: Row, step: int) -> None:
        self._step = step
        if self._config is not None:  # With a row, because the steps in a file must not decrease.
            self._writer.add_text("config", self._config, step)
            self._config = None
        values, lists = separate(row, self._per_expert)
        for name, value_E in lists.items():
            self._add_histogram(name, value_E, step)
        for name, value in sorted(values.items(), key=lambda item: item[0] == LAST_OF_ROW):
            if isinstance(value, str):
                self._writer.add_text(name, value, step)
            else:
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def go_back(self, step: int) -> bool:
        self._writer.close()
        remove_events(self._directory, after=step)
        self._open()
        return True

    def alert(self, alarm: Alarm) -> None:
        self._writer.add_text(f"alarms/{alarm.rule}", alarm.message, alarm.step)

    def summary(self, values: dict[str, Any]) -> None:
        self._writer.add_text("result", _as_table(values), self._step)

    def image(self, name: str, path: Path) -> None:
        from matplotlib.image import imread

        self._writer.add_image(name, imread(path), self._step, dataformats="HWC")

    def finish(self) -> None:
        self._writer.close()

    def _open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._directory))

    def _add_histogram(self, name: str, value_E: list[float], step: int) -> None:
        """Add a histogram over the expert's index, in which expert e has the bin from e to e + 1."""
        import numpy as np

        values = np.asarray(value_E)
        if not np.isfinite(values).all():
            return  # A histogram has no NaN.
        middle_E = np.arange(len(values)) + 0.5
        self._writer.add_histogram_raw(
            name,
            min=0,
            max=len(values),
            num=float(values.sum()),
            sum=float(values @ middle_E),
            sum_squares=float(values @ middle_E**2),
            bucket_limits=(middle_E + 0.5).tolist(),
            bucket_counts=value_E,
            global_step=step,
        )


def _as_table(values: Mapping[str, Any]) -> str:
    """Return nested values as a table in Markdown, with dotted names."""
    lines = (f"| {name} | {show_value(value).replace('|', chr(92) + '|')} |" for name, value in flat(values))
    return "\n".join(["| key | value |", "|---|---|", *lines])


def remove_events(directory: Path, after: int) -> set[int]:
    """Remove the events of steps later than `after` from the event files in `directory`, and those of incomplete rows.

    Returns:
        The steps whose rows the files still have.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    steps = set[int]()
    for path in sorted(directory.glob("events.out.tfevents.*")):
        kept = 0
        for end, content in read_records(path):
            try:
                event = Event.FromString(content)
            except DecodeError:
                break
            if event.step > after:
                break
            if any(value.tag == LAST_OF_ROW for value in event.summary.value):
                steps.add(event.step)
            if event.step in steps:
                kept = end
        if kept:
            os.truncate(path, kept)
        else:
            path.unlink()
    return steps


def read_records(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the records of an event file: the position behind each and its content, up to an incomplete one."""
    with open_binary(path) as file:
        while len(head := file.read(LENGTH.size + CHECKSUM_BYTES)) == LENGTH.size + CHECKSUM_BYTES:
            (size,) = LENGTH.unpack_from(head)
            if size > MAX_RECORD_BYTES:
                return
            content, checksum = file.read(size), file.read(CHECKSUM_BYTES)
            if len(content) < size or len(checksum) < CHECKSUM_BYTES:
                return
            yield file.tell(), content
