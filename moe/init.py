"""All initial weights, drawn here and nowhere else.

A number depends on the run's seed and on which weight it is (parameter name, expert index, block of rows), never on
the layout: a rank that holds experts 4-7, or a part of their rows and columns, draws exactly what a single process
draws there, and never materialises more than it keeps and one block of rows. Draws are made on the CPU in fp32, so
that devices and precisions agree.
"""

import math

import torch

from moe.model import Transformer
from moe.noise import fill_part
from moe.region import Region
from moe.router import Router


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
        routers = {name: module for name, module in model.named_modules() if isinstance(module, Router)}
        for name, parameter in model.named_parameters():
            local, shape, region = model.local_shard(name, parameter)
            module, _, leaf = name.rpartition(".")
            if module in routers:
                routers[module].init_parameter(leaf, local, f"{seed}/{name}", std)
                continue
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
