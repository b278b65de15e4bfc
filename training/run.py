"""The name of a run and the files in its directory: `<root>/<name>/`, or `<root>/<sweep>/<job>/` for a job of a sweep.

This module does not import torch, so that the command line can use it.
"""

import contextlib
import itertools
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from common.errors import RunError
from common.files import write_atomically
from common.text import finite, parse_json, to_json
from training.config import RunConfig

LAUNCH_FILE = "launch.json"
RESULT_FILE = "result.json"
CONFIG_FILE = "config.yaml"
DEFAULT_RUN_IDS = ("", "none", "default")
"""Values of TORCHELASTIC_RUN_ID without an id of the user's. torchrun on one node sets a random UUID instead."""


def choose_name(run: RunConfig) -> str:
    """Return `run.name`, or `<experiment>-<n>` with the lowest n from 1 that no other run has.

    A chosen name is reserved by creating its directory, so that two launches at the same moment get different names.

    Raises:
        RunError: no directory can be created below `run.root`.
    """
    if run.name is not None:
        return run.name
    root = Path(run.root)
    with _as_run_error(run.root):
        root.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            name = f"{run.experiment}-{number}"
            with contextlib.suppress(FileExistsError):
                (root / name).mkdir(parents=True)
                return name
    raise AssertionError("unreachable: the numbers do not end")


def torchrun_name(run: RunConfig, share: Callable[[Callable[[], str]], str]) -> str:
    """Return the name of a run that torchrun or deepspeed started. It is the same on every rank and after a restart.

    It is, in this order: `run.name`; the name that this launch chose before it was restarted;
    `<experiment>-<TORCHELASTIC_RUN_ID>`, if the user chose that id and no other run has the name; the name that
    `choose_name` chooses.

    Args:
        share: `share(choose)` calls `choose` on rank 0 only and returns its result on every rank.

    Raises:
        RunError: on rank 0, as in `choose_name`.
    """
    return run.name if run.name is not None else share(lambda: _find_or_choose(run, launch_identity()))


def launched_directory(run: RunConfig) -> Path | None:
    """Return the directory of this launch's run, or None if `torchrun_name` has not chosen a name yet."""
    name = run.name if run.name is not None else _find(run, launch_identity())
    return None if name is None else Path(run.root) / name


def launch_identity() -> dict[str, Any]:
    """Return what identifies this launch also after a restart of its workers: the launcher's process, their parent."""
    agent = os.getppid()
    return {
        "run_id": os.environ.get("TORCHELASTIC_RUN_ID", ""),
        "host": socket.gethostname(),
        "agent_pid": agent,
        "agent_start": _start_time(agent),
    }


def prepare_directory(run: RunConfig, name: str) -> Path:
    """Create the directory `<root>/<name>`, check that files can be written in it, and return it.

    Raises:
        RunError: the directory or a file in it cannot be written. The message has the system's reason.
    """
    directory = Path(run.root) / name
    with _as_run_error(run.root):
        directory.mkdir(parents=True, exist_ok=True)
        # Permission bits do not tell: root ignores them, and a disk can be read-only. So a file is written.
        handle, probe = tempfile.mkstemp(prefix=".write-test-", dir=directory)
        os.close(handle)
        os.unlink(probe)
    return directory


def discard_unstarted(directory: Path) -> None:
    """Remove the directory of a run that was refused before it wrote anything, so that its name is free again."""
    if directory.is_dir() and {path.name for path in directory.iterdir()} <= {".lock", LAUNCH_FILE}:
        shutil.rmtree(directory)


def lock_run(directory: Path, name: str) -> Any:
    """Lock the run, so that no other process writes it. The lock ends with this process or when it is released.

    Returns:
        The lock, a `filelock.FileLock`.

    Raises:
        RunError: another process has the lock.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(directory / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(
            f"run.name={name}: expected a run that no other process is writing; {directory} is in use"
        ) from None
    return lock


def finished_result(directory: Path, steps: int) -> dict[str, Any] | None:
    """Return the content of `result.json` if the run in `directory` has finished after at least `steps` steps, else
    None."""
    try:
        result = parse_json((directory / RESULT_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(result, dict) or result.get("status") != "finished":
        return None
    step = result.get("step")
    return finite(result) if isinstance(step, int) and step >= steps else None


def save_config(directory: Path, config: Mapping[str, Any]) -> Path:
    """Write a configuration of plain containers to `config.yaml` in `directory` atomically, and return the file.

    It contains no secret, because keys come from the environment and no configuration dataclass has a field for one.
    """
    import yaml

    return write_atomically(directory / CONFIG_FILE, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))


def save_result(directory: Path, result: Mapping[str, Any]) -> Path:
    """Write a result of plain containers to `result.json` in `directory` atomically, and return the file."""
    return write_atomically(directory / RESULT_FILE, to_json(dict(result), indent=2) + "\n")


def _find(run: RunConfig, identity: dict[str, Any]) -> str | None:
    """The name of the run that this launch has started already."""
    for path in sorted(Path(run.root).glob(f"*/{LAUNCH_FILE}")):
        if path.parent.name.startswith(f"{run.experiment}-"):
            with contextlib.suppress(OSError, ValueError):
                if parse_json(path.read_bytes()) == identity:
                    return path.parent.name
    return None


def _find_or_choose(run: RunConfig, identity: dict[str, Any]) -> str:
    started = _find(run, identity)
    if started is not None:
        return started
    root = Path(run.root)
    run_id = identity["run_id"]
    name = f"{run.experiment}-{''.join(c if c.isalnum() or c in '._-' else '-' for c in run_id)}"
    if not _is_given(run_id, identity["agent_pid"]) or (root / name).exists():
        name = choose_name(run)
    with _as_run_error(run.root):
        (root / name).mkdir(parents=True, exist_ok=True)
    write_atomically(root / name / LAUNCH_FILE, to_json(identity) + "\n")
    return name


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
    try:
        # The command name is in parentheses and may contain spaces. The start time is field 22 of proc_pid_stat(5).
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


@contextlib.contextmanager
def _as_run_error(root: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"run.root={root}: expected a writable directory ({error.strerror})") from error
