"""Collectives with gradients, and their forms without.

Shapes: R rows, D model, B batch, S sequence, s = S/P of it on each of the P ranks of a group.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.text import parse_json, to_json

Collective = Callable[[Tensor, int, dist.ProcessGroup], Tensor]
"""Computes (tensor, dim, group) -> tensor."""


def all_gather_json(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return the value of every rank of the group, in their order. Collective.

    The values travel as JSON in CPU tensors. `torch.distributed.all_gather_object` would unpickle them, and a pickle
    from a process that is no rank can run any code.

    Args:
        value: can be written as JSON. Tuples come back as lists.
        group: None: all ranks. Without a process group, this process is the only rank.
    """
    text = torch.frombuffer(bytearray(to_json(value).encode()), dtype=torch.uint8)
    if not dist.is_initialized():
        return [parse_json(text.numpy().tobytes())]
    ranks = dist.get_world_size(group)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(ranks)]
    dist.all_gather(sizes, torch.tensor([len(text)]), group=group)
    longest = max(int(size) for size in sizes)
    texts = [torch.empty(longest, dtype=torch.uint8) for _ in range(ranks)]
    dist.all_gather(texts, torch.cat([text, text.new_zeros(longest - len(text))]), group=group)
    return [parse_json(received[: int(size)].numpy().tobytes()) for received, size in zip(texts, sizes, strict=True)]


