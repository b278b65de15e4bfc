"""Dispatch of tokens to experts, and combination of the experts' outputs, on one device.

Shapes: B batch, S sequence, T = B·S tokens, K top-k, D model, E experts, e experts on this rank, R rows (one per
dispatched assignment, and with `static` some empty ones).

`dispatch` copies each token once for every expert that takes it, grouped by expert. `combine` sums the experts' outputs
per token, weighted. Both are gathers, forward and backward: no two threads add to the same address. The result is
therefore the same bit for bit on every run, also on GPUs, without a slower deterministic mode. On GPUs, `moe.kernels`
computes them. The eager code here is the specification.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.kernels import use_kernels
from moe.router import Routing


class LocalPlan(NamedTuple):
    """Which row belongs to which token and assignment."""

    tokens_R: Tensor
    """The token that each row is a copy of; T for an empty row, which is zeros."""
    assignments_R: Tensor
    """The assignment (token·K + choice) of each row; T·K for an empty row."""
    slots_TK: Tensor
    """The row of each assignment; R if the assignment is not dispatched."""
    full: bool
    """Whether every assignment has a row and no row is empty."""


ApplyExperts = Callable[[Tensor, Tensor], Tensor]
"""Computes (rows [R, D] grouped by expert, number of rows of each expert [e]) -> the experts' outputs [R, D]."""


class Dispatcher(Protocol):
    """The interface between the router and the experts (expert parallelism installs another implementation)."""

    def run(self, x_BSD: Tensor, routing: Routing, apply_experts: ApplyExperts, shared: nn.Module | None) -> Tensor:
        """Send each token to its experts, apply them, and return the weighted sum of their outputs, [T, D].

        Args:
            apply_experts: applies the experts of this rank. It can be called more than once, with a part of the rows.
            shared: the shared experts, whose output is added; None if there are none.
        """


