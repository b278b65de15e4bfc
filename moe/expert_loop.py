"""SwiGLU experts on a CPU: one after the other, with intermediate results that stay in its cache.

Shapes: R routed rows, N of them for one expert, D model, F expert hidden width, e experts on this rank.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


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
        gate_RF, up_RF = (rows_RD.new_empty(len(rows_RD), gate_eFD.shape[1]) for _ in range(2))
        y_RD = torch.empty_like(rows_RD)
        for expert, rows in _rows_of_experts(counts_e):
            _multiply(rows_RD[rows], gate_eFD[expert].t(), out=gate_RF[rows])
            _multiply(rows_RD[rows], up_eFD[expert].t(), out=up_RF[rows])
            _multiply(F.silu(gate_RF[rows]).mul_(up_RF[rows]), down_eDF[expert].t(), out=y_RD[rows])
        ctx.save_for_backward(rows_RD, counts_e, gate_eFD, up_eFD, down_eDF, gate_RF, up_RF)
        return y_RD

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, counts_e, gate_eFD, up_eFD, down_eDF, gate_RF, up_RF = ctx.saved_tensors
        inputs = rows_RD, counts_e, gate_eFD, up_eFD, down_eDF
        grads = [torch.empty_like(x) if needs else None for x, needs in zip(inputs, ctx.needs_input_grad, strict=True)]
        grad_rows_RD, _, grad_gate_eFD, grad_up_eFD, grad_down_eDF = grads
        for expert, rows in _rows_of_experts(counts_e, all_experts=True):
            x_ND, grad_ND, gate_NF, up_NF = rows_RD[rows], grad_RD[rows], gate_RF[rows], up_RF[rows]
            grad_hidden_NF = _product(grad_ND, down_eDF[expert])
            silu_NF = F.silu(gate_NF)
            if grad_down_eDF is not None:
                _multiply(grad_ND.t(), silu_NF * up_NF, out=grad_down_eDF[expert])
            grad_up_NF = silu_NF.mul_(grad_hidden_NF)
            grad_gate_NF = torch.ops.aten.silu_backward(grad_hidden_NF.mul_(up_NF), gate_NF)
            if grad_gate_eFD is not None:
                _multiply(grad_gate_NF.t(), x_ND, out=grad_gate_eFD[expert])
            if grad_up_eFD is not None:
                _multiply(grad_up_NF.t(), x_ND, out=grad_up_eFD[expert])
            if grad_rows_RD is not None:
                _multiply(grad_gate_NF, gate_eFD[expert], out=grad_rows_RD[rows])
                grad_rows_RD[rows].addmm_(grad_up_NF, up_eFD[expert].to(grad_up_NF.dtype))
        return tuple(grads)


def _rows_of_experts(counts_e: Tensor, all_experts: bool = False) -> Iterator[tuple[int, slice]]:
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
