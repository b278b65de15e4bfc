"""The ranks that save or load a checkpoint together, and how they wait for each other while some of them read or write.

A collective of a process group ends after the group's time-out, however much a slow disk has still to write. Ranks
therefore exchange results as JSON in the key-value store, and wait by polling it. A rank that reads or writes
publishes its progress there. The others wait for as long as there is any, and `IO_TIMEOUT_S` longer.
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common.errors import CheckpointError
from common.files import explain_os_error
from common.processes import has_ended
from common.text import parse_json, to_json

if TYPE_CHECKING:  # the command line looks for checkpoints without importing torch
    from torch.distributed import Store

IO_TIMEOUT_S = 300.0
"""Seconds without progress after which reading or writing has failed: the default of `checkpoint.io_timeout_s`."""
MARGIN_S = 5.0
"""Seconds that other ranks wait longer than rank 0, so that all ranks raise the error that rank 0 sends."""
_sessions = itertools.count()


class NotFiniteError(CheckpointError):
    """A tensor has a NaN or an infinite element, so it is not saved."""


class StalledError(CheckpointError):
    """A rank made no progress while it read or wrote, or has ended. The other ranks cannot continue without it."""


class RemoteError(CheckpointError):
    """A remote store refused to read or write, or did not answer. It says nothing about the checkpoints in it."""


class Failure(NamedTuple):
    """An error on one rank, as the ranks exchange it."""

    kind: str
    """A key of `ERRORS`."""
    message: str

    def error(self) -> CheckpointError:
        """Return the exception."""
        return ERRORS[self.kind](self.message)


ERRORS = {error.__name__: error for error in (CheckpointError, NotFiniteError, StalledError, RemoteError)}


class Peers:
    """The ranks that work on a checkpoint together. All of them call `run` equally often.

    Args:
        store: the key-value store that the ranks share. A single process needs none.
        timeout_s: seconds without progress on any rank after which waiting ends. A change of the attribute also applies
            to a thread that waits already.
        name: the start of the keys. Ranks create their `Peers` of one name once in the lifetime of the store.

    Attributes:
        siblings: rank -> process id, of the ranks on this host, as far as they are known. Nothing is expected from one
            that has ended.
    """

    def __init__(
        self, store: "Store | None", rank: int, world_size: int, timeout_s: float = IO_TIMEOUT_S, name: str = "io"
    ) -> None:
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        self.siblings: Mapping[int, int] = {}
        self._store, self._name = store, name
        self._phases = itertools.count()
        self._shown, self._shown_at = "", 0.0

    @classmethod
    def of_default_group(cls) -> "Peers":
        """Return the ranks of torch's default process group, or this process alone if there is none. Collective."""
        import torch.distributed as dist

        if not dist.is_initialized() or dist.get_world_size() == 1:
            return cls(None, 0, 1)
        store = dist.distributed_c10d._get_default_store()
        return cls(store, dist.get_rank(), dist.get_world_size(), name=f"io-{next(_sessions)}")

    def run(
        self, work: Callable[[], Any], where: Path, combine: Callable[[list[Any]], Sequence[Any]] | None = None
    ) -> Any:
        """Call `work` on every rank, then `combine` on rank 0 with the results of all ranks. Collective.

        Args:
            work: returns what can be written as JSON. It calls `progress` while it reads or writes.
            where: the start of the message about an error of the system.
            combine: returns one reply for each rank. Without it, the replies are None.

        Returns:
            This rank's reply.

        Raises:
            CheckpointError: on all ranks, if `work` failed on any rank or `combine` failed.
            NotFiniteError: the same, if every error is that a tensor is not finite.
            StalledError: a rank made no progress for `timeout_s` seconds, or has ended.
        """
        result, failure, cause = _attempt(work, where)
        if self.world_size > 1:
            key = f"{self._name}/{next(self._phases)}"
            if self.rank > 0:
                self._send(f"{key}/result/{self.rank}", [result, failure])
                reply, failed = self._receive(f"{key}/reply/{self.rank}", 0, key, MARGIN_S)
                failure = None if failed is None else Failure(*failed)
            else:
                reply, failure, own = self._collect(key, result, failure, where, combine)
                cause = cause or own
        elif failure is None:
            replies, failure, cause = _attempt(lambda: combine([result]) if combine else [None], where)
            reply = None if replies is None else replies[0]
        if failure is not None:
            raise failure.error() from cause
        return reply

    def on_rank_0(self, work: Callable[[], Any], where: Path) -> Any:
        """Call `work` on rank 0 only, and return its result on every rank. Collective. The rest is as in `run`."""
        return self.run(lambda: work() if self.rank == 0 else None, where, lambda found: [found[0]] * len(found))

    def progress(self, file: Path | str, done: int, total: int) -> None:
        """Tell the other ranks that this rank reads or writes `file`, a path or a URL, and has done `done` of `total`
        bytes."""
        now = time.monotonic()
        if self._store is None or (str(file) == self._shown and now - self._shown_at < min(1.0, self.timeout_s / 5)):
            return
        self._shown, self._shown_at = str(file), now
        self._store.set(self._status(self.rank), f"{file} ({done} of {total} bytes)")
        self._store.add(f"{self._name}/progress", 1)

    def _collect(
        self,
        key: str,
        result: Any,
        failure: Failure | None,
        where: Path,
        combine: Callable[[list[Any]], Sequence[Any]] | None,
    ) -> tuple[Any, Failure | None, Exception | None]:
        """Rank 0's part of `run`: receive all results, combine them, send the replies. Returns its own reply."""
        outcomes: list[tuple[Any, Failure | None]] = [(result, failure)]
        try:
            for rank in range(1, self.world_size):
                sent, failed = self._receive(f"{key}/result/{rank}", rank, key)
                outcomes.append((sent, None if failed is None else Failure(*failed)))
        except StalledError as error:
            joined: Failure | None = Failure(StalledError.__name__, str(error))
        else:
            joined = _join([failure for _, failure in outcomes])
        replies: Sequence[Any] | None = [None] * self.world_size
        cause: Exception | None = None
        if joined is None and combine is not None:
            replies, joined, cause = _attempt(lambda: combine([result for result, _ in outcomes]), where)
        replies = replies or [None] * self.world_size
        for rank in range(1, self.world_size):
            self._send(f"{key}/reply/{rank}", [replies[rank], joined])
        return replies[0], joined, cause

    def _send(self, key: str, value: Any) -> None:
        assert self._store is not None
        self._store.set(key, to_json(value))

    def _receive(self, key: str, sender: int, phase: str, margin_s: float = 0.0) -> Any:
        """Wait for the value of `key`, which the rank `sender` sets, and return it.

        Raises:
            StalledError: no rank made any progress for `timeout_s + margin_s` seconds, or `sender` has ended. The
                message names the rank and its file.
        """
        store = self._store
        assert store is not None
        start = changed = time.monotonic()
        progress = -1
        while True:
            # Before the key is looked for, because a rank can end after it has sent the value.
            ended = sender in self.siblings and has_ended(self.siblings[sender])
            if store.check([key]):
                break
            if ended:
                raise StalledError(f"rank {sender} has ended, and is waited for with {self._file_of(sender)}")
            now = time.monotonic()
            current = store.add(f"{self._name}/progress", 0)
            if current != progress:
                progress, changed = current, now
            elif now - changed > self.timeout_s + margin_s:  # Another thread can shorten `timeout_s` meanwhile.
                raise StalledError(self._describe_stall(phase, self.timeout_s + margin_s))
            time.sleep(min(0.25, max(0.0005, (now - start) / 20)))
        value = parse_json(store.get(key))
        store.delete_key(key)
        return value

    def _describe_stall(self, phase: str, timeout_s: float) -> str:
        """Name the ranks from which no result has come, and what they read or wrote last."""
        assert self._store is not None
        others = range(1, self.world_size) if self.rank == 0 else (0,)
        late = [rank for rank in others if not self._store.check([f"{phase}/result/{rank}"])] or [0]
        more = f" (also ranks {', '.join(map(str, late[1:9]))})" if len(late) > 1 else ""
        return (
            f"rank {late[0]}{more}: no progress for {timeout_s:g} s with {self._file_of(late[0])}: "
            "expected a disk that answers, or a larger checkpoint.io_timeout_s"
        )

    def _file_of(self, rank: int) -> str:
        """Return what a rank read or wrote last."""
        assert self._store is not None
        status = self._status(rank)
        return self._store.get(status).decode() if self._store.check([status]) else "a checkpoint"

    def _status(self, rank: int) -> str:
        return f"{self._name}/status/{rank}"


