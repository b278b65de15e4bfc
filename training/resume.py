"""Which checkpoint a run goes on from, and whether it is one of the same run."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe.config import ModelConfig
from training.checkpoint import CheckpointError, committed, newest_verified, read_state
from training.config import Config

CHECKPOINTS = "checkpoints"
FREE_MODEL_KEYS = ("expert_kernel", "init_std")
"""Keys of the model that may change between two starts of a run: they change no weight's meaning."""


def find_checkpoint(config: Config, directory: Path, *, restarted: bool, warn: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint below the run's `directory`, as `run.resume` wants it; None to start at step 0.

    Args:
        restarted: this is a restart of workers within one launch: going on is what was asked for.
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
                f"run.resume=never: expected a run.name that is free; {directory} holds checkpoints up to {there[0].name}"
            )
        return None
    newest = newest_verified(root, warn)
    if newest is None and resume == "must":
        raise CheckpointError(f"run.resume=must: expected a checkpoint in {root}; found none")
    return newest


def run_state(config: Config, model: ModelConfig, *, step: int, updates: int, loader: dict[str, Any], data: str) -> dict[str, Any]:
    """What a checkpoint holds beside tensors."""
    return {
        "step": step,
        "updates": updates,
        "loader": loader,
        "data": data,
        "seed": config.run.seed,
        "seq_len": config.train.seq_len,
        "model": dataclasses.asdict(model),
    }


def check_state(path: Path, config: Config, model: ModelConfig, data: str) -> dict[str, Any]:
    """The state of checkpoint `path`, if it is one of this model on these tokens.

    Raises:
        CheckpointError: names the first key that differs, its value here and there.
    """
    state = read_state(path)
    saved = state["model"]
    asked = {f"model.{key}": (value, saved.get(key)) for key, value in dataclasses.asdict(model).items()}
    for key in FREE_MODEL_KEYS:
        del asked[f"model.{key}"]
    asked["train.seq_len"] = (config.train.seq_len, state["seq_len"])
    asked["run.seed"] = (config.run.seed, state["seed"])
    for key, (here, there) in asked.items():
        if here != there:
            raise CheckpointError(f"{key}={here}: expected {there}, as in the checkpoint {path} (or another run.name)")
    if data != state["data"]:
        raise CheckpointError(
            f"data (tokens {data[:12]}): expected the tokens {state['data'][:12]} that the checkpoint {path} was trained "
            "on (or another run.name)"
        )
    return state
