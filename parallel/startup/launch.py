"""Worker processes on this machine: how they are started, and what a worker knows about its world.

`python train.py launch.nproc=N` starts its workers with the elastic agent that torchrun uses: a rendezvous, monitoring
of the processes, and restarts of the whole group. Some things are added. The launcher gets the return values of the
workers, or the message of the worker that failed. When the launcher dies, its workers die too. The rendezvous is in the
launcher's memory. torch's default is a TCP server on all interfaces, and the agent unpickles what it reads there:
whoever reaches the port could run code.
"""

import contextlib
import ctypes
import itertools
import logging
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import tempfile
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from common.errors import ConfigError
from parallel.startup.failures import LAST_FAILURE, failures_recorded, last_failure, read_reports, write_report

PR_SET_PDEATHSIG = 1
"""The option of Linux's `prctl` that chooses the signal a process gets when its parent dies."""
ROOT = Path(__file__).resolve().parents[2]
PRELOADED = ("parallel.startup.preloaded", "torch.distributed.launcher.api")
"""Modules that every worker needs, besides those of its function. The first prepares for the other imports."""
LAUNCHER_PID = "MIXWRIGHT_LAUNCHER_PID"
"""The variable that tells a process which launcher has started it, until `begin_process` removes it."""
QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR", "KINETO_LOG_LEVEL": "99"}
"""Variables that keep torch's C++ code from logging, if the user has not set them. When one worker ends, the sockets of
the others would log warnings, which would hide the message about the reason. The profiler logs its start and end, and a
warning if memory is freed that was allocated before. Kineto (a part of it) has no name for a level above all others."""
RENDEZVOUS = "memory"
"""The name under which torch knows `_rendezvous_in_memory`."""
HANDLED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Signals that the launcher passes on to its workers."""
AGENT_SIGNALS = "SIGQUIT"
"""Signals for which torch's agent has its own handlers."""
GRACE_S = 600
"""Seconds that the workers have to end after such a signal. Then they are killed. A large checkpoint takes minutes. The
agent of torch 2.11 always waits for 30 seconds."""
STOPPING = "stopping"
"""The launcher creates this file before it passes a signal on, and then waits for the end of the workers only."""


class WorkerFailure(RuntimeError):
    """A worker ended with an error, and no restart was left.

    Attributes:
        exitcode: exit status of the worker; negative if a signal killed it.
        message: the cause of the worker's `SystemExit`, or its traceback.
    """

    def __init__(self, exitcode: int, message: str) -> None:
        super().__init__(message)
        self.exitcode = exitcode
        self.message = message


@dataclass(frozen=True)
class World:
    """The rank of this process among the processes that a launcher started."""

    rank: int = 0
    local_rank: int = 0
    """Rank among the processes of this node."""
    world_size: int = 1
    local_world_size: int = 1
    """Number of processes of this node."""
    restart_count: int = 0
    """How often the launcher has restarted the processes."""


def is_launched() -> bool:
    """Return whether torchrun, deepspeed or another launcher started this process as one of its ranks."""
    return "RANK" in os.environ


def world_from_env() -> World:
    """Return the world that torchrun or deepspeed describes in the environment, or a world of one process.

    Only a launcher sets RANK for its processes. Without RANK the other variables say nothing about this process:
    clusters and shells export them, too.

    Raises:
        ConfigError: RANK is set, but another variable is missing, is not an integer, or is out of range.
    """
    if not is_launched():
        return World()
    world_size = _env_int("WORLD_SIZE", 1, None)
    # deepspeed's launcher sets LOCAL_SIZE where torchrun sets LOCAL_WORLD_SIZE
    local_name = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in os.environ), "LOCAL_WORLD_SIZE")
    local_world_size = 1 if world_size == 1 else _env_int(local_name, 1, world_size)
    restarts = "TORCHELASTIC_RESTART_COUNT"
    return World(
        rank=_env_int("RANK", 0, world_size - 1),
        local_rank=_env_int("LOCAL_RANK", 0, local_world_size - 1) if local_world_size > 1 else 0,
        world_size=world_size,
        local_world_size=local_world_size,
        restart_count=_env_int(restarts, 0, None) if restarts in os.environ else 0,
    )


def run_in_workers(entry: Callable[..., Any], args: tuple[Any, ...], *, nproc: int) -> None:
    """Call `entry(*args)` in this process if a launcher has started it, else in `nproc` worker processes."""
    if is_launched():
        entry(*args)
    else:
        launch_workers(entry, args, nproc=nproc)


