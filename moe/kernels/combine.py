"""Dispatch and combine: copies of tokens to the rows of the experts, and weighted sums of rows per token.

Shapes: T tokens, K top-k, D model, R rows.

`slots_TK` has the row of each assignment, and R for an assignment that has none. One program handles all columns and
all assignments of a token. It adds in fp32, in the order of the assignments, and rounds once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def blocks(top_k: int, dim: int) -> dict[str, Any]:
    """Return the constants of both kernels: chunks of assignments are unrolled, a thread has 16 elements of a row."""
    columns = triton.next_power_of_2(max(dim, 1))
    chunk = min(8 if columns <= 8192 else 4, triton.next_power_of_2(top_k))  # registers: a thread of wide rows has more
    warps = min(max(columns // 512, 1), 16)
    return {"CHUNK": chunk, "CHUNKS": triton.cdiv(top_k, chunk), "COLUMNS": columns, "num_warps": warps}


@triton.jit(do_not_specialize=["rows", "top_k"])
def gather_kernel(
    y, slots, weights, out, rows, width, top_k,
    WEIGHTED: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute out[t] = sum_k weights[t, k] * y[slots[t, k]] for one token; without weights, the plain sum."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    mask = columns < width
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(CHUNKS):
        for i in tl.static_range(CHUNK):
            k = first * CHUNK + i
            slot = tl.load(slots + token * top_k + k, k < top_k, other=rows)
            end = tl.where(slot < rows, width, 0)
            row = tl.load(y + slot * width + columns, columns < end, other=0.0).to(tl.float32)
            if WEIGHTED:
                row *= tl.load(weights + token * top_k + k, k < top_k, other=0.0).to(tl.float32)
            total += row
    tl.store(out + token * width + columns, total.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["rows", "top_k"])
def scatter_kernel(
    x, slots, weights, y, out, grad_weights, rows, width, top_k,
    WEIGHTED: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write out[slots[t, k]] = weights[t, k] * x[t] for one token, and grad_weights[t, k] = <y[slots[t, k]], x[t]>.

    Without weights it copies x[t].
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    mask = columns < width
    value = tl.load(x + token * width + columns, mask, other=0.0)
    for first in range(CHUNKS):
        for i in tl.static_range(CHUNK):
            k = first * CHUNK + i
            slot = tl.load(slots + token * top_k + k, k < top_k, other=rows)
            present = columns < tl.where(slot < rows, width, 0)
            if WEIGHTED:
                weight = tl.load(weights + token * top_k + k, k < top_k, other=0.0).to(tl.float32)
                row = tl.load(y + slot * width + columns, present, other=0.0).to(tl.float32)
                product = value.to(tl.float32) * weight
                tl.store(out + slot * width + columns, product.to(out.dtype.element_ty), present)
                dot = tl.sum(value.to(tl.float32) * row)
                tl.store(grad_weights + token * top_k + k, dot.to(grad_weights.dtype.element_ty), k < top_k)
            else:
                tl.store(out + slot * width + columns, value, present)


@torch.library.custom_op("mixwright::scatter_rows", mutates_args=())
def scatter_rows(x_TD: Tensor, slots_TK: Tensor, rows: int, full: bool) -> Tensor:
    """Return [R, D]: a copy of each token in the rows of its assignments.

    Args:
        rows: R.
        full: whether every row has an assignment. If not, rows without one are zeros.
    """
    x_TD, slots_TK = x_TD.contiguous(), slots_TK.contiguous()
    (tokens, top_k), dim = slots_TK.shape, x_TD.shape[1]
    out_RD = x_TD.new_empty(rows, dim) if full else x_TD.new_zeros(rows, dim)
    scatter_kernel[(tokens,)](
        x_TD, slots_TK, x_TD, x_TD, out_RD, x_TD, rows, dim, top_k, WEIGHTED=False, **blocks(top_k, dim)
    )
    return out_RD


@torch.library.custom_op("mixwright::combine_rows", mutates_args=())
def combine_rows(y_RD: Tensor, slots_TK: Tensor, weights_TK: Tensor | None, full: bool) -> Tensor:
    """Return [T, D]: the sum of the rows of each token's assignments, weighted if there are weights.

    Args:
        full: as in `scatter_rows`, for the gradient.
    """
    y_RD, slots_TK = y_RD.contiguous(), slots_TK.contiguous()
    (rows, dim), (tokens, top_k) = y_RD.shape, slots_TK.shape
    out_TD = y_RD.new_empty(tokens, dim)
    weighted = weights_TK is not None
    weights = y_RD if weights_TK is None else weights_TK.contiguous()
    gather_kernel[(tokens,)](y_RD, slots_TK, weights, out_TD, rows, dim, top_k, WEIGHTED=weighted, **blocks(top_k, dim))
    return out_TD


@torch.library.custom_op("mixwright::combine_rows_backward", mutates_args=())
def combine_rows_backward(
    grad_TD: Tensor, y_RD: Tensor, slots_TK: Tensor, weights_TK: Tensor, full: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the rows and of the weights, given that of the result of `combine_rows`."""
    grad_TD, y_RD, slots_TK, weights_TK = (x.contiguous() for x in (grad_TD, y_RD, slots_TK, weights_TK))
    (rows, dim), (tokens, top_k) = y_RD.shape, slots_TK.shape
    grad_RD = torch.empty_like(y_RD) if full else torch.zeros_like(y_RD)
    grad_weights_TK = torch.empty_like(weights_TK)
    scatter_kernel[(tokens,)](
        grad_TD, slots_TK, weights_TK, y_RD, grad_RD, grad_weights_TK, rows, dim, top_k,
        WEIGHTED=True, **blocks(top_k, dim),
    )  # fmt: skip
    return grad_RD, grad_weights_TK


def _contiguous(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


scatter_rows.register_fake(lambda x, slots, rows, full: x.new_empty(rows, x.shape[1]))
combine_rows.register_fake(lambda y, slots, weights, full: y.new_empty(slots.shape[0], y.shape[1]))
combine_rows_backward.register_fake(lambda grad, y, slots, weights, full: (_contiguous(y), _contiguous(weights)))


def _save_for_scatter(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, slots_TK, _, ctx.full = inputs
    ctx.save_for_backward(slots_TK)


def _scatter_backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None, None]:
    return combine_rows(grad_RD, *ctx.saved_tensors, None, ctx.full), None, None, None


def _save_for_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y_RD, slots_TK, weights_TK, ctx.full = inputs
    ctx.rows = y_RD.shape[0]
    ctx.save_for_backward(slots_TK, *(() if weights_TK is None else (y_RD, weights_TK)))


def _combine_backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, Tensor | None, None]:
    slots_TK, *weighted = ctx.saved_tensors
    if not weighted:
        return scatter_rows(grad_TD, slots_TK, ctx.rows, ctx.full), None, None, None
    y_RD, weights_TK = weighted
    grad_RD, grad_weights_TK = combine_rows_backward(grad_TD, y_RD, slots_TK, weights_TK, ctx.full)
    return grad_RD, None, grad_weights_TK, None


scatter_rows.register_autograd(_scatter_backward, setup_context=_save_for_scatter)
combine_rows.register_autograd(_combine_backward, setup_context=_save_for_combine)
