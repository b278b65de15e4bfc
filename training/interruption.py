"""Signals that end a run after its current step: SIGTERM, SIGINT, SIGHUP and SIGUSR1, to any of its processes.

A signal sets a flag on the rank that got it. The ranks sum their flags with the token counts of the next step, before
they start it, so all ranks stop after the same step. Then they save a checkpoint together.
"""

import os
import signal
import threading
import time
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Self

from common.processes import has_ended
from parallel.startup.launch import is_launched

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
REPEAT_S = 1.0
"""A worker gets one Ctrl-C twice: from the terminal, and from its launcher. After this time it is another one."""
REPORT_S = 5.0
"""How long a rank that has lost another one can take to report what it knows, before SIGTERM ends it."""


class Interruption:
    """Handles the signals while the context is active. A signal that this process ignores stays ignored.

    A second SIGINT ends the process at once. SIGTERM ends it after `REPORT_S` if another rank of this host has
    ended: the launcher sends it then, and the step cannot end. In that time the collective that this rank waits in
    fails, and the rank reports why. For the same reason, the handlers of a rank that a launcher has started stay after
    an exception.

    Args:
        siblings: process ids of the ranks on this host.
    """

    def __init__(self, siblings: Sequence[int] = ()) -> None:
        self.agreed = 0
        """The number of the signal after which all ranks stop; 0: they go on."""
        self._siblings, self._received, self._since = siblings, 0, 0.0
        self._handlers: dict[signal.Signals, object] = {}
        self._closed = threading.Event()
        self._wakeup = (-1, -1)
        self._writer = -1

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        if is_launched():
            # The interpreter runs a handler in the main thread, which a collective can keep busy. This thread is free.
            reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            os.set_blocking(reader, True)
            self._wakeup = (reader, signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False))
            threading.Thread(target=self._watch, args=(reader,), daemon=True).start()
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if handler is not signal.SIG_IGN:
                self._handlers[number] = handler
                signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None or not is_launched():
            self.close()

    def close(self) -> None:
        """Restore what the signals did before. More calls do nothing."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what getsignal has returned
        self._handlers = {}
        self._closed.set()
        if self._writer >= 0:
            signal.set_wakeup_fd(self._wakeup[1])
            os.close(self._writer)  # The thread reads the end of the pipe.
            self._writer = -1

    def flags(self) -> list[int]:
        """Return for each of `SIGNALS` whether it is the first that this rank got."""
        return [int(number == self._received) for number in SIGNALS]

    def agree(self, counts: Sequence[int]) -> bool:
        """Take the sums of all ranks' `flags`, and return whether all ranks stop."""
        self.agreed = next((int(number) for number, count in zip(SIGNALS, counts, strict=True) if count), 0)
        return self.agreed > 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._received:
            self._received, self._since = number, time.monotonic()
        elif number == signal.SIGINT and not is_launched():
            raise KeyboardInterrupt

    def _watch(self, reader: int) -> None:
        """Read the numbers of the signals that have come, as `signal.set_wakeup_fd` writes them."""
        first: float | None = None
        while numbers := os.read(reader, 64):
            for number in numbers:
                if number == signal.SIGINT and first is not None and time.monotonic() - first > REPEAT_S:
                    os._exit(128 + number)
                lost = number == signal.SIGTERM and any(map(has_ended, self._siblings))
                if lost and not self._closed.wait(REPORT_S):
                    os._exit(128 + number)
                if number in SIGNALS and first is None:
                    first = time.monotonic()
        os.close(reader)
