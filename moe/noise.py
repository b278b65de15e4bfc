"""Random numbers that depend on what they are for, and on nothing else.

A number is a function of (seed, token, layer, channel): the same on every layout, in every order, and again when a
forward pass is recomputed. A counter-based generator does that without any state (Salmon et al., SC 2011); the mixing
function is that of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), in int64 arithmetic that wraps, as on every device.

Shapes: B batch, S sequence, D channels.
"""

import torch
from torch import Tensor

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
