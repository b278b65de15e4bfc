"""CPU threads of one process: the number, and where it comes from.

`launch.threads` comes first, then the environment, then the cores that this process may use, divided by the processes
of this machine. torchrun sets OMP_NUM_THREADS=1 itself if the user has not set it.
"""

import math
import os
from pathlib import Path

import torch

VARIABLES = (*(["MKL_NUM_THREADS"] if torch.backends.mkl.is_available() else []), "OMP_NUM_THREADS")
"""Environment variables that torch reads when it starts its threads. The first that is set counts."""


def set_threads(asked: int | None, local_ranks: int) -> None:
    """Set the number of CPU threads that torch uses in this process.

    Args:
        asked: `launch.threads`; None: the number that the environment gives, or else a share of the cores.
        local_ranks: processes on this machine.
    """
    if asked is not None:
        torch.set_num_threads(asked)
    elif _from_environment() is None:
        # torch's own number is lower than that of the cores if two logical cores share a physical one.
        torch.set_num_threads(min(torch.get_num_threads(), max(1, usable_cores() // local_ranks)))


def describe_threads(asked: int | None, local_ranks: int) -> str:
    """Return the number of threads of this process and its source, as in `2 per process (OMP_NUM_THREADS=2)`.

    Args:
        asked: the argument of `set_threads`.
        local_ranks: the argument of `set_threads`.
    """
    divided = f"{usable_cores()} usable cores, {local_ranks} local process{'es' if local_ranks > 1 else ''}"
    source = f"launch.threads={asked}" if asked is not None else _from_environment() or divided
    return f"{torch.get_num_threads()} per process ({source})"


def usable_cores(cgroups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Return how many cores this process may use: those of its CPU mask, and at most the limit of its control group.

    Args:
        cgroups: where Linux shows the control groups, version 2.
        membership: the file that names this process's group.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    lines = membership.read_text().splitlines() if membership.exists() else []
    own = next((Path(line.removeprefix("0::/")) for line in lines if line.startswith("0::/")), Path())
    for group in (own, *own.parents):
        limit = cgroups / group / "cpu.max"
        quota, _, period = limit.read_text().partition(" ") if limit.exists() else ("max", "", "")
        if quota != "max":
            cores = min(cores, max(1, math.floor(int(quota) / int(period))))
    return cores


def _from_environment() -> str | None:
    """Return the variable that gives the number of threads, as `NAME=value`; None: none has a number above 0.

    OMP_NUM_THREADS can be a list, whose first number counts.
    """
    for name in VARIABLES:
        value = os.environ.get(name, "")
        first = value.partition(",")[0].strip()
        if first.isascii() and first.isdigit() and int(first) > 0:
            return f"{name}={value}"
    return None
