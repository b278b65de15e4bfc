"""The decoder-only transformer: embed -> blocks -> norm -> head.

Shapes: B batch, S sequence, D model, V vocabulary, L MoE layers.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.cache import Cache
from moe.config import ModelConfig, RouterConfig
from moe.layer import Block
from moe.linear import Linear, RMSNorm
from moe.rope import rotary_table
from moe.router import RouterStats


class Output(NamedTuple):
    logits_BSV: Tensor
    """In the compute dtype."""
    stats: RouterStats | None
    """Router statistics stacked over MoE layers (a leading L); None in a dense model."""


class Transformer(nn.Module):
    """A plain module on one device; `parallel.apply` changes it from outside."""

    def __init__(self, config: ModelConfig, router: RouterConfig, compute_dtype: torch.dtype) -> None:
        """`compute_dtype`: arithmetic of the forward pass, whatever the dtype of the weights.

        Raises:
            ValueError: `config.vocab_size` is not set.
        """
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("vocab_size=None: expected an integer >= 1 (or a tokenizer to take it from)")
        self.config = config
        self.compute_dtype = compute_dtype
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.dim))
        self.layers = nn.ModuleList(Block(config, router, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = None if config.tie_embeddings else Linear(config.dim, config.vocab_size)

    def forward(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor,
        documents_BS: Tensor | None = None,
        valid_BS: Tensor | None = None,
        *,
        noise_keys_BS: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Output:
        """Logits of the next token at every position.

        Args:
            tokens_BS: token ids.
            positions_BS: position of each token in its document.
            documents_BS: equal numbers may attend to each other (causally); None: each row is one document.
            valid_BS: False on padding; None: no padding.
            noise_keys_BS: `moe.noise.noise_keys` of the tokens; needed for router jitter in training.
            cache: keys and values of earlier tokens (generation); these tokens are written into it.
        """
        config = self.config
        x_BSD = F.embedding(tokens_BS, self.embedding).to(self.compute_dtype)
        rotary = rotary_table(positions_BS, config.head_dim, config.rope_theta, self.compute_dtype)
        if cache is not None:
            cache.begin(positions_BS, valid_BS)
        collected = []
        for number, layer in enumerate(self.layers):
            of_layer = None if cache is None else cache.layers[number]
            x_BSD, stats = layer(x_BSD, rotary, documents_BS, valid_BS, noise_keys_BS, of_layer)
            if stats is not None:
                collected.append(stats)
        if cache is not None:
            cache.advance()
        x_BSD = self.norm(x_BSD)
        logits_BSV = F.linear(x_BSD, self.embedding.to(x_BSD.dtype)) if self.head is None else self.head(x_BSD)
        stacked = RouterStats(*(torch.stack(field) for field in zip(*collected, strict=True))) if collected else None
        return Output(logits_BSV, stacked)
