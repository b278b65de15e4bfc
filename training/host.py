"""The memory of this host, and the refusal of a run that cannot fit into it. It needs no torch."""

import os
import shlex
import sys

from common.errors import ConfigError, require


def host_memory() -> int:
    """Return the bytes of memory of this host."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_memory(parameters: int, state: int, local_ranks: int) -> None:
    """Refuse a run on CPUs whose weights, gradients and optimizer state alone exceed this host's memory.

    Otherwise the kernel would kill some process, perhaps of another program, when the memory is full.

    Args:
        parameters: number of parameters of the whole model.
        state: bytes of weights, gradients and moments on one rank.
        local_ranks: number of ranks on this host.

    Raises:
        ConfigError: the host has too little memory. The message has the command that plans the run for GPUs.
    """
    needed, memory = state * local_ranks, host_memory()
    model = shlex.join(word for word in sys.argv[1:] if word.startswith(("model=", "model."))) or "model=<preset>"
    require(
        needed <= memory,
        ConfigError,
        f"train.device=cpu: expected a model that fits this host's {memory / 1e9:.1f} GB of memory; "
        f"{parameters:,} parameters need {needed / 1e9:.1f} GB on {local_ranks} ranks, without activations; "
        f"`python scripts/plan.py {model} gpus={local_ranks} gpu=h100` plans it for GPUs",
    )
