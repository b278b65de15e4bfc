"""Expert parallelism: each rank of the group keeps a contiguous range of experts, and tokens travel to them.

Shapes: T tokens, K top-k, D model, E experts, e = E/P experts held by one of the P ranks, R routed rows.

(GShard, arXiv 2006.16668; dropless, with uneven splits.)
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.dispatch import LocalDispatcher, LocalPlan
from moe.experts import Experts
from moe.layer import MoELayer
from moe.model import Transformer
from moe.router import Routing
from parallel.collectives import all_to_all_rows


class AllToAllPlan(NamedTuple):
    local: LocalPlan
    send: list[int]
    """Rows sent to each rank of the group."""
    receive: list[int]
    """Rows received from each rank of the group."""
    by_expert_R: Tensor
    """Order that turns received rows (by source, then expert) into (by expert, then source)."""
    by_source_R: Tensor
    """The inverse of `by_expert_R`."""


class AllToAllDispatcher(nn.Module):
    """Permute by expert -> exchange counts -> exchange rows -> group by local expert; `combine` goes all the way back.

    Within an expert, rows arrive by source rank and keep their order: the order a single process would have. A rank
    that sends or receives nothing takes part in every exchange all the same, forward and backward.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group
        self.local = LocalDispatcher()

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Tensor, AllToAllPlan]:
        rows_RD, counts_E, local = self.local.dispatch(x_TD, routing)
        ranks = self.group.size()
        arriving_E = torch.empty_like(counts_E)
        dist.all_to_all_single(arriving_E, counts_E, group=self.group)
        counts_Pe, arriving_Pe = counts_E.view(ranks, -1), arriving_E.view(ranks, -1)
        send, receive = torch.stack((counts_Pe.sum(dim=1), arriving_Pe.sum(dim=1))).tolist()

        held = arriving_Pe.shape[1]
        expert_of_row_R = (
            torch.arange(held, device=x_TD.device).repeat(ranks).repeat_interleave(arriving_E, output_size=sum(receive))
        )
        by_expert_R = expert_of_row_R.argsort(stable=True)
        by_source_R = torch.empty_like(by_expert_R)
        by_source_R[by_expert_R] = torch.arange(sum(receive), device=x_TD.device)
        plan = AllToAllPlan(local, send, receive, by_expert_R, by_source_R)
        arrived_RD = all_to_all_rows(rows_RD, send, receive, self.group)
        return _Permute.apply(arrived_RD, by_expert_R, by_source_R), arriving_Pe.sum(dim=0), plan

    def combine(self, y_RD: Tensor, routing: Routing, plan: AllToAllPlan) -> Tensor:
        leaving_RD = _Permute.apply(y_RD, plan.by_source_R, plan.by_expert_R)
        returned_RD = all_to_all_rows(leaving_RD, plan.receive, plan.send, self.group)
        return self.local.combine(returned_RD, routing, plan.local)

    def extra_repr(self) -> str:
        return f"all-to-all over {self.group.size()} ranks"


class _Permute(torch.autograd.Function):
    """rows[order]; knowing the inverse, the gradient is a gather as well."""

    @staticmethod
    def forward(ctx, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def, override]
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def shard_experts(model: Transformer, group: dist.ProcessGroup) -> None:
    """Keep this rank's range of experts in every MoE layer and install the all-to-all dispatcher.

    On a meta-device model this costs nothing; the weights that go were never drawn.
    """
    ranks, rank = group.size(), group.rank()
    for layer in model.modules():
        if not isinstance(layer, MoELayer):
            continue
        layer.dispatcher = AllToAllDispatcher(group)
        experts: Experts = layer.experts
        held = experts.held // ranks
        experts.first_expert = rank * held
        for name, parameter in list(experts.named_parameters()):
            own = parameter.detach()[rank * held : (rank + 1) * held].clone()
            setattr(experts, name, nn.Parameter(own))
