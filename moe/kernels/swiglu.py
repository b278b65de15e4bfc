"""SwiGLU, silu(gate) * up (arXiv 2002.05202), forward and backward.

Shapes: R rows, F hidden width.

The forward pass keeps its inputs only; the backward pass computes the sigmoid again. It reads and writes five tensors
[R, F], where eager code reads and writes ten. Both halves can be one tensor [R, 2F], as one matmul with both weights
returns it. Its gradient is then one tensor too, so that one matmul computes the gradient of the input.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCKS = {"ROWS": 16, "COLUMNS": 128, "num_warps": 4}
"""A program computes a tile of this size: each thread loads 16 elements, and each row of a tile is contiguous."""


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(gate, up, out, rows, width, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Compute a tile of `out` [R, F]. `stride` is the distance of two rows of `gate` and of `up`."""
    column_blocks = tl.cdiv(width, COLUMNS)
    first_row = tl.program_id(0) // column_blocks * ROWS
    columns = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    row = tl.arange(0, ROWS)[:, None]
    mask = (first_row + row < rows) & (columns < width)
    start = first_row.to(tl.int64) * stride  # the tensors can have more than 2^31 elements, a tile cannot
    g = tl.load(gate + start + (row * stride + columns), mask).to(tl.float32)
    u = tl.load(up + start + (row * stride + columns), mask).to(tl.float32)
    result = g * tl.sigmoid(g) * u
    tl.store(out + first_row.to(tl.int64) * width + (row * width + columns), result.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(grad, gate, up, grad_gate, grad_up, rows, width, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Compute a tile of the gradients of `gate` and `up`, which are `stride` from row to row like their inputs."""
    column_blocks = tl.cdiv(width, COLUMNS)
    first_row = tl.program_id(0) // column_blocks * ROWS
    columns = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    row = tl.arange(0, ROWS)[:, None]
    mask = (first_row + row < rows) & (columns < width)
    start = first_row.to(tl.int64) * stride
    d = tl.load(grad + first_row.to(tl.int64) * width + (row * width + columns), mask).to(tl.float32)
    g = tl.load(gate + start + (row * stride + columns), mask).to(tl.float32)
    u = tl.load(up + start + (row * stride + columns), mask).to(tl.float32)
    s = tl.sigmoid(g)
    d_gate = d * u * s * (1 + g * (1 - s))
    d_up = d * g * s
    tl.store(grad_gate + start + (row * stride + columns), d_gate.to(grad_gate.dtype.element_ty), mask)
    tl.store(grad_up + start + (row * stride + columns), d_up.to(grad_up.dtype.element_ty), mask)


def _grid(rows: int, width: int) -> tuple[int]:
    return (triton.cdiv(rows, BLOCKS["ROWS"]) * triton.cdiv(width, BLOCKS["COLUMNS"]),)


@torch.library.custom_op("mixwright::swiglu", mutates_args=())
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up for two tensors [..., F] of one shape and dtype."""
    gate, up = gate.contiguous(), up.contiguous()
    out, width = torch.empty_like(gate), gate.shape[-1]
    rows = gate.numel() // max(width, 1)
    forward_kernel[_grid(rows, width)](gate, up, out, rows, width, width, **BLOCKS)
    return out


@torch.library.custom_op("mixwright::swiglu_backward", mutates_args=())
def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `gate` and `up`, given that of the result of `swiglu`."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    grad_gate, grad_up, width = torch.empty_like(gate), torch.empty_like(up), gate.shape[-1]
    rows = gate.numel() // max(width, 1)
    backward_kernel[_grid(rows, width)](grad, gate, up, grad_gate, grad_up, rows, width, width, **BLOCKS)
    return grad_gate, grad_up


@torch.library.custom_op("mixwright::swiglu_joined", mutates_args=())
def swiglu_joined(gate_up_RG: Tensor) -> Tensor:
    """Return silu(gate) * up [R, F], where `gate_up_RG` [R, 2F] has the gate in its first half."""
    gate_up_RG = gate_up_RG.contiguous()
    rows, width = gate_up_RG.shape[0], gate_up_RG.shape[1] // 2
    out_RF = gate_up_RG.new_empty(rows, width)
    forward_kernel[_grid(rows, width)](
        gate_up_RG, gate_up_RG[:, width:], out_RF, rows, width, 2 * width, **BLOCKS
    )  # fmt: skip
    return out_RF


@torch.library.custom_op("mixwright::swiglu_joined_backward", mutates_args=())
def swiglu_joined_backward(grad_RF: Tensor, gate_up_RG: Tensor) -> Tensor:
    """Return the gradient of `gate_up_RG` [R, 2F], given that of the result of `swiglu_joined`."""
    grad_RF, gate_up_RG = grad_RF.contiguous(), gate_up_RG.contiguous()
    (rows, width), grad_RG = grad_RF.shape, torch.empty_like(gate_up_RG)
    backward_kernel[_grid(rows, width)](
        grad_RF, gate_up_RG, gate_up_RG[:, width:], grad_RG, grad_RG[:, width:], rows, width, 2 * width, **BLOCKS
    )
    return grad_RG


swiglu.register_fake(lambda gate, up: torch.empty_like(gate, memory_format=torch.contiguous_format))
swiglu_backward.register_fake(
    lambda grad, gate, up: tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (gate, up))
)
swiglu_joined.register_fake(lambda gate_up: gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2))
swiglu_joined_backward.register_fake(
    lambda grad, gate_up: torch.empty_like(gate_up, memory_format=torch.contiguous_format)
)


def _save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


swiglu.register_autograd(lambda ctx, grad: swiglu_backward(grad, *ctx.saved_tensors), setup_context=_save_inputs)
swiglu_joined.register_autograd(
    lambda ctx, grad: swiglu_joined_backward(grad, *ctx.saved_tensors), setup_context=_save_inputs
)