class RowExchange:
    """The state of an all-to-all of rows that is started first and waited for later, in both passes.

    In the forward pass, `start_exchange` sends the rows and `finish_exchange` waits for them. In the backward pass,
    autograd runs the two in reverse order: the backward of `finish_exchange` sends the gradients, and that of
    `start_exchange` waits for them.

    Args:
        send: number of rows for each rank of the group, in the forward pass.
        receive: number of rows from each rank of the group, in the forward pass.
    """

    def __init__(self, send: list[int], receive: list[int], group: dist.ProcessGroup) -> None:
        self.send, self.receive, self.group = send, receive, group
        self.work: dist.Work | None = None
        self.sent: Tensor | None = None
        """The rows that are being sent. Their memory must not be freed before the exchange has finished."""
        self.received: Tensor | None = None

    def begin(self, rows_RD: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Start sending `rows_RD`. The returned tensor is filled when `wait` returns."""
        self.received = rows_RD.new_empty(sum(receive), *rows_RD.shape[1:])
        self.sent = rows_RD.contiguous()
        self.work = dist.all_to_all_single(self.received, self.sent, receive, send, group=self.group, async_op=True)
        return self.received

    def wait(self) -> Tensor:
        """Wait for the exchange that `begin` started. Return the received rows."""
        assert self.work is not None and self.received is not None
        self.work.wait()
        received = self.received
        self.work = self.sent = self.received = None
        return received


class _StartExchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, exchange: RowExchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.begin(rows_RD, exchange.send, exchange.receive)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        # `grad_RD` is what `_FinishExchange` sent. It only makes autograd call this function after that one.
        return ctx.exchange.wait(), None


class _FinishExchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, exchange: RowExchange) -> Tensor:
        ctx.exchange = exchange
        exchange.wait()
        ctx.mark_dirty(rows_RD)  # the exchange has filled it in place
        return rows_RD

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        exchange = ctx.exchange
        exchange.begin(grad_RD, exchange.receive, exchange.send)
        return grad_RD, None


def start_exchange(
    rows_RD: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup
) -> tuple[Tensor, RowExchange]:
    """Start `all_to_all_rows` without waiting for it. Pass both results to `finish_exchange` before reading the rows.

    Computation between the two calls overlaps with the exchange. Its backward pass overlaps with the exchange of the
    gradients, because autograd runs the later of two independent parts of a graph first.
    """
    exchange = RowExchange(send, receive, group)
    return _StartExchange.apply(rows_RD, exchange), exchange


def finish_exchange(rows_RD: Tensor, exchange: RowExchange) -> Tensor:
    """Wait for an exchange and return its rows.

    Args:
        rows_RD, exchange: the results of `start_exchange`.
    """
    return _FinishExchange.apply(rows_RD, exchange)


def all_to_all_rows(rows_RD: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send the first `send[0]` rows to rank 0 of the group, the next `send[1]` to rank 1, and so on. Any can be 0.

    The gradient is exchanged in the opposite direction.

    Args:
        rows_RD: rows in the order of their destinations.
        send: number of rows for each rank of the group.
        receive: number of rows from each rank of the group.

    Returns:
        [sum(receive), D], in the order of their sources.
    """
    return finish_exchange(*start_exchange(rows_RD, send, receive, group))


# torch 2.13 renamed both and warns about the old names; 2.11 has only the old ones.
_all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
_reduce_scatter = dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor


def all_gather_dim(part: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """Concatenate the parts of all ranks, which have the same shape, along `dim` in rank order. No gradient."""
    part = part.movedim(dim, 0).contiguous()
    whole = part.new_empty(group.size() * part.shape[0], *part.shape[1:])
    _all_gather(whole, part, group=group)
    return whole.movedim(0, dim)


def reduce_scatter_dim(whole: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """Sum `whole` over all ranks, divide the sum along `dim` into one equal part per rank, and return this rank's part.
    No gradient."""
    whole = whole.movedim(dim, 0).contiguous()
    part = whole.new_empty(whole.shape[0] // group.size(), *whole.shape[1:])
    _reduce_scatter(part, whole, group=group)
    return part.movedim(0, dim)


class _WithGradient(torch.autograd.Function):
    """Applies the collective `in_forward` in the forward pass, and `in_backward` to the gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, in_forward: Collective, in_backward: Collective, dim: int, group: dist.ProcessGroup
    ) -> Tensor:
        ctx.in_backward, ctx.dim, ctx.group = in_backward, dim, group
        return in_forward(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return ctx.in_backward(grad, ctx.dim, ctx.group), None, None, None, None


def gather_dim(part: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """Compute `all_gather_dim` with a gradient, which is reduce-scattered."""
    return _WithGradient.apply(part, all_gather_dim, reduce_scatter_dim, dim, group)


def scatter_dim(whole: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """Compute `reduce_scatter_dim` with a gradient, which is all-gathered."""
    return _WithGradient.apply(whole, reduce_scatter_dim, all_gather_dim, dim, group)


def _all_reduce(part: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """Return the sum of `part` over all ranks; `dim` is not used. No gradient."""
    total = part.clone()
    dist.all_reduce(total, group=group)
    return total


def sum_over_ranks(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum of `part` over all ranks, for ranks that use it for different parts of the loss.

    The gradient is therefore summed, too.
    """
    return _WithGradient.apply(part, _all_reduce, _all_reduce, 0, group)


class GatherSequence(nn.Module):
    """All-gathers the sequence: [B, s, ...] of each rank -> [B, S, ...] on all ranks. The gradient is reduce-scattered.

    (Sequence parallelism, arXiv 2205.05198.)
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group

    def forward(self, part_BSD: Tensor) -> Tensor:
        """Join this rank's [B, s, ...] with those of the other ranks, in rank order: [B, S, ...]."""
        return gather_dim(part_BSD, 1, self.group)

    def extra_repr(self) -> str:
        """Return what `repr` shows in the parentheses: the number of ranks."""
        return f"over {self.group.size()} ranks"


class ScatterSequence(GatherSequence):
    """Reduce-scatters the sequence: partial sums [B, S, ...] on each rank -> this rank's part [B, s, ...] of the sum.
    The gradient is all-gathered."""

    def forward(self, whole_BSD: Tensor) -> Tensor:
        """Return this rank's part [B, s, ...] of the sum of `whole_BSD` [B, S, ...] over the ranks."""
        return scatter_dim(whole_BSD, 1, self.group)


class SliceSequence(GatherSequence):
    """Selects this rank's part of a mask or of noise keys: [B, S] -> [B, s]. None stays None."""

    def forward(self, whole_BS: Tensor | None) -> Tensor | None:  # type: ignore[override]
        """Return this rank's part [B, s] of `whole_BS` [B, S], or None."""
        return None if whole_BS is None else whole_BS.chunk(self.group.size(), dim=1)[self.group.rank()]


def all_gather_rows(rows_RD: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
    """Concatenate the rows of all ranks in rank order. The gradient is summed over ranks.

    Args:
        counts: number of rows of each rank of the group.
    """
    ranks = group.size()
    copies = rows_RD.repeat(ranks, *[1] * (rows_RD.dim() - 1))
    return all_to_all_rows(copies, [rows_RD.shape[0]] * ranks, counts, group)


def reduce_scatter_rows(rows_RD: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
    """Sum `rows_RD` over all ranks, and return this rank's rows of the sum. The gradient is all-gathered.

    Args:
        rows_RD: partial sums of the rows of all ranks, in rank order.
        counts: number of rows of each rank of the group.
    """
    ranks, local_rows = group.size(), counts[group.rank()]
    partial_sums = all_to_all_rows(rows_RD, counts, [local_rows] * ranks, group)
    return partial_sums.unflatten(0, (ranks, local_rows)).sum(dim=0)
