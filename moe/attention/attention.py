"""Grouped-query attention with an optional sliding window, over rows of packed documents.

Shapes: B batch, S sequence, X >= S key positions, D model, H query heads, G key/value heads, C head dim, W window.

The part of attention that mixes positions is the *core*, `core(q, k, v, context)`. It is a seam: the default is for one
device, and context parallelism installs another.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.attention.cache import LayerCache
from moe.attention.flex import flex
from moe.attention.masked import masked_attention
from moe.attention.varlen import takes, varlen
from moe.attention.window import windowed_attention
from moe.config import ModelConfig
from moe.device import on_gpu
from moe.linear import Linear, OutputLinear, RMSNorm
from moe.token_context import TokenContext, apply_rotary

Kernel = Literal["sdpa", "varlen", "flex", "blocks", "masked"]
Expand = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""Computes keys and values [B, H, X, .] from the latents of X positions, the rotary parts of their keys, and the noise
keys of the tokens there (`TokenContext.noise_keys_BS`)."""


def choose_kernel(q_BHSC: Tensor, k_BGXC: Tensor, window: int | None, context: TokenContext) -> Kernel:
    """Return which kernel computes attention.

    - `sdpa`: rows of one document without a window. On an H100, torch chooses cuDNN's kernel.
    - `varlen`: documents and windows on GPUs in bf16 and fp16, for whole rows whose segments are known.
    - `flex`: everything else on GPUs, but not in fp64.
    - `blocks`: windows on CPUs and in fp64.
    - `masked`: documents on CPUs and in fp64.

    Args:
        window: None if no query has as many keys before it.
    """
    whole_rows = q_BHSC.shape[2] == k_BGXC.shape[2]
    if window is None and context.documents_BS is None and whole_rows:
        # With grouped heads in fp32, torch has no fused kernel and would store all scores.
        grouped = q_BHSC.shape[1] != k_BGXC.shape[1]
        return "flex" if on_gpu(q_BHSC) and q_BHSC.dtype == torch.float32 and grouped else "sdpa"
    if on_gpu(q_BHSC) and q_BHSC.dtype != torch.float64:
        return "varlen" if whole_rows and context.segments is not None and takes(q_BHSC) else "flex"
    return "masked" if window is None else "blocks"


class AttentionCore(nn.Module):
    """Causal attention over the last `window` keys (the query's position included) of the same document.

    With a window W < X, time grows as S·W and memory as X (Mistral 7B, arXiv 2310.06825): with a fused kernel on GPUs,
    and with blocks of queries on CPUs and in fp64. Rows of one document without a window use torch's fused attention.

    The queries have the last S of the X positions, so that a part of a row can attend to the keys before it.

    Args:
        window: W; None: no window.
        scale: factor on the scores; None: 1/sqrt(C).
    """

    def __init__(self, window: int | None, scale: float | None = None) -> None:
        super().__init__()
        self.window = window
        self.scale = scale

    def forward(
        self, q_BHSC: Tensor, k_BGXC: Tensor, v_BGXc: Tensor, context: TokenContext, expand: Expand | None = None
    ) -> Tensor:
        """Return the mixed values [B, H, S, c].

        Args:
            v_BGXc: of the keys' width C, or narrower. Narrower values are padded with zeros: torch's fused kernels for
                CPUs and FlashAttention take one width only, and without them all scores would be stored.
            context: its `documents_BS` has the documents of all X key positions, or is None if each row is one
                document.
            expand: computes the keys and values from `k_BGXC` and `v_BGXc`, which then are latents; None: they are the
                keys and values.
        """
        if expand is not None:
            k_BGXC, v_BGXc = expand(k_BGXC, v_BGXc, context.noise_keys_BS)
        v_BGXC = pad_width(v_BGXc, q_BHSC.shape[-1])
        return self.attend(q_BHSC, k_BGXC, v_BGXC, context)[..., : v_BGXc.shape[-1]]

    def attend(self, q_BHSC: Tensor, k_BGXC: Tensor, v_BGXC: Tensor, context: TokenContext) -> Tensor:
        """Return the mixed values [B, H, S, C] for values of the keys' width."""
        window = None if self.window is None or self.window >= k_BGXC.shape[2] else self.window
        kernel = choose_kernel(q_BHSC, k_BGXC, window, context)
        if kernel == "sdpa":
            return _causal(q_BHSC, k_BGXC, v_BGXC, self.scale)
        if kernel == "varlen":
            assert context.segments is not None
            return varlen(q_BHSC, k_BGXC, v_BGXC, context.segments, window, self.scale)
        if kernel == "flex":
            return flex(q_BHSC, k_BGXC, v_BGXC, context, window, self.scale)
        if window is not None:
            return windowed_attention(q_BHSC, k_BGXC, v_BGXC, context.documents_BS, window, self.scale)
        return masked_attention(q_BHSC, k_BGXC, v_BGXC, _mask(q_BHSC, k_BGXC, context.documents_BS), self.scale)

    def extra_repr(self) -> str:
        """Return what `repr` shows in the parentheses: the window, or `full` without one."""
        return "full" if self.window is None else f"window={self.window}"


