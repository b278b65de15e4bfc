"""A counting sort of the assignments by expert.

Shapes: A assignments, E experts, P programs.

Each program ranks the assignments of one block among those to the same expert. A prefix sum over (expert, block) gives
the place of the first one of each. No order of execution enters: the result is that of a stable sort.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

RANK_BLOCK = 64
"""Assignments of a program, which compares each one with each other one."""


@triton.jit(do_not_specialize=["assignments", "programs"])
def rank_kernel(experts, ranks, counts, assignments, programs, BLOCK: tl.constexpr):
    """Write how many earlier assignments of the block have the same expert, and the counts [E + 1, P] of the block."""
    block = tl.program_id(0)
    row, column = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    row_index, column_index = block * BLOCK + row, block * BLOCK + column
    expert = tl.load(experts + row_index, row_index < assignments, other=-1).to(tl.int32)
    others = tl.load(experts + column_index, column_index < assignments, other=-1).to(tl.int32)
    same = expert[:, None] == others[None, :]
    rank = tl.sum((same & (column[None, :] < row[:, None])).to(tl.int32), axis=1)
    later = tl.sum((same & (column[None, :] > row[:, None])).to(tl.int32), axis=1)
    tl.store(ranks + row_index, rank, row_index < assignments)
    tl.store(counts + expert * programs + block, rank + 1, (row_index < assignments) & (later == 0))


@triton.jit(do_not_specialize=["assignments", "programs"])
def place_kernel(experts, ranks, counts, ends, order, slots, assignments, programs, BLOCK: tl.constexpr):
    """Write the place of every assignment in the sorted list, and the list. `ends` is the prefix sum of `counts`."""
    block = tl.program_id(0)
    index = block * BLOCK + tl.arange(0, BLOCK)
    mask = index < assignments
    cell = tl.load(experts + index, mask, other=0).to(tl.int32) * programs + block
    slot = tl.load(ends + cell, mask, other=0) - tl.load(counts + cell, mask, other=0) + tl.load(ranks + index, mask)
    tl.store(slots + index, slot.to(tl.int64), mask)
    tl.store(order + slot, index.to(tl.int64), mask)


@torch.library.custom_op("mixwright::group_by_expert", mutates_args=())
def group_by_expert(experts_A: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `moe.dispatch.group_by_expert` returns."""
    experts_A = experts_A.contiguous()
    assignments = len(experts_A)
    programs = triton.cdiv(assignments, RANK_BLOCK)
    ranks_A = experts_A.new_empty(assignments, dtype=torch.int32)
    counts_EP = experts_A.new_zeros(num_experts + 1, programs, dtype=torch.int32)
    rank_kernel[(programs,)](experts_A, ranks_A, counts_EP, assignments, programs, BLOCK=RANK_BLOCK)
    ends_EP = counts_EP.flatten().cumsum(0, dtype=torch.int32)
    order_A, slots_A = torch.empty_like(experts_A), torch.empty_like(experts_A)
    place_kernel[(programs,)](
        experts_A, ranks_A, counts_EP, ends_EP, order_A, slots_A, assignments, programs, BLOCK=RANK_BLOCK
    )
    return order_A, slots_A, counts_EP[:num_experts].sum(dim=1)


group_by_expert.register_fake(
    lambda experts, num_experts: (
        torch.empty_like(experts), torch.empty_like(experts), experts.new_empty(num_experts)
    )
)  # fmt: skip
