"""Parameters and floating-point operations of a model, counted on its modules.

The modules can be on the meta device (`meta_model`), so a model of any size can be counted.
"""

from typing import NamedTuple

import torch

from common.errors import ModelError
from moe.config import ModelConfig, RouterConfig
from moe.experts import Experts
from moe.model import Transformer


class ParameterCounts(NamedTuple):
    """Numbers of parameters."""

    total: int
    active: int
    """Parameters that one token uses: top_k of num_experts routed experts, and all other parameters, including the
    embedding."""
    experts: int
    """Parameters of the routed experts."""


def meta_model(config: ModelConfig, router: RouterConfig) -> Transformer:
    """Build the whole model on the meta device, without memory for its weights.

    Raises:
        ModelError: a tensor cannot have the configured size.
    """
    try:
        with torch.device("meta"):
            return Transformer(config, router, torch.float32)
    except (RuntimeError, TypeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ModelError(f"model: expected sizes that a tensor can have ({reason})") from error


def count_parameters(model: Transformer) -> ParameterCounts:
    """Count the parameters of `model`. A model divided over ranks has fewer: only those that this rank stores."""
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(
        parameter.numel()
        for module in model.modules()
        if isinstance(module, Experts)
        for parameter in module.parameters()
    )
    config = model.config
    idle = experts * (config.num_experts - config.top_k) // config.num_experts if config.is_moe else 0  # type: ignore[operator]
    return ParameterCounts(total, total - idle, experts)


def forward_flops_per_token(model: Transformer, seq_len: int) -> float:
    """Return the FLOPs of the forward pass per token of a row of `seq_len` tokens.

    Each active parameter of a matmul costs 2 FLOPs. Norms and the lookup in the embedding are not matmuls. The head
    is one, even if it is tied to the embedding. Attention costs 4·H·C FLOPs per query-key pair and layer, for the pairs
    that the causal mask and the window allow.
    """
    config = model.config
    vectors = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 1)
    lookup = 0 if config.tie_embeddings else model.embedding.numel()
    matmul = count_parameters(model).active - vectors - lookup
    pairs = sum(attended_pairs(config.window(layer), seq_len) for layer in range(config.num_layers))
    return 2 * matmul + 4 * config.num_heads * config.head_dim * pairs / seq_len


def training_flops_per_token(model: Transformer, seq_len: int) -> float:
    """Return the FLOPs of the forward and the backward pass per token: three times those of the forward pass.

    The backward pass computes two gradients per matmul. Recomputed activations are not counted.
    """
    return 3 * forward_flops_per_token(model, seq_len)


def attended_pairs(window: int | None, seq_len: int) -> int:
    """Count the query-key pairs of one row of `seq_len` tokens under a causal mask and a window.

    >>> attended_pairs(None, 4), attended_pairs(2, 4)
    (10, 7)
    """
    reach = min(window or seq_len, seq_len)
    return reach * (reach + 1) // 2 + (seq_len - reach) * reach
