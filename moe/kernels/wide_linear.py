"""The linear map of a router, x W^T for bf16 tokens and an fp32 weight, on tensor cores with the precision of fp32.

Shapes: T tokens, D model, E experts, S parts of the sum over tokens.

Tensor cores multiply bf16 numbers exactly. The tokens are such numbers, and an fp32 number is the sum of three of them
(`split`), so that three products of bf16 matrices make up the product. Tensor cores do not round a sum to the nearest
number (Ootomo and Yokota, arXiv 2203.03341), and the errors of a long sum add up. The kernel therefore leaves sums of
64 products to them, and adds these sums with the usual fp32 addition.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PARTS = 3
SPLIT = {"BLOCK": 1024, "num_warps": 4}
TOKENS_PER_PROGRAM = 2048
"""Tokens that one program sums up for the gradient of the weight. The sums of the programs are added afterwards."""


def blocks(rows: int, columns: int) -> dict[str, Any]:
    """Return the constants of `matmul_kernel`: the tile of the result of one program, and the products of one sum."""
    tile = {"ROWS": 128 if rows > 64 else 64, "COLUMNS": min(max(triton.next_power_of_2(columns), 16), 128)}
    return {**tile, "INNER": 64, "num_warps": 8 if rows > 64 else 4, "num_stages": 3}


@triton.jit
def split_kernel(x, parts, size, BLOCK: tl.constexpr):
    """Write the bits of the three parts of `BLOCK` elements. Each part is what remains, cut off after 8 digits."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    rest = tl.load(x + index, mask, other=0.0)
    for _ in tl.static_range(3):
        bits = tl.where(rest == rest, rest.to(tl.int32, bitcast=True), 0x7FC00000)  # NaN stays NaN
        tl.store(parts + index, (bits >> 16).to(tl.int16), mask)
        rest = rest - (bits & -0x10000).to(tl.float32, bitcast=True)
        rest = tl.where(tl.abs(rest) < float("inf"), rest, 0.0)  # nothing is left of NaN and of infinity
        parts += size


