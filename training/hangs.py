"""What a run says if a rank waits for another one until the time-out of a collective."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common.errors import TrainingFailure
from common.files import write_atomically
from common.processes import process_state
from common.text import first_line, parse_json, to_json
from training.checkpoint.peers import StalledError

COLLECTIVES = "collectives"
"""The directory in the run's directory with the last collectives of each rank that has failed."""
LAST = 20
INTERVAL_S = 0.5
"""How often a rank looks whether others are stopped."""


class FlightRecord:
    """Which step this rank is in, for the message."""

    def __init__(self) -> None:
        self.step: Callable[[], int] = lambda: 0
        """Returns the number of steps that have been started."""


@contextlib.contextmanager
def hangs_explained(
    directory: Path, rank: int, siblings: Mapping[int, int], timeout_s: float
) -> Iterator[FlightRecord]:
    """If a collective in the context fails, write down the last collectives. After a time-out, say who is at fault.

    The same is said if a rank waits for another one that reads or writes a checkpoint, and makes no progress.

    A process of this host that is stopped for as long as the limit is killed: it ignores every other signal, so its
    launcher would wait for it. A thread looks for such processes, because a rank can wait without a limit for the
    key-value store that a stopped rank 0 serves.

    Args:
        directory: the run's.
        siblings: rank -> process id, of the ranks on this host.
        timeout_s: the limit of a collective.

    Raises:
        TrainingFailure: in place of the error of a time-out.
    """
    record = FlightRecord()
    watch = _Watch({other: pid for other, pid in siblings.items() if other != rank}, timeout_s)
    watch.start()
    try:
        yield record
    except (StalledError, RuntimeError) as error:
        collective = isinstance(error, dist.DistError) or any(name in str(error) for name in ("gloo", "NCCL"))
        if not collective and not (isinstance(error, StalledError) and watch.kill_stopped()):
            raise
        step, entries = record.step(), last_collectives()
        with contextlib.suppress(OSError):
            write_record(directory, rank, step, entries, error)
        where = f"the last collectives of the ranks that answer are in {directory / COLLECTIVES}"
        if watch.killed:
            waited = f"rank {rank} waited {timeout_s:g} s for it in" if collective else f"{error}, in"
            raise watch.failure(f"{waited} step {step}; {where}") from error
        if not any(sign in str(error) for sign in ("Timed out", "timed out", "timeout")):
            raise
        # A time-out can have retired the collective already. Then it is the last one.
        waiting = [entry for entry in entries if not entry["retired"]] or entries
        operation = waiting[-1]["profiling_name"] if waiting else "a collective"
        waited = f"rank {rank} waited {timeout_s:g} s in {operation} of step {step}"
        if watch.kill_stopped():
            raise watch.failure(f"{waited}; {where}") from error
        raise TrainingFailure(f"{waited} for a rank that runs but does not answer; {where}", alone=True) from error
    finally:
        watch.ended.set()


class _Watch(threading.Thread):
    """Kills processes that are stopped for longer than a limit.

    Args:
        processes: rank -> process id.
        limit_s: the limit. Only the time in which this process runs counts: Ctrl-Z stops all ranks at once.
    """

    def __init__(self, processes: Mapping[int, int], limit_s: float) -> None:
        super().__init__(daemon=True)
        self.processes, self.limit_s = processes, limit_s
        self.killed: dict[int, int] = {}
        self.ended = threading.Event()

    def run(self) -> None:
        """Look at the processes every `INTERVAL_S` until `ended` is set."""
        seen: Counter[int] = Counter()
        while not self.ended.wait(INTERVAL_S):
            for rank, pid in self.processes.items():
                seen[rank] = seen[rank] + 1 if process_state(pid) == "T" else 0
            if any(times * INTERVAL_S > self.limit_s for times in seen.values()):
                self.kill_stopped()

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
    return [{key: entry[key] for key in keys} for entry in entries[-LAST:]]


def write_record(directory: Path, rank: int, step: int, entries: list[dict[str, Any]], error: Exception) -> None:
    """Write the last collectives of this rank to `<directory>/collectives/rank-<rank>.json`."""
    (directory / COLLECTIVES).mkdir(exist_ok=True)
    content = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid(), "step": step, "time": time.time()}
    text = to_json(content | {"error": first_line(error), "collectives": entries}, indent=2)
    write_atomically(directory / COLLECTIVES / f"rank-{rank}.json", text + "\n")
