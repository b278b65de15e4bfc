"""Context parallelism: each rank of a group holds a part of every row, S places in sequence order.

Shapes: B batch, S places held here, A places before them that are fetched, X = A + S, H query heads, G key/value heads,
C head dim, P ranks, n rows that travel to one rank.

Queries stay; keys and values travel, as in the all-gather form of Llama 3 (arXiv 2407.21783, section 3.3.2): with few
key/value heads they are small beside the queries, and packed documents need no more than a mask. Unlike there, a rank
receives only what its queries can see: with a window W the last W - 1 places before its own, from as many neighbours
as hold them, and without a window all places to its left, never those to its right. One exchange a layer and
direction stands in for the rounds of a ring (arXiv 2310.01889).

Parts are contiguous, so that a window reaches few neighbours and work is even. Where no layer has a window, later ranks
would see more keys than earlier ones: each then holds two pieces, one counted from the start of the row and one from
its end (`Layout.zigzag`), all of the row is gathered, and every rank has the same to do.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from moe.attention.attention import Attention, AttentionCore
from moe.router import Router
from parallel.collectives import all_gather_dim, all_to_all_rows, gather_dim
from parallel.layout import Layout


class ContextCore(nn.Module):
    """Fetches the keys and values that the queries here see in earlier ranks' parts, and calls the core on them.

    Every rank takes part in every exchange, forward and backward, whatever it sends. All hold equally many places.
    """

    def __init__(self, core: AttentionCore, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.core = core
        self.group = group

    def forward(self, q_BHSC: Tensor, k_BGSC: Tensor, v_BGSC: Tensor, documents_BS: Tensor | None) -> Tensor:
        """Returns [B, H, S, C]. `documents_BS`: numbers that mean the same on all ranks, or None on all."""
        reach = self._reach(k_BGSC.shape[2])
        if reach == 0:
            return self.core(q_BHSC, k_BGSC, v_BGSC, documents_BS)
        k_BGXC, v_BGXC = _Fetch.apply(k_BGSC, v_BGSC, reach, self.group)
        documents_BX = None if documents_BS is None else _documents(documents_BS, reach, self.group)
        return self.core(q_BHSC, k_BGXC, v_BGXC, documents_BX)

    def _reach(self, length: int) -> int:
        """How far a query sees at most, beyond its rank's part; the same on all ranks."""
        left = (self.group.size() - 1) * length
        return left if self.core.window is None else min(self.core.window - 1, left)

    def extra_repr(self) -> str:
        window = self.core.window
        halo = "all places" if window is None else f"the last {window - 1} places"
        return (
            f"{self.core.extra_repr()}, halo of {halo} before its own, rank {self.group.rank()} of {self.group.size()}"
        )


def rows_to_each(reach: int, length: int, source: int, ranks: int) -> list[int]:
    """How many of the last places of rank `source`, which holds `length`, each rank needs to see `reach` back."""
    return [min(max(reach - (rank - source - 1) * length, 0), length) if rank > source else 0 for rank in range(ranks)]


def _splits(reach: int, length: int, group: dist.ProcessGroup) -> tuple[list[int], list[int]]:
    """Rows to send to, and to receive from, each rank of the group."""
    ranks, own = group.size(), group.rank()
    receive = [rows_to_each(reach, length, source, ranks)[own] for source in range(ranks)]
    return rows_to_each(reach, length, own, ranks), receive


