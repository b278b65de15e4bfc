"""The checkpoint that a run continues from, and the check that it belongs to the same model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.errors import CheckpointError, ConfigError
from common.plugins import missing_plugins
from common.strict import from_dict, to_dict
from common.text import printable
from moe.config import ModelConfig, RouterConfig
from training.checkpoint.manifest import CHECKPOINTS, committed, newest_verified, read_state
from training.config import Config
from training.initial import FREE_MODEL_KEYS


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
    if newest is None and resume == "must":
        raise CheckpointError(f"run.resume=must: expected a checkpoint in {root}; found none")
    return None if newest is None else str(newest)


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
    if missing:
        raise CheckpointError(f"{path}: {printable(missing)}")
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
            if value != saved_value:
                raise CheckpointError(
                    f"{section}.{key}={json.dumps(value)}: expected {json.dumps(saved_value)} as in the checkpoint "
                    f"{path}, or another run.name"
                )
    if state["step"] > steps:
        raise CheckpointError(
            f"train.steps={steps}: expected at least {state['step']}, the step of the checkpoint {path}"
        )
    return state


def _meaning(config: ModelConfig | RouterConfig, top_k: int) -> dict[str, Any]:
    """The keys that decide what the weights mean. `auto` is replaced by the value that it stands for."""
    values = to_dict(config)
    if isinstance(config, RouterConfig):
        return {key: values[key] for key in type(config).MEANING} | {"normalize": config.normalizes(top_k)}
    return {key: value for key, value in values.items() if key not in FREE_MODEL_KEYS}
