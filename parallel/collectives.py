"""Collectives that gradients flow through."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _exchange(rows_RD, send, receive, group)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return _exchange(grad_RD, ctx.receive, ctx.send, ctx.group), None, None, None


def _exchange(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    arrived = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), receive, send, group=group)
    return arrived


def all_to_all_rows(rows_RD: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send the first `send[0]` rows to rank 0 of the group, the next `send[1]` to rank 1, ...; any may be 0.

    Args:
        rows_RD: rows in the order of their destinations.
        send: rows for each rank of the group.
        receive: rows from each rank of the group.

    Returns:
        [sum(receive), D], in the order of their sources. Its gradient travels the way back.
    """
    return _AllToAllRows.apply(rows_RD, send, receive, group)
