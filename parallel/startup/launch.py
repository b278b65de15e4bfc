"""Starting worker processes on this machine, and what a worker knows about the world it was started in.

The workers of `python train.py launch.nproc=N` come from the same elastic agent as torchrun's: a rendezvous on a free
port of localhost, a watch over the processes, restarts of the whole group. What differs is the ending: the launcher
gets rank 0's return value, or the message of the worker that failed first, and a killed launcher leaves no orphans.
"""

import contextlib
import ctypes
import json
import logging
import os
import signal
import sys
import tempfile
import traceback
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
"""A worker that ends leaves its peers' sockets warning; why it ended is what the user is told."""
HANDLED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class WorkerFailure(RuntimeError):
    """A worker ended with an error and no restart was left.

    Attributes:
        exitcode: the worker's exit status; negative for a signal.
        message: what it said: the reason of a `SystemExit`, else its traceback.
    """

    def __init__(self, exitcode: int, message: str) -> None:
        super().__init__(message)
        self.exitcode = exitcode
        self.message = message


@dataclass(frozen=True)
class World:
    """This process's place among the processes that a launcher started."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    restart_count: int = 0


def world_from_env() -> World:
    """The world as torchrun or deepspeed describes it in the environment; a world of one without them.

    Raises:
        ValueError: a variable is missing beside the others, no integer, or out of range.
    """
    if "RANK" not in os.environ:
        return World()
    world_size = _env_int("WORLD_SIZE", 1, None)
    # deepspeed's launcher sets LOCAL_SIZE where torchrun sets LOCAL_WORLD_SIZE
    local_name = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in os.environ else "LOCAL_SIZE"
    local_world_size = _env_int(local_name, 1, world_size)
    restarts = "TORCHELASTIC_RESTART_COUNT"
    return World(
        rank=_env_int("RANK", 0, world_size - 1),
        local_rank=_env_int("LOCAL_RANK", 0, local_world_size - 1) if "LOCAL_RANK" in os.environ else 0,
        world_size=world_size,
        local_world_size=local_world_size,
        restart_count=_env_int(restarts, 0, None) if restarts in os.environ else 0,
    )


def die_with_parent(parent_pid: int | None = None) -> None:
    """Have the kernel kill this process when its parent dies (Linux; elsewhere nothing happens).

    Args:
        parent_pid: the parent expected; when it is gone already, this process ends here.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent_pid is not None and os.getppid() != parent_pid:
        os._exit(128 + signal.SIGKILL)


def launch_workers(
    entry: Callable[..., Any], args: tuple[Any, ...], *, nproc: int, max_restarts: int = 0, threads: int | None = None
) -> dict[int, Any]:
    """Run `entry(*args)` in `nproc` fresh processes that see a torchrun environment, and wait for them.

    Args:
        entry: a function of an importable module; it and `args` are pickled.
        max_restarts: how often the whole group is started again after a worker failed.
        threads: CPU threads a worker; `None`: this process's cores divided by `nproc`.

    Returns:
        What each rank returned.

    Raises:
        WorkerFailure: a worker failed and no restart was left. A worker that has a message for the user, and no
            traceback, ends with `raise SystemExit(code) from error`.
        SystemExit: 128 + the signal that this process was told to end by, after the workers have ended.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    threads = threads or max(1, _cores() // nproc)
    environment = {name: os.environ.get(name, value) for name, value in QUIET.items()} | {
        "OMP_NUM_THREADS": str(threads),
        # otherwise restarted workers read the addresses of dead ones from the agent's store
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=max_restarts,
        start_method="spawn",
    )
    with tempfile.TemporaryDirectory(prefix="workers-") as reports:
        call = elastic_launch(config, _run_worker)
        try:
            with _environment(environment), _signal_handlers_restored(), _logging_disabled():
                results: dict[int, Any] = call(entry, args, os.getpid(), reports)
                return results
        except ChildFailedError as error:
            raise _failure(error, list(Path(reports).glob(f"{max_restarts}-*.json"))) from None
        except SignalException as error:
            raise SystemExit(128 + int(error.sigval)) from None


def _run_worker(entry: Callable[..., Any], args: tuple[Any, ...], launcher_pid: int, reports: str) -> Any:
    """Top of a worker process: tell the launcher in a file why it failed, because an exit status has no room for it."""
    die_with_parent(launcher_pid)
    world = world_from_env()
    report = Path(reports) / f"{world.restart_count}-{world.rank}.json"
    try:
        return entry(*args)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
        if code:
            report.write_text(json.dumps({"exitcode": code, "message": str(stop.__cause__ or stop.code)}))
        raise
    except Exception:
        report.write_text(json.dumps({"exitcode": 1, "message": traceback.format_exc()}))
        raise SystemExit(1) from None


def _failure(error: Any, reports: list[Path]) -> WorkerFailure:
    """The failure to raise: a message for the user first, else that of the worker that the agent saw fail first."""
    rank, first = error.get_first_failure()
    said = {int(path.stem.split("-")[1]): json.loads(path.read_text()) for path in sorted(reports)}
    chosen = next((report for report in said.values() if report["exitcode"] == 2), said.get(rank))
    if chosen is not None:
        return WorkerFailure(**chosen)
    code = first.exitcode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
    return WorkerFailure(code, f"worker {rank} (process {first.pid}) {how}")


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _signal_handlers_restored() -> Iterator[None]:
    """The agent turns signals into exceptions and never turns them back: a later SIGTERM would look like an error."""
    before = {number: signal.getsignal(number) for number in HANDLED_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _logging_disabled() -> Iterator[None]:
    """The agent reports each failure in 30 lines; the launcher raises its own, and has nothing else to log."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _env_int(name: str, low: int, high: int | None) -> int:
    text = os.environ.get(name, "")
    span = f"from {low} to {high}" if high is not None else f">= {low}"
    if not (text.isascii() and text.isdigit() and low <= int(text) and (high is None or int(text) <= high)):
        raise ValueError(f"{name}={text}: expected an integer {span} in the environment (from torchrun or deepspeed)")
    return int(text)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
