"""Context parallelism: each rank of a group has a part of every row, S positions in sequence order.

Shapes: B batch, S positions of this rank, A earlier positions that are fetched, X = A + S, H query heads, G key/value
heads, C head dim, P ranks, n positions that are sent to one rank.

Queries stay on their rank. Keys and values are sent to the ranks that need them, as in the all-gather form of Llama 3
(arXiv 2407.21783, section 3.3.2): with few key/value heads they are small compared with the queries, and packed
documents need only a mask. With latent attention (`moe.attention.latent`) latents are sent, and each rank computes the
keys and values of its heads from them. In contrast to Llama 3, a rank receives only what its queries can attend to:
with a window W, the last W - 1 positions before its part (the halo), from as many neighbours as have them; without a
window, all positions before its part. One exchange per layer and direction replaces the rounds of a ring
(arXiv 2310.01889).

Parts are contiguous, so that a window reaches few neighbours and the work is even. If no layer has a window, later
ranks would attend to more keys than earlier ones. Each rank then has two pieces, one counted from the start of the row
and one from its end (`Layout.zigzag`), the whole row is gathered, and the work is even again.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.attention.attention import Attention, AttentionCore, Expand
from moe.router import Router
from moe.token_context import TokenContext
from parallel.collectives import all_gather_dim, all_to_all_rows, gather_dim
from parallel.layout import Layout


class ContextCore(nn.Module):
    """Fetches the keys and values that this rank's queries attend to on earlier ranks, and calls the core on them.

    Every rank takes part in every exchange, forward and backward, even if it sends nothing. All ranks have the same
    number of positions.
    """

    def __init__(self, core: AttentionCore, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.core = core
        self.group = group

    def forward(
        self, q_BHSC: Tensor, k_BGSC: Tensor, v_BGSC: Tensor, context: TokenContext, expand: Expand | None = None
    ) -> Tensor:
        """Return the mixed values [B, H, S, C].

        A document must have the same number on all ranks, or `documents_BS` must be None on all ranks.
        """
        reach = self._reach(k_BGSC.shape[2])
        if reach == 0:
            return self.core(q_BHSC, k_BGSC, v_BGSC, context, expand)
        k_BGXC, v_BGXC = _Fetch.apply(k_BGSC, v_BGSC, reach, self.group)
        noise_keys_BS = _noise_keys(context, k_BGSC, expand)
        with_halo = context.share(
            ("halo", reach),
            lambda: TokenContext(
                documents_BS=_fetch_numbers(context.documents_BS, reach, self.group),
                noise_keys_BS=_fetch_numbers(noise_keys_BS, reach, self.group),
            ),
        )
        return self.core(q_BHSC, k_BGXC, v_BGXC, with_halo, expand)

    def _reach(self, length: int) -> int:
        """Return how many positions before this rank's part a query can attend to. It is the same on all ranks."""
        left = (self.group.size() - 1) * length
        return left if self.core.window is None else min(self.core.window - 1, left)

    def extra_repr(self) -> str:
        """Return what `repr` shows in the parentheses: the window, the halo and this rank."""
        window = self.core.window
        halo = "all positions" if window is None else f"the last {window - 1} positions"
        return f"{self.core.extra_repr()}, halo of {halo} before, rank {self.group.rank()} of {self.group.size()}"


def rows_to_each(reach: int, length: int, source: int, ranks: int) -> list[int]:
    """Return how many of its last positions rank `source` sends to each rank, so that queries can attend `reach`
    positions back. Every rank has `length` positions."""
    return [min(max(reach - (rank - source - 1) * length, 0), length) if rank > source else 0 for rank in range(ranks)]


def _splits(reach: int, length: int, group: dist.ProcessGroup) -> tuple[list[int], list[int]]:
    """Return the numbers of positions to send to, and to receive from, each rank of the group."""
    ranks, rank = group.size(), group.rank()
    receive = [rows_to_each(reach, length, source, ranks)[rank] for source in range(ranks)]
    return rows_to_each(reach, length, rank, ranks), receive


