"""Top-k of the experts' scores of each token, with ties to the lower index.

Shapes: T tokens, E experts, K top-k.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOWEST = tl.constexpr(-(2**63))


def blocks(experts: int) -> dict[str, Any]:
    """Return the constants of the kernel: a program has 2,048 scores, 16 a thread."""
    columns = triton.next_power_of_2(experts)
    return {"TOKENS": max(2048 // columns, 1), "EXPERTS": columns, "num_warps": 4}


@triton.jit(do_not_specialize=["tokens"])
def top_k_kernel(scores, out, tokens, experts, K: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr):
    """Write the indices of the K largest scores of `TOKENS` tokens, best first.

    A score and its index make one integer: in its high half a number that is ordered like the score, in its low half
    one that is larger for a lower index. No two are equal. As in `torch.sort`, NaN is the largest score, and zeros of
    both signs are equal.
    """
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, EXPERTS)
    mask = (token < tokens)[:, None] & (expert < experts)[None, :]
    score = tl.load(scores + token[:, None] * experts + expert[None, :], mask, other=0.0).to(tl.float32)
    bits = score.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF  # comparisons of integers: those of floats can take small numbers for 0
    ordered = tl.where(bits < 0, -size, size)
    ordered = tl.where(size > 0x7F800000, 0x7FFFFFFF, ordered)
    key = (ordered.to(tl.int64) << 32) | (EXPERTS - 1 - expert)[None, :]
    key = tl.where(mask, key, LOWEST)
    for k in range(K):
        best = tl.max(key, axis=1)
        tl.store(out + token * K + k, EXPERTS - 1 - (best & 0x7FFFFFFF), token < tokens)
        key = tl.where(key == best[:, None], LOWEST, key)


@torch.library.custom_op("mixwright::top_k", mutates_args=())
def top_k(scores: Tensor, k: int) -> Tensor:
    """Return what `moe.selection.top_k_stable` returns, for at most `moe.kernels.MAX_EXPERTS` scores and
    `moe.kernels.MAX_K` of them."""
    scores = scores.contiguous()
    experts = scores.shape[-1]
    tokens = scores.numel() // experts
    out = scores.new_empty(*scores.shape[:-1], k, dtype=torch.int64)
    constants = blocks(experts)
    top_k_kernel[(triton.cdiv(tokens, constants["TOKENS"]),)](scores, out, tokens, experts, K=k, **constants)
    return out


top_k.register_fake(lambda scores, k: scores.new_empty(*scores.shape[:-1], k, dtype=torch.int64))
