"""The MoE layer: router -> dispatch -> experts -> combine, and the transformer block around it.

Shapes: B batch, S sequence, D model, R routed rows, e experts held here.
"""

from torch import Tensor, nn

from moe.attention.attention import Attention
from moe.attention.cache import LayerCache
from moe.config import ModelConfig, RouterConfig
from moe.dispatch import Dispatcher, LocalDispatcher
from moe.experts import Experts
from moe.feedforward import FeedForward
from moe.linear import RMSNorm
from moe.recompute import Recompute, recomputes
from moe.router import Router, RouterStats


class MoELayer(nn.Module):
    """Routed experts, and beside them the shared experts that see every token (DeepSeekMoE, arXiv 2401.06066)."""

    def __init__(self, config: ModelConfig, router: RouterConfig, layer: int) -> None:
        super().__init__()
        assert config.num_experts is not None and config.top_k is not None
        width, kind = config.expert_width, config.expert_kind
        self.router = Router(config.dim, config.num_experts, config.top_k, router, layer)
        self.experts = Experts(config.num_experts, config.dim, width, kind, config.expert_kernel)
        self.dispatcher: Dispatcher = LocalDispatcher()
        # n networks of width F side by side are one of width n·F: each hidden unit adds its own part to the output.
        shared = config.num_shared_experts
        self.shared = FeedForward(config.dim, shared * width, kind) if shared else None

    def forward(
        self, x_BSD: Tensor, valid_BS: Tensor | None, noise_keys_BS: Tensor | None = None
    ) -> tuple[Tensor, RouterStats]:
        routing, stats = self.router(x_BSD, valid_BS, noise_keys_BS)
        travelling_RD, counts_e, plan = self.dispatcher.dispatch(x_BSD.flatten(0, 1), routing)
        shared_BSD = None if self.shared is None else self.shared(x_BSD)  # while the tokens travel
        y_RD = self.experts(self.dispatcher.wait_rows(travelling_RD, plan), counts_e)
        y_BSD = self.dispatcher.combine(y_RD, routing, plan).view_as(x_BSD)
        return y_BSD if shared_BSD is None else y_BSD + shared_BSD, stats


class Block(nn.Module):
    """Pre-norm residual block: attention, then the MoE layer or a dense feed-forward network."""

    def __init__(self, config: ModelConfig, router: RouterConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn = (
            MoELayer(config, router, layer)
            if config.is_moe_layer(layer)
            else FeedForward(config.dim, config.hidden_dim, config.ffn)
        )
        self.recompute: Recompute = "none"

    @recomputes("full")
    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        documents_BS: Tensor | None,
        valid_BS: Tensor | None,
        noise_keys_BS: Tensor | None,
        cache: LayerCache | None,
    ) -> tuple[Tensor, RouterStats | None]:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), rotary, documents_BS, cache)
        normed_BSD = self.ffn_norm(x_BSD)
        if isinstance(self.ffn, MoELayer):
            y_BSD, stats = self.ffn(normed_BSD, valid_BS, noise_keys_BS)
            return x_BSD + y_BSD, stats
        return x_BSD + self.ffn(normed_BSD), None

    def extra_repr(self) -> str:
        return "" if self.recompute == "none" else f"recompute={self.recompute}"
