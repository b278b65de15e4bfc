"""The time that this process waits for other ranks."""

import time
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist


class WaitingClock:
    """A context manager that measures how long this process waits for collectives, in `seconds`.

    The slowest rank makes all others wait, so that every rank needs the same time for a step. Without the time in which
    it waits, a rank's time is its own.

    Inside of the context, the method `wait` of torch's `Work` is timed. Every collective that torch, FSDP and this
    project start from Python ends in it. With NCCL it returns before the collective has ended, so that on GPUs only the
    time of the host is measured.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> Self:
        self._wait = dist.Work.wait
        original, clock = self._wait, self

        def wait(work: dist.Work, *args: Any, **kwargs: Any) -> Any:
            start = time.monotonic()
            try:
                return original(work, *args, **kwargs)
            finally:
                clock.seconds += time.monotonic() - start

        dist.Work.wait = wait  # type: ignore[assignment, method-assign]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        dist.Work.wait = self._wait  # type: ignore[method-assign]
