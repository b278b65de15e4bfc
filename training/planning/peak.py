"""The largest memory of a step as torch's allocators count it, to compare with plans."""

from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile


class AllocatorPeak:
    """Measures, while the context is open, how far the memory of tensors rises.

    On a GPU, this is what torch's caching allocator counts. On a CPU, it is the sum of the allocator's events, which
    torch's profiler records. Memory that was allocated before and is freed in the context does not count there.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.above = 0
        """The largest number of bytes that were allocated in the context and existed at the same time."""
        on_cpu = device.type == "cpu"
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True) if on_cpu else None
        self._before = 0

    def __enter__(self) -> "AllocatorPeak":
        if self._profile is None:
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self._profile.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._profile is None:
            self.above = torch.cuda.max_memory_allocated(self.device) - self._before
            return
        self._profile.stop()
        assert self._profile.profiler is not None and self._profile.profiler.kineto_results is not None
        total = 0
        for event in self._profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                total += event.nbytes()  # type: ignore[attr-defined]
                self.above = max(self.above, total)
