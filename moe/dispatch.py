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

from moe.chunks import chunks
from moe.device import on_gpu
from moe.expert_loop import aligned_counts, needs_alignment
from moe.kernels import use_kernels
from moe.router import Routing

CHUNK_ELEMENTS = 2**17
"""Numbers that are converted from bf16 at once on a CPU: 512 KiB in fp32."""


class LocalPlan(NamedTuple):
    """Which row belongs to which token and assignment."""

    tokens_R: Tensor
    """The token that each row is a copy of; T for an empty row, which is zeros."""
    assignments_R: Tensor
    """The assignment (token·K + choice) of each row; T·K for an empty row."""
    slots_TK: Tensor
    """The row of each assignment; R if the assignment is not dispatched."""
    complete: bool
    """Whether every assignment has a row."""
    dense: bool
    """Whether no row is empty."""


ApplyExperts = Callable[[Tensor, Tensor], Tensor]
"""Computes (rows [R, D] grouped by expert, number of rows of each expert [e]) -> the experts' outputs [R, D]."""

Apply = Callable[[Tensor], Tensor]
"""Computes [B, S, D] -> [B, S, D]."""


class Dispatcher(Protocol):
    """The interface between the router and the experts (expert parallelism installs another implementation)."""

    def run(self, x_BSD: Tensor, routing: Routing, apply_experts: ApplyExperts, shared: Apply | None) -> Tensor:
        """Send each token to its experts, apply them, and return the weighted sum of their outputs, [T, D].

        Args:
            apply_experts: applies the experts of this rank. It can be called more than once, with a part of the rows.
            shared: applies the shared experts, whose output is added; None if there are none.
        """