@triton.jit
def matmul_kernel(
    a, high, middle, low, out, rows, columns, inner, a_row, a_inner, b_column, b_inner, inner_per_program,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Compute a tile of A (B_high + B_middle + B_low) over a range of the inner dimension, in fp32.

    A is [rows, inner], the parts of B are [inner, columns], in bf16, and `out` is [ranges, rows, columns].
    """
    column_blocks, row_blocks = tl.cdiv(columns, COLUMNS), tl.cdiv(rows, ROWS)
    block = tl.program_id(0)
    first_column = block % column_blocks * COLUMNS
    first_row = block // column_blocks % row_blocks * ROWS
    part = (block // column_blocks // row_blocks).to(tl.int64)  # the tensors can have more than 2^31 elements
    first_inner = part * inner_per_program
    length = tl.minimum(inner - first_inner, inner_per_program).to(tl.int32)

    row, column, k = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, INNER)
    in_row, in_column = (first_row + row < rows)[:, None], (first_column + column < columns)[None, :]
    a += first_row.to(tl.int64) * a_row + first_inner * a_inner
    start_b = first_column.to(tl.int64) * b_column + first_inner * b_inner
    a_tile = row[:, None] * a_row + k[None, :] * a_inner
    b_tile = k[:, None] * b_inner + column[None, :] * b_column
    high, middle, low = high + start_b, middle + start_b, low + start_b
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, length, INNER):
        in_range = k < length - start
        in_b = in_range[:, None] & in_column
        factor = tl.load(a + a_tile, in_row & in_range[None, :], other=0.0)
        small = tl.dot(factor, tl.load(low + b_tile, in_b, other=0.0))
        small = tl.dot(factor, tl.load(middle + b_tile, in_b, other=0.0), small)
        total += tl.dot(factor, tl.load(high + b_tile, in_b, other=0.0), small)
        a += INNER * a_inner
        high += INNER * b_inner
        middle += INNER * b_inner
        low += INNER * b_inner
    out += (part * rows + first_row) * columns + first_column
    tl.store(out + row[:, None] * columns + column[None, :], total, in_row & in_column)


def split(x: Tensor) -> Tensor:
    """Return three bf16 tensors [3, ...] of decreasing size whose sum is the fp32 tensor `x`.

    The sum is exact but for digits below 2^-133, the smallest bf16 number. The second and the third part of NaN and of
    infinity are 0.
    """
    x = x.contiguous()
    parts = x.new_empty(PARTS, *x.shape, dtype=torch.bfloat16)
    split_kernel[(triton.cdiv(x.numel(), SPLIT["BLOCK"]),)](x, parts.view(torch.int16), x.numel(), **SPLIT)
    return parts


def _matmul(a: Tensor, parts: Tensor, inner_per_program: int) -> Tensor:
    """Return a (parts[0] + parts[1] + parts[2]) in fp32, as sums [S, ...] over ranges of the inner dimension."""
    (rows, inner), columns = a.shape, parts.shape[2]
    constants, ranges = blocks(rows, columns), max(triton.cdiv(inner, inner_per_program), 1)
    out = a.new_empty(ranges, rows, columns, dtype=torch.float32)
    grid = ranges * triton.cdiv(rows, constants["ROWS"]) * triton.cdiv(columns, constants["COLUMNS"])
    matmul_kernel[(grid,)](
        a, *parts, out, rows, columns, inner, *a.stride(), parts.stride(2), parts.stride(1), inner_per_program,
        **constants,
    )  # fmt: skip
    return out


@torch.library.custom_op("mixwright::wide_linear", mutates_args=())
def wide_linear(x: Tensor, weight_ED: Tensor) -> Tensor:
    """Return x W^T in fp32 [..., E], for bf16 tokens [..., D] and an fp32 weight.

    The error is that of an fp32 matmul. Equal rows of the weight have equal results, and so have equal tokens, however
    many other tokens there are.
    """
    x_TD = x.flatten(0, -2).contiguous()
    out_TE = _matmul(x_TD, split(weight_ED).transpose(1, 2), x_TD.shape[1])[0]
    return out_TE.view(*x.shape[:-1], len(weight_ED))


@torch.library.custom_op("mixwright::wide_linear_grad_input", mutates_args=())
def wide_linear_grad_input(grad: Tensor, weight_ED: Tensor) -> Tensor:
    """Return the gradient of the tokens in bf16, given that of the result.

    Before the result is rounded, its error relative to the sum of absolute products is about 2^-16: of the products of
    two parts, the three largest ones are summed up.
    """
    high_TE, middle_TE, _ = split(grad.flatten(0, -2))
    high_ED, middle_ED, _ = split(weight_ED)
    grad_TD = torch.cat((middle_TE, high_TE, high_TE), dim=1) @ torch.cat((high_ED, middle_ED, high_ED))
    return grad_TD.view(*grad.shape[:-1], weight_ED.shape[1])


@torch.library.custom_op("mixwright::wide_linear_grad_weight", mutates_args=())
def wide_linear_grad_weight(grad: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of the weight in fp32, given that of the result. The error is that of an fp32 matmul."""
    x_TD = x.flatten(0, -2).contiguous()
    sums_SDE = _matmul(x_TD.t(), split(grad.flatten(0, -2)), TOKENS_PER_PROGRAM)
    return sums_SDE.sum(dim=0).t().contiguous()


wide_linear.register_fake(lambda x, weight: x.new_empty(*x.shape[:-1], weight.shape[0], dtype=torch.float32))
wide_linear_grad_input.register_fake(
    lambda grad, weight: grad.new_empty(*grad.shape[:-1], weight.shape[1], dtype=torch.bfloat16)
)
wide_linear_grad_weight.register_fake(lambda grad, x: grad.new_empty(grad.shape[-1], x.shape[-1]))


def _save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, weight_ED = ctx.saved_tensors
    needs_x, needs_weight = ctx.needs_input_grad
    return (
        wide_linear_grad_input(grad, weight_ED) if needs_x else None,
        wide_linear_grad_weight(grad, x) if needs_weight else None,
    )


wide_linear.register_autograd(_backward, setup_context=_save_inputs)
