"""Which ranks are at fault if a collective reaches its time-out, by what all ranks report.

A rank whose collective has failed adds a report to the key-value store of the launch, and waits a moment for those of
the other ranks. A rank that runs something else reports what that is, from a thread. A rank without a report hangs in
such a way that its threads do not run, or it does not reach the store: rank 0 serves it, so a rank on the other side
of a network that is cut cannot report.
"""

import contextlib
import os
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch.distributed as dist

from common.text import parse_json, show_ranges, to_json
from parallel.collectives import all_gather_json
from parallel.startup.launch import World

T = TypeVar("T")
REACH_S = 1.5
"""How long a rank waits for an answer of the store. It is idle then, and answers at once."""
COLLECT_S = 2.0
"""How long a rank waits for the reports of others. They reach their own time-outs at about the same time."""
REPORTS = "hang/reports"
"""The key in the store of all reports, one in a line."""


class Ranks(NamedTuple):
    """The ranks of a launch."""

    rank: int
    """That of this process."""
    hosts: list[str]
    """The host name of each rank."""
    siblings: dict[int, int]
    """Rank -> process id of the other ranks on this host."""
    heads: tuple[int, ...] = ()
    """The first rank of each host."""

    def show(self, ranks: Iterable[int]) -> str:
        """Return ranks with their hosts, as in `rank 0 (a), ranks 8-15 (b)`."""
        by_host: dict[str, list[int]] = {}
        for rank in ranks:
            by_host.setdefault(self.hosts[rank], []).append(rank)
        groups = by_host.items()
        return ", ".join(f"rank{'s' * (len(found) > 1)} {show_ranges(found)} ({host})" for host, found in groups)


def find_ranks(world: World, group: dist.ProcessGroup) -> Ranks:
    """Return the ranks of this launch. Collective.

    Args:
        group: all ranks.
    """
    found = all_gather_json([socket.gethostname(), os.getpid(), world.local_rank], group)
    first = world.rank - world.local_rank
    local = [rank for rank in range(first, first + world.local_world_size) if rank != world.rank]
    heads = tuple(rank for rank, (*_, local_rank) in enumerate(found) if local_rank == 0)
    return Ranks(world.rank, [host for host, *_ in found], {rank: found[rank][1] for rank in local}, heads)


class Report(NamedTuple):
    """What a rank does while others wait for it, or it waits for others."""

    rank: int
    step: int
    operation: str | None = None
    """The collective that the rank waits in; None: in none."""
    group: str = ""
    """The process group of this collective."""
    number: int = 0
    """How many collectives of the group the rank has started."""
    place: str = ""
    """The function that the main thread runs, with its file and line."""


class HangReports:
    """The reports of all ranks of a launch.

    Args:
        store: that of the launch. The reports use a connection of their own, because a thread of this process can wait
            in the other one.
    """

    def __init__(self, store: dist.Store, ranks: Ranks) -> None:
        self.ranks = ranks
        self._store = store.clone()  # type: ignore[attr-defined]  # torch's stubs lack it
        self._asker, self._asked = threading.Thread(), 0.0
        self._lock = threading.Lock()

    def unanswered_s(self) -> float:
        """Return for how long the store has not answered; 0 if it has."""
        return time.monotonic() - self._asked if self._asker.is_alive() else 0.0

    def wanted(self) -> bool:
        """Return whether another rank has added a report."""
        return bool(self._ask(lambda: self._store.check([REPORTS])))

    def add(self, report: Report) -> bool:
        """Add the report of this rank, or replace it. Return whether the store answers."""

        def append() -> bool:
            self._store.append(REPORTS, to_json(report) + "\n")
            return True

        return bool(self._ask(append))

    def collect(self) -> dict[int, Report]:
        """Return the reports of all ranks. Those of some are missing if they do not come within `COLLECT_S`."""
        found: dict[int, Report] = {}
        end = time.monotonic() + COLLECT_S
        while len(found) < len(self.ranks.hosts) and time.monotonic() < end:
            if self.wanted():  # Otherwise `get` would wait.
                lines = (self._ask(lambda: self._store.get(REPORTS)) or b"").splitlines()
                reports = [Report(*parse_json(line)) for line in lines]
                found = {report.rank: report for report in reports}
            time.sleep(0.1)
        return found

    def _ask(self, question: Callable[[], T]) -> T | None:
        """Return the answer of the store; None if it does not come within `REACH_S`, or an earlier one has not yet.

        torch waits without a limit for most answers, and if the network is cut, also after a limit.
        """
        answers: list[T] = []

        def ask() -> None:
            with contextlib.suppress(dist.DistError):  # Rank 0 has ended.
                answers.append(question())

        with self._lock:
            if self._asker.is_alive():
                return None
            self._asker, self._asked = threading.Thread(target=ask, daemon=True), time.monotonic()
            self._asker.start()
            self._asker.join(REACH_S)
        return answers[0] if answers else None


def blame(reports: Mapping[int, Report], ranks: Ranks) -> str:
    """Return which ranks the rank of this process waits for, as the end of a sentence.

    Args:
        reports: of the ranks that have one; empty if this rank does not reach the store.
    """
    if ranks.rank not in reports:
        return (
            f" and does not reach rank 0 ({ranks.hosts[0]}): that rank has ended, its host is down, or the network "
            f"between it and this host ({ranks.hosts[ranks.rank]}) is cut"
        )
    busy = [report for _, report in sorted(reports.items()) if report.operation is None]
    silent = [rank for rank in range(len(ranks.hosts)) if rank not in reports]
    if busy or silent:
        at_fault = [f"{ranks.show([one.rank])}, which runs {one.place} in step {one.step}" for one in busy[:3]]
        if silent:
            local = all(rank in ranks.siblings for rank in silent)
            why = "blocked" if local else "blocked, or its host is down, or the network to it is cut"
            at_fault.append(f"{ranks.show(silent)}, which give{'s' * (len(silent) == 1)} no answer ({why})")
        return f" for {' and '.join(at_fault)}"
    behind = _behind(reports)
    if behind:
        one = behind[0]
        furthest = max(report.number for report in reports.values() if report.group == one.group)
        return (
            f" for {ranks.show(report.rank for report in behind)}, which waits in {one.operation} of step {one.step}, "
            f"number {one.number} of its process group, while others are in number {furthest}"
        )
    counts = Counter(f"{report.operation} of step {report.step}" for report in reports.values())
    operations = ", ".join(f"{operation} ({number} ranks)" for operation, number in counts.most_common(3))
    return (
        f", and all ranks wait: in {operations}; connections between {', '.join(dict.fromkeys(ranks.hosts))} are "
        "broken, or the ranks wait for each other in different operations"
    )


def _behind(reports: Mapping[int, Report]) -> list[Report]:
    """Return the reports of the ranks that have started fewer collectives of their group than others in it."""
    furthest: Counter[str] = Counter()
    for report in reports.values():
        furthest[report.group] = max(furthest[report.group], report.number)
    return [report for _, report in sorted(reports.items()) if report.number < furthest[report.group]]


def main_thread_stack() -> list[str]:
    """Return where the main thread is, as `function (file:line)`, the innermost call last."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return [f"{entry.name} ({Path(entry.filename).name}:{entry.lineno})" for entry in traceback.extract_stack(frame)]
