"""What a run says if a rank waits for another one until the time-out of a collective."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common.errors import TrainingFailure
from common.files import write_atomically
from common.processes import process_state
from common.text import first_line, parse_json, to_json
from training.checkpoint.peers import StalledError
from training.hang_reports import HangReports, Ranks, Report, blame, main_thread_stack

COLLECTIVES = "collectives"
"""The directory in the run's directory with the last collectives of each rank that has failed."""
LAST = 20
INTERVAL_S = 0.5
"""How often a rank looks whether others are stopped, or wait for it."""
END_S = 3.0
"""A rank for which others have waited ends after this time, if its launcher does not end it: no other rank is on its
host."""


class FlightRecord:
    """Which step this rank is in, for the message."""

    def __init__(self) -> None:
        self.step: Callable[[], int] = lambda: 0
        """Returns the number of steps that have been started."""


@contextlib.contextmanager
def hangs_explained(directory: Path, ranks: Ranks, store: dist.Store, timeout_s: float) -> Iterator[FlightRecord]:
    """If a collective in the context fails, write down the last collectives. After a time-out, say who is at fault.

    The same is said if a rank waits for another one that reads or writes a checkpoint, and makes no progress.

    A process of this host that is stopped for as long as the limit is killed: it ignores every other signal, so its
    launcher would wait for it. A thread looks for such processes, because a rank can wait for the key-value store that
    a stopped rank 0 serves. The thread also looks whether other ranks wait for this one, and reports what it runs.

    Args:
        directory: the run's.
        store: that of the launch.
        timeout_s: the limit of a collective.

    Raises:
        TrainingFailure: in place of the error of a time-out.
    """
    record, reports = FlightRecord(), HangReports(store, ranks)
    watch = _Watch(directory, reports, record, timeout_s)
    watch.start()
    try:
        yield record
    except (StalledError, RuntimeError) as error:
        collective = isinstance(error, dist.DistError) or any(name in str(error) for name in ("gloo", "NCCL"))
        if not collective and not (isinstance(error, StalledError) and watch.kill_stopped()):
            raise
        watch.ended.set()  # This rank waits, and reports it here.
        step, entries = record.step(), last_collectives()
        with contextlib.suppress(OSError):
            write_record(directory, ranks.rank, step, entries, error)
        where = f"the last collectives of the ranks that answer are in {directory / COLLECTIVES}"
        if watch.killed:
            waited = f"rank {ranks.rank} waited {timeout_s:g} s for it in" if collective else f"{error}, in"
            raise watch.failure(f"{waited} step {step}; {where}") from error
        # A time-out can have retired the collective already. Then it is the last one.
        report = _waiting(ranks.rank, step, [entry for entry in entries if not entry["retired"]] or entries)
        report = report._replace(operation=report.operation or "a collective")
        if isinstance(error, (dist.DistStoreError, dist.DistNetworkError)):
            report = Report(ranks.rank, step, "the key-value store of rank 0")
        # When one rank has reached the time-out, gloo closes its connections, and others can fail because of that.
        late = any(sign in str(error) for sign in ("Timed out", "timed out", "timeout"))
        if not late and not (entries and _seconds_since_start(entries[-1]) > timeout_s / 2):
            if watch.reported or reports.wanted():
                raise TrainingFailure(watch.too_late(step), alone=True) from error
            raise
        waited = f"rank {ranks.rank} waited {timeout_s:g} s in {report.operation} of step {step}"
        if watch.kill_stopped():
            raise watch.failure(f"{waited}; {where}") from error
        found = reports.collect() if reports.add(report) else {}
        # One rank of each host says it.
        local = [rank for rank, one in found.items() if rank in ranks.siblings and one.operation is not None]
        first = ranks.rank <= min(local, default=ranks.rank)
        raise TrainingFailure(f"{waited}{blame(found, ranks)}; {where}", alone=first) from error
    finally:
        watch.ended.set()
        watch.join(END_S)  # It must not run when the interpreter exits.


