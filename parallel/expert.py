"""Expert parallelism: each rank of a group stores a contiguous range of experts, and gets their tokens by all-to-all.

Shapes: B batch, S sequence, T = B·S tokens, K top-k, D model, E experts, P ranks of the expert group, e = E/P experts
on each of them, X ranks among which each expert's hidden width is divided (`expert_tensor`), Q = X·P sources of rows,
R rows, H parts of the tokens.

(GShard, arXiv 2006.16668.) Dropless routing exchanges an uneven number of rows per rank, and first exchanges these
numbers. With a capacity, every rank sends the same number of rows for every expert, some of them empty. Then no numbers
need to be exchanged, and the host does not wait for the device.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.dispatch import Apply, ApplyExperts, LocalDispatcher, aligned_places
from moe.expert_loop import needs_alignment
from moe.layer import MoELayer
from moe.model import Transformer
from moe.router import Routing
from parallel.collectives import (
    all_gather_dim,
    all_gather_rows,
    finish_exchange,
    reduce_scatter_rows,
    start_exchange,
)
from parallel.mesh import Mesh
from parallel.weight_shards import local_slice


class PartPlan(NamedTuple):
    """Where the rows of one part of the tokens go. There are two parts with `parallel.overlap`, and otherwise one."""

    send: list[int]
    """Number of rows for each rank of the expert group."""
    receive: list[int]
    """Number of rows from each rank of the expert group."""
    tensor_rows: list[int]
    """Number of rows that each rank of the `expert_tensor` group receives."""
    counts_e: Tensor
    """Number of rows of each expert on this rank, from all sources, empty rows included."""
    by_expert_R: Tensor
    """The received row that belongs to each row in the order (expert, source); their number for an empty row."""
    by_source_R: Tensor
    """The row in the order (expert, source) of each received row."""


class AllToAllDispatcher(nn.Module):
    """Sorts rows by expert, exchanges them, applies the experts, and undoes these steps.

    The rows of an expert are ordered by source rank, and keep their order within it, as in a single process. Every rank
    takes part in every exchange, forward and backward, even if it sends and receives no rows.

    With `overlap`, the tokens are divided into two halves. The experts compute with one half while the rows of the
    other half are exchanged, in both passes. (DeepSeek-V3, arXiv 2412.19437, overlaps two micro-batches in this way.)
    """

    def __init__(self, group: dist.ProcessGroup, tensor: dist.ProcessGroup, overlap: bool = False) -> None:
        """
        Args:
            group: ranks that store different experts.
            tensor: ranks that store shards of the same experts, divided by hidden width. Each of them computes with the
                rows of all of them.
            overlap: exchange the rows in two halves.
        """
        super().__init__()
        self.group = group
        self.tensor = tensor
        self.parts = 2 if overlap else 1
        self.local = LocalDispatcher()

    def run(self, x_BSD: Tensor, routing: Routing, apply_experts: ApplyExperts, shared: Apply | None) -> Tensor:
        """Exchange the rows, and compute while they are exchanged. See `moe.dispatch.Dispatcher`.

        Autograd runs the later of two independent operations first: the backward pass goes through this method from the
        last line to the first. The order of the collectives is therefore the same on all ranks, and whatever computes
        between the start and the end of an exchange also computes during the exchange of its gradients. With two
        halves, the backward pass starts the exchanges of the outputs' gradients, 2 and 1. It then waits for 2, computes
        the experts' gradients of 2, starts the exchange of the rows' gradients of 2, waits for 1, and so on.
        """
        divided = divide(routing, self.parts, sequences=len(x_BSD))
        static = divided.capacity is not None
        rows_RD, counts, local = self.local.dispatch(x_BSD.flatten(0, 1), divided, static=static, count_rows=True)
        plans = self._plan(counts, divided.capacity, align=needs_alignment(rows_RD))
        sent = _split(rows_RD, [sum(plan.send) for plan in plans])
        arriving = [
            start_exchange(rows, plan.send, plan.receive, self.group) for rows, plan in zip(sent, plans, strict=True)
        ]
        shared_BSD = None if shared is None else shared(x_BSD)
        returning = []
        for (rows_RD, exchange), plan in zip(arriving, plans, strict=True):
            rows_RD = finish_exchange(rows_RD, exchange)
            if self.tensor.size() > 1:
                rows_RD = all_gather_rows(rows_RD, plan.tensor_rows, self.tensor)
            y_RD = apply_experts(_Permute.apply(rows_RD, plan.by_expert_R, plan.by_source_R), plan.counts_e)
            y_RD = _Permute.apply(y_RD, plan.by_source_R, plan.by_expert_R)
            if self.tensor.size() > 1:
                y_RD = reduce_scatter_rows(y_RD, plan.tensor_rows, self.tensor)
            returning.append(start_exchange(y_RD, plan.receive, plan.send, self.group))
        returned_RD = _join([finish_exchange(rows_RD, exchange) for rows_RD, exchange in returning])
        y_TD = self.local.combine(returned_RD, routing, local)
        return y_TD if shared_BSD is None else y_TD + shared_BSD.flatten(0, 1)

    def _plan(self, counts: Tensor, capacity: int | None, align: bool) -> list[PartPlan]:
        """Return the plan of each part H.

        Args:
            counts: number of rows that this rank sends to each expert, [H·E], those of the first part first.
            capacity: the number of rows that every rank sends to every expert in each part; None: it differs.
            align: add empty rows to those of each expert (`moe.expert_loop.aligned_counts`) if their numbers differ.
        """
        parts, ranks, tensor_ranks = self.parts, self.group.size(), self.tensor.size()
        counts_HPe = counts.view(parts, ranks, -1)
        num_local = counts_HPe.shape[2]
        if capacity is None:
            # received_PHe[p, h, i]: the rows of part h that rank p sends to this rank's expert i.
            sent_PHe = counts_HPe.transpose(0, 1).contiguous()
            received_PHe = torch.empty_like(sent_PHe)
            dist.all_to_all_single(received_PHe, sent_PHe, group=self.group)
            if tensor_ranks > 1:
                received_PHe = all_gather_dim(received_PHe, 0, self.tensor)
            received_HQe = received_PHe.transpose(0, 1)
            received_HXP = received_HQe.sum(dim=2).view(parts, tensor_ranks, ranks)
            own_HP, rows_HX = received_HXP[:, self.tensor.rank()], received_HXP.sum(dim=2)
            # One transfer from the device for all numbers.
            numbers = torch.cat((counts_HPe.sum(dim=2), own_HP, rows_HX), dim=1).tolist()
            splits = [(row[:ranks], row[ranks : 2 * ranks], row[2 * ranks :]) for row in numbers]
        else:
            received_HQe = counts.new_full((parts, tensor_ranks * ranks, num_local), capacity)
            even = [num_local * capacity] * ranks
            splits = [(even, even, [sum(even)] * tensor_ranks)] * parts
        align = align and capacity is None
        return [
            PartPlan(send, receive, tensor_rows, *_orders(received_Qe, sum(tensor_rows), align))
            for (send, receive, tensor_rows), received_Qe in zip(splits, received_HQe, strict=True)
        ]

    def extra_repr(self) -> str:
        """Return what `repr` shows in the parentheses: the number of ranks, and whether there are two halves."""
        divided = f", hidden width over {self.tensor.size()}" if self.tensor.size() > 1 else ""
        overlap = ", overlap of two halves" if self.parts > 1 else ""
        return f"all-to-all over {self.group.size()} ranks{divided}{overlap}"


def divide(routing: Routing, parts: int, sequences: int) -> Routing:
    """Return a routing in which every part of the tokens has its own E experts, so that one sort divides all rows.

    The tokens are divided into contiguous parts of equal size, up to one token. Expert i of part h has the number
    h·E + i; nothing is dispatched to parts·E.

    Args:
        sequences: number of sequences of the tokens. The bound of `routing.capacity` holds for each of them in equal
            parts. If a part has a fraction of a sequence, it has no useful bound.
    """
    if parts == 1:
        return routing
    experts_TK, num_experts = routing.experts_TK, routing.num_experts
    tokens = len(experts_TK)
    part_T1 = (torch.arange(tokens, device=experts_TK.device) * parts // tokens).unsqueeze(1)
    divided_TK = torch.where(experts_TK == num_experts, parts * num_experts, experts_TK + part_T1 * num_experts)
    capacity = routing.capacity
    capacity = None if capacity is None or sequences % parts else capacity // parts
    return routing._replace(experts_TK=divided_TK, num_experts=parts * num_experts, capacity=capacity)


def _orders(received_Qe: Tensor, rows: int, align: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return `PartPlan.counts_e`, `PartPlan.by_expert_R` and `PartPlan.by_source_R`.

    Args:
        received_Qe: number of rows from each source for each expert.
        rows: R, their sum.
        align: add empty rows to those of each expert.
    """
    sources, num_local = received_Qe.shape
    experts_e = torch.arange(num_local, device=received_Qe.device)
    expert_of_row_R = experts_e.repeat(sources).repeat_interleave(received_Qe.flatten(), output_size=rows)
    by_expert_R = expert_of_row_R.argsort(stable=True)
    counts_e, place_R = received_Qe.sum(dim=0), torch.arange(rows, device=received_Qe.device)
    if align:
        counts_e, place_R = aligned_places(counts_e)
    by_source_R = torch.empty_like(by_expert_R)
    by_source_R[by_expert_R] = place_R
    if align:
        by_expert_R = place_R.new_full((int(counts_e.sum()),), rows).index_copy_(0, place_R, by_expert_R)
    return counts_e, by_expert_R, by_source_R


