"""What a worker process of a disturbed run does: it says which process it is, and trains."""

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.files import write_atomically
from moe.model import Transformer
from parallel.startup.launch import world_from_env
from training.config import Config
from training.loop import train

PROCESSES, OUTPUT = "processes", "output.txt"


class Spoiled(NamedTuple):
    """A gradient that is NaN on one rank."""

    rank: int
    parameter: str
    """A parameter that every rank has."""
    since: int
    """The first step in which it is NaN, of a run that starts at step 0."""


def train_quietly(directory: Path, spoiled: Spoiled | None, config: Config) -> dict[str, Any]:
    """Train a run as `train.py` does. What this process prints goes to a file.

    Args:
        directory: receives the process id of every rank, `processes/<rank>`, and the output of all of them.
        spoiled: makes a gradient NaN.
    """
    output = os.open(directory / OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    rank = world_from_env().rank
    if spoiled is not None and rank == spoiled.rank:
        _spoil(spoiled)
    write_atomically(directory / PROCESSES / str(rank), str(os.getpid()))
    return train(config)


def _spoil(spoiled: Spoiled) -> None:
    """Make a gradient NaN in the backward pass of the model, which has one forward pass in each step."""
    steps = 0

    def before_forward(module: nn.Module, arguments: Any) -> None:
        nonlocal steps
        if isinstance(module, Transformer) and torch.is_grad_enabled():
            steps += 1
            if steps == 1:
                dict(module.named_parameters())[spoiled.parameter].register_hook(spoil)

    def spoil(gradient: Tensor) -> Tensor:
        return gradient * math.nan if steps >= spoiled.since else gradient

    nn.modules.module.register_module_forward_pre_hook(before_forward)
