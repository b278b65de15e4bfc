"""The process that owns a run's directory: it chooses the run's name, makes the directory, locks it, and removes it
again if the run does not start.

One process of a launch is the owner: the launcher that starts worker processes, or rank 0 under torchrun and deepspeed.
No other process creates or removes anything in the directory before the run has started. `.lock` is a regular file that
is locked with flock(2). It also has a random token, by which the ranks check that they see the same directory.

This module does not import torch, so that the command line can use it.
"""

import contextlib
import fcntl
import glob
import itertools
import os
import secrets
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from common.errors import RunError, require
from common.files import append_line, open_regular, read_file, write_atomically
from common.processes import process_stat
from common.text import parse_json, to_json
from training.config import RunConfig

LOCK_FILE = ".lock"
SWEEP_LOCK_FILE = ".sweep-lock"
"""The lock file of a sweep's directory, which has the directories of its jobs."""
LAUNCH_FILE = "launch.json"
MAX_LAUNCH = 4096
"""The most bytes of this file."""
SWEEP_TABLE, SWEEP_RECORD = "sweep.csv", "sweep.jsonl"
RUN_MARKS = (LOCK_FILE, LAUNCH_FILE, "config.yaml")
"""A directory that has one of these files is that of a run."""
SWEEP_MARKS = (SWEEP_LOCK_FILE, SWEEP_TABLE)
PATIENCE_S = 3.0
"""Seconds to wait for a lock. After a launcher is killed, its workers live on for a moment, and still have it."""
DEFAULT_RUN_IDS = ("", "none", "default")
"""Values of TORCHELASTIC_RUN_ID without an id of the user's. torchrun on one node sets a random UUID instead."""


