"""What the ranks agree on before a process group exists: the run's name, its tokens, its layout and where it starts.

Rank 0 chooses and sends its choice to the other ranks through the launcher's key-value store. A mistake is therefore
reported before any process group exists, and no rank waits in a collective for a rank that has ended.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from filelock import BaseFileLock

from common.errors import CheckpointError, ConfigError, DataError, RunError, require
from common.plugins import changed_plugins, loaded_plugins, missing_plugins
from common.strict import from_dict, to_dict
from common.text import printable, to_json
from data.tokens.store import Store, prepare
from moe.accounting.flops import ParameterCounts, count_parameters, meta_model, training_flops_per_token
from moe.config import ModelConfig, RouterConfig
from parallel.planning.plan import Plan
from parallel.startup.launch import World
from parallel.startup.preflight import check_ranks_agree, collect_properties, flatten
from parallel.startup.rendezvous import choose_on_rank0, wait_for_all
from training.checkpoint.manifest import CHECKPOINTS, committed, newest_verified, read_state
from training.config import Config, with_vocabulary
from training.device import Process, check_memory, memory_of_a_rank
from training.formats.reader import open_model
from training.initial import FREE_MODEL_KEYS
from training.layout import build_workload, resolve_layout
from training.optimizer import check_same_optimizer
from training.report.terminal import show_line
from training.run import finished_result, lock_run, prepare_directory, torchrun_name
from training.trainable import check_same_choice, choose_trainable, trained_elements


@dataclass(frozen=True)
class AgreedRun:
    """The run as all ranks know it before any of them computes."""

    config: Config
    """The configuration, with the sizes of the parallel axes that were `auto`."""
    name: str
    directory: Path
    lock: BaseFileLock | None
    """Rank 0's lock on the directory; None on other ranks."""
    tokens: Store
    """The token store: the training and the held-out tokens, and their tokenizer."""
    model: ModelConfig
    """The model's configuration, with its vocabulary."""
    counts: ParameterCounts
    """Numbers of parameters of the whole model."""
    trained_parameters: int
    """Number of parameters that `optim.train` chooses."""
    flops_per_token: float
    """FLOPs of forward and backward for one token."""
    plan: Plan
    """The layout, and the estimate of its memory."""
    warning: str | None
    """A warning about the layout, for the user."""
    checkpoint: str | None
    """The checkpoint that the run continues from; None for a run that starts at step 0."""
    state: dict[str, Any] | None
    """The state in this checkpoint."""
    initial_directory: str | None
    """The model directory whose weights the run starts from; None for random weights or a checkpoint."""
    finished_result: dict[str, Any] | None
    """The content of `result.json` if the run has reached `train.steps` already."""


def agree_on_run(config: Config, process: Process, rank_store: dist.Store) -> AgreedRun:
    """Check that the ranks were started alike, and agree on everything that `AgreedRun` has.

    Args:
        rank_store: the key-value store of this launch's ranks.

    Raises:
        PreflightError: the ranks were not started alike.
        ConfigError, RunError, DataError, ModelError, CheckpointError: the run cannot be done as configured.
    """
    world = process.world
    libraries = ("deepspeed",) if config.engine.kind == "deepspeed" else ()
    properties = flatten({"plugins": loaded_plugins()})
    properties |= collect_properties(to_dict(config), process.device.type, str(process.dtype), libraries)
    check_ranks_agree(rank_store, world, properties, config.parallel.start_timeout_s)
    from_rank_0 = partial(choose_on_rank0, rank_store, world)

    # The name, the directory and the tokens.
    name = torchrun_name(config.run, partial(from_rank_0, "name"))
    directory = prepare_directory(config.run, name)
    tokens = prepare(config.data, verify=world.local_rank == 0, report=show_line if process.is_main else None)
    check_shared(rank_store, world, directory, tokens.train.key)
    lock = lock_run(directory, name) if process.is_main else None

    # The model and its layout.
    model = with_vocabulary(config.model, tokens.tokenizer.vocab_size)
    whole = meta_model(model, config.router)
    counts = count_parameters(whole)
    trained_parameters = trained_elements(whole, choose_trainable(whole, config.optim.train))
    memory = from_rank_0("memory", lambda: memory_of_a_rank(process.device, world.local_world_size))
    workload = build_workload(config, model, itemsize=process.dtype.itemsize, trained=trained_parameters / counts.total)
    resolved, plan, warning = resolve_layout(config, workload, world, memory)
    if process.device.type == "cpu" and config.engine.kind == "native":
        check_memory(counts.total, plan.fullest.state, world.local_world_size)

    # Where it starts: at a checkpoint of this run, at another model's weights, or at random weights.
    checkpoint = from_rank_0(
        "checkpoint", lambda: find_checkpoint(config, directory, restarted=world.restart_count > 0, warn=show_line)
    )
    state = None
    if checkpoint is not None:
        state = checked_state(checkpoint, model, config.router, config.train.steps)
        check_same_choice(config.optim.train, state.get("train", "all"), checkpoint)
        check_same_optimizer(config.optim.kind, state.get("optimizer", "adamw"), checkpoint)
        for plugin in changed_plugins(state.get("plugins", {})) if process.is_main else ():
            show_line(f"warning: plugin {plugin} has changed since the checkpoint {checkpoint} was written")
    init_from = config.run.init_from if checkpoint is None else None
    return AgreedRun(
        config=resolved,
        name=name,
        directory=directory,
        lock=lock,
        tokens=tokens,
        model=model,
        counts=counts,
        trained_parameters=trained_parameters,
        flops_per_token=training_flops_per_token(whole, config.train.seq_len),
        plan=plan,
        warning=warning,
        checkpoint=checkpoint,
        state=state,
        initial_directory=from_rank_0("initial", lambda: find_initial(init_from, warn=show_line)),
        finished_result=from_rank_0("finished", lambda: finished_result(directory, config.train.steps)),
    )


