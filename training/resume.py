"""Which checkpoint a run goes on from, and whether it is one of the same model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from common.errors import CheckpointError, ConfigError, DataError, RunError
from common.strict import from_dict, to_dict
from moe.config import ModelConfig, RouterConfig
from parallel.startup.launch import World
from parallel.startup.rendezvous import choose_on_rank0, wait_for_all
from training.checkpoint.manifest import CHECKPOINTS, committed, newest_verified, read_state
from training.config import Config
from training.initial import FREE_MODEL_KEYS, ROUTER_KEYS


def check_shared(store: dist.Store, world: World, directory: Path, tokens: str) -> None:
    """All ranks must see one run directory and one token store, or the run would be lost at its first checkpoint.

    Raises:
        RunError, DataError: on the ranks that see another.
    """
    probe = f".seen-by-all-{world.restart_count}"
    if world.rank == 0:
        (directory / probe).touch()
    theirs = choose_on_rank0(store, world, "tokens", lambda: tokens)
    if not (directory / probe).exists():
        raise RunError(
            f"run.root={directory.parent}: expected a directory that all nodes share; rank 0 sees another one"
        )
    if theirs != tokens:
        raise DataError(
            f"data (tokens {tokens[:12]}): expected the text of rank 0 (tokens {theirs[:12]}) on every node"
        )
    wait_for_all(store, world, "probed")
    if world.rank == 0:
        (directory / probe).unlink()


def find_checkpoint(config: Config, directory: Path, *, restarted: bool, warn: Callable[[str], None]) -> str | None:
    """The newest whole checkpoint below the run's `directory`, as `run.resume` wants it; None to start at step 0.

    Args:
        restarted: the launcher started the workers again: going on is what it was asked for.
        warn: gets one line per damaged checkpoint that is passed over.

    Raises:
        CheckpointError: `run.resume` forbids what is there, or asks for what is not; or no checkpoint is whole.
    """
    root = directory / CHECKPOINTS
    resume = config.run.resume
    if resume == "never" and not restarted:
        there = committed(root)
        if there:
            raise CheckpointError(
                f"run.resume=never: expected a run.name that is free; {directory} holds checkpoints up to "
                f"{there[0].name}"
            )
        return None
    newest = newest_verified(root, warn)
    if newest is None and resume == "must":
        raise CheckpointError(f"run.resume=must: expected a checkpoint in {root}; found none")
    return None if newest is None else str(newest)


def checked_state(path: str, model: ModelConfig, router: RouterConfig, steps: int) -> dict[str, Any]:
    """The state in the checkpoint `path`, if it is one of this model and routing, at most `steps` steps old.

    Raises:
        CheckpointError: names the first key that differs, its value here and there.
    """
    state = read_state(Path(path))
    try:
        saved: dict[str, ModelConfig | RouterConfig] = {"model": from_dict(ModelConfig, state["model"], "model")}
        if model.is_moe:
            saved["router"] = from_dict(RouterConfig, state["router"], "router")
    except (KeyError, ConfigError) as error:
        raise CheckpointError(f"{path}: expected the state of a run ({error})") from error
    for section, there_config in saved.items():
        config = model if section == "model" else router
        here, there = (_meaning(part, model.top_k or 1) for part in (config, there_config))
        for key, value in here.items():
            if value != there[key]:
                raise CheckpointError(
                    f"{section}.{key}={json.dumps(value)}: expected {json.dumps(there[key])} as in the checkpoint "
                    f"{path}, or another run.name"
                )
    if state["step"] > steps:
        raise CheckpointError(
            f"train.steps={steps}: expected at least {state['step']}, the step of the checkpoint {path}"
        )
    return state


def _meaning(config: ModelConfig | RouterConfig, top_k: int) -> dict[str, Any]:
    """The keys that say what the weights mean, with the values they stand for."""
    values = to_dict(config)
    if isinstance(config, RouterConfig):
        return {key: values[key] for key in ROUTER_KEYS} | {"normalize": config.normalizes(top_k)}
    return {key: value for key, value in values.items() if key not in FREE_MODEL_KEYS}
