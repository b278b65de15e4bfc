"""The tracker that writes `metrics.csv`, for spreadsheets and `pandas.read_csv`."""

import codecs
import csv
import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.files import atomic_file, open_binary
from common.text import one_line
from training.config import TrackingConfig
from training.report.metrics import Row
from training.report.trackers import TrackedRun, Tracker, separate

FILE = "metrics.csv"


class CsvTracker(Tracker):
    """Writes a line for each row of `metrics.jsonl`. Its first cell is the step. A value that the row lacks is empty.

    The values of single experts are columns only with `tracking.per_expert`. If a row has a metric that no row before
    had, such as the first held-out loss, the file is replaced by one with a further column at the end.

    Args:
        config: the section `tracking`.
        run: if it is resumed, the lines up to its checkpoint are kept. Later lines, and an incomplete last one, are
            removed.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, config: TrackingConfig, run: TrackedRun) -> None:
        self._per_expert, self._path = config.per_expert, run.directory / FILE
        self._columns, self._steps = {"step": None}, set[int]()
        if run.resumed_step is not None:
            self._columns |= dict.fromkeys(next(_complete_lines(self._path), []))
        self._rewrite(-1 if run.resumed_step is None else run.resumed_step)

    def seen(self) -> Collection[int]:
        return self._steps

    def log(self, row: Row, step: int) -> None:
        values, _ = separate(row, self._per_expert)
        if values.keys() - self._columns.keys():
            self._file.close()
            self._columns |= dict.fromkeys(values)
            self._rewrite(step - 1)
        cells = {name: one_line(value) if isinstance(value, str) else value for name, value in values.items()}
        _writer(self._file, self._columns).writerow({"step": step} | cells)
        self._file.flush()

    def go_back(self, step: int) -> bool:
        self._file.close()
        self._rewrite(step)
        return True

    def finish(self) -> None:
        self._file.close()

    def _rewrite(self, last_step: int) -> None:
        """Replace the file by one that has all columns and the lines up to `last_step`, and open it to append lines."""
        self._steps.clear()
        with atomic_file(self._path) as file:
            writer = _writer(codecs.getwriter("utf-8")(file), self._columns)
            writer.writeheader()
            for line in _lines_up_to(self._path, last_step):
                writer.writerow(line)
                self._steps.add(int(line["step"]))
        self._file = self._path.open("a", encoding="utf-8", newline="")


def _writer(file: Any, columns: Collection[str]) -> "csv.DictWriter[str]":
    return csv.DictWriter(file, columns, lineterminator="\n")


def _complete_lines(path: Path) -> Iterator[list[str]]:
    """Yield the cells of every line, the header first, up to the end of the file or its first damage.

    There is none if the file is missing or has no header of this tracker.
    """
    if not os.path.lexists(path):
        return
    with open_binary(path) as file:
        text = (line.decode(errors="replace") for line in file if line.endswith(b"\n"))
        columns: list[str] = []
        with suppress(csv.Error):
            for cells in csv.reader(text):
                columns = columns or cells
                if columns[:1] != ["step"] or len(cells) != len(columns):
                    return
                yield cells


def _lines_up_to(path: Path, last_step: int) -> Iterator[dict[str, str]]:
    """Yield the lines of the steps up to `last_step`, as cells by column."""
    lines = _complete_lines(path)
    columns = next(lines, [])
    for cells in lines:
        if not cells[0].isdecimal() or int(cells[0]) > last_step:
            return
        yield dict(zip(columns, cells, strict=True))