def check_shared(rank_store: dist.Store, world: World, directory: Path, tokens: str) -> None:
    """Check that all ranks see the same run directory and the same tokens.

    Without a shared directory, the run would fail at its first checkpoint.

    Args:
        tokens: the hash of this rank's training tokens.

    Raises:
        RunError, DataError: on the ranks that do not see the directory of rank 0, or have other tokens.
    """
    probe = f".seen-by-all-{world.restart_count}"
    if world.rank == 0:
        (directory / probe).touch()
    tokens_of_rank_0 = choose_on_rank0(rank_store, world, "tokens", lambda: tokens)
    require(
        (directory / probe).exists(),
        RunError,
        f"run.root={directory.parent}: expected a directory that all nodes share; rank 0 sees another one",
    )
    require(
        tokens_of_rank_0 == tokens,
        DataError,
        f"data (tokens {tokens[:12]}): expected the text of rank 0 (tokens {tokens_of_rank_0[:12]}) on every node",
    )
    wait_for_all(rank_store, world, "probed")
    if world.rank == 0:
        (directory / probe).unlink()


def find_checkpoint(config: Config, directory: Path, *, restarted: bool, warn: Callable[[str], None]) -> str | None:
    """Return the newest undamaged checkpoint of the run in `directory`, or None if the run starts at step 0.

    Args:
        restarted: whether the launcher has restarted the workers. The run then continues even with `run.resume=never`.
        warn: receives one line for each damaged checkpoint.

    Raises:
        CheckpointError: `run.resume=never` and there is a checkpoint, `run.resume=must` and there is none, or all
            checkpoints are damaged.
    """
    root = directory / CHECKPOINTS
    resume = config.run.resume
    if resume == "never" and not restarted:
        checkpoints = committed(root)
        if checkpoints:
            raise CheckpointError(
                f"run.resume=never: expected the name of a new run; {directory} has checkpoints up to "
                f"{checkpoints[0].name}"
            )
        return None
    newest = newest_verified(root, warn)
    require(
        newest is not None or resume != "must",
        CheckpointError,
        f"run.resume=must: expected a checkpoint in {root}; found none",
    )
    return None if newest is None else str(newest)


def find_initial(directory: str | None, warn: Callable[[str], None]) -> str | None:
    """Return the path that `run.init_from` stands for. For a run, this is its newest undamaged checkpoint.

    It reads the whole checkpoint. Only rank 0 calls it, and shares the result.

    Args:
        warn: receives one line for each damaged checkpoint.

    Raises:
        ModelError: there is no model directory or no undamaged checkpoint.
    """
    return None if directory is None else str(open_model(directory, warn=warn).path)


def checked_state(path: str, model: ModelConfig, router: RouterConfig, steps: int) -> dict[str, Any]:
    """Return the state in the checkpoint `path`, after a check that a run of this model and router can continue it.

    Args:
        model: the run's model, with its vocabulary.
        steps: the run's `train.steps`.

    Raises:
        CheckpointError: the checkpoint needs a plugin that is not loaded; or the weights have another meaning there
            (names the first key that differs and both values); or it is of a later step than the run's last.
    """
    state = read_state(Path(path))
    missing = missing_plugins(state.get("plugins", {}))
    require(not missing, CheckpointError, f"{path}: {printable(missing)}")
    try:
        saved: dict[str, ModelConfig | RouterConfig] = {"model": from_dict(ModelConfig, state["model"], "model")}
        if model.is_moe:
            saved["router"] = from_dict(RouterConfig, state["router"], "router")
    except (KeyError, ConfigError) as error:
        raise CheckpointError(f"{path}: expected the state of a run ({error})") from error
    for section, saved_config in saved.items():
        config = model if section == "model" else router
        values, saved_values = (_meaning(part, model.top_k or 1) for part in (config, saved_config))
        for key, value in values.items():
            saved_value = saved_values.get(key)
            require(
                value == saved_value,
                CheckpointError,
                f"{section}.{key}={to_json(value)}: expected {to_json(saved_value)} as in the checkpoint "
                f"{path}, or another run.name",
            )
    require(
        state["step"] <= steps,
        CheckpointError,
        f"train.steps={steps}: expected at least {state['step']}, the step of the checkpoint {path}",
    )
    return state


def _meaning(config: ModelConfig | RouterConfig, top_k: int) -> dict[str, Any]:
    """The keys that decide what the weights mean. `auto` is replaced by the value that it stands for."""
    values = to_dict(config)
    if isinstance(config, RouterConfig):
        return {key: values[key] for key in type(config).MEANING} | {"normalize": config.normalizes(top_k)}
    return {key: value for key, value in values.items() if key not in FREE_MODEL_KEYS}
