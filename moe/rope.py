"""Rotary position embedding (RoFormer, arXiv 2104.09864), in the half-split layout of Hugging Face's Llama family.

Shapes: B batch, S sequence, H heads, C head dim.
"""

import torch
from torch import Tensor


def rotary_table(positions_BS: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the cosine and the sine of the rotation angles of every position.

    Angles are computed in fp32 (fp64 for an fp64 model), because bf16 cannot represent all integers above 256.

    Args:
        positions_BS: position of each token in its document.
        head_dim: C.
        theta: base of the geometric sequence of frequencies.
        dtype: of the result.

    Returns:
        Two tensors [B, 1, S, C].
    """
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, head_dim, 2, device=positions_BS.device, dtype=wide) / head_dim
    angles = positions_BS.to(wide).unsqueeze(-1) * theta**-exponents
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x_BHSC: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair (x_i, x_{i + C/2}) by the angle of its position. `table`: the result of `rotary_table`."""
    cos, sin = table
    first, second = x_BHSC.chunk(2, dim=-1)
    return x_BHSC * cos + torch.cat((-second, first), dim=-1) * sin
