"""Moving tokens to their experts and back, on one device.

Shapes: T tokens, K top-k, D model, E experts, R routed rows (T·K less what is not dispatched).

`dispatch` copies each token once for every expert that takes it, grouped by expert; `combine` sums the experts'
answers per token. Both directions, forward and backward, are gathers: no two threads ever add into one address, so
the result is the same bit for bit on every run, on GPUs too, without a slower deterministic mode.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from moe.router import Routing


class LocalPlan(NamedTuple):
    """Where rows came from and where they go back to."""

    tokens_R: Tensor
    """The token each row is a copy of; T for an empty row."""
    assignments_R: Tensor
    """The assignment (token·K + choice) each row serves; T·K for an empty row."""
    slots_TK: Tensor
    """The row that serves each assignment; R where none does."""
    full: bool
    """Every assignment has a row, and every row serves one."""


class Dispatcher(Protocol):
    """The seam between the router and the experts."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Any]:
        """Rows [R, D] for the experts held here, their counts [e], and the plan to undo it.

        The rows may still be on their way, and in another order: `wait_rows` is to be called before they are read.
        """
        ...

    def wait_rows(self, rows_RD: Tensor, plan: Any) -> Tensor:
        """The rows, here, grouped by expert."""
        ...

    def combine(self, y_RD: Tensor, routing: Routing, plan: Any) -> Tensor:
        """The weighted sum of the experts' rows for each token, [T, D]."""
        ...


class LocalDispatcher(nn.Module):
    """All experts are here: sort the assignments by expert (tokens stay in order within an expert)."""

    def dispatch(self, x_TD: Tensor, routing: Routing, static: bool = False) -> tuple[Tensor, Tensor, LocalPlan]:
        """`static`: rows for every expert, `routing.capacity` of them, of which some are empty (zeros)."""
        tokens, top_k = routing.experts_TK.shape
        experts = routing.experts_TK.flatten()
        if static:
            return self._dispatch_static(x_TD, routing, experts)
        order = experts.argsort(stable=True)
        counts = experts.new_zeros(routing.num_experts + 1)  # bincount would make the host wait for a GPU
        counts_E = counts.scatter_add_(0, experts, torch.ones_like(experts))[: routing.num_experts]
        rows = tokens * top_k if routing.complete else int(counts_E.sum())
        slots = torch.empty_like(order).scatter_(0, order, torch.arange(tokens * top_k, device=order.device))
        full = rows == tokens * top_k
        plan = LocalPlan(order[:rows] // top_k, order[:rows], slots.clamp_(max=rows).view(tokens, top_k), full)
        return _Scatter.apply(x_TD, plan), counts_E, plan

    def _dispatch_static(self, x_TD: Tensor, routing: Routing, experts: Tensor) -> tuple[Tensor, Tensor, LocalPlan]:
        tokens, top_k = routing.experts_TK.shape
        assert routing.capacity is not None
        rows, none = routing.num_experts * routing.capacity, tokens * top_k
        order = experts.argsort(stable=True)
        sorted_experts = experts[order]
        # The place among the rows of its expert: its place among all, less that of the expert's first.
        place = torch.arange(none, device=order.device) - torch.searchsorted(sorted_experts, sorted_experts)
        slots = (sorted_experts * routing.capacity + place).clamp_(max=rows)
        assignments_R = order.new_full((rows + 1,), none).scatter_(0, slots, order)[:rows]
        slots_TK = torch.empty_like(order).scatter_(0, order, slots).view(tokens, top_k)
        plan = LocalPlan(assignments_R // top_k, assignments_R, slots_TK, full=False)
        counts_E = order.new_full((routing.num_experts,), routing.capacity)
        return _Scatter.apply(x_TD, plan), counts_E, plan

    def wait_rows(self, rows_RD: Tensor, plan: LocalPlan) -> Tensor:
        return rows_RD

    def combine(self, y_RD: Tensor, routing: Routing, plan: LocalPlan) -> Tensor:
        return _Combine.apply(y_RD, routing.weights_TK.to(y_RD.dtype), plan)

    def extra_repr(self) -> str:
        return "all experts on this device"


def _with_zero(rows: Tensor, plan: LocalPlan) -> Tensor:
    """The rows and one of zeros behind them, which stands for those that are missing."""
    if plan.full:
        return rows
    return torch.cat((rows, rows.new_zeros(1, *rows.shape[1:])))


def _rows_of_assignments(rows_RD: Tensor, plan: LocalPlan) -> Tensor:
    """[T, K, D]: the row of each assignment, zeros where there is none."""
    rows_RD = _with_zero(rows_RD, plan)
    return rows_RD.index_select(0, plan.slots_TK.flatten()).unflatten(0, plan.slots_TK.shape)


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, plan: LocalPlan) -> Tensor:
        ctx.plan = plan
        return _with_zero(x_TD, plan).index_select(0, plan.tokens_R)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _rows_of_assignments(grad_RD, ctx.plan).sum(dim=1), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, weights_TK: Tensor, plan: LocalPlan) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(y_RD, weights_TK)
        return torch.bmm(weights_TK.unsqueeze(1), _rows_of_assignments(y_RD, plan)).squeeze(1)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        y_RD, weights_TK = ctx.saved_tensors
        plan: LocalPlan = ctx.plan
        weight_R1 = _with_zero(weights_TK.flatten(), plan).index_select(0, plan.assignments_R).unsqueeze(1)
        grad_y_RD = _with_zero(grad_TD, plan).index_select(0, plan.tokens_R) * weight_R1
        grad_weights_TK = torch.bmm(_rows_of_assignments(y_RD, plan), grad_TD.unsqueeze(2)).squeeze(2)
        return grad_y_RD, grad_weights_TK, None
