"""Attention under an explicit mask, with grouped queries and without copies of keys and values.

Shapes: B batch, S queries, X keys, H query heads, G key/value heads, C head dim, r = H/G query heads per group.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from moe.device import on_gpu


def masked_attention(
    q_BHSC: Tensor, k_BGXC: Tensor, v_BGXC: Tensor, mask_B1SX: Tensor, scale: float | None = None
) -> Tensor:
    """Return softmax(q k^T · scale) v over the keys where the mask is True, [B, H, S, C].

    Every query must attend to at least one key. The r query heads of a group are treated as r·S queries of one head, so
    that keys and values need not be repeated for each of them.

    Args:
        scale: None: 1/sqrt(C).
    """
    heads, length, groups = q_BHSC.shape[1], q_BHSC.shape[2], k_BGXC.shape[1]
    ratio = heads // groups
    q, mask = q_BHSC, mask_B1SX
    if ratio > 1:
        q = q.unflatten(1, (groups, ratio)).flatten(2, 3)
        mask = mask if length == 1 else mask.repeat(1, 1, ratio, 1)
    if not on_gpu(q) and q.dtype == torch.bfloat16:
        # torch's fused CPU kernel is twice as slow as plain matmuls in bf16, forward and backward together.
        scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k_BGXC.transpose(-1, -2)
        mixed = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1) @ v_BGXC
    else:
        mixed = F.scaled_dot_product_attention(q, k_BGXC, v_BGXC, attn_mask=mask, scale=scale)
    return torch.unflatten(mixed, 2, (ratio, length)).flatten(1, 2) if ratio > 1 else mixed
