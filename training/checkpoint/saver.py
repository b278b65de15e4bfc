"""When and how a run saves its checkpoints: at once or in the background, what is refused, and what a failure does."""

import copy
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
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
from training.checkpoint.remote import RemoteCheckpoints
from training.checkpoint.shards import as_shard
from training.config import CheckpointConfig

PATIENCE_S = 20.0
"""Seconds without progress after which a run that has failed no longer waits for the checkpoint in flight."""
NICE = 10
"""The priority of the thread that writes in the background, as nice(1) takes it, unless the process has a lower one."""
Tensors = Mapping[str, Tensor | LocalShard]


class Outcome(NamedTuple):
    """How a save has ended. The same on all ranks, apart from the times."""

    step: int
    path: Path | None
    """The checkpoint; None if it was not saved."""
    errors: list[Exception]
    """Why it was not saved, or, if it was, why it could not be copied or older checkpoints could not be deleted."""
    save_s: float | None
    """The time from the start of the save until older checkpoints were deleted; None if it was only copied."""
    copy_s: float | None
    """The time for which it was copied to the remote store; None if it was not."""


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
        remote: where every checkpoint is copied to.
    """

    def __init__(
        self,
        root: Path,
        config: CheckpointConfig,
        peers: Peers,
        newest: str | None,
        note: Callable[[str], None],
        remote: RemoteCheckpoints | None = None,
    ) -> None:
        self.newest = newest
        """The newest checkpoint that was saved or that the run continues from."""
        self._root, self._config, self._peers, self._note, self._remote = root, config, peers, note, remote
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

        If the remote store lacks the checkpoint that the run continues from, it is copied there.

        Args:
            tensors: as in `save`.

        Raises:
            CheckpointError: as in `save`.
        """
        if self._config.background:
            self._copy(self._choose(tensors()))
        if self._remote is not None and self.newest is not None:
            self._begin(partial(self._upload, Path(self.newest)))

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
            parts, state = self._copy(parts), copy.deepcopy(state)
        self._begin(partial(self._run, step, parts, state, start))
        self._figures["speed/checkpoint_stall_s"] = time.monotonic() - start

    def go_back(self, path: str) -> None:
        """Continue from the checkpoint `path` after newer ones have been deleted, and delete their copies. Collective.

        Raises:
            CheckpointError: as in `save`.
        """
        self.newest = path
        if self._remote is not None:
            try:
                self._remote.delete_after(self.newest_step, self._peers)
            except CheckpointError as error:
                self._warn_or_raise(error)

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

        They are `speed/checkpoint_stall_s`, the time for which the training loop waited, `speed/checkpoint_s`, the
        time until the checkpoint was complete and older ones were deleted, and `speed/checkpoint_upload_s`, the time
        for which it was then copied to the remote store.
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

    def _begin(self, work: Callable[[], Outcome]) -> None:
        """Call `work` and report how it has ended, in a thread if checkpoints are saved in the background."""

        def run() -> None:
            if self._config.background and sys.platform == "linux":  # where a priority is that of a thread
                thread = threading.get_native_id()
                # Only root can raise a priority, and the process may have a lower one.
                os.setpriority(os.PRIO_PROCESS, thread, max(NICE, os.getpriority(os.PRIO_PROCESS, thread)))
            self._outcome = work()

        if self._config.background:
            self._thread = threading.Thread(target=run, name="save", daemon=True)
            self._thread.start()
        else:
            run()
            self._conclude()

    def _run(self, step: int, parts: list[tuple[str, Tensor]], state: dict[str, Any], start: float) -> Outcome:
        """Write the checkpoint, delete those that are not kept, and copy it. A background thread can call it."""
        assert self._assignment is not None
        errors = []
        try:
            path = write(self._root, step, self._assignment, parts, state, self._peers)
        except Exception as error:
            return Outcome(step, None, [error], None, None)
        try:
            prune(self._root, step, self._retention, self._peers)
        except Exception as error:
            errors.append(error)
        seconds = time.monotonic() - start
        if self._remote is None or any(isinstance(error, StalledError) for error in errors):
            return Outcome(step, path, errors, seconds, None)
        copied = self._upload(path)
        return copied._replace(errors=errors + copied.errors, save_s=seconds)

    def _upload(self, path: Path) -> Outcome:
        """Copy a checkpoint to the remote store, and delete those that are not kept there."""
        assert self._remote is not None
        start, step, seconds = time.monotonic(), step_of(path), None
        errors: list[Exception] = []
        saved = f"{path} is saved, but it could not be copied to {self._remote.url}"
        try:
            if self._remote.upload(path, self._peers):
                seconds = time.monotonic() - start
                saved = f"{path} is copied to {self._remote.url}, but older checkpoints could not be deleted there"
                self._remote.prune(step, self._retention, self._peers)
        except StalledError as error:
            errors.append(error)
        except CheckpointError as error:
            errors.append(CheckpointError(f"{saved}: {error}"))
        except Exception as error:
            errors.append(error)
        return Outcome(step, path, errors, None, seconds)

    def _conclude(self) -> None:
        """Report how the last save has ended."""
        assert self._outcome is not None
        step, path, errors, save_s, copy_s = self._outcome
        if path is not None and save_s is not None:
            self.newest = str(path)
            self._figures["speed/checkpoint_s"] = save_s
            self._note(f"saved {path}{f' in the background, in {save_s:.1f} s' if self._config.background else ''}")
        if self._remote is not None and copy_s is not None:
            self._figures["speed/checkpoint_upload_s"] = copy_s
            self._note(f"copied step-{step} to {self._remote.url} in {copy_s:.1f} s")
        for error in errors:
            if isinstance(error, NotFiniteError):
                self.refuse(step, str(error))
            else:
                self._warn_or_raise(error, unsaved=step if path is None else None)

    def _warn_or_raise(self, error: Exception, unsaved: int | None = None) -> None:
        """Raise `error`, or say it if the run goes on (`checkpoint.on_error`).

        Args:
            unsaved: the step that was not saved because of the error.
        """
        if not isinstance(error, CheckpointError) or isinstance(error, StalledError) or self._config.on_error == "stop":
            raise error
        if unsaved is None:
            self._note(f"warning: {error} (checkpoint.on_error=warn)")
        else:
            self.refuse(unsaved, f"{error} (checkpoint.on_error=warn)")