class LocalDispatcher(nn.Module):
    """Dispatches to experts that are all on this device, by sorting the assignments by expert.

    The rows of an expert keep the order of their tokens.
    """

    def run(self, x_BSD: Tensor, routing: Routing, apply_experts: ApplyExperts, shared: Apply | None) -> Tensor:
        """Dispatch, apply the experts, and combine. See `Dispatcher.run`."""
        rows_RD, counts_E, plan = self.dispatch(x_BSD.flatten(0, 1), routing, align=needs_alignment(x_BSD))
        shared_BSD = None if shared is None else shared(x_BSD)
        y_TD = self.combine(apply_experts(rows_RD, counts_E), routing, plan)
        return y_TD if shared_BSD is None else y_TD + shared_BSD.flatten(0, 1)

    def dispatch(
        self, x_TD: Tensor, routing: Routing, static: bool = False, count_rows: bool | None = None, align: bool = False
    ) -> tuple[Tensor, Tensor, LocalPlan]:
        """Copy each token once per assignment, grouped by expert.

        Args:
            static: give every expert exactly `routing.capacity` rows. Rows without an assignment are zeros.
            count_rows: read the number of dispatched assignments if it is not known, so that there are no empty rows.
                On a GPU, the host would have to wait for it. If this is False, there are rows for all assignments that
                could be dispatched. The empty ones are zeros at the end, and count as rows of the last expert. None:
                True on CPUs, False on other devices and in compiled graphs.
            align: add empty rows to those of each expert, so that their number is one of `aligned_counts`.

        Returns:
            The rows [R, D], the number of rows of each expert [E], and the plan for `combine`.
        """
        tokens, top_k = routing.experts_TK.shape
        experts = routing.experts_TK.flatten()
        if static:
            return self._dispatch_static(x_TD, routing, experts)
        order, slots, counts_E = group_by_expert(experts, routing.num_experts, use_kernels(x_TD))
        rows, complete, dense = len(experts), routing.complete, True
        if not complete:
            if count_rows is None:  # The shapes of a compiled graph must not depend on values.
                count_rows = not on_gpu(x_TD) and not torch.compiler.is_compiling()
            if count_rows:
                rows = int(counts_E.sum())
                complete = rows == len(experts)
            else:
                dense = False
                if routing.capacity is not None:
                    rows = min(rows, routing.num_experts * routing.capacity)
                counts_E[-1] += rows - counts_E.sum()
            missing = experts == routing.num_experts
            order, slots = order.masked_fill(missing[order], len(experts)), slots.masked_fill_(missing, rows)
        plan = LocalPlan(order[:rows] // top_k, order[:rows], slots.view(tokens, top_k), complete, dense)
        if align:
            plan, counts_E = align_rows(plan, counts_E)
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
        plan = LocalPlan(assignments_R // top_k, assignments_R, slots_TK, complete=False, dense=False)
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

        rows_RD: Tensor = combine.scatter_rows(x_TD, plan.slots_TK, len(plan.tokens_R), plan.dense)
    else:
        rows_RD = _Scatter.apply(x_TD, plan)
    return rows_RD


def _combine(y_RD: Tensor, weights_TK: Tensor, plan: LocalPlan) -> Tensor:
    """Return the weighted sums of the rows of each token, [T, D]."""
    if use_kernels(y_RD):
        from moe.kernels import combine

        y_TD: Tensor = combine.combine_rows(y_RD, plan.slots_TK, weights_TK, plan.dense)
    else:
        y_TD = _Combine.apply(y_RD, weights_TK, plan)
    return y_TD


def align_rows(plan: LocalPlan, counts_E: Tensor) -> tuple[LocalPlan, Tensor]:
    """Add empty rows to those of each expert, so that their number is one of `aligned_counts`.

    Returns:
        The new plan, and the number of rows of each expert.
    """
    aligned_E, place_R = aligned_places(counts_E)
    (tokens, _), rows = plan.slots_TK.shape, int(aligned_E.sum())
    tokens_R = plan.tokens_R.new_full((rows,), tokens).index_copy_(0, place_R, plan.tokens_R)
    assignments_R = plan.tokens_R.new_full((rows,), plan.slots_TK.numel()).index_copy_(0, place_R, plan.assignments_R)
    place_of_slot = torch.cat((place_R, place_R.new_tensor([rows])))  # that of a missing row is missing again
    slots_TK = place_of_slot[plan.slots_TK]
    return LocalPlan(tokens_R, assignments_R, slots_TK, plan.complete, plan.dense and rows == len(place_R)), aligned_E


def aligned_places(counts_e: Tensor) -> tuple[Tensor, Tensor]:
    """Return the aligned number of rows of each expert [e], and the place of each row among the aligned ones [R]."""
    aligned_e = aligned_counts(counts_e)
    shift_e = (aligned_e - counts_e).cumsum(0) - (aligned_e - counts_e)
    shift_R = shift_e.repeat_interleave(counts_e)
    return aligned_e, shift_R + torch.arange(len(shift_R))


def _with_zero(rows: Tensor, needed: bool = True) -> Tensor:
    """Append a row of zeros, if it is needed: the indices of missing rows point to it."""
    return torch.cat((rows, rows.new_zeros(1, *rows.shape[1:]))) if needed else rows


def _sum_rows(rows_RD: Tensor, plan: LocalPlan, weights_TK: Tensor | None = None) -> Tensor:
    """Return the sum of each token's rows, [T, D], multiplied by the weights if there are any."""
    rows_RD, slots_TK = _with_zero(rows_RD, not plan.complete), plan.slots_TK
    if on_gpu(rows_RD):
        rows_TKD = torch.unflatten(rows_RD.index_select(0, slots_TK.flatten()), 0, slots_TK.shape)
        if weights_TK is None:
            return rows_TKD.sum(dim=1)
        return torch.bmm(torch.stack(_in_parts(weights_TK, rows_RD.dtype), dim=1), rows_TKD).sum(dim=1)
    # torch's operator for bags of embeddings does this on a CPU without a copy of the rows. But in bf16 it rounds
    # halves up, not to even numbers, so bf16 rows are converted to fp32, in chunks that stay in the cache.
    if rows_RD.dtype != torch.bfloat16:
        return F.embedding_bag(slots_TK, rows_RD, mode="sum", per_sample_weights=weights_TK)
    (tokens, top_k), dim = slots_TK.shape, rows_RD.shape[1]
    sum_TD = rows_RD.new_empty(tokens, dim)
    for part in chunks(tokens, top_k * dim, CHUNK_ELEMENTS):
        slots = slots_TK[part]
        wide_RD = rows_RD.index_select(0, slots.flatten()).to(torch.float32)
        order_TK = torch.arange(slots.numel()).view_as(slots)
        weights = None if weights_TK is None else weights_TK[part]
        sum_TD[part] = F.embedding_bag(order_TK, wide_RD, mode="sum", per_sample_weights=weights)
    return sum_TD


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, plan: LocalPlan) -> Tensor:
        ctx.plan = plan
        return _with_zero(x_TD, not plan.dense).index_select(0, plan.tokens_R)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        return _sum_rows(grad_RD, ctx.plan), None


class _Combine(torch.autograd.Function):
    """Multiplies bf16 rows by fp32 weights, and rounds each product or sum. The weights of a token, such as 1/3, can be
    the same for all tokens. If they were rounded to bf16, outputs and gradients would all be wrong by the same factor.
    """

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, weights_TK: Tensor, plan: LocalPlan) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(y_RD, weights_TK)
        return _sum_rows(y_RD, plan, weights_TK)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        y_RD, weights_TK = ctx.saved_tensors
        plan: LocalPlan = ctx.plan
        weight_R1 = _with_zero(weights_TK.flatten(), not plan.dense).index_select(0, plan.assignments_R).unsqueeze(1)
        grad_TD = _with_zero(grad_TD, not plan.dense)
        if not on_gpu(y_RD) and y_RD.dtype == torch.bfloat16:
            grad_y_RD, grad_weights_R = _weighted_gradients(grad_TD, y_RD, weight_R1, plan)
        else:
            grad_RD = grad_TD.index_select(0, plan.tokens_R)
            grad_weights_R = torch.bmm(y_RD.unsqueeze(1), grad_RD.unsqueeze(2)).flatten().to(weights_TK.dtype)
            weight_R1, *rest = _in_parts(weight_R1, grad_RD.dtype)
            grad_y_RD = torch.addcmul(grad_RD * rest[0], grad_RD, weight_R1) if rest else grad_RD.mul_(weight_R1)
        slots = plan.slots_TK.flatten()
        grad_weights = _with_zero(grad_weights_R, not plan.complete).index_select(0, slots)
        return grad_y_RD, grad_weights.view_as(weights_TK), None


def _weighted_gradients(grad_TD: Tensor, y_RD: Tensor, weight_R1: Tensor, plan: LocalPlan) -> tuple[Tensor, Tensor]:
    """Return the gradients of the rows and of their weights on a CPU, in chunks that stay in its cache."""
    grad_y_RD, grad_weights_R = torch.empty_like(y_RD), torch.empty_like(weight_R1[:, 0])
    for rows in chunks(len(y_RD), y_RD.shape[1], CHUNK_ELEMENTS):
        grad_RD = grad_TD.index_select(0, plan.tokens_R[rows]).to(weight_R1.dtype)
        torch.sum(grad_RD * y_RD[rows], dim=1, out=grad_weights_R[rows])
        grad_y_RD[rows] = grad_RD.mul_(weight_R1[rows])
    return grad_y_RD, grad_weights_R


def _in_parts(weights: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return tensors of `dtype` whose sum is `weights`: one, or if `dtype` is narrower, the rounded weights and the
    rounding errors."""
    rounded = weights.to(dtype)
    return [rounded] if dtype == weights.dtype else [rounded, (weights - rounded).to(dtype)]
