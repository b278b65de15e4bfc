"""The MoE layer (router -> dispatch -> experts -> combine), and the transformer block that contains it.

Shapes: B batch, S sequence, D model.
"""

from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from moe.attention.attention import GroupedQueryAttention
from moe.attention.cache import LayerCache
from moe.attention.latent import LatentAttention
from moe.config import ModelConfig, RouterConfig
from moe.dispatch import Dispatcher, LocalDispatcher
from moe.experts import Experts
from moe.feedforward import FeedForward
from moe.linear import Linear, RMSNorm
from moe.router import RouterStats
from moe.routers import build_router
from moe.token_context import TokenContext


class MoELayer(nn.Module):
    """The routed experts of a layer, and the shared experts, which process every token (DeepSeekMoE, arXiv 2401.06066).

    Attributes:
        dispatcher: seam: moves tokens to their experts and back (expert parallelism installs an all-to-all).
    """

    def __init__(self, config: ModelConfig, router: RouterConfig, layer: int) -> None:
        super().__init__()
        assert config.num_experts is not None and config.top_k is not None
        width, kind = config.expert_width, config.expert_kind
        self.router = build_router(config.dim, config.num_experts, config.top_k, router, layer)
        self.experts = Experts(config.num_experts, config.dim, width, kind, config.expert_kernel)
        self.dispatcher: Dispatcher = LocalDispatcher()
        # The sum of n networks of width F is one network of width n·F, because the output is a sum over hidden units.
        self.shared = FeedForward(config.dim, config.shared_width, kind) if config.num_shared_experts else None
        self.shared_gate = Linear(config.dim, 1) if config.shared_gate else None

    def forward(self, x_BSD: Tensor, context: TokenContext) -> tuple[Tensor, RouterStats]:
        """Return the output [B, S, D] for the normalised input `x_BSD`, and the router's statistics."""
        routing, stats = self.router(x_BSD, context.valid_BS, context.noise_keys_BS)
        shared = None if self.shared is None else partial(self.apply_shared, noise_keys_BS=context.noise_keys_BS)
        return self.experts(x_BSD, routing, self.dispatcher, shared).view_as(x_BSD), stats

    def apply_shared(self, x_BSD: Tensor, noise_keys_BS: Tensor | None) -> Tensor:
        """Return the output of the shared experts [B, S, D], multiplied by their gate if they have one."""
        assert self.shared is not None
        y_BSD: Tensor = self.shared(x_BSD, noise_keys_BS)
        return y_BSD if self.shared_gate is None else y_BSD * self.shared_gate(x_BSD, noise_keys_BS).sigmoid()


class Block(nn.Module):
    """A pre-norm residual block: attention, then a MoE layer or a dense feed-forward network."""

    RECOMPUTE: ClassVar[dict[str, str]] = {"full": "forward"}

    def __init__(self, config: ModelConfig, router: RouterConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        kind = GroupedQueryAttention if config.kv_lora_rank is None else LatentAttention
        self.attention = kind(config, layer)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn = (
            MoELayer(config, router, layer)
            if config.is_moe_layer(layer)
            else FeedForward(config.dim, config.hidden_dim, config.ffn)
        )

    def forward(
        self, x_BSD: Tensor, context: TokenContext, cache: LayerCache | None = None
    ) -> tuple[Tensor, RouterStats | None]:
        """Return the block's output [B, S, D], and the router's statistics, or None in a dense block.

        Args:
            cache: keys and values of earlier tokens. It is used while text is generated.
        """
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), context, cache)
        normed_BSD = self.ffn_norm(x_BSD)
        if isinstance(self.ffn, MoELayer):
            y_BSD, stats = self.ffn(normed_BSD, context)
            return x_BSD + y_BSD, stats
        return x_BSD + self.ffn(normed_BSD, context.noise_keys_BS), None

    def extra_repr(self) -> str:
        """Return what `repr` shows in the parentheses: whether the block is recomputed as a whole."""
        return "recompute=full" if "forward" in vars(self) else ""
