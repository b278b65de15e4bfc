"""The softmax statistics of logits, and the gradient of their cross-entropy.

Shapes: T rows, V entries of the vocabulary on this rank.

The eager code is in `moe/losses.py`. Each kernel reads the logits once. The second overwrites them, so that no other
tensor of their size exists. Numbers are computed in fp32 and rounded once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

STATISTICS: dict[str, Any] = {"BLOCK": 4096, "num_warps": 8}
"""A program goes through a row in blocks of this size; 16 logits a thread are two loads of 16 bytes in bf16."""
GRADIENT: dict[str, Any] = {"BLOCK": 4096, "num_warps": 8}


@triton.jit
def statistics_kernel(logits, labels, stats, first, width, rows, BLOCK: tl.constexpr):
    """Write the largest logit, sum(exp(logit - largest)) and the label's logit of one row (arXiv 1805.02867)."""
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * width
    index = tl.arange(0, BLOCK)
    largest = -float("inf")
    total = 0.0
    for block in range(tl.cdiv(width, BLOCK)):
        column = block * BLOCK + index
        x = tl.load(start + column, column < width, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(largest, tl.max(x, axis=0))
        base = tl.where(higher == -float("inf"), 0.0, higher)  # all logits so far are masked
        total = total * tl.exp(largest - base) + tl.sum(tl.exp(x - base), axis=0)
        largest = higher
    label = tl.load(labels + row) - first
    x = tl.load(start + label, (label >= 0) & (label < width), other=0.0).to(tl.float32)
    tl.store(stats + row, largest)
    tl.store(stats + rows + row, total)
    tl.store(stats + 2 * rows + row, x)


@triton.jit
def gradient_kernel(
    logits, labels, stats, stats_stride, factors, first, number, width, IN_TURN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Overwrite a block of one row of logits by its gradient. `number` is the number of the first row."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    places = logits + row.to(tl.int64) * width + column
    factor = tl.load(factors + row)
    largest, total = tl.load(stats + row), tl.load(stats + stats_stride + row)
    x = tl.load(places, column < width, other=-float("inf")).to(tl.float32)
    gradient = tl.exp(x - largest) * (factor / total)
    is_label = column == tl.load(labels + row) - first
    of_label = gradient - factor
    if IN_TURN:  # what `moe.losses.round_in_turn` does
        threshold = ((number + row) * 40503) & 0xFFFF
        bits = of_label.to(tl.int32, bitcast=True) + threshold
        of_label = (bits & -0x10000).to(tl.float32, bitcast=True)
    gradient = tl.where(is_label, of_label, gradient)
    tl.store(places, gradient.to(logits.dtype.element_ty), column < width)


@torch.library.custom_op("mixwright::softmax_statistics", mutates_args=())
def softmax_statistics(logits_TV: Tensor, labels_T: Tensor, first: int) -> Tensor:
    """Return what `moe.losses.softmax_statistics` returns, for contiguous tensors."""
    rows, width = logits_TV.shape
    stats_3T = torch.empty(3, rows, dtype=torch.float32, device=logits_TV.device)
    if rows:
        statistics_kernel[(rows,)](logits_TV, labels_T, stats_3T, first, width, rows, **STATISTICS)
    return stats_3T


softmax_statistics.register_fake(
    lambda logits_TV, labels_T, first: logits_TV.new_empty(3, logits_TV.shape[0], dtype=torch.float32)
)


@torch.library.custom_op("mixwright::write_logit_gradient", mutates_args=("logits_TV",))
def write_logit_gradient(
    logits_TV: Tensor, labels_T: Tensor, first: int, stats_3T: Tensor, factor_T: Tensor, number: int
) -> None:
    """Do what `moe.losses.write_logit_gradient` does, for contiguous tensors; rows of `stats_3T` can be apart."""
    rows, width = logits_TV.shape
    if rows and width:
        gradient_kernel[(rows, triton.cdiv(width, GRADIENT["BLOCK"]))](
            logits_TV, labels_T, stats_3T, stats_3T.stride(0), factor_T, first, number, width,
            IN_TURN=logits_TV.dtype == torch.bfloat16, **GRADIENT,
        )  # fmt: skip


write_logit_gradient.register_fake(lambda *_: None)