class DirectoryLock:
    """A lock on a directory: flock(2) on a file in it, until `release` is called or the process ends."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def acquire(cls, path: Path, *, shared: bool = False) -> Self | None:
        """Lock the file `path`, and create it if it is missing. Return None if another process has a lock.

        Args:
            shared: other processes can have shared locks at the same time, but no process an exclusive one.

        Raises:
            FileNotFoundError: the directory is missing.
            OSError: the file cannot be opened or locked, or is not a regular file.
        """
        descriptor = open_regular(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            locked, named = os.fstat(descriptor), os.stat(path, follow_symlinks=False)
            if (locked.st_dev, locked.st_ino) == (named.st_dev, named.st_ino):
                return cls(descriptor)
        except (BlockingIOError, FileNotFoundError):
            pass  # Another process has the lock, or has removed this file since it was opened.
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None

    def write(self, text: str) -> None:
        """Replace the content of the lock file."""
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text.encode(), 0)

    def change(self, *, shared: bool) -> bool:
        """Make an exclusive lock shared, or a shared one exclusive. Return False, without a lock, if another process
        has a lock that excludes this one."""
        try:
            fcntl.flock(self._descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Release the lock. The file stays."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class RunOwner:
    """Owns the directory of one run, or of one sweep, while it is used as a context.

    The lock is shared with rank 0 of the worker processes (`join_run`), so that the directory is still locked if the
    launcher is killed before its workers. If the context ends with an exception, and the directory has nothing but what
    this object has written, these files are removed, and the directory if this object has made it. `run.root` stays.

    Args:
        sweep: own the directory of a sweep.
    """

    def __init__(self, *, sweep: bool = False) -> None:
        self.directory: Path | None = None
        """The directory that this process owns; None before `claim` or `claim_launched`."""
        self._sweep = sweep
        self._lock: DirectoryLock | None = None
        self._made_directory = False
        self._made_files: list[Path] = []
        self._claimed_ns = 0

    def claim(self, run: RunConfig) -> str:
        """Create and lock the directory of a run, check that files can be written in it, and return the run's name.

        The name is `run.name`, or `<experiment>-<n>` with the lowest n from 1 that no other run has. Nothing is done if
        this object owns the directory already.

        Raises:
            RunError: the directory cannot be written, another process has the lock, or `run.name` is not the name of a
                run: it is in the directory of another run, or it is that of a sweep.
        """
        if run.name is not None:
            if self.directory != Path(run.root) / run.name:
                self._take(run, run.name)
            return run.name
        for number in itertools.count(1):
            if self._make(run, name := f"{run.experiment}-{number}"):
                return name
        raise AssertionError("unreachable: the numbers do not end")

    def claim_launched(self, run: RunConfig) -> str:
        """Do the same as `claim` for a run that torchrun or deepspeed started. The name is the same after a restart.

        It is, in this order: `run.name`; the name that this launch chose before it was restarted;
        `<experiment>-<TORCHELASTIC_RUN_ID>`, if the user chose that id and no other run has the name; the name that
        `claim` chooses.

        Raises:
            RunError: as in `claim`.
        """
        if run.name is not None:
            return self.claim(run)
        identity = launch_identity()
        name = _find(run, identity)
        if name is not None:
            self._take(run, name)
            return name
        run_id = identity["run_id"]
        name = f"{run.experiment}-{''.join(c if c.isalnum() or c in '._-' else '-' for c in run_id)}"
        if not _is_given(run_id, identity["agent_pid"]) or not self._make(run, name):
            name = self.claim(run)
        assert self.directory is not None
        with _as_run_error(run.root):
            self._made_files.append(write_atomically(self.directory / LAUNCH_FILE, to_json(identity) + "\n"))
        return name

    def append(self, name: str, line: str) -> None:
        """Append a line to the file `name` in the directory that this process owns.

        Raises:
            RunError: the file cannot be written.
        """
        assert self.directory is not None
        file = self.directory / name
        with _as_run_error(str(self.directory)):
            if not os.path.lexists(file):
                self._made_files.append(file)
            append_line(file, line)

    def has_written(self, name: str) -> bool:
        """Return whether the file `name` in the directory was written after this process had claimed the directory."""
        if self.directory is None:
            return False
        with contextlib.suppress(OSError):
            return os.stat(self.directory / name).st_mtime_ns >= self._claimed_ns
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._lock is not None:
            if kind is not None:
                self._discard_unstarted(self._lock)
            self._lock.release()

    @property
    def _lock_file(self) -> str:
        return SWEEP_LOCK_FILE if self._sweep else LOCK_FILE

    def _take(self, run: RunConfig, name: str) -> None:
        """Own the directory of a name that is given. It may exist."""
        directory = Path(run.root) / name
        self._check_place(directory, run, name)
        deadline = time.monotonic() + PATIENCE_S
        with _as_run_error(run.root):
            while True:
                made = _make_directory(directory)
                if self._acquire(directory, made):
                    return
                if time.monotonic() > deadline:
                    break
                time.sleep(0.05)
        found = "is in use" if directory.is_dir() else "is not a directory"
        raise RunError(f"run.name={name}: expected a run that no other process is writing; {directory} {found}")

    def _make(self, run: RunConfig, name: str) -> bool:
        """Own the directory of a name that no other run has. Return False if there is one, or a file of this name."""
        directory = Path(run.root) / name
        with _as_run_error(run.root):
            return _make_directory(directory) and self._acquire(directory, made=True)

    def _acquire(self, directory: Path, made: bool) -> bool:
        """Lock a directory, which this process has `made` or not. Return False if another process has the lock."""
        try:
            lock = DirectoryLock.acquire(directory / self._lock_file)
        except FileNotFoundError:
            return False  # Another process has removed the directory that it had made.
        if lock is None:
            return False
        # Permission bits do not tell whether files can be written: root ignores them, and a disk can be read-only.
        lock.write(f"{secrets.token_hex(16)}\n")
        if not lock.change(shared=True):
            return False
        self._lock, self.directory = lock, directory
        self._made_directory = made
        self._claimed_ns = os.stat(directory / self._lock_file).st_mtime_ns  # By the clock of the file system.
        return True

    def _check_place(self, directory: Path, run: RunConfig, name: str) -> None:
        for parent in Path(name).parents[:-1]:
            require(
                not _has_any(Path(run.root) / parent, RUN_MARKS),
                RunError,
                f"run.name={name}: expected a name outside of other runs; {Path(run.root) / parent} is a run",
            )
        marks, kind = (RUN_MARKS, "run") if self._sweep else (SWEEP_MARKS, "sweep")
        require(
            not _has_any(directory, marks),
            RunError,
            f"run.name={name}: expected the name of a {'sweep' if self._sweep else 'run'}; {directory} is a {kind}",
        )

    def _discard_unstarted(self, lock: DirectoryLock) -> None:
        """Remove what this process has made, unless the directory has other files or another process has the lock."""
        assert self.directory is not None
        with contextlib.suppress(OSError):
            if set(os.listdir(self.directory)) <= {self._lock_file, LAUNCH_FILE, SWEEP_RECORD} and _wait_for(lock):
                # The lock file goes in any case: of several launches that open it, any can be the one that locks it.
                for path in (*self._made_files, self.directory / self._lock_file):
                    path.unlink(missing_ok=True)
                if self._made_directory:
                    # It is not removed if it has a file again: another process may have opened it meanwhile.
                    self.directory.rmdir()


def join_run(directory: Path, name: str) -> DirectoryLock:
    """Share the owner's lock of a run's directory. For rank 0 of the worker processes that the owner started.

    Raises:
        RunError: another process than the owner has locked the directory.
    """
    with _as_run_error(str(directory.parent)):
        lock = DirectoryLock.acquire(directory / LOCK_FILE, shared=True)
    require(lock is not None, RunError, f"run.name={name}: expected a run that no other process is writing")
    assert lock is not None
    return lock


def is_sweep(directory: Path) -> bool:
    """Return whether `directory` is that of a sweep."""
    return _has_any(directory, SWEEP_MARKS)


def sweep_of(directory: Path) -> str | None:
    """Return the name of the sweep that the run in `directory` is a job of, or None."""
    return directory.parent.name if is_sweep(directory.parent) else None


def is_written(directory: Path) -> bool:
    """Return whether a process has the lock of the run in `directory`. The directory can be read-only."""
    try:
        descriptor = open_regular(directory / LOCK_FILE, os.O_RDONLY)
    except OSError:
        return False
    try:
        # While the owner and rank 0 share the lock, this fails and changes nothing.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def run_token(directory: Path) -> str:
    """Return the token that the owner of a run's directory has written there; empty if this process cannot read it."""
    try:
        descriptor = open_regular(directory / LOCK_FILE, os.O_RDONLY)
    except OSError:
        return ""
    try:
        return os.read(descriptor, 64).decode("ascii", errors="replace").strip()
    finally:
        os.close(descriptor)


