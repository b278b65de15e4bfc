"""What a run is called and where it lies: `<root>/<name>/`, or `<root>/<sweep>/<job>/` for a job of a sweep."""

import contextlib
import itertools
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from common.errors import RunError
from common.files import write_atomically
from training.config import RunConfig

LAUNCH_FILE = "launch.json"
RESULT_FILE = "result.json"
CONFIG_FILE = "config.yaml"
TOKENIZER_FILE = "tokenizer.model"
SHARED_RUN_IDS = ("", "none", "default")
"""Values of TORCHELASTIC_RUN_ID that many launches have."""


def choose_name(run: RunConfig) -> str:
    """The explicit name, else `<experiment>-<n>` with the lowest n from 1 that no other run has.

    The directory is created here, which claims the name: launches at the same moment get different ones.

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
    """The name of a run that torchrun or deepspeed started, the same on every rank and after every restart.

    The explicit name; else what this launch chose before a restart; else `<experiment>-<TORCHELASTIC_RUN_ID>` where
    that id is no default and the name is free; else the next free number.

    Args:
        share: `share(choose)` calls `choose` on rank 0 only and returns its result on every rank.

    Raises:
        RunError: on rank 0, as in `choose_name`.
    """
    if run.name is not None:
        return run.name
    return share(lambda: _find_or_choose(run, launch_identity()))


def launched_directory(run: RunConfig) -> Path | None:
    """Where the run of this launch lies: as `torchrun_name` named it. None if it has not yet."""
    name = run.name if run.name is not None else _find(run, launch_identity())
    return None if name is None else Path(run.root) / name


def launch_identity() -> dict[str, Any]:
    """What tells this launch from every other one, and stays when its workers are restarted: the agent process."""
    agent = os.getppid()
    return {
        "run_id": os.environ.get("TORCHELASTIC_RUN_ID", ""),
        "host": socket.gethostname(),
        "agent_pid": agent,
        "agent_start": _start_time(agent),
    }


def prepare_directory(run: RunConfig, name: str) -> Path:
    """Create `<root>/<name>` and prove that files can be written there.

    Raises:
        RunError: they cannot, with the system's reason.
    """
    directory = Path(run.root) / name
    with _as_run_error(run.root):
        directory.mkdir(parents=True, exist_ok=True)
        # root may write where the permission bits say no, and nobody may on a read-only disk: only a real file tells
        handle, probe = tempfile.mkstemp(prefix=".write-test-", dir=directory)
        os.close(handle)
        os.unlink(probe)
    return directory


def discard_unstarted(directory: Path) -> None:
    """Remove the directory of a run that was refused before it wrote anything: its name is free again."""
    if directory.is_dir() and {path.name for path in directory.iterdir()} <= {".lock", LAUNCH_FILE}:
        shutil.rmtree(directory)


def lock_run(directory: Path, name: str) -> Any:
    """Hold the run for this process until it ends or the lock is released.

    Raises:
        RunError: another process is writing it.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(directory / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(f"run.name={name}: expected a run that nobody else is writing; {directory} is in use") from None
    return lock


def is_finished(directory: Path, steps: int) -> bool:
    """Whether `result.json` in the run's directory says that the run ended well after at least `steps` steps."""
    try:
        result = json.loads((directory / RESULT_FILE).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(result, dict) and result.get("status") == "finished" and result.get("step", -1) >= steps


def save_config(directory: Path, config: Mapping[str, Any]) -> Path:
    """Write the plain mapping as `config.yaml` in `directory`, whole or not at all; returns the file.

    No secret can be in it: no config dataclass holds one, keys come from the environment only.
    """
    import yaml

    return write_atomically(directory / CONFIG_FILE, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))


def save_tokenizer(directory: Path, file: Path) -> None:
    """Copy the tokenizer's `file` into `directory`, whole or not at all, so that a run can be used without its data."""
    partial = directory / f".{TOKENIZER_FILE}.{os.getpid()}"
    shutil.copyfile(file, partial)
    partial.replace(directory / TOKENIZER_FILE)


def save_result(directory: Path, result: Mapping[str, Any]) -> Path:
    """Write the plain mapping as `result.json` in `directory`, whole or not at all; returns the file."""
    return write_atomically(directory / RESULT_FILE, json.dumps(dict(result), indent=2) + "\n")


def _find(run: RunConfig, identity: dict[str, Any]) -> str | None:
    """The run that the launch has begun already."""
    for path in sorted(Path(run.root).glob(f"*/{LAUNCH_FILE}")):
        if path.parent.name.startswith(f"{run.experiment}-"):
            with contextlib.suppress(OSError, ValueError):
                if json.loads(path.read_text()) == identity:
                    return path.parent.name
    return None


def _find_or_choose(run: RunConfig, identity: dict[str, Any]) -> str:
    found = _find(run, identity)
    if found is not None:
        return found
    root = Path(run.root)
    run_id = identity["run_id"]
    name = f"{run.experiment}-{''.join(c if c.isalnum() or c in '._-' else '-' for c in run_id)}"
    if run_id in SHARED_RUN_IDS or (root / name).exists():
        name = choose_name(run)
    with _as_run_error(run.root):
        (root / name).mkdir(parents=True, exist_ok=True)
    write_atomically(root / name / LAUNCH_FILE, json.dumps(identity) + "\n")
    return name


def _start_time(pid: int) -> str:
    """When the process started, in kernel ticks: a process id alone is used again. Empty where there is no /proc."""
    try:
        # the command name, in parentheses, may hold spaces; start time is field 22 of proc_pid_stat(5)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


@contextlib.contextmanager
def _as_run_error(root: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"run.root={root}: expected a writable directory ({error.strerror})") from error
