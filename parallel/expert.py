"""Expert parallelism: each rank of a group stores a contiguous range of experts, and gets their tokens by all-to-all.

Shapes: T tokens, K top-k, D model, E experts, P ranks of the expert group, e = E/P experts on each of them, X ranks
among which each expert's hidden width is divided (`expert_tensor`), Q = X·P sources of rows, R rows.

(GShard, arXiv 2006.16668.) Dropless routing exchanges an uneven number of rows per rank, and first exchanges these
numbers. With a capacity, every rank sends the same number of rows for every expert, some of them empty. Then no numbers
need to be exchanged, and the host does not wait for the device.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.dispatch import LocalDispatcher, LocalPlan
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
    """What `wait_rows` and `combine` need to know about a dispatch."""

    local: LocalPlan
    exchange: RowExchange
    tensor_rows: list[int]
    """Number of rows that each rank of the `expert_tensor` group has received."""
    by_expert_R: Tensor
    """The permutation of the rows from the order (source, expert) to the order (expert, source)."""
    by_source_R: Tensor
    """The inverse of `by_expert_R`."""


class AllToAllDispatcher(nn.Module):
    """Sorts rows by expert, exchanges them, and groups the received rows by expert. `combine` undoes these steps.

    The rows of an expert are ordered by source rank, and keep their order within it, as in a single process. Every rank
    takes part in every exchange, forward and backward, even if it sends and receives no rows.
    """

    def __init__(self, group: dist.ProcessGroup, tensor: dist.ProcessGroup) -> None:
        """
        Args:
            group: ranks that store different experts.
            tensor: ranks that store shards of the same experts, divided by hidden width. Each of them computes with the
                rows of all of them.
        """
        super().__init__()
        self.group = group
        self.tensor = tensor
        self.local = LocalDispatcher()

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Tensor, AllToAllPlan]:
        """Start the exchange of rows; `wait_rows` waits for it. See `moe.dispatch.Dispatcher`."""
        static = routing.capacity is not None
        rows_RD, counts_E, local = self.local.dispatch(x_TD, routing, static=static, count_rows=True)
        ranks = self.group.size()
        if routing.capacity is None:
            # received_E[p * e + i]: the rows of this rank's expert i that rank p sends.
            received_E = torch.empty_like(counts_E)
            dist.all_to_all_single(received_E, counts_E, group=self.group)
            if self.tensor.size() > 1:
                received_E = all_gather_dim(received_E, 0, self.tensor)
            received_Qe = received_E.view(self.tensor.size() * ranks, -1)
            tensor_rows_X = received_E.view(self.tensor.size(), -1).sum(dim=1)
            receive_P = received_Qe.view(self.tensor.size(), ranks, -1)[self.tensor.rank()].sum(dim=1)
            # One transfer from the device for all numbers.
            numbers = torch.cat((counts_E.view(ranks, -1).sum(dim=1), receive_P, tensor_rows_X)).tolist()
            send, receive, tensor_rows = numbers[:ranks], numbers[ranks : 2 * ranks], numbers[2 * ranks :]
        else:
            num_local = routing.num_experts // ranks
            send = receive = [num_local * routing.capacity] * ranks
            tensor_rows = [sum(receive)] * self.tensor.size()
            received_Qe = counts_E.new_full((self.tensor.size() * ranks, num_local), routing.capacity)

        sources, num_local = received_Qe.shape
        rows = sum(tensor_rows)
        experts_e = torch.arange(num_local, device=x_TD.device)
        expert_of_row_R = experts_e.repeat(sources).repeat_interleave(received_Qe.flatten(), output_size=rows)
        by_expert_R = expert_of_row_R.argsort(stable=True)
        by_source_R = torch.empty_like(by_expert_R)
        by_source_R[by_expert_R] = torch.arange(rows, device=x_TD.device)
        rows_RD, exchange = start_exchange(rows_RD, send, receive, self.group)
        plan = AllToAllPlan(local, exchange, tensor_rows, by_expert_R, by_source_R)
        return rows_RD, received_Qe.sum(dim=0), plan

    def wait_rows(self, rows_RD: Tensor, plan: AllToAllPlan) -> Tensor:
        """Wait for the rows [R, D] and return them in the order (expert, source)."""
        rows_RD = finish_exchange(rows_RD, plan.exchange)
        if self.tensor.size() > 1:
            rows_RD = all_gather_rows(rows_RD, plan.tensor_rows, self.tensor)
        return _Permute.apply(rows_RD, plan.by_expert_R, plan.by_source_R)

    def combine(self, y_RD: Tensor, routing: Routing, plan: AllToAllPlan) -> Tensor:
        """Send the outputs `y_RD` back to the ranks of their tokens. Return the weighted sum for each token, [T, D]."""
        by_source_RD = _Permute.apply(y_RD, plan.by_source_R, plan.by_expert_R)
        if self.tensor.size() > 1:
            by_source_RD = reduce_scatter_rows(by_source_RD, plan.tensor_rows, self.tensor)
        returned_RD = all_to_all_rows(by_source_RD, plan.exchange.receive, plan.exchange.send, self.group)
        return self.local.combine(returned_RD, routing, plan.local)

    def extra_repr(self) -> str:
        """Return what `repr` shows in the parentheses: the number of ranks."""
        divided = f", hidden width over {self.tensor.size()}" if self.tensor.size() > 1 else ""
        return f"all-to-all over {self.group.size()} ranks{divided}"


class _Permute(torch.autograd.Function):
    """Computes rows[order]. With the inverse permutation, the gradient is a gather too."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def shard_experts(model: Transformer, mesh: Mesh) -> None:
    """Replace the experts of every MoE layer by this rank's shard of them, and install the all-to-all dispatcher.

    Call this on the meta device, before the weights are initialised, so that no rank allocates all experts.
    """
    for prefix, layer in model.named_modules():
        if not isinstance(layer, MoELayer):
            continue
        layer.dispatcher = AllToAllDispatcher(mesh.expert, mesh.expert_tensor)
        experts = layer.experts
        experts.first_expert = mesh.expert.rank() * (experts.num_local // mesh.expert.size())
        for name, parameter in list(experts.named_parameters()):
            setattr(experts, name, nn.Parameter(local_slice(f"{prefix}.experts.{name}", parameter, mesh)))
