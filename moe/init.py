"""Initial weights, drawn so that they are the same on every layout.

A weight depends on the run's seed and on its identity (parameter name, expert index, block of rows), not on the layout.
A rank that stores experts 4-7, or some of their rows and columns, draws the same numbers as a single process, and never
materialises more than its shard and one block of rows. Numbers are drawn on the CPU in fp32, so they are the same on
every device and in every precision.
"""

import math

import torch
from torch import Tensor

from moe.model import Transformer
from moe.noise import fill_part
from moe.region import Region


def init_parameters(model: Transformer, seed: int) -> None:
    """Fill the shard of every parameter that this rank stores (`Transformer.local_shard`), in place.

    Matrices are normal with standard deviation `init_std`. For those that write into the residual stream (`wo`,
    `w_down`) it is divided by sqrt(2·num_layers), so that the variance of the stream does not grow with depth (GPT-2).
    Norms are 1, and buffers are 0. A module with a method `init_parameter` (a router) fills its own parameters, which
    every rank must store as a whole.
    """
    config = model.config
    residual_std = config.init_std / math.sqrt(2 * config.num_layers)
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.zero_()
        for name, parameter in model.named_parameters():
            local, shape, region = model.local_shard(name, parameter)
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
    if local.dim() == 2:
        fill_part(local, region, columns, identity, std)
        return
    matrix = Region(region.offset[1:], region.shape[1:])
    for index, weight in enumerate(local):
        fill_part(weight, matrix, columns, f"{identity}/{region.offset[0] + index}", std)
