"""Initial weights, drawn so that they are the same on every layout.

A weight depends on the run's seed and on its identity (parameter name, expert index, block of rows), not on the layout.
A rank that stores experts 4-7, or some of their rows and columns, draws the same numbers as a single process, and never
materialises more than its shard and one block of rows. Numbers are drawn on the CPU in fp32, so they are the same on
every device and in every precision.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from moe.adapter import init_adapter
from moe.config import ModelConfig, split_adapter_name
from moe.model import Transformer
from moe.noise import fill_part, fill_rows, row_blocks
from moe.packed import matrices_in, pack
from moe.quantization import Packing
from moe.region import LocalShard, Region


def init_parameters(model: Transformer, seed: int) -> None:
    """Fill the shard of every parameter that this rank stores (`Transformer.local_shard`), in place.

    Matrices are normal with the standard deviation `initial_std`, and some are quantised then. Norms are 1, biases and
    buffers are 0. A module with a method `init_parameter` (a router) fills its own parameters, which every rank must
    store as a whole. Adapters are initialised last, by `init_adapters`.
    """
    config = model.config
    tasks: list[Callable[[], None]] = []
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.zero_()
        for name, parameter in model.named_parameters():
            if split_adapter_name(name)[1] is not None:
                continue
            local, shape, region = model.local_shard(name, parameter)
            owner, _, leaf = name.rpartition(".")
            init_parameter = getattr(model.get_submodule(owner), "init_parameter", None)
            if init_parameter is not None:
                init_parameter(leaf, local, f"{seed}/{name}", config.init_std)
            elif name in model.packings:
                tasks += _packed_tasks(local, region, model.packings[name], f"{seed}/{name}", initial_std(name, config))
            elif len(shape) == 1:
                local.fill_(0.0 if leaf == "bias" else 1.0)
            else:
                tasks += _tasks(local.detach(), region, shape[-1], f"{seed}/{name}", initial_std(name, config))
    _run(tasks)
    init_adapters(model, seed)


@torch.no_grad()
def init_adapters(model: Transformer, seed: int) -> None:
    """Fill the shards of the adapters' parameters that this rank stores. The other weights must have their values."""
    parameters = dict(model.named_parameters())
    shards: dict[str, dict[str, LocalShard]] = {}
    for name, parameter in parameters.items():
        weight, part = split_adapter_name(name)
        if part is not None:
            shards.setdefault(weight, {})[part] = model.local_shard(name, parameter)
    for weight, parts in shards.items():
        init_adapter(parts, model.local_shard(weight, parameters[weight]).local, f"{seed}/{weight}")


def initial_std(name: str, config: ModelConfig) -> float:
    """Return the standard deviation of the initial weights of the matrix `name`: `init_std`.

    For matrices that write into the residual stream (`wo`, `w_down`) it is divided by sqrt(2·num_layers), so that the
    variance of the stream does not grow with depth (GPT-2).
    """
    is_residual = name.removesuffix(".weight").endswith((".wo", ".w_down"))
    return config.init_std / math.sqrt(2 * config.num_layers) if is_residual else config.init_std


def _tasks(local: Tensor, region: Region, columns: int, identity: str, std: float) -> Iterator[Callable[[], None]]:
    """Yield functions that fill `local` part by part. They can be called in any order, and at the same time.

    Args:
        local: the region `region` of a matrix, or of matrices that are stacked along dim 0 (experts).
    """
    if local.dim() == 3:
        matrix = Region(region.offset[1:], region.shape[1:])
        for index, weight in enumerate(local):
            yield from _tasks(weight, matrix, columns, f"{identity}/{region.offset[0] + index}", std)
        return
    (first, column), (rows, width) = region
    for _, low, high in row_blocks(first, rows):
        part = Region((low, column), (high - low, width))
        yield partial(fill_part, local[low - first : high - first], part, columns, identity, std)


def _packed_tasks(
    local: Tensor, region: Region, packing: Packing, identity: str, std: float
) -> Iterator[Callable[[], None]]:
    """Yield functions that fill the bytes of quantised matrices, one function for each.

    Args:
        local, region: as in `moe.packed.matrices_in`.
    """

    def fill(bytes_P: Tensor, part: slice, identity: str) -> None:
        weight_OI = torch.empty(packing.rows, packing.columns)
        fill_rows(weight_OI, identity, std)
        bytes_P.copy_(pack(weight_OI.to(local.device), packing)[part])

    for index, bytes_P, part in matrices_in(local, region):
        yield partial(fill, bytes_P, part, identity if index is None else f"{identity}/{index}")


def _run(tasks: list[Callable[[], None]]) -> None:
    """Call the tasks with as many threads as torch uses.

    torch draws the numbers of a generator with one thread, which takes 8 ns per weight.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # Threads of threads would be too many. New threads take this number over.
    try:
        with ThreadPoolExecutor(threads) as pool:
            for result in [pool.submit(task) for task in tasks]:
                result.result()
    finally:
        torch.set_num_threads(threads)
