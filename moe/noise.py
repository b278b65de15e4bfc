"""Random numbers without a generator's state, for noise that is the same on every layout.

Each number is a function of (seed, token, layer, channel). It does not depend on the layout or on the order of the
computation, and it is the same when a forward pass is recomputed. Such generators are called counter-based (Salmon et
al., SC 2011). The mixing function is that of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), in int64 arithmetic, which
wraps on overflow on every device.

Shapes: B batch, S sequence, D channels.
"""

import hashlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from moe.region import LocalShard, Region

ROW_BLOCK = 256
"""Rows of a weight that are drawn from one generator."""
GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros (a logical shift). torch's `>>` copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """Map int64 to int64 one to one, so that neighbouring inputs get unrelated outputs."""
    x = (x ^ _shift_right(x, 30)) * MIX_1
    x = (x ^ _shift_right(x, 27)) * MIX_2
    return x ^ _shift_right(x, 31)


def noise_keys(seed: int, numbers_BS: Tensor) -> Tensor:
    """Return one int64 key per token [B, S].

    Args:
        seed: the run's seed.
        numbers_BS: index of each token in the global order of all tokens of the run.
    """
    root = mix(torch.full((), seed, dtype=torch.int64, device=numbers_BS.device) + GOLDEN)
    return mix(numbers_BS * GOLDEN + root)


def uniform(keys_BS: Tensor, salt: int | Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Return uniform random numbers in [0, 1), multiples of 2^-24.

    Args:
        keys_BS: `noise_keys` of the tokens.
        salt: the layer, a number or a tensor with one element; different values give unrelated numbers.
        channels: D.

    Returns:
        [B, S, D] of `dtype`.
    """
    channel_D = torch.arange(channels, device=keys_BS.device) * GOLDEN
    bits_BSD = mix(mix(keys_BS + salt).unsqueeze(-1) + channel_D)
    return _shift_right(bits_BSD, 40).to(dtype) * 2.0**-24


def normal(keys_BS: Tensor, salt: int | Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Return standard normal random numbers [B, S, D]; the arguments are those of `uniform`."""
    # uniform() is a multiple of 2^-24; the half step keeps the quantile away from 0 and 1.
    quantiles = uniform(keys_BS, salt, channels, torch.float64) + 2.0**-25
    return (torch.erfinv(2 * quantiles - 1) * 2**0.5).to(dtype)


def fill_rows(weight: Tensor, identity: str, std: float, first_row: int = 0) -> None:
    """Fill consecutive whole rows of a matrix with normal numbers.

    Args:
        weight: [rows, columns], filled in place.
        identity: what the numbers depend on, e.g. the seed and the parameter's name.
        std: standard deviation.
        first_row: index in the matrix of the first row of `weight`.
    """
    fill_part(weight, Region((first_row, 0), tuple(weight.shape)), weight.shape[1], identity, std)


def row_blocks(first_row: int, rows: int) -> Iterator[tuple[int, int, int]]:
    """Yield (block, low, high) for every block that has some of the rows: those from `low` to `high` - 1.

    >>> list(row_blocks(200, 100))
    [(0, 200, 256), (1, 256, 300)]
    """
    end = first_row + rows
    for block in range(first_row // ROW_BLOCK, -(-end // ROW_BLOCK)):
        yield block, max(first_row, block * ROW_BLOCK), min(end, (block + 1) * ROW_BLOCK)


def fill_part(weight: Tensor, region: Region, columns: int, identity: str, std: float) -> None:
    """Fill a region of a matrix with normal numbers, the same ones that filling the whole matrix puts there.

    Args:
        weight: the elements of the matrix in `region`, filled in place.
        columns: number of columns of the matrix.
        identity: what the numbers depend on, e.g. the seed and the parameter's name.
        std: standard deviation.
    """
    for drawn, part in _blocks(weight, region, columns, identity, torch.randn):
        part.copy_(drawn * std)


def fill_uniform(shard: LocalShard, identity: str, bound: float) -> None:
    """Fill this rank's region of a matrix, or of stacked matrices, with uniform numbers from -bound to bound.

    As with `fill_part`, the numbers do not depend on the region.

    Args:
        identity: what the numbers depend on, e.g. the seed and the parameter's name.
    """
    region, columns = shard.region, shard.shape[-1]
    if len(region.shape) == 3:
        matrix = Region(region.offset[1:], region.shape[1:])
        for index, local in enumerate(shard.local):
            fill_uniform(LocalShard(local, shard.shape[1:], matrix), f"{identity}/{region.offset[0] + index}", bound)
        return
    for drawn, part in _blocks(shard.local, region, columns, identity, torch.rand):
        part.copy_((2 * drawn - 1) * bound)


def _blocks(
    weight: Tensor, region: Region, columns: int, identity: str, draw: Callable[..., Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the numbers of each block of rows that are in `region`, and the part of `weight` to fill with them.

    Args:
        draw: returns random numbers for a shape and a generator.
    """
    (first_row, first_column), (rows, width) = region
    for block, low, high in row_blocks(first_row, rows):
        digest = hashlib.sha256(f"{identity}/{block}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        # Whole blocks are drawn, because torch draws other numbers for a tensor of another size.
        drawn = draw(ROW_BLOCK, columns, generator=generator)[:, first_column : first_column + width]
        yield drawn[low - block * ROW_BLOCK : high - block * ROW_BLOCK], weight[low - first_row : high - first_row]