def _send_last(last: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """Give each rank so many of the `last` places [.., ...]; returns [A, ...], in the order of the sequence."""
    return all_to_all_rows(torch.cat([last[len(last) - rows :] for rows in send]), send, receive, group)


class _Fetch(torch.autograd.Function):
    """[B, G, S, C] -> [B, G, X, C], for keys and values in one exchange.

    A place may serve several ranks: their gradients are added up in the order of the ranks, in at least fp32.
    """

    @staticmethod
    def forward(ctx, k: Tensor, v: Tensor, reach: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def, override]
        ctx.reach, ctx.group, ctx.length = reach, group, k.shape[2]
        send, receive = _splits(reach, ctx.length, group)
        first = ctx.length - max(send)  # nobody needs those before
        fetched_ABGC = _send_last(_by_place(k[:, :, first:], v[:, :, first:]), send, receive, group)
        earlier_k, earlier_v = fetched_ABGC.permute(1, 2, 0, 3).chunk(2, dim=-1)
        return torch.cat((earlier_k, k), dim=2), torch.cat((earlier_v, v), dim=2)

    @staticmethod
    def backward(ctx, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[no-untyped-def, override]
        send, receive = _splits(ctx.reach, ctx.length, ctx.group)
        earlier = sum(receive)
        leaving = _by_place(grad_k[:, :, :earlier], grad_v[:, :, :earlier])
        returned = all_to_all_rows(leaving, receive, send, ctx.group)
        own_k, own_v = (
            grad[:, :, earlier:].to(torch.promote_types(grad.dtype, torch.float32), copy=True)
            for grad in (grad_k, grad_v)
        )
        for part_nBGC in returned.split(send):
            last = ctx.length - len(part_nBGC)
            from_k, from_v = part_nBGC.permute(1, 2, 0, 3).chunk(2, dim=-1)
            own_k[:, :, last:] += from_k
            own_v[:, :, last:] += from_v
        return own_k.to(grad_k.dtype), own_v.to(grad_v.dtype), None, None


def _by_place(k: Tensor, v: Tensor) -> Tensor:
    """Keys and values [B, G, n, C] side by side, places first: [n, B, G, 2·C]."""
    return torch.cat((k.permute(2, 0, 1, 3), v.permute(2, 0, 1, 3)), dim=-1)


_fetched = WeakTensorKeyDictionary()
"""documents -> {(group, reach, version): documents of all X places}, while the tensor lives: layers share them."""


def _documents(documents_BS: Tensor, reach: int, group: dist.ProcessGroup) -> Tensor:
    """[B, X]. Fetched by the first layer that asks; later ones, and recomputed ones, get the same tensor.

    `AttentionCore` in turn makes one mask for all layers that give it the same tensor.
    """
    of_documents = _fetched.setdefault(documents_BS, {})
    key = (group, reach, documents_BS._version)
    if key not in of_documents:
        send, receive = _splits(reach, documents_BS.shape[1], group)
        earlier_BA = _send_last(documents_BS.t(), send, receive, group).t()
        # A copy also where nothing is earlier: a value that is its own key would never go.
        of_documents[key] = torch.cat((earlier_BA, documents_BS), dim=1)
    fetched: Tensor = of_documents[key]
    return fetched


def piece_order(layout: Layout) -> list[list[int]]:
    """For each rank that shares a row, in the order of `mesh.sequence`, its pieces' numbers in the sequence."""
    if not layout.zigzag:
        return [[rank] for rank in range(layout.sequence)]
    by_context = [layout.pieces_of(rank) for rank in range(layout.context)]
    if layout.tensor == 1:
        return by_context
    finer = layout.tensor // 2  # tensor ranks cut each of the two pieces
    return [[piece * finer + part] for pieces in by_context for piece in pieces for part in range(finer)]


class ZigzagCore(nn.Module):
    """Gathers all keys and values of the row, and calls the core for each of the two pieces of queries here.

    (The balanced order of Llama 3's context parallelism, arXiv 2407.21783, section 3.3.2.)
    """

    def __init__(self, core: AttentionCore, group: dist.ProcessGroup) -> None:
        super().__init__()
        assert core.window is None
        self.core = core
        self.group = group

    def forward(self, q_BHSC: Tensor, k_BGSC: Tensor, v_BGSC: Tensor, documents_BS: Tensor | None) -> Tensor:
        """Returns [B, H, S, C]; arguments as of `ContextCore`."""
        layout, places = Layout(context=self.group.size(), zigzag=True), k_BGSC.shape[2] // 2
        order = _inverse([piece for pieces in piece_order(layout) for piece in pieces])
        k, v = (_in_order(gather_dim(x, 2, self.group), 2, order) for x in (k_BGSC, v_BGSC))
        mixed = []
        for q, piece in zip(q_BHSC.chunk(2, dim=2), layout.pieces_of(self.group.rank()), strict=True):
            end = (piece + 1) * places
            documents = None if documents_BS is None else self._documents(documents_BS, order, end)
            mixed.append(self.core(q, k[:, :, :end], v[:, :, :end], documents))
        return torch.cat(mixed, dim=2)

    def _documents(self, documents_BS: Tensor, order: list[int], end: int) -> Tensor:
        """[B, X]; the same tensor for all layers, as in `_documents`."""
        of_documents = _fetched.setdefault(documents_BS, {})
        whole, part = ((self.group, reach, documents_BS._version) for reach in (-1, end))
        if whole not in of_documents:
            of_documents[whole] = _in_order(all_gather_dim(documents_BS, 1, self.group), 1, order)
        if part not in of_documents:
            of_documents[part] = of_documents[whole][:, :end]
        documents_BX: Tensor = of_documents[part]
        return documents_BX

    def extra_repr(self) -> str:
        return f"{self.core.extra_repr()}, two pieces of {2 * self.group.size()}, rank {self.group.rank()}"


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=lambda place: order[place])


def _in_order(x: Tensor, dim: int, order: list[int]) -> Tensor:
    """The equal pieces of `x` along `dim`, rearranged."""
    pieces = x.chunk(len(order), dim)
    return torch.cat([pieces[place] for place in order], dim)


class GatheredRows(nn.Module):
    """Whole sequences for routers that decide over them (`moe.router.Rows`): all-gathered over the group."""

    def __init__(self, group: dist.ProcessGroup, order: list[list[int]]) -> None:
        """`order`: `piece_order`."""
        super().__init__()
        self.group = group
        self.own_pieces = order[group.rank()]
        self.pieces = len(self.own_pieces)
        self.order = _inverse([piece for pieces in order for piece in pieces])

    def gather(self, x_BS: Tensor) -> Tensor:
        """[B, S, ...] of each rank, equally long -> [B, P·S, ...]. Carries no gradient."""
        assert not x_BS.requires_grad
        return _in_order(all_gather_dim(x_BS, 1, self.group), 1, self.order)

    def slice_local(self, x_BS: Tensor) -> Tensor:
        """[B, P·S, ...] -> [B, S, ...]: this rank's part."""
        pieces = x_BS.chunk(len(self.order), dim=1)
        return torch.cat([pieces[piece] for piece in self.own_pieces], dim=1)

    def extra_repr(self) -> str:
        return f"all-gather over {self.group.size()} ranks"


def shard_attention(model: nn.Module, group: dist.ProcessGroup, zigzag: bool = False) -> None:
    """Let every attention of the model see what its queries need of the other ranks' parts of the rows."""
    for module in model.modules():
        if isinstance(module, Attention):
            core = ZigzagCore(module.core, group) if zigzag else ContextCore(module.core, group)
            module.add_module("core", core)


def install_rows(model: nn.Module, group: dist.ProcessGroup, layout: Layout) -> None:
    """Let every router of the model decide over whole sequences; `group`: all ranks that share a row, in rank order."""
    for module in model.modules():
        if isinstance(module, Router):
            module.rows = GatheredRows(group, piece_order(layout))
