"""Running a function in this process, or in worker processes that this process starts."""

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from common.errors import TrainingFailure, UserError, expect
from common.files import disk_errors
from common.plugins import given_plugins, load_plugins
from common.strict import from_dict, to_dict
from moe.quantization import expect_adapters, expect_library
from parallel.startup.launch import (
    World,
    is_launched,
    launch_workers,
    preload_workers,
    world_from_env,
)
from scripts.cli.command_line import UNREAD, discard_unread_output
from scripts.cli.early_end import signal_of
from training.config import Config, LaunchConfig
from training.host import check_memory, host_memory
from training.layout import build_workload, resolve_layout
from training.owner import RunOwner
from training.run import INTERRUPTED

R = TypeVar("R")
GPU_DRIVER = Path("/proc/driver/nvidia")
"""Exists where NVIDIA's driver is loaded. Workers are not forked there: a forked process cannot use CUDA if its parent
has initialised it, which an import can do."""
TRAINING_MODULES = ("train", "training.loop")
"""What the workers of `train.py` import."""


def execute(
    config: Config,
    train: Callable[..., dict[str, Any]],
    owner: RunOwner | None = None,
    *,
    fresh_processes: bool = False,
) -> dict[str, Any]:
    """Run `train(config, owner)` and return its result on rank 0.

    It runs in this process if torchrun or deepspeed started this process, or if one process is enough. Otherwise
    `train(config)` runs in worker processes, and this process owns the run's directory.

    Args:
        train: a function of an importable module. In this process it is given the `RunOwner`.
        owner: claims the run's directory, and owns it until this function ends. None: a new one.
        fresh_processes: start a worker even for a single process, so that each job of a sweep begins in a fresh state.

    Raises:
        UserError: the configuration does not fit the number of processes, or cannot be used for another reason.
        WorkerFailure: a worker process failed.
        KeyboardInterrupt: Ctrl-C. The command that resumes the run has been printed.
        SystemExit: the same, with status 128 + n, for another signal n of `training.interruption.SIGNALS`.
    """
    from training.report.recorder import check_tracking

    launch = config.launch
    world = world_from_env() if is_launched() else World(world_size=launch.nproc, local_world_size=launch.nproc)
    check_before_start(config, world)
    check_tracking(config.tracking)
    expect_library(config.quantize)
    expect_adapters(config.quantize, config.model.adapter is not None)
    owner = owner or RunOwner()
    try:
        with owner, disk_errors(Path(config.run.root)):
            result = _train(config, train, owner, fresh_processes)
        if result.get("status") == INTERRUPTED:
            raise _as_exception(result["signal"])
        return result
    except (KeyboardInterrupt, SystemExit) as stop:
        if signal_of(stop) and owner.directory is not None and owner.directory.is_dir():
            _show_how_to_resume(owner.directory, config, world)
        raise


def check_before_start(config: Config, world: World) -> None:
    """Check the layout and, if the ranks run on CPUs, their memory: before a corpus is read or a worker is started.

    `training.agree` checks them again with the vocabulary and the device, which are known there. Here the vocabulary
    can be unknown, so that a model is not refused which is only a little too large.

    Raises:
        ConfigError: the layout is not possible, or this host has too little memory.
    """
    adapter = config.model.adapter
    expect(
        adapter is None or config.run.init_from is not None,
        "run.init_from",
        None,
        f"the model directory that the adapters are added to (adapter.kind={config.adapter.kind})",
    )
    workload = build_workload(config, config.model)
    least = workload.adapter_share if adapter is not None else 1.0 if config.optim.train == "all" else 0.0
    workload = replace(workload, trained=least)
    device = config.train.device
    if device == "cuda" or (device == "auto" and GPU_DRIVER.exists()) or config.engine.kind != "native":
        resolve_layout(config, workload, world)
        return
    found = resolve_layout(config, workload, world, host_memory() // world.local_world_size)
    parameters = sum(weight.numel * number for weight, number in workload.weights.items())
    check_memory(parameters, found.plan.fullest.state, world.local_world_size)


def _train(
    config: Config, train: Callable[..., dict[str, Any]], owner: RunOwner, fresh_processes: bool
) -> dict[str, Any]:
    launch = config.launch
    if is_launched():
        prepare_launched(launch)
        return train(config, owner)
    if not _needs_workers(launch, fresh_processes):
        return in_processes(launch, train, prepare_for_workers(config, owner), owner)
    preloaded = config.train.device == "cpu" or not GPU_DRIVER.exists()
    if preloaded:
        preload_workers(TRAINING_MODULES)
    named = prepare_for_workers(config, owner)
    return in_processes(launch, train, named, fresh=fresh_processes, preloaded=preloaded)


def _as_exception(number: int) -> BaseException:
    """Return the exception that ends a command after this signal."""
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)


