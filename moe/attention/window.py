"""Sliding-window attention in blocks, forward and backward: time S·W, memory S, on any device and in any precision.

Shapes: B batch, S queries, P >= S places of keys, H query heads, G key/value heads, r = H/G, C head dim, W window,
Q queries of a block, X keys of a block, M blocks, n blocks worked on at once.

A block of Q queries meets the X = Q + (W rounded up to Q) keys that end with its own. Scores exist for a few blocks at
a time, as many as fit a CPU's cache, and the backward pass computes them again instead of keeping S·W of them
(FlashAttention, arXiv 2205.14135, does so by tiles).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_QUERIES = 128
MIN_QUERIES = 16
SCORES_AT_ONCE = 2**20
"""Elements of the largest intermediate: 2 MiB in bf16."""
NOWHERE = -1
"""Document of the places before the row and behind it; padding inside a row has it as well, and sees only its like."""


def windowed_attention(
    q_BHSC: Tensor, k_BGPC: Tensor, v_BGPC: Tensor, documents_BP: Tensor | None, window: int
) -> Tensor:
    """Causal attention over the last `window` keys, the query's own included, of the same document; [B, H, S, C].

    The queries are the last S of the P places.
    """
    out_of_sight = k_BGPC.shape[2] - q_BHSC.shape[2] - (window - 1)
    if out_of_sight > 0:
        k_BGPC, v_BGPC = k_BGPC[:, :, out_of_sight:], v_BGPC[:, :, out_of_sight:]
        documents_BP = None if documents_BP is None else documents_BP[:, out_of_sight:]
    out: Tensor = _Windowed.apply(q_BHSC, k_BGPC, v_BGPC, documents_BP, window)
    return out


class _Plan(NamedTuple):
    """How the row is cut."""

    batch: int
    groups: int
    ratio: int
    length: int
    channels: int
    window: int
    queries: int
    before: int
    """Places in front of the queries, a multiple of `queries`, at least `window` - 1."""
    blank: int
    """The first of these: the ones that hold no key."""
    blocks: int
    at_once: int

    @property
    def keys(self) -> int:
        return self.before + self.queries


def _plan(q: Tensor, k: Tensor, window: int) -> _Plan:
    batch, heads, length, channels = q.shape
    queries = MIN_QUERIES
    while queries < min(window, length, MAX_QUERIES):
        queries *= 2
    before = -(-window // queries) * queries
    blocks = -(-length // queries)
    at_once = max(1, SCORES_AT_ONCE // (batch * heads * queries * (before + queries)))
    return _Plan(
        batch=batch,
        groups=k.shape[1],
        ratio=heads // k.shape[1],
        length=length,
        channels=channels,
        window=window,
        queries=queries,
        before=before,
        blank=before - (k.shape[2] - length),
        blocks=blocks,
        at_once=min(at_once, blocks),
    )


class _Pieces:
    """The padded row, and its parts for blocks `first` to `end`."""

    def __init__(self, plan: _Plan, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> None:
        self.plan = plan
        behind = plan.blocks * plan.queries - plan.length
        self.q, self.behind = F.pad(q, (0, 0, 0, behind)), behind
        self.k, self.v = (F.pad(x, (0, 0, plan.blank, behind)) for x in (k, v))
        self.documents = None if documents is None else F.pad(documents, (plan.blank, behind), value=NOWHERE)
        query = torch.arange(plan.queries, device=q.device).unsqueeze(1) + plan.before
        key = torch.arange(plan.keys, device=q.device).unsqueeze(0)
        self.out_of_reach_QX = (key > query) | (key <= query - plan.window)

    def by_query(self, x: Tensor, first: int, end: int) -> Tensor:
        """[B, H, M·Q, C] -> [B·G·n, r·Q, C]."""
        plan = self.plan
        part = x[:, :, first * plan.queries : end * plan.queries]
        part = part.view(plan.batch, plan.groups, plan.ratio, end - first, plan.queries, plan.channels)
        return part.transpose(2, 3).reshape(-1, plan.ratio * plan.queries, plan.channels)

    def from_query(self, x: Tensor, first: int, end: int) -> Tensor:
        """The inverse of `by_query` for one part: [B, H, n·Q, C]."""
        plan = self.plan
        x = x.view(plan.batch, plan.groups, end - first, plan.ratio, plan.queries, plan.channels).transpose(2, 3)
        return x.reshape(plan.batch, plan.groups * plan.ratio, -1, plan.channels)

    def by_key(self, x: Tensor, first: int, end: int) -> Tensor:
        """[B, G, before + M·Q, C] -> [B·G·n, X, C], overlapping."""
        plan = self.plan
        part = x[:, :, first * plan.queries : end * plan.queries + plan.before]
        return part.unfold(2, plan.keys, plan.queries).transpose(-1, -2).reshape(-1, plan.keys, plan.channels)

    def add_by_key(self, total: Tensor, x: Tensor, first: int, end: int) -> None:
        """Add the parts [B·G·n, X, C] where `by_key` took them from."""
        plan = self.plan
        x = x.view(plan.batch, plan.groups, end - first, plan.keys, plan.channels)
        into = total.view(plan.batch, plan.groups, -1, plan.queries, plan.channels)
        for j in range(plan.keys // plan.queries):
            into[:, :, first + j : end + j] += x[:, :, :, j * plan.queries : (j + 1) * plan.queries]

    def probabilities(self, q: Tensor, k: Tensor, first: int, end: int) -> Tensor:
        """softmax of the scaled queries `q` on the keys `k`, [B·G·n, r·Q, X]."""
        plan = self.plan
        scores = q @ k.transpose(1, 2)
        six = scores.view(plan.batch, plan.groups, end - first, plan.ratio, plan.queries, plan.keys)
        six.masked_fill_(self._hidden(first, end), -torch.inf)
        return scores.softmax(dim=-1)

    def _hidden(self, first: int, end: int) -> Tensor:
        """True where a query does not see a key; broadcasts to [B, G, n, r, Q, X]."""
        plan, hidden = self.plan, self.out_of_reach_QX
        low, high = first * plan.queries, end * plan.queries + plan.before
        if self.documents is not None:
            keys_BnX = self.documents[:, low:high].unfold(1, plan.keys, plan.queries)
            own_BnQ = keys_BnX[..., plan.before :]
            hidden = (hidden | (own_BnQ.unsqueeze(-1) != keys_BnX.unsqueeze(-2)))[:, None, :, None]
        if low < plan.blank:
            # Padding may carry the number of the places before the row, and those are no keys for it either.
            place = torch.arange(low, high, device=hidden.device).unfold(0, plan.keys, plan.queries)
            hidden = hidden | (place < plan.blank).view(1, 1, end - first, 1, 1, plan.keys)
        return hidden


class _Windowed(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, window: int
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, documents)
        ctx.window = window
        plan = _plan(q, k, window)
        pieces = _Pieces(plan, q * plan.channels**-0.5, k, v, documents)
        out = torch.empty_like(pieces.q)
        for first in range(0, plan.blocks, plan.at_once):
            end = min(first + plan.at_once, plan.blocks)
            p = pieces.probabilities(
                pieces.by_query(pieces.q, first, end), pieces.by_key(pieces.k, first, end), first, end
            )
            mixed = p @ pieces.by_key(pieces.v, first, end)
            out[:, :, first * plan.queries : end * plan.queries] = pieces.from_query(mixed, first, end)
        return out[:, :, : plan.length]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # type: ignore[override]
        q, k, v, documents = ctx.saved_tensors
        plan = _plan(q, k, ctx.window)
        scale = plan.channels**-0.5
        pieces = _Pieces(plan, q * scale, k, v, documents)
        grad = F.pad(grad, (0, 0, 0, pieces.behind))
        # Each key adds up over several blocks: in at least fp32.
        wide = torch.promote_types(q.dtype, torch.float32)
        grad_q = torch.empty_like(pieces.q)
        grad_k, grad_v = (torch.zeros_like(x, dtype=wide) for x in (pieces.k, pieces.v))
        for first in range(0, plan.blocks, plan.at_once):
            end = min(first + plan.at_once, plan.blocks)
            own, keys = pieces.by_query(pieces.q, first, end), pieces.by_key(pieces.k, first, end)
            p = pieces.probabilities(own, keys, first, end)
            arriving = pieces.by_query(grad, first, end)
            pieces.add_by_key(grad_v, p.transpose(1, 2) @ arriving, first, end)
            grad_p = arriving @ pieces.by_key(pieces.v, first, end).transpose(1, 2)
            grad_s = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype)
            pieces.add_by_key(grad_k, grad_s.transpose(1, 2) @ own, first, end)
            grad_q[:, :, first * plan.queries : end * plan.queries] = pieces.from_query(grad_s @ keys, first, end)
        row = slice(plan.blank, plan.before + plan.length)
        return (
            grad_q[:, :, : plan.length] * scale,
            grad_k[:, :, row].to(k.dtype),
            grad_v[:, :, row].to(v.dtype),
            None,
            None,
        )
