"""What a worker process of a disturbed run does: it says which process it is, and trains."""

import os
from pathlib import Path
from typing import Any

from common.files import write_atomically
from parallel.startup.launch import world_from_env
from training.config import Config
from training.loop import train

PROCESSES, OUTPUT = "processes", "output.txt"


def train_quietly(directory: Path, config: Config) -> dict[str, Any]:
    """Train a run as `train.py` does. What this process prints goes to a file.

    Args:
        directory: receives the process id of every rank, `processes/<rank>`, and the output of all of them.
    """
    output = os.open(directory / OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    write_atomically(directory / PROCESSES / str(world_from_env().rank), str(os.getpid()))
    return train(config)