def _split(rows_RD: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    return [rows_RD] if len(sizes) == 1 else rows_RD.split(sizes)


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Permute(torch.autograd.Function):
    """Computes rows[order], with zeros where an index is the number of rows. `inverse` says where each row is in the
    result, so that the gradient is a gather too."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return _gather(rows, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return _gather(grad, inverse), None, None


def _gather(rows: Tensor, order: Tensor) -> Tensor:
    if len(order) <= len(rows):  # no row is empty
        return rows.index_select(0, order)
    gathered = rows.index_select(0, order.clamp(max=len(rows) - 1))
    return gathered.index_fill_(0, (order == len(rows)).nonzero().squeeze(1), 0)


def shard_experts(model: Transformer, mesh: Mesh) -> None:
    """Replace the experts of every MoE layer by this rank's shard of them, and install the all-to-all dispatcher.

    Call this on the meta device, before the weights are initialised, so that no rank allocates all experts.
    """
    for prefix, layer in model.named_modules():
        if not isinstance(layer, MoELayer):
            continue
        layer.dispatcher = AllToAllDispatcher(mesh.expert, mesh.expert_tensor, mesh.layout.overlap)
        experts = layer.experts
        experts.first_expert = mesh.expert.rank() * (experts.num_local // mesh.expert.size())
        for owner, module in experts.named_modules(prefix=f"{prefix}.experts"):
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, leaf, nn.Parameter(local_slice(f"{owner}.{leaf}", parameter, mesh)))
