"""Run a function on gloo ranks and bring back what it returns.

All ranks are forked from one process, which imports torch and the test modules once. Every import takes longer than
most of these tests.
"""

import functools
import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from parallel.startup.launch import die_with_parent

TIMEOUT_S = 60


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """`function(rank, world_size, *args)` in `world_size` processes of one thread each, inside a gloo group.

    Returns the results by rank; an exception on any rank is raised here.
    """
    with tempfile.TemporaryDirectory() as directory:
        _server().submit(_start, function, world_size, directory, args).result()
        return [torch.load(Path(directory) / f"result-{rank}", weights_only=False) for rank in range(world_size)]


@functools.cache
def _server() -> ProcessPoolExecutor:
    """The process that the ranks are forked from. It computes nothing, because a fork has none of its threads."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=die_with_parent)


def _start(function: Callable[..., Any], world_size: int, directory: str, args: tuple[Any, ...]) -> None:
    mp.start_processes(_entry, (function, world_size, directory, args), nprocs=world_size, start_method="fork")


def _entry(rank: int, function: Callable[..., Any], world_size: int, directory: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{directory}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=TIMEOUT_S))
    try:
        torch.save(function(rank, world_size, *args), f"{directory}/result-{rank}")
        dist.barrier()
    finally:
        dist.destroy_process_group()
