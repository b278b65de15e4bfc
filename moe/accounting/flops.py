"""What a model costs: parameters and floating-point operations, counted on the modules themselves.

A model that fits nowhere is counted on the meta device.
"""

from typing import NamedTuple

import torch

from common.errors import ModelError
from moe.config import ModelConfig, RouterConfig
from moe.experts import Experts
from moe.model import Transformer


class ParameterCounts(NamedTuple):
    total: int
    active: int
    """Parameters one token touches: routed experts count for top_k of num_experts, embeddings in full."""
    experts: int
    """Parameters of routed experts held by this module."""


def meta_model(config: ModelConfig, router: RouterConfig) -> Transformer:
    """The whole model without a byte of weights.

    Raises:
        ModelError: a size or a number of bytes that no tensor has.
    """
    try:
        with torch.device("meta"):
            return Transformer(config, router, torch.float32)
    except (RuntimeError, TypeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ModelError(f"model: expected sizes that a tensor can have ({reason})") from error


def count_parameters(model: Transformer) -> ParameterCounts:
    """Parameters of `model` as it stands (after expert parallelism: what this rank holds)."""
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
    """Model FLOPs of the forward pass for one token of a row of `seq_len`.

    2 per active matmul parameter (norms and the embedding's lookup are no matmul; a tied head is), plus attention's
    4·H·C per query-key pair and layer, with the true number of keys a causal, windowed query reaches on average.
    """
    config = model.config
    vectors = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 1)
    lookup = 0 if config.tie_embeddings else model.embedding.numel()
    matmul = count_parameters(model).active - vectors - lookup
    pairs = sum(attended_pairs(config.window(layer), seq_len) for layer in range(config.num_layers))
    return 2 * matmul + 4 * config.num_heads * config.head_dim * pairs / seq_len


def training_flops_per_token(model: Transformer, seq_len: int) -> float:
    """Model FLOPs of forward and backward: a matmul's two gradients cost it twice more (recompute not counted)."""
    return 3 * forward_flops_per_token(model, seq_len)


def attended_pairs(window: int | None, seq_len: int) -> int:
    """Query-key pairs of one row of `seq_len` under a causal mask and a window."""
    reach = min(window or seq_len, seq_len)
    return reach * (reach + 1) // 2 + (seq_len - reach) * reach
