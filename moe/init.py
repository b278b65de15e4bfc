"""All initial weights, drawn here and nowhere else.

A number depends on the run's seed and on which weight it is (parameter name, expert index, block of rows), never on
the layout: a rank that holds experts 4-7, or a part of their rows and columns, draws exactly what a single process
draws there, and never materialises more than it keeps and one block of rows. Draws are made on the CPU in fp32, so
that devices and precisions agree.
"""

import hashlib
import math

import torch
from torch import Tensor

from moe.model import Transformer
from moe.region import Region

ROW_BLOCK = 256
"""Rows drawn from one generator."""


def init_parameters(model: Transformer, seed: int) -> None:
    """Fill every parameter in place, or the part of it that lies here (`model.local_shard`).

    Matrices: normal with standard deviation `init_std`; those that write into the residual stream (`wo`, `w_down`)
    divided by sqrt(2·num_layers), so that the stream's variance does not grow with depth (GPT-2). Norms: 1.
    Selection biases of routers: 0.
    """
    std = model.config.init_std
    residual_std = std / math.sqrt(2 * model.config.num_layers)
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.zero_()
        for name, parameter in model.named_parameters():
            local, shape, region = model.local_shard(name, parameter)
            if len(shape) == 1:
                local.fill_(1.0)
                continue
            leaf = name.removesuffix(".weight").rpartition(".")[2]
            scale = residual_std if leaf in ("wo", "w_down") else std
            if len(shape) == 2:
                fill_part(local, region, shape[1], f"{seed}/{name}", scale)
                continue
            matrix = Region(region.offset[1:], region.shape[1:])
            for row, weight in enumerate(local):
                fill_part(weight, matrix, shape[2], f"{seed}/{name}/{region.offset[0] + row}", scale)


def fill_rows(weight: Tensor, identity: str, std: float, first_row: int = 0) -> None:
    """Fill `weight` [rows, columns], whose first row is row `first_row` of the parameter `identity`."""
    fill_part(weight, Region((first_row, 0), tuple(weight.shape)), weight.shape[1], identity, std)


def fill_part(weight: Tensor, region: Region, columns: int, identity: str, std: float) -> None:
    """Fill `weight`, which is `region` of the matrix `identity` of `columns` columns."""
    (first_row, first_column), (rows, width) = region
    end = first_row + rows
    for block in range(first_row // ROW_BLOCK, -(-end // ROW_BLOCK)):
        low, high = max(first_row, block * ROW_BLOCK), min(end, (block + 1) * ROW_BLOCK)
        digest = hashlib.sha256(f"{identity}/{block}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        # Always the whole block: torch draws other numbers for a tensor of another size.
        drawn = torch.randn(ROW_BLOCK, columns, generator=generator)[:, first_column : first_column + width]
        weight[low - first_row : high - first_row] = drawn[low - block * ROW_BLOCK : high - block * ROW_BLOCK] * std