class LocalDispatcher(nn.Module):
    """Dispatches to experts that are all on this device, by sorting the assignments by expert.

    The rows of an expert keep the order of their tokens.
    """

    def run(self, x_BSD: Tensor, routing: Routing, apply_experts: ApplyExperts, shared: nn.Module | None) -> Tensor:
        """Dispatch, apply the experts, and combine. See `Dispatcher.run`."""
        rows_RD, counts_E, plan = self.dispatch(x_BSD.flatten(0, 1), routing)
        shared_BSD = None if shared is None else shared(x_BSD)
        y_TD = self.combine(apply_experts(rows_RD, counts_E), routing, plan)
        return y_TD if shared_BSD is None else y_TD + shared_BSD.flatten(0, 1)

    def dispatch(
        self, x_TD: Tensor, routing: Routing, static: bool = False, count_rows: bool | None = None
    ) -> tuple[Tensor, Tensor, LocalPlan]:
        """Copy each token once per assignment, grouped by expert.

        Args:
            static: give every expert exactly `routing.capacity` rows. Rows without an assignment are zeros.
            count_rows: read the number of dispatched assignments if it is not known, so that there are no empty rows.
                On a GPU, the host would have to wait for it. If this is False, there are rows for all assignments that
                could be dispatched. The empty ones are zeros at the end, and count as rows of the last expert. None:
                True on CPUs, False on other devices and in compiled graphs.

        Returns:
            The rows [R, D], the number of rows of each expert [E], and the plan for `combine`.
        """
        tokens, top_k = routing.experts_TK.shape
        experts = routing.experts_TK.flatten()
        if static:
            return self._dispatch_static(x_TD, routing, experts)
        order, slots, counts_E = group_by_expert(experts, routing.num_experts, use_kernels(x_TD))
        rows, full = len(experts), routing.complete
        if not full:
            fixed = not x_TD.is_cpu or torch.compiler.is_compiling()  # shapes of a graph do not depend on values
            if not fixed if count_rows is None else count_rows:
                rows = int(counts_E.sum())
                full = rows == len(experts)
            else:
                if routing.capacity is not None:
                    rows = min(rows, routing.num_experts * routing.capacity)
                counts_E[-1] += rows - counts_E.sum()
            missing = experts == routing.num_experts
            order, slots = order.masked_fill(missing[order], len(experts)), slots.masked_fill_(missing, rows)
        plan = LocalPlan(order[:rows] // top_k, order[:rows], slots.view(tokens, top_k), full)
        return _scatter(x_TD, plan), counts_E, plan

    def _dispatch_static(self, x_TD: Tensor, routing: Routing, experts: Tensor) -> tuple[Tensor, Tensor, LocalPlan]:
        tokens, top_k = routing.experts_TK.shape
        assert routing.capacity is not None
        rows, assignments = routing.num_experts * routing.capacity, tokens * top_k
        order, _, _ = group_by_expert(experts, routing.num_experts, use_kernels(x_TD))
        sorted_experts = experts[order]
        # An assignment's index within its expert: its index in the sorted list, less that of the expert's first one.
        index = torch.arange(assignments, device=order.device) - torch.searchsorted(sorted_experts, sorted_experts)
        slots = (sorted_experts * routing.capacity + index).clamp_(max=rows)
        assignments_R = order.new_full((rows + 1,), assignments).scatter_(0, slots, order)[:rows]
        slots_TK = torch.empty_like(order).scatter_(0, order, slots).view(tokens, top_k)
        plan = LocalPlan(assignments_R // top_k, assignments_R, slots_TK, full=False)
        counts_E = order.new_full((routing.num_experts,), routing.capacity)
        return _scatter(x_TD, plan), counts_E, plan

    def combine(self, y_RD: Tensor, routing: Routing, plan: LocalPlan) -> Tensor:
        """Return the weighted sum of the outputs `y_RD` for each token, [T, D]."""
        wide = torch.promote_types(routing.weights_TK.dtype, y_RD.dtype)
        return _combine(y_RD, routing.weights_TK.to(wide), plan)

    def extra_repr(self) -> str:
        """Return what `repr` shows in the parentheses: where the experts are."""
        return "all experts on this device"


def group_by_expert(experts_A: Tensor, num_experts: int, kernel: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Sort A assignments by expert. Those to one expert keep their order.

    Args:
        experts_A: the expert of each assignment, or `num_experts` if it is not dispatched.
        kernel: use the kernel for GPUs.

    Returns:
        The assignments in sorted order [A], the place of each assignment in this order [A], and the number of
        assignments to each expert [E].
    """
    if kernel:
        from moe.kernels import group

        result: tuple[Tensor, Tensor, Tensor] = group.group_by_expert(experts_A, num_experts)
        return result
    order_A = experts_A.argsort(stable=True)
    slots_A = torch.empty_like(order_A).scatter_(0, order_A, torch.arange(len(order_A), device=order_A.device))
    counts = experts_A.new_zeros(num_experts + 1)  # bincount would make the host wait for a GPU
    return order_A, slots_A, counts.scatter_add_(0, experts_A, torch.ones_like(experts_A))[:num_experts]


def _scatter(x_TD: Tensor, plan: LocalPlan) -> Tensor:
    """Return the rows [R, D]: copies of the tokens, and zeros in empty rows."""
    if use_kernels(x_TD):
        from moe.kernels import combine

        rows_RD: Tensor = combine.scatter_rows(x_TD, plan.slots_TK, len(plan.tokens_R), plan.full)
    else:
        rows_RD = _Scatter.apply(x_TD, plan)
    return rows_RD


def _combine(y_RD: Tensor, weights_TK: Tensor, plan: LocalPlan) -> Tensor:
    """Return the weighted sums of the rows of each token, [T, D]."""
    if use_kernels(y_RD):
        from moe.kernels import combine

        y_TD: Tensor = combine.combine_rows(y_RD, plan.slots_TK, weights_TK, plan.full)
    else:
        y_TD = _Combine.apply(y_RD, weights_TK, plan)
    return y_TD


def _with_zero(rows: Tensor, plan: LocalPlan) -> Tensor:
    """Append a row of zeros, which the indices of missing rows point to. A full plan has no missing rows."""
    if plan.full:
        return rows
    return torch.cat((rows, rows.new_zeros(1, *rows.shape[1:])))


def _rows_of_assignments(rows_RD: Tensor, plan: LocalPlan) -> Tensor:
    """Return the row of each assignment, [T, K, D], and zeros for assignments that are not dispatched."""
    rows_RD = _with_zero(rows_RD, plan)
    return torch.unflatten(rows_RD.index_select(0, plan.slots_TK.flatten()), 0, plan.slots_TK.shape)


def _sum_rows(rows_RD: Tensor, plan: LocalPlan, weights_TK: Tensor | None = None) -> Tensor:
    """Return the sum of each token's rows, [T, D], multiplied by weights of the same dtype if there are any.

    torch's operator for bags of embeddings does this on a CPU without a copy of the rows.
    """
    return F.embedding_bag(plan.slots_TK, _with_zero(rows_RD, plan), mode="sum", per_sample_weights=weights_TK)


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, plan: LocalPlan) -> Tensor:
        ctx.plan = plan
        return _with_zero(x_TD, plan).index_select(0, plan.tokens_R)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        if grad_RD.is_cpu and grad_RD.dtype != torch.bfloat16:  # in bf16 it rounds halves up, not to even numbers
            return _sum_rows(grad_RD, ctx.plan), None
        return _rows_of_assignments(grad_RD, ctx.plan).sum(dim=1), None


class _Combine(torch.autograd.Function):
    """Multiplies bf16 rows by fp32 weights, and rounds each product or sum. The weights of a token, such as 1/3, can be
    the same for all tokens. If they were rounded to bf16, outputs and gradients would all be wrong by the same factor.
    """

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, weights_TK: Tensor, plan: LocalPlan) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(y_RD, weights_TK)
        if y_RD.is_cpu:
            if y_RD.dtype == weights_TK.dtype:
                # torch.compile of torch 2.11 computes wrong gradients if `to` does nothing here.
                return _sum_rows(y_RD, plan, weights_TK)
            return _sum_rows(y_RD.to(weights_TK.dtype), plan, weights_TK).to(y_RD.dtype)
        parts_TPK = torch.stack(_in_parts(weights_TK, y_RD.dtype), dim=1)
        return torch.bmm(parts_TPK, _rows_of_assignments(y_RD, plan)).sum(dim=1)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        y_RD, weights_TK = ctx.saved_tensors
        plan: LocalPlan = ctx.plan
        weight_R1 = _with_zero(weights_TK.flatten(), plan).index_select(0, plan.assignments_R).unsqueeze(1)
        grad_RD = _with_zero(grad_TD, plan).index_select(0, plan.tokens_R)
        grad_weights_R = torch.bmm(y_RD.unsqueeze(1), grad_RD.unsqueeze(2)).flatten().to(weights_TK.dtype)
        grad_weights_TK = _with_zero(grad_weights_R, plan).index_select(0, plan.slots_TK.flatten()).view_as(weights_TK)
        weight_R1, *rest = _in_parts(weight_R1, grad_RD.dtype)
        grad_y_RD = torch.addcmul(grad_RD * rest[0], grad_RD, weight_R1) if rest else grad_RD.mul_(weight_R1)
        return grad_y_RD, grad_weights_TK, None


def _in_parts(weights: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return tensors of `dtype` whose sum is `weights`: one, or if `dtype` is narrower, the rounded weights and the
    rounding errors."""
    rounded = weights.to(dtype)
    return [rounded] if dtype == weights.dtype else [rounded, (weights - rounded).to(dtype)]
