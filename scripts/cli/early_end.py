"""The early end of a run: which signal was the reason, and the report of what the run has logged until then."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from parallel.startup.launch import is_launched
from training.owner import RunOwner

LIMIT_S = 20.0
"""Seconds that a report can take. torchrun waits 30 s for a rank to which it has sent SIGTERM, as Slurm does by default
for the processes of a job."""


def signal_of(error: BaseException) -> signal.Signals | None:
    """Return the signal that has ended a run with this exception, or None if it was another reason."""
    if isinstance(error, KeyboardInterrupt):
        return signal.SIGINT
    status = error.code if isinstance(error, SystemExit) else None
    return next((number for number in signal.Signals if status == 128 + number), None)


def report_early_end(owner: RunOwner, error: BaseException, message: str = "") -> None:
    """Write `report.html` of a run that has ended with `error`, if it has logged a step since it was started.

    This is the last thing that the process does for the run: its checkpoint is complete, and the message about the
    error is printed. After an error under torchrun or deepspeed no report is written, because the launcher may restart
    the ranks, and would wait for rank 0.

    Args:
        owner: has owned the run's directory. On ranks other than 0 it has none.
        message: what the user was told about the error.
    """
    from training.report.metrics import METRICS_FILE

    if not owner.has_written(METRICS_FILE) or (is_launched() and isinstance(error, Exception)):
        return
    number = signal_of(error)
    assert owner.directory is not None
    ended = (
        f"The run was ended by {number.name}." if number else f"The run has ended with an error: {message or error}."
    )
    write_in_time(owner.directory, ended)


def write_in_time(directory: Path, reason: str | None = None) -> None:
    """Write the report of a run or sweep, and print where it is.

    One line is printed instead if this fails, takes longer than `LIMIT_S`, or is stopped by Ctrl-C. No exception is
    raised.

    Args:
        reason: a sentence about why a run has no result, for its report.
    """
    from training.report.page.write import REPORT_FILE, write_report_or_say_why
    from training.report.terminal import show_line

    try:
        with _interrupted_after(LIMIT_S):
            page = write_report_or_say_why(directory, show_line, reason)
        if page is not None:
            show_line(f"report until here: {page}")
    except KeyboardInterrupt:
        show_line(f"warning: {REPORT_FILE} is not written: Ctrl-C, or it took longer than {LIMIT_S:g} s")


@contextmanager
def _interrupted_after(seconds: float) -> Iterator[None]:
    """Raise KeyboardInterrupt in the context after some seconds, if this is the main thread.

    A process of a launcher ignores SIGTERM in the context: the launcher sends it as soon as another rank has ended.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {signal.SIGALRM: signal.default_int_handler} | (
        {signal.SIGTERM: signal.SIG_IGN} if is_launched() else {}
    )
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
