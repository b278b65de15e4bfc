"""Grouped-query attention with an optional sliding window, over rows of packed documents.

Shapes: B batch, S sequence, D model, H query heads, G key/value heads, C head dim, W window.

The part that mixes positions is the *core*, a seam: `core(q, k, v, documents)`. The default is right on one device;
context parallelism installs another.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from moe.cache import LayerCache
from moe.config import ModelConfig
from moe.flex import fits_flex, flex
from moe.linear import Linear
from moe.masked import masked_attention
from moe.rope import apply_rotary
from moe.window import windowed_attention


class AttentionCore(nn.Module):
    """Causal attention over the last `window` keys (the query's own included) of the same document.

    With a window W < S, time grows as S·W and memory as S (Mistral 7B, arXiv 2310.06825): a fused kernel on GPUs,
    blocks of queries elsewhere and in fp64. Rows of one document without a window go to torch's own fused attention.
    """

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window = window

    def forward(self, q_BHSC: Tensor, k_BGSC: Tensor, v_BGSC: Tensor, documents_BS: Tensor | None) -> Tensor:
        """Returns [B, H, S, C]. `documents_BS` (None: each row is one document) separates packed documents."""
        length = q_BHSC.shape[2]
        window = None if self.window is None or self.window >= length else self.window
        if window is None and documents_BS is None:
            return _causal(q_BHSC, k_BGSC, v_BGSC)
        if fits_flex(q_BHSC):
            return flex(q_BHSC, k_BGSC, v_BGSC, documents_BS, window)
        if window is not None:
            return windowed_attention(q_BHSC, k_BGSC, v_BGSC, documents_BS, window)
        assert documents_BS is not None
        same_BSS = documents_BS.unsqueeze(2) == documents_BS.unsqueeze(1)
        return masked_attention(q_BHSC, k_BGSC, v_BGSC, same_BSS.tril().unsqueeze(1))

    def extra_repr(self) -> str:
        return "full" if self.window is None else f"window={self.window}"


def _causal(q_BHSC: Tensor, k_BGSC: Tensor, v_BGSC: Tensor) -> Tensor:
    ratio = q_BHSC.shape[1] // k_BGSC.shape[1]
    if q_BHSC.is_cuda:
        return F.scaled_dot_product_attention(q_BHSC, k_BGSC, v_BGSC, is_causal=True, enable_gqa=ratio > 1)
    k_BHSC, v_BHSC = (x.repeat_interleave(ratio, dim=1) for x in (k_BGSC, v_BGSC))
    return F.scaled_dot_product_attention(q_BHSC, k_BHSC, v_BHSC, is_causal=True)


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
        # Seams: tensor parallelism cuts the sequence between the projections and the rest of the model.
        self.gather: nn.Module = nn.Identity()
        self.scatter: nn.Module = nn.Identity()

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

        x_BSD = self.gather(x_BSD)
        q_BHSC = apply_rotary(heads(self.wq(x_BSD)), rotary)
        k_BGSC = apply_rotary(heads(self.wk(x_BSD)), rotary)
        v_BGSC = heads(self.wv(x_BSD))
        if cache is None:
            mixed_BHSC = self.core(q_BHSC, k_BGSC, v_BGSC, documents_BS)
        else:
            mixed_BHSC = cache.attend(q_BHSC, k_BGSC, v_BGSC)
        return self.scatter(self.wo(mixed_BHSC.transpose(1, 2).flatten(2)))
