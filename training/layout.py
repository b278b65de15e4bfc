"""The layout of a run: axes that are `auto` get a size, and a layout that is not possible is refused."""

from dataclasses import replace
from typing import NamedTuple

from common.errors import ConfigError, located
from moe.config import ModelConfig
from parallel.planning.auto import resolve, without_auto
from parallel.planning.plan import Plan, plan
from parallel.planning.workload import Workload
from parallel.startup.launch import World
from training.config import Config
from training.deepspeed.settings import check_engine, deepspeed_settings
from training.optimizer import OPTIMIZERS


class ResolvedLayout(NamedTuple):
    """The result of `resolve_layout`."""

    config: Config
    """The configuration with a number for every parallel axis except `expert` and `replicate`."""
    plan: Plan
    warning: str | None
    """One line for the user if the layout seems not to fit into the memory."""


def build_workload(config: Config, model: ModelConfig, *, itemsize: int = 2, trained: float = 1.0) -> Workload:
    """Return what one optimizer step of a run computes.

    Args:
        model: `config.model`, with the size of the vocabulary if it is already known.
        itemsize: bytes of a number in the forward pass.
        trained: share of the parameters that train.
    """
    train = config.train
    return Workload(
        model,
        config.router,
        train.global_batch,
        train.accumulation,
        train.seq_len,
        itemsize=itemsize,
        weight_itemsize=8 if train.precision == "fp64" else 4,
        trained=trained,
        moments=len(OPTIMIZERS[config.optim.kind].moments),
        quantize=config.quantize,
    )


def resolve_layout(config: Config, workload: Workload, world: World, memory: int | None = None) -> ResolvedLayout:
    """Choose the parallel axes that are `auto`, and plan the layout. Needs no process group.

    Args:
        workload: `build_workload(config, ...)`.
        memory: bytes of one rank's device, the same on all ranks; None: unknown.

    Raises:
        ConfigError: the layout is not possible; the message names the key to change.
    """
    train, parallel = config.train, config.parallel
    try:
        check_engine(config.engine, parallel, train)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if config.engine.kind == "deepspeed":
        deepspeed_settings(config.engine, train, config.optim, world.world_size)
        parallel = without_auto(parallel)
    try:
        parallel, warning = resolve(parallel, workload, world, memory)
    except ValueError as error:
        raise located(error, "train" if str(error).startswith("global_batch") else "parallel") from error
    return ResolvedLayout(
        replace(config, parallel=parallel),
        plan(parallel.layout(world.world_size, workload.model, workload.seq_len), parallel, workload),
        warning,
    )
