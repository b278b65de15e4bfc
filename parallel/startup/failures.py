"""Why a launcher has restarted its workers, for the workers that it starts next."""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.files import write_atomically
from common.text import parse_json, shorten, to_json

LAST_FAILURE = "MIXWRIGHT_LAST_FAILURE"
"""Environment variable of a restarted worker: which worker of the attempt before failed, and how."""


@contextlib.contextmanager
def failures_recorded(reports: Path) -> Iterator[None]:
    """Make torch's elastic agent write a line about the worker that failed before it restarts the workers.

    The agent itself does not tell the new workers. It reports the first failure that it sees, which can be that of a
    worker that has lost its connection. If a signal has killed a worker, the agent is made to report that one.

    Args:
        reports: the directory of `write_report`.
    """
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
    from torch.distributed.launcher import api

    agent = api.LocalElasticAgent

    class Agent(agent):  # type: ignore[misc, valid-type]
        def _monitor_workers(self, worker_group: Any) -> Any:
            # When the agent sees a failure, it ends the other workers with SIGTERM. So they are looked at before, too.
            before = self._ended(worker_group)
            result = super()._monitor_workers(worker_group)
            if result.is_failed():
                attempt = worker_group.spec.max_restarts - self._remaining_restarts
                after = self._ended(worker_group).items()
                ended = {rank: end for rank, end in after if end.exitcode != -signal.SIGTERM} | before
                killed = {rank: end for rank, end in ended.items() if end.exitcode < 0}
                result.failures = killed or result.failures
                failed = {rank: end.exitcode for rank, end in (ended | result.failures).items()}
                messages = {rank: report["message"] for rank, report in read_reports(reports, attempt).items()}
                _file(reports, attempt).write_text(describe_failure(failed, messages), encoding="utf-8")
            return result

        def _ended(self, worker_group: Any) -> dict[int, ProcessFailure]:
            """Return how the workers have ended that have failed, by their ranks."""
            context = getattr(self._pcontext, "_pc", None)
            return {
                worker_group.workers[local].global_rank: ProcessFailure(local, process.pid, process.exitcode, "")
                for local, process in enumerate(context.processes if context else ())
                if process.exitcode
            }

    api.LocalElasticAgent = Agent  # type: ignore[misc]
    try:
        yield
    finally:
        api.LocalElasticAgent = agent  # type: ignore[misc]


def write_report(reports: Path, attempt: int, rank: int, exitcode: int, message: str) -> None:
    """Leave the reason why this worker ends, for the launcher. The agent can kill the worker at any moment.

    Args:
        attempt: how often the workers have been restarted.
        message: one line for the user, or a traceback.
    """
    write_atomically(reports / f"{attempt}-{rank}.json", to_json({"exitcode": exitcode, "message": message}))


def read_reports(reports: Path, attempt: int) -> dict[int, dict[str, Any]]:
    """Return the `exitcode` and the `message` of each rank that has left a report, in the order of the ranks."""
    files = {int(file.stem.partition("-")[2]): file for file in reports.glob(f"{attempt}-*.json")}
    return {rank: parse_json(files[rank].read_bytes()) for rank in sorted(files)}


def last_failure(reports: Path, restarts: int) -> str | None:
    """Return the line about the failure before the restart number `restarts`; None before the first restart."""
    file = _file(reports, restarts - 1)
    return file.read_text(encoding="utf-8") if restarts and file.exists() else None


def describe_failure(failed: dict[int, int], messages: dict[int, str]) -> str:
    """Return which rank failed and how, in one line.

    The other ranks can have failed because they lost their connection to the rank at fault. So a rank that a signal
    killed comes first, and then one whose report is a line and no traceback.

    Args:
        failed: rank -> exit status; minus the number of the signal if one killed the rank.
        messages: rank -> the message of its report, for the ranks that have left one.
    """
    lines = {rank: messages.get(rank, "").strip().splitlines() for rank in failed}
    rank, code = min(failed.items(), key=lambda item: (item[1] >= 0, len(lines[item[0]]) != 1, item[0]))
    if code < 0:
        return f"rank {rank} was killed by {signal.Signals(-code).name}"
    said = [shorten(line, 300) for line in lines[rank][-1:]]
    return ": ".join([f"rank {rank} ended with exit status {code}", *said])


def _file(reports: Path, attempt: int) -> Path:
    return reports / f"failure-{attempt}.txt"
