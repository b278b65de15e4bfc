"""Expert parallelism: each rank of the group keeps a contiguous range of experts, and tokens travel to them.

Shapes: T tokens, K top-k, D model, E experts, e = E/P experts held by one of the P ranks, X ranks that share out each
expert's hidden width, Q = X·P sources of rows, R routed rows.

(GShard, arXiv 2006.16668.) Dropless, rows are exchanged with uneven splits. With a capacity every rank sends the same
number of rows for every expert, empty ones among them: no count has to be known, and no host waits for a device.
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
from parallel.collectives import (
    RowExchange,
    all_gather_dim,
    all_gather_rows,
    all_to_all_rows,
    finish_exchange,
    reduce_scatter_rows,
    start_exchange,
)
from parallel.mesh import Mesh
from parallel.weight_shards import local_slice


class AllToAllPlan(NamedTuple):
    local: LocalPlan
    travelling: RowExchange
    send: list[int]
    """Rows sent to each rank of the group."""
    receive: list[int]
    """Rows received from each rank of the group."""
    gathered: list[int]
    """Rows that each of the ranks that share out these experts has received."""
    by_expert_R: Tensor
    """Order that turns received rows (by source, then expert) into (by expert, then source)."""
    by_source_R: Tensor
    """The inverse of `by_expert_R`."""


class AllToAllDispatcher(nn.Module):
    """Permute by expert -> exchange rows -> group by local expert; `combine` goes all the way back.

    Within an expert, rows arrive by source rank and keep their order: the order a single process would have. A rank
    that sends or receives nothing takes part in every exchange all the same, forward and backward.
    """

    def __init__(self, group: dist.ProcessGroup, tensor: dist.ProcessGroup) -> None:
        """`tensor`: ranks that hold parts of the same experts' hidden widths; each works on all rows of all of them."""
        super().__init__()
        self.group = group
        self.tensor = tensor
        self.local = LocalDispatcher()

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Tensor, AllToAllPlan]:
        """The rows are on their way: `wait_rows` waits for them."""
        rows_RD, counts_E, local = self.local.dispatch(x_TD, routing, static=routing.capacity is not None)
        ranks = self.group.size()
        if routing.capacity is None:
            arriving_E = torch.empty_like(counts_E)
            dist.all_to_all_single(arriving_E, counts_E, group=self.group)
            if self.tensor.size() > 1:
                arriving_E = all_gather_dim(arriving_E, 0, self.tensor)
            arriving_Qe = arriving_E.view(self.tensor.size() * ranks, -1)
            received_X = arriving_E.view(self.tensor.size(), -1).sum(dim=1)
            own_P = arriving_Qe.view(self.tensor.size(), ranks, -1)[self.tensor.rank()].sum(dim=1)
            numbers = torch.cat((counts_E.view(ranks, -1).sum(dim=1), own_P, received_X)).tolist()
            send, receive, gathered = numbers[:ranks], numbers[ranks : 2 * ranks], numbers[2 * ranks :]
        else:
            held = routing.num_experts // ranks
            send = receive = [held * routing.capacity] * ranks
            gathered = [sum(receive)] * self.tensor.size()
            arriving_Qe = counts_E.new_full((self.tensor.size() * ranks, held), routing.capacity)

        sources, held = arriving_Qe.shape
        rows = sum(gathered)
        experts_e = torch.arange(held, device=x_TD.device)
        expert_of_row_R = experts_e.repeat(sources).repeat_interleave(arriving_Qe.flatten(), output_size=rows)
        by_expert_R = expert_of_row_R.argsort(stable=True)
        by_source_R = torch.empty_like(by_expert_R)
        by_source_R[by_expert_R] = torch.arange(rows, device=x_TD.device)
        rows_RD, travelling = start_exchange(rows_RD, send, receive, self.group)
        plan = AllToAllPlan(local, travelling, send, receive, gathered, by_expert_R, by_source_R)
        return rows_RD, arriving_Qe.sum(dim=0), plan

    def wait_rows(self, rows_RD: Tensor, plan: AllToAllPlan) -> Tensor:
        rows_RD = finish_exchange(rows_RD, plan.travelling)
        if self.tensor.size() > 1:
            rows_RD = all_gather_rows(rows_RD, plan.gathered, self.tensor)
        return _Permute.apply(rows_RD, plan.by_expert_R, plan.by_source_R)

    def combine(self, y_RD: Tensor, routing: Routing, plan: AllToAllPlan) -> Tensor:
        leaving_RD = _Permute.apply(y_RD, plan.by_source_R, plan.by_expert_R)
        if self.tensor.size() > 1:
            leaving_RD = reduce_scatter_rows(leaving_RD, plan.gathered, self.tensor)
        returned_RD = all_to_all_rows(leaving_RD, plan.receive, plan.send, self.group)
        return self.local.combine(returned_RD, routing, plan.local)

    def extra_repr(self) -> str:
        shared = f", hidden width over {self.tensor.size()}" if self.tensor.size() > 1 else ""
        return f"all-to-all over {self.group.size()} ranks{shared}"


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


def shard_experts(model: Transformer, mesh: Mesh) -> None:
    """Keep this rank's part of the experts in every MoE layer and install the all-to-all dispatcher.

    On a meta-device model this costs nothing; the weights that go were never drawn.
    """
    for prefix, layer in model.named_modules():
        if not isinstance(layer, MoELayer):
            continue
        layer.dispatcher = AllToAllDispatcher(mesh.expert, mesh.expert_tensor)
        experts: Experts = layer.experts
        experts.first_expert = mesh.expert.rank() * (experts.held // mesh.expert.size())
        for name, parameter in list(experts.named_parameters()):
            setattr(experts, name, nn.Parameter(local_slice(f"{prefix}.experts.{name}", parameter, mesh)))
