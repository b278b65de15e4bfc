"""Rotary position embedding (RoFormer, arXiv 2104.09864), in the half-split layout of Hugging Face's Llama family.

Shapes: B batch, S sequence, H heads, C head dim.
"""

import torch
from torch import Tensor


def rotary_table(positions_BS: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, two tensors [B, 1, S, C] of `dtype`.

    Angles are computed in fp32 (fp64 for an fp64 model): in bf16, positions beyond 256 would collapse.
    """
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, head_dim, 2, device=positions_BS.device, dtype=wide) / head_dim
    angles = positions_BS.to(wide).unsqueeze(-1) * theta**-exponents
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x_BHSC: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (x_i, x_{i + C/2}) by its position's angle."""
    cos, sin = table
    first, second = x_BHSC.chunk(2, dim=-1)
    return x_BHSC * cos + torch.cat((-second, first), dim=-1) * sin
