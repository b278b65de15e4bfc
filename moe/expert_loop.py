"""SwiGLU experts on a CPU: one after the other, with intermediate results that stay in its cache.

Shapes: R routed rows, N of them for one expert, D model, F expert hidden width, e experts on this rank.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moe.device import on_gpu

ALIGNMENT = 16
"""The number of rows of an expert is a multiple of this in bf16, and a larger one of 1/32 to 1/16 of it."""


def needs_alignment(x: Tensor) -> bool:
    """Return whether the number of rows of each expert should be one of a few (`aligned_counts`).

    In bf16 on a CPU, torch calls oneDNN, which compiles a kernel for each shape of a matmul. That takes 1 to 3 ms, and
    the matmul of an expert often 0.1 ms. Without alignment nearly every expert has a new shape in every step.
    """
    return not on_gpu(x) and x.dtype == torch.bfloat16 and not torch.compiler.is_compiling()


def aligned_counts(counts_e: Tensor) -> Tensor:
    """Return the numbers of rows, each rounded up to one of at most 16 numbers between two powers of two.

    >>> aligned_counts(torch.tensor([0, 1, 100, 513, 1000])).tolist()
    [0, 16, 112, 544, 1024]
    """
    # frexp gives the exponent of the next power of two above a number.
    step_e = (torch.frexp((counts_e - 1).clamp(min=0).double()).exponent.long() - 5).clamp(min=0)
    step_e = (torch.ones_like(counts_e) << step_e).clamp(min=ALIGNMENT)
    return (counts_e + step_e - 1) // step_e * step_e


def swiglu_loop(rows_RD: Tensor, counts_e: Tensor, gate_eFD: Tensor, up_eFD: Tensor, down_eDF: Tensor) -> Tensor:
    """Apply each SwiGLU expert to its rows. `moe.experts.Experts` with `loop_kernel` is the readable reference.

    On a CPU, memory that is used for the first time costs more than the work on it, because the system fills each page
    with zeros. Results are therefore written to their places instead of being joined, gate and up are the only numbers
    of the hidden layers that are kept, and the backward pass computes the activation again.

    Args:
        rows_RD: rows grouped by expert.
        counts_e: number of rows of each expert.
        gate_eFD, up_eFD, down_eDF: the weights. They are cast to the dtype of the rows where they are used.

    Returns:
        [R, D], in the same order.
    """
    y_RD: Tensor = _SwiGLULoop.apply(rows_RD, counts_e, gate_eFD, up_eFD, down_eDF)
    return y_RD


class _SwiGLULoop(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_RD: Tensor, counts_e: Tensor, gate_eFD: Tensor, up_eFD: Tensor, down_eDF: Tensor
    ) -> Tensor:
        gate_up_RG = rows_RD.new_empty(len(rows_RD), 2 * gate_eFD.shape[1])
        y_RD = torch.empty_like(rows_RD)
        for expert, rows in rows_of_experts(counts_e):
            for columns, weight_CD in _gate_and_up(gate_eFD[expert], up_eFD[expert], rows_RD.dtype):
                torch.mm(rows_RD[rows], weight_CD.t(), out=gate_up_RG[rows, columns])
            gate_NF, up_NF = gate_up_RG[rows].chunk(2, dim=1)
            _multiply(F.silu(gate_NF).mul_(up_NF), down_eDF[expert].t(), out=y_RD[rows])
        ctx.save_for_backward(rows_RD, counts_e, gate_eFD, up_eFD, down_eDF, gate_up_RG)
        return y_RD

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, counts_e, gate_eFD, up_eFD, down_eDF, gate_up_RG = ctx.saved_tensors
        inputs = rows_RD, counts_e, gate_eFD, up_eFD, down_eDF
        grads = [torch.empty_like(x) if needs else None for x, needs in zip(inputs, ctx.needs_input_grad, strict=True)]
        grad_rows_RD, _, grad_gate_eFD, grad_up_eFD, grad_down_eDF = grads
        for expert, rows in rows_of_experts(counts_e, all_experts=True):
            x_ND, grad_ND, gate_up_NG = rows_RD[rows], grad_RD[rows], gate_up_RG[rows]
            gate_NF, up_NF = gate_up_NG.chunk(2, dim=1)
            grad_hidden_NF = _product(grad_ND, down_eDF[expert])
            silu_NF = F.silu(gate_NF)
            if grad_down_eDF is not None:
                _multiply(grad_ND.t(), silu_NF * up_NF, out=grad_down_eDF[expert])
            grad_NG = torch.empty_like(gate_up_NG)
            grad_gate_NF, grad_up_NF = grad_NG.chunk(2, dim=1)
            torch.mul(silu_NF, grad_hidden_NF, out=grad_up_NF)
            torch.ops.aten.silu_backward(grad_hidden_NF.mul_(up_NF), gate_NF, grad_input=grad_gate_NF)
            if grad_gate_eFD is not None:
                _multiply(grad_gate_NF.t(), x_ND, out=grad_gate_eFD[expert])
            if grad_up_eFD is not None:
                _multiply(grad_up_NF.t(), x_ND, out=grad_up_eFD[expert])
            if grad_rows_RD is not None:
                first, *rest = _gate_and_up(gate_eFD[expert], up_eFD[expert], rows_RD.dtype)
                torch.mm(grad_NG[:, first[0]], first[1], out=grad_rows_RD[rows])
                for columns, weight_CD in rest:
                    grad_rows_RD[rows].addmm_(grad_NG[:, columns], weight_CD)
        return tuple(grads)


def _gate_and_up(gate_FD: Tensor, up_FD: Tensor, dtype: torch.dtype) -> list[tuple[slice, Tensor]]:
    """Return matrices of `dtype`, and which columns of [gate, up] each of them gives.

    Two matrices that must be cast are joined at the same time, because one large matmul is faster than two small ones.
    """
    width, dim = gate_FD.shape
    if gate_FD.dtype == dtype:
        return [(slice(width), gate_FD), (slice(width, None), up_FD)]
    joined_GD = gate_FD.new_empty(2 * width, dim, dtype=dtype)
    joined_GD[:width], joined_GD[width:] = gate_FD, up_FD
    return [(slice(None), joined_GD)]


def rows_of_experts(counts_e: Tensor, all_experts: bool = False) -> Iterator[tuple[int, slice]]:
    """Yield the index of each expert that has rows, or of each one, and the slice of its rows."""
    end = 0
    for expert, count in enumerate(counts_e.tolist()):
        end += count
        if count or all_experts:
            yield expert, slice(end - count, end)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a b in the dtype of `a`."""
    return a @ b.to(a.dtype)


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write a b, computed in the dtype of `a`, to `out`."""
    if a.dtype == b.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(_product(a, b))