def _mask(q_BHSC: Tensor, k_BGXC: Tensor, documents_BX: Tensor | None) -> Tensor:
    """Return True where a query attends to a key, [B, 1, S, X]."""
    length, places = q_BHSC.shape[2], k_BGXC.shape[2]
    earlier = places - length
    if documents_BX is None:
        same_BSX = torch.ones(1, length, places, dtype=torch.bool, device=q_BHSC.device)
    else:
        same_BSX = documents_BX[:, earlier:].unsqueeze(2) == documents_BX.unsqueeze(1)
    return same_BSX.tril(earlier).unsqueeze(1)


def pad_width(x: Tensor, width: int) -> Tensor:
    """Return `x` [..., c] with zeros behind it along the last dim, so that this has `width` elements."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _causal(q_BHSC: Tensor, k_BGSC: Tensor, v_BGSC: Tensor, scale: float | None) -> Tensor:
    ratio = q_BHSC.shape[1] // k_BGSC.shape[1]
    if on_gpu(q_BHSC):
        grouped = ratio > 1
        return F.scaled_dot_product_attention(q_BHSC, k_BGSC, v_BGSC, is_causal=True, enable_gqa=grouped, scale=scale)
    k_BHSC, v_BHSC = (x.repeat_interleave(ratio, dim=1) for x in (k_BGSC, v_BGSC))
    return F.scaled_dot_product_attention(q_BHSC, k_BHSC, v_BHSC, is_causal=True, scale=scale)


class HeadNorm(RMSNorm):
    """RMSNorm of each head [C], with one weight for all heads (Qwen3, arXiv 2505.09388)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the heads of `x` [B, S, H·C]."""
        return super().forward(torch.unflatten(x, -1, (-1, self.weight.shape[0]))).flatten(-2)


def build_norm(config: ModelConfig, heads: int) -> nn.Module:
    """Return the norm of projected queries or keys [B, S, H·C], or an identity without one."""
    if config.qk_norm is None:
        return nn.Identity()
    if config.qk_norm == "head":
        return HeadNorm(config.head_dim, config.norm_eps)
    return RMSNorm(heads * config.head_dim, config.norm_eps)


class Attention(nn.Module):
    """What all kinds of attention share. A kind is a subclass with projections and the method `mix`.

    Attributes:
        wo: the projection of the mixed values to the width of the model.
        core: seam: mixes positions (context parallelism fetches keys and values of other ranks first).
        gather, scatter: seams: join and split the sequence around the projections (tensor parallelism).
    """

    wo: OutputLinear

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.head_dim, self.scale = config.head_dim, config.softmax_scale
        self.core = AttentionCore(config.window(layer), self.scale)
        self.gather: nn.Module = nn.Identity()
        self.scatter: nn.Module = nn.Identity()

    def forward(self, x_BSD: Tensor, context: TokenContext, cache: LayerCache | None = None) -> Tensor:
        """Return the output [B, S, D] of attention within the rows of `x_BSD`.

        Args:
            cache: the keys and values of earlier tokens, which the tokens of `x_BSD` attend to as well; None: no such
                tokens.
        """
        mixed_BHSC = self.mix(self.gather(x_BSD), context, cache)
        y_BSD: Tensor = self.wo(mixed_BHSC.transpose(1, 2).flatten(2), self.scatter, context.noise_keys_BS)
        return y_BSD

    def mix(self, x_BSD: Tensor, context: TokenContext, cache: LayerCache | None) -> Tensor:
        """Compute queries, keys and values, and return the mixed values of this rank's heads [B, H, S, C]."""
        raise NotImplementedError

    def split_heads(self, projected: Tensor) -> Tensor:
        """Return [B, S, H·C] as [B, H, S, C]."""
        return torch.unflatten(projected, -1, (-1, self.head_dim)).transpose(1, 2)


class GroupedQueryAttention(Attention):
    """Several query heads share a key/value head (arXiv 2305.13245).

    Attributes:
        q_norm, k_norm: seams: the norms of queries and keys (tensor parallelism divides the heads).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        bias = config.attention_bias is not None
        self.wq = Linear(config.dim, config.num_heads * config.head_dim, bias)
        self.wk = Linear(config.dim, config.num_kv_heads * config.head_dim, bias)
        self.wv = Linear(config.dim, config.num_kv_heads * config.head_dim, bias)
        self.wo = OutputLinear(config.num_heads * config.head_dim, config.dim, config.attention_bias == "all")
        self.q_norm: nn.Module = build_norm(config, config.num_heads)
        self.k_norm: nn.Module = build_norm(config, config.num_kv_heads)

    def mix(self, x_BSD: Tensor, context: TokenContext, cache: LayerCache | None) -> Tensor:
        """Return the mixed values of this rank's heads [B, H, S, C]."""
        assert context.rotary is not None
        keys_BS = context.noise_keys_BS
        q_BHSC = apply_rotary(self.split_heads(self.q_norm(self.wq(x_BSD, keys_BS))), context.rotary)
        k_BGSC = apply_rotary(self.split_heads(self.k_norm(self.wk(x_BSD, keys_BS))), context.rotary)
        v_BGSC = self.split_heads(self.wv(x_BSD, keys_BS))
        if cache is not None:
            return cache.attend(masked_attention, q_BHSC, k_BGSC, v_BGSC)
        mixed_BHSC: Tensor = self.core(q_BHSC, k_BGSC, v_BGSC, context)
        return mixed_BHSC
