"""Grouped-query attention with an optional sliding window, over rows of packed documents.

Shapes: B batch, S sequence, D model, H query heads, G key/value heads, C head dim, W window, M blocks of W queries.

The part that mixes positions is the *core*, a seam: `core(q, k, v, documents)`. The default is right on one device;
context parallelism installs another.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.cache import LayerCache
from moe.config import ModelConfig
from moe.linear import Linear
from moe.rope import apply_rotary


class AttentionCore(nn.Module):
    """Causal attention over the last `window` keys (the query's own included) of the same document.

    With a window W < S, blocks of W queries meet the 2·W keys that can be in reach, so time and memory grow as S·W.
    (Mistral 7B, arXiv 2310.06825.)
    """

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window = window

    def forward(self, q_BHSC: Tensor, k_BGSC: Tensor, v_BGSC: Tensor, documents_BS: Tensor | None) -> Tensor:
        """Returns [B, H, S, C]. `documents_BS` (None: each row is one document) separates packed documents."""
        groups = q_BHSC.shape[1] // k_BGSC.shape[1]
        k_BHSC, v_BHSC = (x.repeat_interleave(groups, dim=1) for x in (k_BGSC, v_BGSC))
        if self.window is None or self.window >= q_BHSC.shape[2]:
            return _full(q_BHSC, k_BHSC, v_BHSC, documents_BS)
        return _windowed(q_BHSC, k_BHSC, v_BHSC, documents_BS, self.window)

    def extra_repr(self) -> str:
        return "full" if self.window is None else f"window={self.window}"


def _full(q: Tensor, k: Tensor, v: Tensor, documents_BS: Tensor | None) -> Tensor:
    if documents_BS is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    same_BSS = documents_BS.unsqueeze(2) == documents_BS.unsqueeze(1)
    return _attend(q, k, v, same_BSS.tril().unsqueeze(1))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention where `mask` is True. Every query reaches at least itself."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # torch's fused CPU kernel is twice as slow as plain matmuls in bf16, forward and backward together.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return scores.masked_fill(~mask, -torch.inf).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _windowed(q: Tensor, k: Tensor, v: Tensor, documents_BS: Tensor | None, window: int) -> Tensor:
    batch, heads, length, channels = q.shape
    blocks = -(-length // window)
    padding = blocks * window - length

    def cut(x: Tensor) -> Tensor:
        """[B, H, S, C] -> [B, M, H, W, C]; the tail is padded, and no real query looks that far ahead."""
        padded = F.pad(x, (0, 0, 0, padding))
        return padded.view(batch, heads, blocks, window, channels).transpose(1, 2)

    def with_previous(x: Tensor) -> Tensor:
        """[B, M, H, W, C] -> [B, M, H, 2W, C]: each block's keys behind those of the block before it."""
        before = F.pad(x[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))
        return torch.cat((before, x), dim=3)

    # Query i of a block stands at place W + i of its 2W keys and reaches i+1 .. W+i; block 0 has nothing before it.
    query = torch.arange(window, device=q.device).unsqueeze(1)
    key = torch.arange(2 * window, device=q.device).unsqueeze(0)
    reach_WX = (key > query) & (key <= query + window)
    mask_BMWX = reach_WX.expand(batch, blocks, -1, -1).clone()
    mask_BMWX[:, 0, :, :window] = False
    if documents_BS is not None:
        own = F.pad(documents_BS, (0, padding), value=-1).view(batch, blocks, window)
        before = F.pad(own[:, :-1], (0, 0, 1, 0), value=-1)
        mask_BMWX &= own.unsqueeze(3) == torch.cat((before, own), dim=2).unsqueeze(2)
    out = _attend(
        cut(q).flatten(0, 1),
        with_previous(cut(k)).flatten(0, 1),
        with_previous(cut(v)).flatten(0, 1),
        mask_BMWX.flatten(0, 1).unsqueeze(1),
    )
    out = out.view(batch, blocks, heads, window, channels).transpose(1, 2)
    return out.reshape(batch, heads, blocks * window, channels)[:, :, :length]


class Attention(nn.Module):
    """Projections, rotary embedding and the core (grouped queries: arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.wq = Linear(config.dim, config.num_heads * config.head_dim)
        self.wk = Linear(config.dim, config.num_kv_heads * config.head_dim)
        self.wv = Linear(config.dim, config.num_kv_heads * config.head_dim)
        self.wo = Linear(config.num_heads * config.head_dim, config.dim)
        self.core = AttentionCore(config.window(layer))

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        documents_BS: Tensor | None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """With `cache`, the tokens also see the earlier ones whose keys and values lie there."""
        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        q_BHSC = apply_rotary(heads(self.wq(x_BSD)), rotary)
        k_BGSC = apply_rotary(heads(self.wk(x_BSD)), rotary)
        v_BGSC = heads(self.wv(x_BSD))
        if cache is None:
            mixed_BHSC = self.core(q_BHSC, k_BGSC, v_BGSC, documents_BS)
        else:
            mixed_BHSC = cache.attend(q_BHSC, k_BGSC, v_BGSC)
        return self.wo(mixed_BHSC.transpose(1, 2).flatten(2))