def _show_how_to_resume(directory: Path, config: Config, world: World) -> None:
    from training.checkpoint.manifest import CHECKPOINTS, newest_committed
    from training.report.run_report import show_interrupted

    discard_unread_output()  # Ctrl-C also ends the `tee` of a pipeline.
    show_interrupted(config, directory, newest_committed(directory / CHECKPOINTS), world.world_size)


def in_processes(
    launch: LaunchConfig,
    function: Callable[..., R],
    config: Any,
    *arguments: Any,
    fresh: bool = False,
    preloaded: bool = False,
) -> R:
    """Run `function(config, *arguments)` in as many processes as `launch` asks for, and return rank 0's result.

    A worker is sent the configuration as a dict, and the plugins of this process. It loads the plugins before it
    rebuilds the configuration, since a class of a plugin cannot be unpickled earlier.

    Args:
        function: a function of an importable module. It and `arguments` are pickled for the workers.
        config: a configuration dataclass.
        fresh: start a worker even for a single process.
        preloaded: fork the workers from the process that `preload_workers` has started.

    Raises:
        WorkerFailure: a worker process failed. Its exit code is 2 if the user can correct the mistake.
    """
    from parallel.startup.threads import set_threads

    if _needs_workers(launch, fresh):
        results: dict[int, R] = launch_workers(
            _in_worker,
            (given_plugins(), type(config), to_dict(config), function, arguments),
            nproc=launch.nproc,
            max_restarts=launch.max_restarts,
            threads=launch.threads,
            preloaded=preloaded,
        )
        return results[0]
    set_threads(launch.threads, local_ranks=1)
    return function(config, *arguments)


def on_every_rank(function: Callable[..., R], config: Any, prepare: Callable[[], tuple[Any, ...]] = tuple) -> R:
    """Run `function(config)` if torchrun or deepspeed started this process, else `function(config, *prepare())` in as
    many processes as `config.launch` asks for. Return the result of rank 0, or of this rank.

    Args:
        prepare: reports mistakes before a process starts, and returns what the ranks need not find out again.
    """
    if is_launched():
        prepare_launched(config.launch)
        return function(config)
    return in_processes(config.launch, function, config, *prepare())


def _needs_workers(launch: LaunchConfig, fresh: bool) -> bool:
    return launch.nproc > 1 or launch.max_restarts > 0 or fresh


def prepare_launched(launch: LaunchConfig) -> None:
    """Set the CPU threads of a process that torchrun or deepspeed has started.

    Raises:
        ConfigError: the environment does not describe a world.
    """
    from parallel.startup.threads import set_threads

    set_threads(launch.threads, world_from_env().local_world_size)


def prepare_for_workers(config: Config, owner: RunOwner) -> Config:
    """Claim the run's directory and build the token store, before any worker is started.

    Returns:
        The configuration with the run's name.

    Raises:
        ConfigError, DataError, RunError: the directory or the token store cannot be prepared.
    """
    from data.tokens.store import prepare
    from training.report.terminal import show_line

    # The directory is claimed first, because reading a corpus can take long.
    name = owner.claim(config.run)
    prepare(config.data, verify=False, report=show_line)
    return replace(config, run=replace(config.run, name=name))


def _in_worker(
    plugins: tuple[str, ...],
    cls: type,
    raw: dict[str, Any],
    function: Callable[..., R],
    arguments: tuple[Any, ...],
) -> R:
    try:
        load_plugins(plugins)
        config: Any = from_dict(cls, raw)
        with disk_errors(Path(config.run.root) if isinstance(config, Config) else Path()):
            return function(config, *arguments)
    except UserError as error:
        raise SystemExit(2) from error
    except TrainingFailure as error:
        raise SystemExit(1) from error
    except BrokenPipeError:
        if discard_unread_output():
            raise SystemExit(UNREAD) from None
        raise
