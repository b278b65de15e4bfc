"""Initial weights, drawn so that they are the same on every layout.

A weight depends on the run's seed and on its identity (parameter name, expert index, block of rows), not on the layout.
A rank that stores experts 4-7, or some of their rows and columns, draws the same numbers as a single process, and never
materialises more than its shard and one block of rows. Numbers are drawn on the CPU in fp32, so they are the same on
every device and in every precision.
"""

import hashlib
import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from moe.config import ModelConfig
from moe.region import LocalShard, Region

ROW_BLOCK = 256
"""Number of rows that are drawn from one generator."""


def init_parameters(model: nn.Module, seed: int) -> None:
    """Fill the shard of every parameter that this rank stores (`Transformer.local_shard`), in place.

    Matrices are normal with standard deviation `init_std`. For those that write into the residual stream (`wo`,
    `w_down`) it is divided by sqrt(2·num_layers), so that the variance of the stream does not grow with depth (GPT-2).
    Norms are 1, and buffers are 0. A module with a method `init_parameter` (a router) fills its own parameters, which
    every rank must store as a whole.

    Args:
        model: a `moe.model.Transformer`. This module cannot import that type, because routers import `fill_rows`.
        seed: the run's seed.
    """
    config = cast(ModelConfig, model.config)
    local_shard = cast(Callable[[str, Tensor], LocalShard], model.local_shard)
    residual_std = config.init_std / math.sqrt(2 * config.num_layers)
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.zero_()
        for name, parameter in model.named_parameters():
            local, shape, region = local_shard(name, parameter)
            owner, _, leaf = name.rpartition(".")
            init_parameter = getattr(model.get_submodule(owner), "init_parameter", None)
            if init_parameter is not None:
                init_parameter(leaf, local, f"{seed}/{name}", config.init_std)
            elif len(shape) == 1:
                local.fill_(1.0)
            else:
                is_residual = name.removesuffix(".weight").endswith((".wo", ".w_down"))
                _fill(local, region, shape[-1], f"{seed}/{name}", residual_std if is_residual else config.init_std)


def _fill(local: Tensor, region: Region, columns: int, identity: str, std: float) -> None:
    """Fill `local`, the region `region` of a matrix, or of matrices that are stacked along dim 0 (experts)."""
    first, matrix = region.offset[0], Region(region.offset[-2:], region.shape[-2:])
    stacked = ((f"{identity}/{first + index}", weight) for index, weight in enumerate(local))
    for name, weight in [(identity, local)] if local.dim() == 2 else stacked:
        fill_part(weight, matrix, columns, name, std)


def fill_rows(weight: Tensor, identity: str, std: float, first_row: int = 0) -> None:
    """Fill consecutive whole rows of a matrix with normal numbers.

    Args:
        weight: [rows, columns], filled in place.
        identity: what the numbers depend on, e.g. the seed and the parameter's name.
        std: standard deviation.
        first_row: index in the matrix of the first row of `weight`.
    """
    fill_part(weight, Region((first_row, 0), tuple(weight.shape)), weight.shape[1], identity, std)


def fill_part(weight: Tensor, region: Region, columns: int, identity: str, std: float) -> None:
    """Fill a region of a matrix with normal numbers, the same ones that filling the whole matrix puts there.

    Args:
        weight: the elements of the matrix in `region`, filled in place.
        columns: number of columns of the matrix.
        identity: what the numbers depend on, e.g. the seed and the parameter's name.
        std: standard deviation.
    """
    (first_row, first_column), (rows, width) = region
    end = first_row + rows
    for block in range(first_row // ROW_BLOCK, -(-end // ROW_BLOCK)):
        low, high = max(first_row, block * ROW_BLOCK), min(end, (block + 1) * ROW_BLOCK)
        digest = hashlib.sha256(f"{identity}/{block}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        # Whole blocks are drawn, because torch draws other numbers for a tensor of another size.
        drawn = torch.randn(ROW_BLOCK, columns, generator=generator)[:, first_column : first_column + width]
        weight[low - first_row : high - first_row] = drawn[low - block * ROW_BLOCK : high - block * ROW_BLOCK] * std
