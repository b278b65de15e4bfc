"""The cast of two weights into one tensor, so that one matmul computes with both.

Shapes: e experts on this rank, F hidden width, D model.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Elements that a program copies from each of the two weights."""


@triton.jit
def join_kernel(gate, up, joined, size, BLOCK: tl.constexpr, SPLIT: tl.constexpr):
    """Copy blocks of two matrices of `size` elements to the two halves of one matrix, or with SPLIT from there."""
    blocks = tl.cdiv(size, BLOCK)
    expert = (tl.program_id(0) // blocks).to(tl.int64)
    index = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    gate += expert * size
    up += expert * size
    joined += 2 * expert * size
    if SPLIT:
        tl.store(gate + index, tl.load(joined + index, mask).to(gate.dtype.element_ty), mask)
        tl.store(up + index, tl.load(joined + size + index, mask).to(up.dtype.element_ty), mask)
    else:
        tl.store(joined + index, tl.load(gate + index, mask).to(joined.dtype.element_ty), mask)
        tl.store(joined + size + index, tl.load(up + index, mask).to(joined.dtype.element_ty), mask)


def _launch(gate_eFD: Tensor, up_eFD: Tensor, joined_eGD: Tensor, *, split: bool) -> None:
    experts, width, dim = gate_eFD.shape
    grid = (experts * triton.cdiv(width * dim, BLOCK),)
    join_kernel[grid](gate_eFD, up_eFD, joined_eGD, width * dim, BLOCK=BLOCK, SPLIT=split)


@torch.library.custom_op("mixwright::join", mutates_args=())
def join(gate_eFD: Tensor, up_eFD: Tensor, dtype: torch.dtype) -> Tensor:
    """Return [e, 2F, D] in `dtype`: `gate_eFD`, and below it `up_eFD`."""
    experts, width, dim = gate_eFD.shape
    joined_eGD = gate_eFD.new_empty(experts, 2 * width, dim, dtype=dtype)
    _launch(gate_eFD.contiguous(), up_eFD.contiguous(), joined_eGD, split=False)
    return joined_eGD


@torch.library.custom_op("mixwright::split", mutates_args=())
def split(joined_eGD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the two halves [e, F, D] of `joined_eGD` in `dtype`."""
    experts, width, dim = joined_eGD.shape
    gate_eFD, up_eFD = (joined_eGD.new_empty(experts, width // 2, dim, dtype=dtype) for _ in range(2))
    _launch(gate_eFD, up_eFD, joined_eGD.contiguous(), split=True)
    return gate_eFD, up_eFD


@join.register_fake
def _(gate_eFD: Tensor, up_eFD: Tensor, dtype: torch.dtype) -> Tensor:
    experts, width, dim = gate_eFD.shape
    return gate_eFD.new_empty(experts, 2 * width, dim, dtype=dtype)


@split.register_fake
def _(joined_eGD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    experts, width, dim = joined_eGD.shape
    gate_eFD, up_eFD = (joined_eGD.new_empty(experts, width // 2, dim, dtype=dtype) for _ in range(2))
    return gate_eFD, up_eFD


def _save_dtype(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.dtype = inputs[0].dtype


def _backward(ctx: Any, grad_eGD: Tensor) -> tuple[Tensor, Tensor, None]:
    return *split(grad_eGD, ctx.dtype), None


join.register_autograd(_backward, setup_context=_save_dtype)