def launch_identity() -> dict[str, Any]:
    """Return what identifies this launch also after a restart of its workers: the launcher's process, their parent."""
    agent = os.getppid()
    return {
        "run_id": os.environ.get("TORCHELASTIC_RUN_ID", ""),
        "host": socket.gethostname(),
        "agent_pid": agent,
        "agent_start": _start_time(agent),
    }


def _find(run: RunConfig, identity: dict[str, Any]) -> str | None:
    """The name of the run that this launch has started already."""
    for path in sorted(Path(run.root).glob(f"{glob.escape(run.experiment)}-*/{LAUNCH_FILE}")):
        with contextlib.suppress(OSError, ValueError):
            if parse_json(read_file(path, MAX_LAUNCH)) == identity:
                return str(path.parent.relative_to(run.root))
    return None


def _is_given(run_id: str, agent_pid: int) -> bool:
    """Whether the user gave `run_id` to the launcher. A UUID that the launcher's command line lacks is torchrun's."""
    try:
        uuid.UUID(run_id)
    except ValueError:
        return run_id not in DEFAULT_RUN_IDS
    with contextlib.suppress(OSError):
        if run_id in Path(f"/proc/{agent_pid}/cmdline").read_text(errors="replace"):
            return True
    return os.environ.get("PET_RDZV_ID") == run_id


def _start_time(pid: int) -> str:
    """The start time of a process in kernel ticks, because a process id is used again. Empty if there is no /proc."""
    return next(iter(process_stat(pid)[19:]), "")


def _make_directory(directory: Path) -> bool:
    """Create a directory and its parents. Return False if there is a directory or a file of this name already."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    try:
        directory.mkdir()
    except FileExistsError:
        return False
    return True


def _has_any(directory: Path, names: tuple[str, ...]) -> bool:
    return any(os.path.lexists(directory / name) for name in names)


def _wait_for(lock: DirectoryLock) -> bool:
    """Wait until no other process shares the lock, which is then exclusive. Return False after `PATIENCE_S`."""
    deadline = time.monotonic() + PATIENCE_S
    while not lock.change(shared=False):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@contextlib.contextmanager
def _as_run_error(root: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"run.root={root}: expected a writable directory ({error.strerror})") from error
