"""Random numbers that depend on what they are for, and on nothing else.

A number is a function of (seed, token, layer, channel): the same on every layout, in every order, and again when a
forward pass is recomputed. A counter-based generator does that without any state (Salmon et al., SC 2011); the mixing
function is that of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), in int64 arithmetic that wraps, as on every device.

Shapes: B batch, S sequence, D channels.
"""

import hashlib

import torch
from torch import Tensor

from moe.region import Region

ROW_BLOCK = 256
"""Rows of a weight that are drawn from one generator."""
GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """A bijection of int64 under which neighbouring inputs have unrelated outputs."""
    x = (x ^ _shift_right(x, 30)) * MIX_1
    x = (x ^ _shift_right(x, 27)) * MIX_2
    return x ^ _shift_right(x, 31)


def noise_keys(seed: int, numbers_BS: Tensor) -> Tensor:
    """One int64 key for every token, from the run's seed and the token's number in the endless global order."""
    root = mix(torch.full((), seed, dtype=torch.int64, device=numbers_BS.device) + GOLDEN)
    return mix(numbers_BS * GOLDEN + root)


def uniform(keys_BS: Tensor, salt: int, channels: int, dtype: torch.dtype) -> Tensor:
    """[B, S, D] numbers of [0, 1), multiples of 2^-24; another `salt` (the layer) gives unrelated ones."""
    channel_D = torch.arange(channels, device=keys_BS.device) * GOLDEN
    drawn = mix(mix(keys_BS + salt).unsqueeze(-1) + channel_D)
    return _shift_right(drawn, 40).to(dtype) * 2.0**-24


def normal(keys_BS: Tensor, salt: int, channels: int, dtype: torch.dtype) -> Tensor:
    """[B, S, D] standard normal numbers; another `salt` gives unrelated ones."""
    # uniform() is a multiple of 2^-24; the half step keeps the quantile away from 0 and 1.
    quantiles = uniform(keys_BS, salt, channels, torch.float64) + 2.0**-25
    return (torch.erfinv(2 * quantiles - 1) * 2**0.5).to(dtype)


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
