"""The layout of a run: what `parallel` leaves to us is chosen, and what cannot be is refused."""

from dataclasses import replace

from common.errors import ConfigError
from common.strict import located
from moe.config import ModelConfig
from parallel.planning.auto import plain, resolve
from parallel.planning.plan import Plan, plan
from parallel.startup.launch import World
from training.config import Config
from training.deepspeed.settings import check_engine, deepspeed_settings


def resolve_layout(
    config: Config,
    model: ModelConfig,
    world: World,
    *,
    memory: int | None = None,
    itemsize: int = 2,
    trained: float = 1.0,
) -> tuple[Config, Plan, str | None]:
    """The configuration without `auto` axes, what it means, and a warning. Needs no process group and no torch.

    Args:
        model: `config.model`, with its vocabulary where it is known already.
        memory: bytes of one rank's device, the same on all ranks; None: unknown.
        itemsize: bytes of a number in the forward pass.
        trained: share of the parameters that train.

    Raises:
        ConfigError: names the key to change.
    """
    train, parallel = config.train, config.parallel
    try:
        check_engine(config.engine, parallel, train)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if config.engine.kind == "deepspeed":
        deepspeed_settings(config.engine, train, config.optim, world.world_size)
        parallel = plain(parallel)
    weight_itemsize = 8 if train.precision == "fp64" else 4
    try:
        choice = resolve(
            parallel,
            model,
            config.router,
            world_size=world.world_size,
            local_world_size=world.local_world_size,
            global_batch=train.global_batch,
            accumulation=train.accumulation,
            seq_len=train.seq_len,
            memory=memory,
            itemsize=itemsize,
            weight_itemsize=weight_itemsize,
            trained=trained,
        )
    except ValueError as error:
        raise located(error, "train" if str(error).startswith("global_batch") else "parallel") from error
    parallel = choice.parallel
    layout = parallel.layout(world.world_size, model, train.seq_len)
    made = plan(
        layout,
        parallel,
        model,
        config.router,
        rows=train.global_batch // train.accumulation // layout.data,
        seq_len=train.seq_len,
        accumulation=train.accumulation,
        itemsize=itemsize,
        weight_itemsize=weight_itemsize,
        trained=trained,
    )
    return replace(config, parallel=parallel), made, choice.warning
