"""The MoE layer: router -> dispatch -> experts -> combine, and the transformer block around it.

Shapes: B batch, S sequence, D model, R routed rows, e experts held here.
"""

from torch import Tensor, nn

from moe.attention import Attention
from moe.config import ModelConfig, RouterConfig
from moe.dispatch import Dispatcher, LocalDispatcher
from moe.experts import Experts, SwiGLU
from moe.linear import RMSNorm
from moe.router import Router, RouterStats


class MoELayer(nn.Module):
    def __init__(self, config: ModelConfig, router: RouterConfig) -> None:
        super().__init__()
        assert config.num_experts is not None and config.top_k is not None
        self.router = Router(config.dim, config.num_experts, config.top_k, router)
        self.experts = Experts(config.num_experts, config.dim, config.hidden_dim, config.expert_kernel)
        self.dispatcher: Dispatcher = LocalDispatcher()

    def forward(self, x_BSD: Tensor, valid_BS: Tensor | None) -> tuple[Tensor, RouterStats]:
        routing, stats = self.router(x_BSD, valid_BS)
        rows_RD, counts_e, plan = self.dispatcher.dispatch(x_BSD.flatten(0, 1), routing)
        y_RD = self.experts(rows_RD, counts_e)
        return self.dispatcher.combine(y_RD, routing, plan).view_as(x_BSD), stats


class Block(nn.Module):
    """Pre-norm residual block: attention, then the MoE layer (or a dense SwiGLU)."""

    def __init__(self, config: ModelConfig, router: RouterConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn = MoELayer(config, router) if config.is_moe else SwiGLU(config.dim, config.hidden_dim)

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        documents_BS: Tensor | None,
        valid_BS: Tensor | None,
    ) -> tuple[Tensor, RouterStats | None]:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), rotary, documents_BS)
        normed_BSD = self.ffn_norm(x_BSD)
        if isinstance(self.ffn, MoELayer):
            y_BSD, stats = self.ffn(normed_BSD, valid_BS)
            return x_BSD + y_BSD, stats
        return x_BSD + self.ffn(normed_BSD), None
