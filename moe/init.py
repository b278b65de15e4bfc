"""All initial weights, drawn here and nowhere else.

A number depends on the run's seed and on which weight it is (parameter name, expert index, block of rows), never on
the layout: a rank that holds experts 4-7 draws exactly what a single process draws for experts 4-7, and never
materialises more than it keeps. Draws are made on the CPU in fp32, so that devices and precisions agree.
"""

import hashlib
import math

import torch
from torch import Tensor

from moe.experts import Experts
from moe.model import Transformer

ROW_BLOCK = 256
"""Rows drawn from one generator."""


def init_parameters(model: Transformer, seed: int) -> None:
    """Fill every parameter in place.

    Matrices: normal with standard deviation `init_std`; those that write into the residual stream (`wo`, `w_down`)
    divided by sqrt(2·num_layers), so that the stream's variance does not grow with depth (GPT-2). Norms: 1.
    Selection biases of routers: 0.
    """
    std = model.config.init_std
    residual_std = std / math.sqrt(2 * model.config.num_layers)
    first_expert = {
        f"{name}.": module.first_expert for name, module in model.named_modules() if isinstance(module, Experts)
    }
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.zero_()
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            leaf = name.removesuffix(".weight").rpartition(".")[2]
            scale = residual_std if leaf in ("wo", "w_down") else std
            offset = next((first for prefix, first in first_expert.items() if name.startswith(prefix)), None)
            if offset is None:
                fill_rows(parameter, f"{seed}/{name}", scale)
            else:
                for local, weight in enumerate(parameter):
                    fill_rows(weight, f"{seed}/{name}/{offset + local}", scale)


def fill_rows(weight: Tensor, identity: str, std: float, first_row: int = 0) -> None:
    """Fill `weight` [rows, columns], whose first row is row `first_row` of the parameter `identity`."""
    end, columns = first_row + weight.shape[0], weight.shape[1]
    for block in range(first_row // ROW_BLOCK, -(-end // ROW_BLOCK)):
        low, high = max(first_row, block * ROW_BLOCK), min(end, (block + 1) * ROW_BLOCK)
        digest = hashlib.sha256(f"{identity}/{block}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        # Always the whole block: torch draws other numbers for a tensor of another size.
        drawn = torch.randn(ROW_BLOCK, columns, generator=generator)
        weight[low - first_row : high - first_row] = drawn[low - block * ROW_BLOCK : high - block * ROW_BLOCK] * std
