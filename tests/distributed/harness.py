"""Spawn gloo ranks that run one function and bring back what it returns."""

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_S = 60


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """`function(rank, world_size, *args)` in `world_size` processes of one thread each, inside a gloo group.

    Returns the results by rank; an exception on any rank is raised here.
    """
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(_entry, (function, world_size, directory, args), nprocs=world_size, join=True)
        return [torch.load(Path(directory) / f"result-{rank}", weights_only=False) for rank in range(world_size)]


def _entry(rank: int, function: Callable[..., Any], world_size: int, directory: str, args: tuple[Any, ...]) -> None:
    os.environ["TORCH_DISTRIBUTED_DEBUG"] = "DETAIL"  # catches mismatched shapes and dtypes between ranks
    torch.set_num_threads(1)
    store = dist.FileStore(f"{directory}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=TIMEOUT_S))
    try:
        torch.save(function(rank, world_size, *args), f"{directory}/result-{rank}")
        dist.barrier()
    finally:
        dist.destroy_process_group()