ALONE = Peers(None, 0, 1)
"""A process without other ranks."""


def _attempt(work: Callable[[], Any], where: Path) -> tuple[Any, Failure | None, Exception | None]:
    """Call `work`, and return its result or its error. The other ranks wait for it, so every error must reach them."""
    try:
        return work(), None, None
    except CheckpointError as error:
        return None, Failure(type(error).__name__, str(error)), error
    except OSError as error:
        return None, Failure(CheckpointError.__name__, explain_os_error(error, where)), error
    except Exception as error:
        return None, Failure(CheckpointError.__name__, f"{where}: {type(error).__name__}: {error}"), error


def _join(failures: Sequence[Failure | None]) -> Failure | None:
    """Return the one failure that all ranks raise: the first of the worst kind, with its rank unless it is everyone's.

    >>> _join([None, Failure("NotFiniteError", "w: nan"), Failure("CheckpointError", "full")]).message
    'rank 2: full'
    """
    found = {rank: failure for rank, failure in enumerate(failures) if failure is not None}
    if not found:
        return None
    rank, first = min(found.items(), key=lambda item: (item[1].kind == NotFiniteError.__name__, item[0]))
    same_everywhere = len(found) == len(failures) and len(set(found.values())) == 1
    return first if same_everywhere else first._replace(message=f"rank {rank}: {first.message}")
