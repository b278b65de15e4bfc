"""When and how a run saves its checkpoints: at once or in the background, what is refused, and what a failure does."""

import copy
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import CheckpointError
from moe.region import LocalShard
from training.checkpoint.checkpoint import Assignment, assign, prune, write
from training.checkpoint.manifest import Retention, step_of
from training.checkpoint.peers import NotFiniteError, Peers, StalledError
from training.checkpoint.shards import as_shard
from training.config import CheckpointConfig

PATIENCE_S = 20.0
"""Seconds without progress after which a run that has failed no longer waits for the checkpoint in flight."""
NICE = 10
"""The priority of the thread that writes in the background, as nice(1) takes it, unless the process has a lower one."""
Tensors = Mapping[str, Tensor | LocalShard]


class Outcome(NamedTuple):
    """How a save has ended. The same on all ranks, apart from the time."""

    step: int
    path: Path | None
    """The checkpoint; None if it was not saved."""
    error: Exception | None
    """Why it was not saved, or, if it was, why older checkpoints could not be deleted."""
    seconds: float
    """The time from the start of the save to its end."""


class Saver:
    """Saves the checkpoints of one run. All ranks call its methods alike, from the thread of the training loop.

    With `checkpoint.background`, `save` copies what this rank writes to the CPU, into pinned memory if it comes from a
    GPU, and a thread writes the copy. The memory is allocated once, for one checkpoint, so one save at most is in
    flight. As a context manager, a saver finishes this save before it is left, whatever has ended the run.

    Args:
        root: the directory of the checkpoints.
        peers: the ranks. Nothing else may use this object, because a thread does.
        newest: the checkpoint that the run continues from.
        note: receives lines for the user.
    """

    def __init__(
        self, root: Path, config: CheckpointConfig, peers: Peers, newest: str | None, note: Callable[[str], None]
    ) -> None:
        self.newest = newest
        """The newest checkpoint that was saved or that the run continues from."""
        self._root, self._config, self._peers, self._note = root, config, peers, note
        self._retention = Retention(config.keep, config.keep_every, config.keep_best)
        self._assignment: Assignment | None = None
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None
        self._figures: dict[str, float] = {}

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
        elif self._thread is not None:
            self._note("the checkpoint that is being written is finished first")
            self._peers.timeout_s = min(self._peers.timeout_s, PATIENCE_S)
            try:
                self.finish()
            except Exception as failure:  # The first error is the one to show.
                self._note(f"a checkpoint was not saved: {failure}")

    def prepare(self, tensors: Callable[[], Tensors]) -> None:
        """Allocate the memory of the copies, if checkpoints are saved in the background. Collective.

        Args:
            tensors: as in `save`.
        """
        if self._config.background:
            self._copy(self._choose(tensors()))

    @property
    def newest_step(self) -> int:
        """The step of `newest`; 0: there is none."""
        return 0 if self.newest is None else step_of(Path(self.newest))

    def refuse(self, step: int, reason: str) -> None:
        """Say that the checkpoint of `step` is not saved."""
        kept = "there is no checkpoint yet" if self.newest is None else f"the newest checkpoint is still {self.newest}"
        self._note(f"step {step} is not saved: {reason}; {kept}")

    def save(self, step: int, tensors: Callable[[], Tensors], state: dict[str, Any]) -> None:
        """Save a checkpoint of `step`, unless a tensor is not finite, and delete those that are not kept. Collective.

        Args:
            tensors: returns name -> a whole tensor, or this rank's shard: the same names and regions at every call.
            state: JSON-serialisable.

        Raises:
            CheckpointError: on all ranks, if any rank failed, unless `checkpoint.on_error` is `warn`. In the
                background, a later call of `poll`, `save` or `finish` raises it.
            StalledError: on all ranks, if a rank made no progress for `checkpoint.io_timeout_s` seconds.
        """
        start = time.monotonic()
        self.finish()
        parts = self._choose(tensors())
        if self._config.background:
            arguments = (step, self._copy(parts), copy.deepcopy(state), start)
            self._thread = threading.Thread(target=self._run, args=arguments, name=f"save-{step}", daemon=True)
            self._thread.start()
        else:
            self._run(step, parts, state, start)
            self._conclude()
        self._figures["speed/checkpoint_stall_s"] = time.monotonic() - start

    def poll(self) -> None:
        """Report the save in flight if it has ended on all ranks. Collective.

        Raises:
            CheckpointError: as in `save`.
        """
        if self._thread is None:
            return
        ended = torch.tensor(int(not self._thread.is_alive()))
        if self._peers.world_size > 1:  # All ranks must learn of a failure after the same step.
            dist.all_reduce(ended, op=dist.ReduceOp.MIN)
        if ended.item():
            self.finish()

    def finish(self) -> None:
        """Wait for the save in flight, if there is one, and report it. Collective.

        Raises:
            CheckpointError: as in `save`.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._conclude()

    def take_figures(self) -> dict[str, float]:
        """Return the metrics of the saves since the last call, in seconds.

        They are `speed/checkpoint_stall_s`, the time for which the training loop waited, and `speed/checkpoint_s`, the
        time until the checkpoint was complete and older ones were deleted.
        """
        figures, self._figures = self._figures, {}
        return figures

    def _choose(self, tensors: Tensors) -> list[tuple[str, Tensor]]:
        """Return (name in the file, tensor) pairs that this rank writes."""
        shards = {name: as_shard(tensor) for name, tensor in tensors.items()}
        if self._assignment is None:
            self._assignment = assign(self._root, shards, self._peers)
        return self._assignment.choose(shards)

    def _copy(self, parts: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
        """Copy the tensors into memory that is allocated at the first call."""
        for name, tensor in parts:
            if name not in self._copies:
                self._copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._copies[name].copy_(tensor.detach(), non_blocking=True)
        if any(tensor.is_cuda for _, tensor in parts):
            torch.cuda.synchronize()
        return list(self._copies.items())

    def _run(self, step: int, parts: list[tuple[str, Tensor]], state: dict[str, Any], start: float) -> None:
        """Write the checkpoint, and delete those that are not kept. A background thread can call it."""
        assert self._assignment is not None
        if self._config.background and sys.platform == "linux":  # where a priority is that of a thread
            thread = threading.get_native_id()
            # Only root can raise a priority, and the process may have a lower one.
            os.setpriority(os.PRIO_PROCESS, thread, max(NICE, os.getpriority(os.PRIO_PROCESS, thread)))
        path, error = None, None
        try:
            path = write(self._root, step, self._assignment, parts, state, self._peers)
            prune(self._root, step, self._retention, self._peers)
        except Exception as caught:
            error = caught
        self._outcome = Outcome(step, path, error, time.monotonic() - start)

    def _conclude(self) -> None:
        """Report how the last save has ended."""
        assert self._outcome is not None
        step, path, error, seconds = self._outcome
        if path is not None:
            self.newest = str(path)
            self._figures["speed/checkpoint_s"] = seconds
            self._note(f"saved {path}{f' in the background, in {seconds:.1f} s' if self._config.background else ''}")
        if error is None:
            return
        if isinstance(error, NotFiniteError):
            self.refuse(step, str(error))
            return
        if not isinstance(error, CheckpointError) or isinstance(error, StalledError) or self._config.on_error == "stop":
            raise error
        if path is None:
            self.refuse(step, f"{error} (checkpoint.on_error=warn)")
        else:
            self._note(f"warning: {error} (checkpoint.on_error=warn)")
