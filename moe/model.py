"""The decoder-only transformer: embed -> blocks -> norm -> head. A pipeline stage is one that lacks some of them.

Shapes: B batch, S sequence, D model, V vocabulary, L MoE layers.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.attention.cache import Cache
from moe.config import ModelConfig, RouterConfig
from moe.layer import Block
from moe.linear import Linear, RMSNorm
from moe.region import LocalShard, whole_shard
from moe.rope import rotary_table
from moe.router import RouterStats


class Output(NamedTuple):
    logits_BSV: Tensor
    """In the compute dtype. Of a pipeline stage that is not the last: the hidden states [B, S, D] it hands on."""
    stats: RouterStats | None
    """Router statistics stacked over the MoE layers here (a leading L); None where there is none."""


class Lookup(nn.Module):
    """Rows of the embedding [V, D], in the compute dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, tokens_BS: Tensor, embedding_VD: Tensor) -> Tensor:
        return F.embedding(tokens_BS, embedding_VD).to(self.dtype)


class Transformer(nn.Module):
    """A plain module on one device; `parallel.apply` changes it from outside.

    A pipeline stage keeps its layers under their numbers, None in place of the others, and may lack the embedding, the
    norm and the head.

    Attributes:
        local_shard: seam: this rank's part of the parameter or buffer of a name.
        lookup: seam: embeds the tokens that this rank routes; tensor parallelism cuts vocabulary and sequence.
        gather: seam: puts the sequence together again before the head.
        own: seam: of masks and keys of all tokens, the part for the tokens that this rank routes.
    """

    embedding: nn.Parameter
    norm: RMSNorm
    head: Linear | None

    def __init__(self, config: ModelConfig, router: RouterConfig, compute_dtype: torch.dtype) -> None:
        """`compute_dtype`: arithmetic of the forward pass, whatever the dtype of the weights.

        Raises:
            ValueError: `config.vocab_size` is not set.
        """
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("vocab_size=None: expected an integer >= 1 (or a tokenizer to take it from)")
        self.config = config
        self.router_config = router
        self.compute_dtype = compute_dtype
        self.local_shard: Callable[[str, Tensor], LocalShard] = whole_shard
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.dim))
        self.layers = nn.ModuleList(Block(config, router, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = None if config.tie_embeddings else Linear(config.dim, config.vocab_size)
        self.lookup: nn.Module = Lookup(compute_dtype)
        self.gather: nn.Module = nn.Identity()
        self.slice_local: nn.Module = nn.Identity()

    def forward(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor,
        documents_BS: Tensor | None = None,
        valid_BS: Tensor | None = None,
        *,
        noise_keys_BS: Tensor | None = None,
        cache: Cache | None = None,
        hidden_BSD: Tensor | None = None,
    ) -> Output:
        """Logits of the next token at every position.

        Args:
            tokens_BS: token ids.
            positions_BS: position of each token in its document.
            documents_BS: equal numbers may attend to each other (causally); None: each row is one document.
            valid_BS: False on padding; None: no padding.
            noise_keys_BS: `moe.noise.noise_keys` of the tokens; needed for router jitter in training.
            cache: keys and values of earlier tokens (generation); these tokens are written into it.
            hidden_BSD: what the stage before hands on, in place of embedded tokens.
        """
        config = self.config
        x_BSD = self._embed(tokens_BS) if hidden_BSD is None else hidden_BSD
        valid_BS, noise_keys_BS = self.slice_local(valid_BS), self.slice_local(noise_keys_BS)
        rotary = rotary_table(positions_BS, config.head_dim, config.rope_theta, self.compute_dtype)
        if cache is not None:
            cache.begin(positions_BS, valid_BS)
        collected = []
        for number, layer in enumerate(self.layers):
            if layer is None:
                continue
            of_layer = None if cache is None else cache.layers[number]
            x_BSD, stats = layer(x_BSD, rotary, documents_BS, valid_BS, noise_keys_BS, of_layer)
            if stats is not None:
                collected.append(stats)
        if cache is not None:
            cache.advance()
        stacked = RouterStats(*(torch.stack(field) for field in zip(*collected, strict=True))) if collected else None
        return Output(x_BSD if self.norm is None else self._logits(self.gather(self.norm(x_BSD))), stacked)

    @property
    def moe_layers(self) -> list[int]:
        """Of the model's MoE layers, counted from 0, those that are here."""
        numbers = filter(self.config.is_moe_layer, range(self.config.num_layers))
        return [place for place, number in enumerate(numbers) if self.layers[number] is not None]

    @property
    def is_last(self) -> bool:
        """Whether its output is logits: not so in a pipeline stage that is followed by another."""
        return self.norm is not None

    def keep(self, layers: Sequence[int]) -> None:
        """Become the pipeline stage of these consecutive layers: what the others need goes."""
        first, last = layers[0] == 0, layers[-1] == self.config.num_layers - 1
        for number in range(self.config.num_layers):
            if number not in layers:
                setattr(self.layers, str(number), None)
        if not first and not (last and self.config.tie_embeddings):
            self.embedding = None  # type: ignore[assignment]
        if not last:
            self.norm = self.head = None  # type: ignore[assignment]

    def _embed(self, tokens_BS: Tensor) -> Tensor:
        x_BSD: Tensor = self.lookup(tokens_BS, self.embedding)
        return x_BSD

    def _logits(self, x_BSD: Tensor) -> Tensor:
        if self.head is not None:
            logits_BSV: Tensor = self.head(x_BSD)
            return logits_BSV
        return F.linear(x_BSD, self.embedding.to(x_BSD.dtype))