def die_with_parent(parent_pid: int | None = None) -> None:
    """Ask the kernel to kill this process when its parent dies. Does nothing on systems other than Linux.

    Args:
        parent_pid: process id of the expected parent. If that process has already ended, this one exits.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent_pid is not None and os.getppid() != parent_pid:
        os._exit(128 + signal.SIGKILL)


def begin_process() -> None:
    """Prepare a main module's process before its slow imports, which include torch.

    A process that a launcher has started dies with its launcher from now on. Ctrl-C ends this process at once and
    silently, until `interrupts_raise` is called: an import that is interrupted would print a traceback.
    """
    os.environ.update(_quiet())  # torch reads the variables when it is imported.
    launcher = os.environ.pop(LAUNCHER_PID, None)
    if launcher is not None:
        die_with_parent(int(launcher))
    elif is_launched():
        die_with_parent()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # A background process can ignore the signal.
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupts_raise() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again, after `begin_process`."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def preload_workers(modules: Sequence[str]) -> None:
    """Start a process that imports `modules`, and from which `launch_workers(preloaded=True)` forks its workers.

    This function does not wait for the imports, which take as long as those of this process at the same time, and which
    workers need not repeat. The process ends when this one does. If it is there already, it is kept.

    Args:
        modules: importable modules. Importing them must not use a GPU.
    """
    multiprocessing.set_forkserver_preload([*PRELOADED, *modules])
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    # This checkout's modules come first, also before those of the current directory.
    with _environment(_quiet() | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", LAUNCHER_PID: str(os.getpid())}):
        multiprocessing.forkserver.ensure_running()


def launch_workers(
    entry: Callable[..., Any],
    args: tuple[Any, ...],
    *,
    nproc: int,
    max_restarts: int = 0,
    threads: int | None = None,
    preloaded: bool = False,
) -> dict[int, Any]:
    """Run `entry(*args)` in `nproc` new processes with the environment that torchrun sets, and wait for them.

    A worker that has a message for the user instead of a traceback ends with `raise SystemExit(code) from error`.

    Args:
        entry: a function of an importable module. It is pickled, and so is `args`.
        max_restarts: how often the whole group is restarted after a worker failed.
        threads: CPU threads per worker; None: as `parallel.startup.threads.set_threads` chooses.
        preloaded: fork the workers from the process that `preload_workers` has started.

    Returns:
        The return value of each rank.

    Raises:
        WorkerFailure: a worker failed, and no restart was left.
        KeyboardInterrupt: this process got SIGINT, and has passed it on. The workers have ended, or a second SIGINT has
            killed them.
        SystemExit: with status 128 + n, this process got another of `HANDLED_SIGNALS`, n.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import rendezvous_handler_registry
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from parallel.startup.threads import VARIABLES

    environment = _quiet() | {
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(GRACE_S),
        "TORCHELASTIC_SIGNALS_TO_HANDLE": AGENT_SIGNALS,
        # Otherwise the agent serves a store on all interfaces, and restarted workers read the addresses of dead ones.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    if threads is not None:
        # Without this key, the variables of the user keep their values. Other libraries than torch read them, too.
        environment |= dict.fromkeys(VARIABLES, str(threads))
    of_workers = environment | {name: os.environ.get(name) for name in ("PYTHONPATH", "PYTHONSAFEPATH")}
    if not preloaded:
        environment |= {LAUNCHER_PID: str(os.getpid())}
    rendezvous_handler_registry.register(RENDEZVOUS, _rendezvous_in_memory)
    # tempfile creates the directory for this user only (mode 0700).
    with tempfile.TemporaryDirectory(prefix="workers-") as directory:
        try:
            with (
                _signals_passed_on(Path(directory)),
                failures_recorded(Path(directory)),
                _environment(environment),
                _logging_disabled(),
            ):
                config = LaunchConfig(
                    min_nodes=1,
                    max_nodes=1,
                    nproc_per_node=nproc,
                    run_id=uuid.uuid4().hex,
                    rdzv_backend=RENDEZVOUS,
                    local_addr="localhost",
                    max_restarts=max_restarts,
                    start_method="forkserver" if preloaded else "spawn",
                    logs_specs=DefaultLogsSpecs(log_dir=f"{directory}/logs"),
                    signals_to_handle=AGENT_SIGNALS,
                )
                run = elastic_launch(config, _run_worker)
                results = run(entry, args, os.getpid(), directory, threads, of_workers if preloaded else None)
                return dict(sorted(results.items()))
        except ChildFailedError as error:
            raise _to_failure(error, read_reports(Path(directory), max_restarts)) from None
        except SignalException as error:
            reports = [read_reports(Path(directory), attempt).values() for attempt in range(max_restarts + 1)]
            refused = [report for report in itertools.chain(*reports) if report["exitcode"] == 2]
            if refused:  # Saving has failed.
                raise WorkerFailure(**refused[0]) from None
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(128 + int(error.sigval)) from None


def _rendezvous_in_memory(parameters: Any) -> Any:
    """Return the rendezvous of one agent, which no other process can reach."""
    from torch.distributed import HashStore
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

    class Backend(C10dRendezvousBackend):
        name = RENDEZVOUS  # The registry compares it.

    store = HashStore()
    return create_handler(store, Backend(store, parameters.run_id), parameters)


def _run_worker(
    entry: Callable[..., Any],
    args: tuple[Any, ...],
    launcher_pid: int,
    reports: str,
    threads: int | None,
    environment: dict[str, str | None] | None,
) -> Any:
    """Run a worker process. If `entry` fails, write the reason to a file that the launcher reads.

    Args:
        environment: variables of a forked worker, which has those of an earlier launch; None: of a variable that is not
            set. None for a worker that the launcher has spawned.
    """
    from parallel.startup.threads import set_threads

    # Again, because torch's start of a process asks for SIGINT instead. A forked worker's parent is not the launcher.
    die_with_parent(launcher_pid if environment is None else None)
    _set_variables((environment or {}) | {LAUNCHER_PID: None})
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _raise_once)
    world = world_from_env()
    _set_variables({LAST_FAILURE: last_failure(Path(reports), world.restart_count)})
    set_threads(threads, world.local_world_size)
    report = partial(write_report, Path(reports), world.restart_count, world.rank)
    try:
        result = entry(*args)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
        if code:
            report(code, str(stop.__cause__ or stop.code))
        raise
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception:
        report(1, traceback.format_exc())
        raise SystemExit(1) from None
    if (Path(reports) / STOPPING).exists():
        raise SystemExit(128 + signal.SIGTERM)  # With status 0, torch would wait for the launcher to take the result.
    return result