def _send_last(last: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send each rank the last `send[rank]` positions of `last` [n, ...].

    Returns:
        The A received positions [A, ...], in the order of the sequence.
    """
    return all_to_all_rows(torch.cat([last[len(last) - rows :] for rows in send]), send, receive, group)


class _Fetch(torch.autograd.Function):
    """Extends keys and values [B, G, S, C] to [B, G, X, C] in one exchange. Their widths C can differ.

    A position can be sent to several ranks. Their gradients are added in the order of the ranks, in at least fp32.
    """

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, reach: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        ctx.reach, ctx.group, ctx.length = reach, group, k.shape[2]
        send, receive = _splits(reach, ctx.length, group)
        first = ctx.length - max(send)  # no rank needs the positions before
        fetched_ABGC = _send_last(_by_position(k[:, :, first:], v[:, :, first:]), send, receive, group)
        earlier_k, earlier_v = fetched_ABGC.permute(1, 2, 0, 3).split((k.shape[3], v.shape[3]), dim=-1)
        return torch.cat((earlier_k, k), dim=2), torch.cat((earlier_v, v), dim=2)

    @staticmethod
    def backward(ctx: Any, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor, Tensor, None, None]:
        send, receive = _splits(ctx.reach, ctx.length, ctx.group)
        earlier = sum(receive)
        fetched_grad = _by_position(grad_k[:, :, :earlier], grad_v[:, :, :earlier])
        returned = all_to_all_rows(fetched_grad, receive, send, ctx.group)
        local_k, local_v = (
            grad[:, :, earlier:].to(torch.promote_types(grad.dtype, torch.float32), copy=True)
            for grad in (grad_k, grad_v)
        )
        for part_nBGC in returned.split(send):
            last = ctx.length - len(part_nBGC)
            part_k, part_v = part_nBGC.permute(1, 2, 0, 3).split((grad_k.shape[3], grad_v.shape[3]), dim=-1)
            local_k[:, :, last:] += part_k
            local_v[:, :, last:] += part_v
        return local_k.to(grad_k.dtype), local_v.to(grad_v.dtype), None, None


def _by_position(k: Tensor, v: Tensor) -> Tensor:
    """Concatenate keys and values [B, G, n, C] along C, and move the positions first: [n, B, G, 2·C].

    With latent attention, these are latents and the rotary parts of keys, which have other widths.
    """
    return torch.cat((k.permute(2, 0, 1, 3), v.permute(2, 0, 1, 3)), dim=-1)


def _fetch_numbers(numbers_BS: Tensor | None, reach: int, group: dist.ProcessGroup) -> Tensor | None:
    """Return numbers [B, X] of the fetched positions and of this rank's, such as their documents, or None."""
    if numbers_BS is None:
        return None
    send, receive = _splits(reach, numbers_BS.shape[1], group)
    earlier_BA = _send_last(numbers_BS.t(), send, receive, group).t()
    return torch.cat((earlier_BA, numbers_BS), dim=1)


def _noise_keys(context: TokenContext, k_BGSC: Tensor, expand: Expand | None) -> Tensor | None:
    """Return the noise keys that `expand` needs, those of the positions of `k_BGSC`; None if it needs none.

    An adapter draws dropout from them. Tensor parallelism, which divides the noise keys, allows no dropout.
    """
    keys_BS = context.noise_keys_BS
    return None if expand is None or keys_BS is None or keys_BS.shape[1] != k_BGSC.shape[2] else keys_BS


def piece_order(layout: Layout) -> list[list[int]]:
    """Return, for each rank of `mesh.sequence` in order, the indices of its pieces in the sequence."""
    if not layout.zigzag:
        return [[rank] for rank in range(layout.sequence)]
    by_context = [layout.pieces_of(rank) for rank in range(layout.context)]
    if layout.tensor == 1:
        return by_context
    parts = layout.tensor // 2  # tensor ranks split each of the two pieces
    return [[piece * parts + part] for pieces in by_context for piece in pieces for part in range(parts)]


class ZigzagCore(nn.Module):
    """Gathers all keys and values of the row, and calls the core for each of this rank's two pieces of queries.

    (The balanced order of Llama 3's context parallelism, arXiv 2407.21783, section 3.3.2.)
    """

    def __init__(self, core: AttentionCore, group: dist.ProcessGroup) -> None:
        super().__init__()
        assert core.window is None
        self.core = core
        self.group = group

    def forward(
        self, q_BHSC: Tensor, k_BGSC: Tensor, v_BGSC: Tensor, context: TokenContext, expand: Expand | None = None
    ) -> Tensor:
        """Return the mixed values [B, H, S, C]."""
        layout, positions = Layout(context=self.group.size(), zigzag=True), k_BGSC.shape[2] // 2
        order = _inverse([piece for pieces in piece_order(layout) for piece in pieces])
        k, v = (_in_order(gather_dim(x, 2, self.group), 2, order) for x in (k_BGSC, v_BGSC))
        if expand is not None:
            noise_keys_BS = _noise_keys(context, k_BGSC, expand)
            row_BX = None if noise_keys_BS is None else self._gather(context, "noise keys", noise_keys_BS, order)
            k, v = expand(k, v, row_BX)
        mixed = []
        for q, piece in zip(q_BHSC.chunk(2, dim=2), layout.pieces_of(self.group.rank()), strict=True):
            end = (piece + 1) * positions
            mixed.append(self.core(q, k[:, :, :end], v[:, :, :end], self._context(context, order, end)))
        return torch.cat(mixed, dim=2)

    def _context(self, context: TokenContext, order: list[int], end: int) -> TokenContext:
        """Return the context of the first `end` positions of the row. Layers share it."""
        if context.documents_BS is None:
            return context.share(("zigzag", end), TokenContext)
        row = self._gather(context, "documents", context.documents_BS, order)
        return context.share(("zigzag", end), lambda: TokenContext(documents_BS=row[:, :end]))

    def _gather(self, context: TokenContext, name: str, numbers_BS: Tensor, order: list[int]) -> Tensor:
        """Return the numbers of the whole row. Layers share them under the name."""
        return context.share(name, lambda: _in_order(all_gather_dim(numbers_BS, 1, self.group), 1, order))

    def extra_repr(self) -> str:
        """Return what `repr` shows in the parentheses: the window, the pieces and this rank."""
        return f"{self.core.extra_repr()}, two pieces of {2 * self.group.size()}, rank {self.group.rank()}"


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=lambda position: order[position])


