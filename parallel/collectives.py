"""Collectives that gradients flow through."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

Collective = Callable[[Tensor, int, dist.ProcessGroup], Tensor]
"""(tensor, dim, group) -> tensor."""


class RowExchange:
    """An exchange of rows that has begun and is waited for later, forward and backward."""

    def __init__(self, send: list[int], receive: list[int], group: dist.ProcessGroup) -> None:
        self.send, self.receive, self.group = send, receive, group
        self.work: dist.Work | None = None
        self.leaving: Tensor | None = None
        """What is being sent: its memory has to live until the exchange is over."""
        self.coming: Tensor | None = None

    def begin(self, rows_RD: Tensor, send: list[int], receive: list[int]) -> Tensor:
        self.coming = rows_RD.new_empty(sum(receive), *rows_RD.shape[1:])
        self.leaving = rows_RD.contiguous()
        self.work = dist.all_to_all_single(self.coming, self.leaving, receive, send, group=self.group, async_op=True)
        return self.coming

    def wait(self) -> Tensor:
        assert self.work is not None and self.coming is not None
        self.work.wait()
        coming = self.coming
        self.work = self.leaving = self.coming = None
        return coming


class _StartExchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, travelling: RowExchange) -> Tensor:
        ctx.travelling = travelling
        return travelling.begin(rows_RD, travelling.send, travelling.receive)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        # `grad_RD` came from `_FinishExchange` to say when; the gradient itself has another number of rows.
        return ctx.travelling.wait(), None


class _FinishExchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, travelling: RowExchange) -> Tensor:
        ctx.travelling = travelling
        travelling.wait()
        ctx.mark_dirty(rows_RD)  # its numbers change while it lies there
        return rows_RD

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        travelling = ctx.travelling
        travelling.begin(grad_RD, travelling.receive, travelling.send)
        return grad_RD, None


def start_exchange(
    rows_RD: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup
) -> tuple[Tensor, RowExchange]:
    """`all_to_all_rows` without waiting: the result may be read after `finish_exchange` only.

    What is computed in between overlaps with the exchange, and its gradient with the exchange on the way back: autograd
    runs the later of two independent parts of a graph first.
    """
    travelling = RowExchange(send, receive, group)
    return _StartExchange.apply(rows_RD, travelling), travelling


def finish_exchange(rows_RD: Tensor, travelling: RowExchange) -> Tensor:
    """The rows of `start_exchange`, now here."""
    rows: Tensor = _FinishExchange.apply(rows_RD, travelling)
    return rows


def all_to_all_rows(rows_RD: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send the first `send[0]` rows to rank 0 of the group, the next `send[1]` to rank 1, ...; any may be 0.

    Args:
        rows_RD: rows in the order of their destinations.
        send: rows for each rank of the group.
        receive: rows from each rank of the group.

    Returns:
        [sum(receive), D], in the order of their sources. Its gradient travels the way back.
    """
    return finish_exchange(*start_exchange(rows_RD, send, receive, group))


# torch 2.13 renamed both and warns of the old names; 2.11 has only those.
_all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
_reduce_scatter = dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor


def all_gather_dim(part: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """The equal parts of all ranks, joined along `dim` in rank order. No gradient."""
    part = part.movedim(dim, 0).contiguous()
    whole = part.new_empty(group.size() * part.shape[0], *part.shape[1:])
    _all_gather(whole, part, group=group)
    return whole.movedim(0, dim)


def reduce_scatter_dim(whole: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """This rank's part, of equal ones along `dim`, of the sum over all ranks. No gradient."""
    whole = whole.movedim(dim, 0).contiguous()
    part = whole.new_empty(whole.shape[0] // group.size(), *whole.shape[1:])
    _reduce_scatter(part, whole, group=group)
    return part.movedim(0, dim)


class _Along(torch.autograd.Function):
    """`there(x, dim, group)`, whose gradient comes `back` by its mirror image."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Collective, back: Collective, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.back, ctx.dim, ctx.group = back, dim, group
        return there(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        return ctx.back(grad, ctx.dim, ctx.group), None, None, None, None


def gather_dim(part: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """`all_gather_dim` with a gradient: the sum over ranks, of which each gets its part."""
    whole: Tensor = _Along.apply(part, all_gather_dim, reduce_scatter_dim, dim, group)
    return whole


def scatter_dim(whole: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """`reduce_scatter_dim` with a gradient: every rank's part of it, joined."""
    part: Tensor = _Along.apply(whole, reduce_scatter_dim, all_gather_dim, dim, group)
    return part


class GatherSequence(nn.Module):
    """[B, s, ...] of every rank -> [B, P·s, ...] on all; the gradient is summed over ranks and cut again.

    (Sequence parallelism: arXiv 2205.05198; `ScatterSequence` is its mirror image.)
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group

    def forward(self, part_BSD: Tensor) -> Tensor:
        return gather_dim(part_BSD, 1, self.group)

    def extra_repr(self) -> str:
        return f"over {self.group.size()} ranks"


class ScatterSequence(GatherSequence):
    """[B, P·s, ...], partial sums on every rank -> this rank's [B, s, ...] of the sum."""

    def forward(self, whole_BSD: Tensor) -> Tensor:
        return scatter_dim(whole_BSD, 1, self.group)


class SliceSequence(GatherSequence):
    """Of a mask or keys for [B, P·s] tokens, this rank's [B, s]; None stays None."""

    def forward(self, whole_BS: Tensor | None) -> Tensor | None:  # type: ignore[override]
        return None if whole_BS is None else whole_BS.chunk(self.group.size(), dim=1)[self.group.rank()]


def all_gather_rows(rows_RD: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
    """Every rank's rows, one rank after the other; `counts`: how many each has. The gradient is summed over ranks."""
    ranks = group.size()
    copies = rows_RD.repeat(ranks, *[1] * (rows_RD.dim() - 1))
    return all_to_all_rows(copies, [rows_RD.shape[0]] * ranks, counts, group)


def reduce_scatter_rows(rows_RD: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
    """The mirror image: partial sums of every rank's rows -> the sum of this rank's `counts[rank]` rows."""
    ranks, own = group.size(), counts[group.rank()]
    arrived = all_to_all_rows(rows_RD, counts, [own] * ranks, group)
    return arrived.unflatten(0, (ranks, own)).sum(dim=0)