def _quiet() -> dict[str, str]:
    return {name: os.environ.get(name, value) for name, value in QUIET.items()}


def _raise_once(number: int, frame: FrameType | None) -> None:
    """Handle SIGINT. A worker gets it twice: from the terminal, and from the launcher."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _to_failure(error: Any, by_rank: dict[int, dict[str, Any]]) -> WorkerFailure:
    """Convert the agent's error. Prefer a message for the user, then one line, from any rank, to the report of the
    worker that failed first: it can have failed because it lost its connection to another one."""
    rank, first = error.get_first_failure()
    messages = [report for report in by_rank.values() if report["exitcode"] == 2]
    messages += [report for report in by_rank.values() if "\n" not in report["message"].strip()]
    if first.exitcode < 0:  # The others lost it, unless one of them has killed it and says why (`training.hangs`).
        messages = [report for report in messages if report["exitcode"] == 1]
    report = next(iter(messages), by_rank.get(rank))
    if report is not None:
        return WorkerFailure(**report)
    code = first.exitcode
    ending = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
    return WorkerFailure(code, f"worker {rank} (process {first.pid}) {ending}")


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables, and restore their previous values at the end."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        _set_variables(before)


def _set_variables(values: Mapping[str, str | None]) -> None:
    """Set environment variables; None: remove the variable."""
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextlib.contextmanager
def _signals_passed_on(directory: Path) -> Iterator[None]:
    """Make the first of `HANDLED_SIGNALS` end the agent, which passes it on to the workers and waits for their end.

    After that, SIGINT kills the workers, and the other signals do nothing. A signal that this process ignores stays
    ignored. The agent's own handlers cannot tell a second signal from the first, and are not removed at its end.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException

    stopping = directory / STOPPING

    def handle(number: int, frame: FrameType | None) -> None:
        if not stopping.exists():
            stopping.touch()
            raise SignalException(f"signal {number}", signal.Signals(number))
        if number == signal.SIGINT:
            for process in multiprocessing.active_children():
                process.kill()

    handled = (*HANDLED_SIGNALS, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in handled}
    try:
        for number in HANDLED_SIGNALS:
            if before[number] is not signal.SIG_IGN:
                signal.signal(number, handle)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _logging_disabled() -> Iterator[None]:
    """Disable logging. The agent logs each failure in 30 lines, and the launcher raises an exception for it anyway."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _env_int(name: str, low: int, high: int | None) -> int:
    """Read an integer from `low` to `high` from the environment; `high` None: without an upper bound."""
    text = os.environ.get(name, "")
    bounds = f"from {low} to {high}" if high is not None else f">= {low}"
    if not (text.isascii() and text.isdigit() and low <= int(text) and (high is None or int(text) <= high)):
        raise ConfigError(
            f"{name}={text}: expected an integer {bounds} in the environment (torchrun and deepspeed set it with RANK)"
        )
    return int(text)
