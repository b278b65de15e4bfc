"""Sliding-window attention in blocks, forward and backward: time S·W, memory S, on any device and in any precision.

Shapes: B batch, S queries, P >= S keys (the queries are at the last S of the P positions), H query heads, G key/value
heads, r = H/G, C head dim, W window, Q queries of a block, X keys of a block, M blocks, n blocks computed at once.

The Q queries of a block attend to X keys: the Q keys at their own positions and the keys before them, W rounded up to a
multiple of Q. Scores exist for a few blocks at a time, as many as fit into a CPU's cache. The backward pass computes
them again instead of storing S·W of them, as FlashAttention (arXiv 2205.14135) does with tiles.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_QUERIES = 128
"""The largest number of queries of a block."""
MIN_QUERIES = 16
"""The smallest number of queries of a block."""
SCORES_AT_ONCE = 2**20
"""Scores of the blocks that are computed at once. They are the largest intermediate result: 2 MiB in bf16."""
NO_DOCUMENT = -1
"""Document number of the positions that pad a row at both ends. Padding inside a row has the same number, so such
positions attend only to each other."""


def windowed_attention(
    q_BHSC: Tensor,
    k_BGPC: Tensor,
    v_BGPC: Tensor,
    documents_BP: Tensor | None,
    window: int,
    scale: float | None = None,
) -> Tensor:
    """Return causal attention over the last `window` keys of the same document, including the key at the query's
    position.

    Args:
        documents_BP: document number of each position; None: each row is one document.
        scale: factor on the scores; None: 1/sqrt(C).

    Returns:
        [B, H, S, C].
    """
    unreachable = k_BGPC.shape[2] - q_BHSC.shape[2] - (window - 1)
    if unreachable > 0:
        k_BGPC, v_BGPC = k_BGPC[:, :, unreachable:], v_BGPC[:, :, unreachable:]
        documents_BP = None if documents_BP is None else documents_BP[:, unreachable:]
    scale = q_BHSC.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = _Windowed.apply(q_BHSC, k_BGPC, v_BGPC, documents_BP, window, scale)
    return out


class _Plan(NamedTuple):
    """How a row is divided into blocks."""

    batch: int
    groups: int
    ratio: int
    length: int
    channels: int
    window: int
    queries: int
    """Q."""
    lookback: int
    """Keys of a block before its first query: a multiple of `queries`, at least `window` - 1."""
    front_padding: int
    """Positions added in front of the keys, so that the first block also has `lookback` keys before its queries."""
    blocks: int
    """M."""
    blocks_at_once: int

    @property
    def keys(self) -> int:
        """X."""
        return self.lookback + self.queries


def _plan(q: Tensor, k: Tensor, window: int) -> _Plan:
    batch, heads, length, channels = q.shape
    queries = MIN_QUERIES
    while queries < min(window, length, MAX_QUERIES):
        queries *= 2
    lookback = -(-window // queries) * queries
    blocks = -(-length // queries)
    blocks_at_once = max(1, SCORES_AT_ONCE // (batch * heads * queries * (lookback + queries)))
    return _Plan(
        batch=batch,
        groups=k.shape[1],
        ratio=heads // k.shape[1],
        length=length,
        channels=channels,
        window=window,
        queries=queries,
        lookback=lookback,
        front_padding=lookback - (k.shape[2] - length),
        blocks=blocks,
        blocks_at_once=min(blocks_at_once, blocks),
    )


class _PaddedRow:
    """Queries, keys and values padded to whole blocks, and access to the blocks `first` to `end` - 1 of them."""

    def __init__(self, plan: _Plan, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> None:
        self.plan = plan
        end_padding = plan.blocks * plan.queries - plan.length
        self.q, self.end_padding = F.pad(q, (0, 0, 0, end_padding)), end_padding
        self.k, self.v = (F.pad(x, (0, 0, plan.front_padding, end_padding)) for x in (k, v))
        self.documents = (
            None if documents is None else F.pad(documents, (plan.front_padding, end_padding), value=NO_DOCUMENT)
        )
        query = torch.arange(plan.queries, device=q.device).unsqueeze(1) + plan.lookback
        key = torch.arange(plan.keys, device=q.device).unsqueeze(0)
        self.out_of_reach_QX = (key > query) | (key <= query - plan.window)

    def query_blocks(self, x: Tensor, first: int, end: int) -> Tensor:
        """Take blocks of queries: [B, H, M·Q, C] -> [B·G·n, r·Q, C]."""
        plan = self.plan
        part = x[:, :, first * plan.queries : end * plan.queries]
        part = part.view(plan.batch, plan.groups, plan.ratio, end - first, plan.queries, plan.channels)
        return part.transpose(2, 3).reshape(-1, plan.ratio * plan.queries, plan.channels)

    def join_query_blocks(self, x: Tensor, first: int, end: int) -> Tensor:
        """Undo `query_blocks`: [B·G·n, r·Q, C] -> [B, H, n·Q, C]."""
        plan = self.plan
        x = x.view(plan.batch, plan.groups, end - first, plan.ratio, plan.queries, plan.channels).transpose(2, 3)
        return x.reshape(plan.batch, plan.groups * plan.ratio, -1, plan.channels)

    def key_blocks(self, x: Tensor, first: int, end: int) -> Tensor:
        """Take blocks of keys or values, which overlap: [B, G, lookback + M·Q, C] -> [B·G·n, X, C]."""
        plan = self.plan
        part = x[:, :, first * plan.queries : end * plan.queries + plan.lookback]
        return part.unfold(2, plan.keys, plan.queries).transpose(-1, -2).reshape(-1, plan.keys, plan.channels)

    def add_key_blocks(self, total: Tensor, x: Tensor, first: int, end: int) -> None:
        """Add the blocks `x` [B·G·n, X, C] to `total` at the positions from which `key_blocks` takes them."""
        plan = self.plan
        x = x.view(plan.batch, plan.groups, end - first, plan.keys, plan.channels)
        total_blocks = total.view(plan.batch, plan.groups, -1, plan.queries, plan.channels)
        for j in range(plan.keys // plan.queries):
            total_blocks[:, :, first + j : end + j] += x[:, :, :, j * plan.queries : (j + 1) * plan.queries]

    def probabilities(self, q: Tensor, k: Tensor, first: int, end: int) -> Tensor:
        """Return the softmax over keys of the scores of `k` for the scaled queries `q`, [B·G·n, r·Q, X]."""
        plan = self.plan
        scores = q @ k.transpose(1, 2)
        scores_BGnrQX = scores.view(plan.batch, plan.groups, end - first, plan.ratio, plan.queries, plan.keys)
        scores_BGnrQX.masked_fill_(self._hidden(first, end), -torch.inf)
        return scores.softmax(dim=-1)

    def _hidden(self, first: int, end: int) -> Tensor:
        """Return True where a query does not attend to a key. The result broadcasts to [B, G, n, r, Q, X]."""
        plan, hidden = self.plan, self.out_of_reach_QX
        low, high = first * plan.queries, end * plan.queries + plan.lookback
        if self.documents is not None:
            of_keys_BnX = self.documents[:, low:high].unfold(1, plan.keys, plan.queries)
            of_queries_BnQ = of_keys_BnX[..., plan.lookback :]
            hidden = (hidden | (of_queries_BnQ.unsqueeze(-1) != of_keys_BnX.unsqueeze(-2)))[:, None, :, None]
        if low < plan.front_padding:
            # Padding inside a row has the document number of the positions in front of it, which hold no keys.
            position = torch.arange(low, high, device=hidden.device).unfold(0, plan.keys, plan.queries)
            hidden = hidden | (position < plan.front_padding).view(1, 1, end - first, 1, 1, plan.keys)
        return hidden


class _Windowed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, window: int, scale: float
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, documents)
        ctx.window, ctx.scale = window, scale
        plan = _plan(q, k, window)
        row = _PaddedRow(plan, q * scale, k, v, documents)
        out = torch.empty_like(row.q)
        for first in range(0, plan.blocks, plan.blocks_at_once):
            end = min(first + plan.blocks_at_once, plan.blocks)
            p = row.probabilities(row.query_blocks(row.q, first, end), row.key_blocks(row.k, first, end), first, end)
            mixed = p @ row.key_blocks(row.v, first, end)
            out[:, :, first * plan.queries : end * plan.queries] = row.join_query_blocks(mixed, first, end)
        return out[:, :, : plan.length]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q, k, v, documents = ctx.saved_tensors
        plan, scale = _plan(q, k, ctx.window), ctx.scale
        row = _PaddedRow(plan, q * scale, k, v, documents)
        grad = F.pad(grad, (0, 0, 0, row.end_padding))
        # The gradient of a key is a sum over several blocks, which is accumulated in at least fp32.
        wide = torch.promote_types(q.dtype, torch.float32)
        grad_q = torch.empty_like(row.q)
        grad_k, grad_v = (torch.zeros_like(x, dtype=wide) for x in (row.k, row.v))
        for first in range(0, plan.blocks, plan.blocks_at_once):
            end = min(first + plan.blocks_at_once, plan.blocks)
            queries, keys = row.query_blocks(row.q, first, end), row.key_blocks(row.k, first, end)
            p = row.probabilities(queries, keys, first, end)
            grad_out = row.query_blocks(grad, first, end)
            row.add_key_blocks(grad_v, p.transpose(1, 2) @ grad_out, first, end)
            grad_p = grad_out @ row.key_blocks(row.v, first, end).transpose(1, 2)
            grad_s = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype)
            row.add_key_blocks(grad_k, grad_s.transpose(1, 2) @ queries, first, end)
            grad_q[:, :, first * plan.queries : end * plan.queries] = row.join_query_blocks(grad_s @ keys, first, end)
        positions = slice(plan.front_padding, plan.lookback + plan.length)
        return (
            grad_q[:, :, : plan.length] * scale,
            grad_k[:, :, positions].to(k.dtype),
            grad_v[:, :, positions].to(v.dtype),
            None,
            None,
            None,
        )