def _in_order(x: Tensor, dim: int, order: list[int]) -> Tensor:
    """Divide `x` along `dim` into equal pieces, and concatenate them in the order `order`."""
    pieces = x.chunk(len(order), dim)
    return torch.cat([pieces[index] for index in order], dim)


class GatheredRows(nn.Module):
    """Whole sequences, all-gathered over the group, for routers that decide over them (`moe.router.Rows`)."""

    def __init__(self, group: dist.ProcessGroup, order: list[list[int]]) -> None:
        """
        Args:
            order: the result of `piece_order`.
        """
        super().__init__()
        self.group = group
        self.local_pieces = order[group.rank()]
        self.pieces = len(self.local_pieces)
        self.order = _inverse([piece for pieces in order for piece in pieces])

    def gather(self, x_BS: Tensor) -> Tensor:
        """Join the parts [B, S, ...] of all ranks, which have the same shape, to [B, P·S, ...]. No gradient."""
        assert not x_BS.requires_grad
        return _in_order(all_gather_dim(x_BS, 1, self.group), 1, self.order)

    def slice_local(self, x_BS: Tensor) -> Tensor:
        """Return this rank's part [B, S, ...] of [B, P·S, ...]."""
        pieces = x_BS.chunk(len(self.order), dim=1)
        return torch.cat([pieces[piece] for piece in self.local_pieces], dim=1)

    def extra_repr(self) -> str:
        """Return what `repr` shows in the parentheses: the number of ranks."""
        return f"all-gather over {self.group.size()} ranks"


def shard_attention(model: nn.Module, group: dist.ProcessGroup, zigzag: bool = False) -> None:
    """Install a core in every attention module that fetches keys and values of the other ranks."""
    for module in model.modules():
        if isinstance(module, Attention):
            core = ZigzagCore(module.core, group) if zigzag else ContextCore(module.core, group)
            module.add_module("core", core)


def install_rows(model: nn.Module, group: dist.ProcessGroup, layout: Layout) -> None:
    """Let every router of the model decide over whole sequences.

    Args:
        group: all ranks that share a row, in rank order.
    """
    for module in model.modules():
        if isinstance(module, Router):
            module.rows = GatheredRows(group, piece_order(layout))
