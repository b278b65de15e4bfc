"""Goodput: the share of a run's time in which it made progress, over all of its launches and restarts.

Rank 0 keeps the account in `goodput.json` in the run's directory, so that it outlives a killed process.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from common.files import atomic_file, read_file
from common.text import parse_json, to_json
from training.report.terminal import human_time

FILE = "goodput.json"
USEFUL = "step"
CAUSES = {
    USEFUL: "optimizer steps",
    "start": "start",
    "load": "loading checkpoints",
    "save": "saving checkpoints",
    "evaluation": "evaluation",
    "compare": "comparing replicas",
    "repeated": "repeated steps",
    "skipped": "steps that changed no weight",
    "down": "from a failure to the restart",
    "other": "other",
}
"""Name -> description of what a run spends its time on. `other` is the rest, such as logging and trackers."""
MAX_BYTES = 2**16
"""The file is smaller."""
MAX_NUMBER = 2**53
"""Its numbers are below this: seconds, steps, restarts. JSON can also have infinite ones."""
WRITE_EVERY_S = 1.0
"""Seconds between two writes of the file. A step that takes longer delays the next one."""


class Goodput:
    """The account of one run. Other ranks than 0 keep one, too, but write no file.

    Args:
        directory: the run's directory; None: no file is read or written.
        start: when this process started, by `clock`.
        new: whether the run starts at step 0 without a restart. An older account in the directory does not count then.
        restarted: whether the launcher has restarted the workers after a failure.
        clock: returns monotonic seconds.
        wall_clock: returns seconds that go on while no process runs.
    """

    def __init__(
        self,
        directory: Path | None,
        start: float,
        *,
        new: bool,
        restarted: bool,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._file = None if directory is None else directory / FILE
        self._clock, self._wall_clock = clock, wall_clock
        before = {} if self._file is None or new else _read(self._file)
        self.seconds: dict[str, float] = {cause: before.get(cause, 0.0) for cause in CAUSES}
        self.furthest = int(before.get("furthest_step", 0))
        """The last step that any process of the run has done. A step up to it is a repeated one."""
        self.restarts = int(before.get("restarts", 0)) + restarted
        if restarted and "written_at" in before:
            gap = wall_clock() - (clock() - start) - before["written_at"]
            self.seconds["down"] += max(0.0, gap)
        self._earlier = sum(self.seconds.values())
        self._start, self._counted, self._written = start, 0.0, start

    def add(self, cause: str, seconds: float) -> None:
        """Count `seconds` of this process as spent on `cause`."""
        self.seconds[cause] += seconds
        self._counted += seconds

    @contextmanager
    def spent_on(self, cause: str) -> Iterator[None]:
        """Count the time of the context as spent on `cause`."""
        start = self._clock()
        try:
            yield
        finally:
            self.add(cause, self._clock() - start)

    def started(self) -> None:
        """Count the time since the start of the process that has no other cause as its start."""
        self.add("start", self._clock() - self._start - self._counted)

    def step(self, done: int, seconds: float, *, refused: bool) -> None:
        """Count an optimizer step."""
        self.add("repeated" if done <= self.furthest else "skipped" if refused else USEFUL, seconds)
        self.furthest = max(self.furthest, done)
        if self._clock() - self._written > WRITE_EVERY_S:
            self.write()

    def write(self) -> None:
        """Write the account to the file."""
        self._settle()
        self._written = self._clock()
        if self._file is not None:
            account = self.seconds | {
                "furthest_step": self.furthest,
                "restarts": self.restarts,
                "written_at": self._wall_clock(),
            }
            # It is not flushed to the disk: after a power cut the account starts again. Without it, training goes on.
            with suppress(OSError), atomic_file(self._file, flush=False) as file:
                file.write(f"{to_json(account, indent=2)}\n".encode())

    def summary(self) -> dict[str, Any]:
        """Return the account for `result.json`: the share of useful time, and the seconds by cause."""
        self._settle()
        wall = sum(self.seconds.values())
        return {"share": self.seconds[USEFUL] / wall if wall else None, "wall_s": wall, "seconds": dict(self.seconds)}

    def _settle(self) -> None:
        """Count the time that has no cause as `other`."""
        wall = self._clock() - self._start
        self.add("other", max(0.0, wall - self._counted))


def goodput_line(summary: Mapping[str, Any], restarts: int) -> str:
    """Return the account in one line, the largest losses first.

    >>> goodput_line({"share": 0.9, "wall_s": 20.0, "seconds": {"step": 18.0, "save": 0.5, "start": 1.5}}, restarts=1)
    '90.0 % of 20.0 s in optimizer steps; start 1.50 s, saving checkpoints 0.50 s; 1 restart'
    """
    share = 0.0 if summary["share"] is None else summary["share"]
    lost = sorted(((s, cause) for cause, s in summary["seconds"].items() if cause != USEFUL), reverse=True)
    named = ", ".join(f"{CAUSES[cause]} {human_time(seconds)}" for seconds, cause in lost if seconds >= 0.005)
    parts = [f"{share:.1%}".replace("%", " %") + f" of {human_time(summary['wall_s'])} in {CAUSES[USEFUL]}", named]
    if restarts:
        parts.append(f"{restarts} restart{'s' * (restarts > 1)}")
    return "; ".join(part for part in parts if part)


def _read(file: Path) -> dict[str, float]:
    """Return the numbers in the file; empty if it is missing or damaged."""
    try:
        account = parse_json(read_file(file, MAX_BYTES))
        return {key: value for key, value in account.items() if type(value) in (int, float) and 0 <= value < MAX_NUMBER}
    except (OSError, ValueError, AttributeError):
        return {}