class _Watch(threading.Thread):
    """Kills processes that are stopped for longer than a limit, and reports what this one runs if others wait for it.

    Args:
        limit_s: the limit. Only the time in which this process runs counts: Ctrl-Z stops all ranks at once.
    """

    def __init__(self, directory: Path, reports: HangReports, record: FlightRecord, limit_s: float) -> None:
        super().__init__(daemon=True)
        self.directory, self.reports, self.record, self.limit_s = directory, reports, record, limit_s
        self.processes = reports.ranks.siblings
        self.killed: dict[int, int] = {}
        self.reported = False
        """Whether other ranks know what this one runs, for which they have waited."""
        self.ended = threading.Event()

    def run(self) -> None:
        """Look at the processes every `INTERVAL_S` until `ended` is set."""
        seen: Counter[int] = Counter()
        step, since = -1, time.monotonic()
        while not self.ended.wait(INTERVAL_S):
            for rank, pid in self.processes.items():
                seen[rank] = seen[rank] + 1 if process_state(pid) == "T" else 0
            if any(times * INTERVAL_S > self.limit_s for times in seen.values()):
                self.kill_stopped()
            now = time.monotonic()
            if self.record.step() != step:
                step, since = self.record.step(), now
            elif not self.reported and now - since > self.limit_s / 2 and self.reports.wanted():
                self.report()
            if min(self.reports.unanswered_s(), now - since) > self.limit_s + END_S:
                # The main thread waits for the store. A collective would have reached its time-out before.
                self.end(f"rank {self.reports.ranks.rank} waits in step {step}{blame({}, self.reports.ranks)}")

    def report(self) -> None:
        """Report what this rank runs while others have waited for it until the time-out."""
        rank, step = self.reports.ranks.rank, self.record.step()
        entries, stack = last_collectives(), main_thread_stack()
        report = _waiting(rank, step, [entry for entry in entries if not entry["retired"]])
        report = report._replace(place=stack[-1])
        if report.operation is not None or self.ended.is_set():
            return  # This rank waits, too. It reports that at its own time-out.
        self.reported = self.reports.add(report)
        said = f"{self.too_late(step)}; it runs {report.place}"
        with contextlib.suppress(OSError):
            write_record(self.directory, rank, step, entries, TrainingFailure(said), stack)
        if not self.processes and not self.ended.wait(END_S):
            self.end(said)  # The launcher of this host has no reason to end it.

    def too_late(self, step: int) -> str:
        """Return what this rank says if others have waited for it."""
        return f"other ranks have waited {self.limit_s:g} s for rank {self.reports.ranks.rank} in step {step}, and end"

    def end(self, said: str) -> None:
        """End this process, whose main thread may never return."""
        print(f"error: {said}", file=sys.stderr, flush=True)
        os._exit(1)

    def kill_stopped(self) -> bool:
        """Kill the processes that are stopped. Return whether any was killed, now or before."""
        for rank, pid in self.processes.items():
            if process_state(pid) == "T":
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
                self.killed[rank] = pid
        return bool(self.killed)

    def failure(self, reason: str) -> TrainingFailure:
        """Return the error that names the processes that were killed."""
        names = ", ".join(f"rank {rank} (process {pid})" for rank, pid in self.killed.items())
        return TrainingFailure(f"{names} was stopped, and is killed: {reason}", alone=True)


def last_collectives() -> list[dict[str, Any]]:
    """Return the last collectives of this rank from torch's flight recorder, the oldest first."""
    recorded = getattr(torch._C._distributed_c10d, "_dump_fr_trace_json", None)
    if recorded is None:
        return []
    keys = ("profiling_name", "process_group", "collective_seq_id", "input_sizes", "input_dtypes", "retired")
    entries = parse_json(recorded(True, False)).get("entries", [])
    return [{key: entry[key] for key in (*keys, "time_created_ns")} for entry in entries[-LAST:]]


def _waiting(rank: int, step: int, entries: list[dict[str, Any]]) -> Report:
    """Return the report of a rank that waits in the last of these collectives; if there is none, in none."""
    if not entries:
        return Report(rank, step)
    last = entries[-1]
    return Report(rank, step, last["profiling_name"], last["process_group"][0], last["collective_seq_id"])


def _seconds_since_start(entry: dict[str, Any]) -> float:
    return time.time() - float(entry["time_created_ns"]) / 1e9


def write_record(
    directory: Path,
    rank: int,
    step: int,
    entries: list[dict[str, Any]],
    error: Exception,
    stack: list[str] | None = None,
) -> None:
    """Write the last collectives of this rank to `<directory>/collectives/rank-<rank>.json`.

    Args:
        stack: what the main thread runs, if that is not a collective.
    """
    (directory / COLLECTIVES).mkdir(exist_ok=True)
    content = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid(), "step": step, "time": time.time()}
    content |= {"error": first_line(error), "stack": stack or [], "collectives": entries}
    text = to_json(content, indent=2)
    write_atomically(directory / COLLECTIVES / f"rank-{rank}.json", text + "\n")
