"""The layout of a run: what `parallel` leaves to us is chosen, and what cannot be is refused."""

from dataclasses import replace

from moe.config import ModelConfig
from parallel.config import check_layout
from parallel.launch import World
from parallel.layout import Layout
from training.config import Config
from training.deepspeed_config import check_engine, deepspeed_settings
from training.strict import ConfigError, located


def laid_out(config: Config, model: ModelConfig, world: World) -> tuple[Config, Layout]:
    """The configuration without `auto` axes, and the sizes of all axes. Needs no process group and no torch.

    Args:
        model: `config.model`, with its vocabulary where it is known already.

    Raises:
        ConfigError: names the key to change.
    """
    train, parallel = config.train, config.parallel
    if config.engine.kind == "deepspeed":
        deepspeed_settings(config.engine, train, config.optim, world.world_size)
    try:
        check_engine(config.engine, parallel, train)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    try:
        layout = parallel.layout(world.world_size, model, train.seq_len)
        check_layout(
            layout,
            parallel,
            model,
            seq_len=train.seq_len,
            accumulation=train.accumulation,
            pooled=config.router.layer_reduction == "hf_pooled",
        )
    except ValueError as error:
        raise located(error, "parallel") from error
    if train.global_batch % (train.accumulation * layout.data):
        whose = "processes" if layout.data == world.world_size else "data-parallel ranks"
        raise ConfigError(
            f"train.global_batch={train.global_batch}: expected a multiple of train.accumulation={train.accumulation} "
            f"times the {layout.data} {whose}"
        )
    return replace(config, parallel=parallel), layout
