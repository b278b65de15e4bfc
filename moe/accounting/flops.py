"""Parameters and floating-point operations of a model, counted on its modules.

The modules can be on the meta device (`meta_model`), so a model of any size can be counted.
"""

from typing import NamedTuple

import torch

from common.errors import ModelError
from moe.config import ModelConfig, RouterConfig, attended_pairs
from moe.experts import Experts
from moe.model import Transformer


class ParameterCounts(NamedTuple):
    """Numbers of parameters."""

    total: int
    active: int
    """Parameters that one token uses, in the mean over the tokens: those of `RouterConfig.experts_per_token` routed
    experts, and all other parameters, including the embedding."""
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
    used = active_expert_parameters(experts, model.config, model.router_config)
    return ParameterCounts(total, total - experts + used, experts)


def active_expert_parameters(experts: int, config: ModelConfig, router: RouterConfig) -> int:
    """Return how many of the `experts` parameters of all routed experts one token uses, in the mean over the tokens."""
    if config.num_experts is None or config.top_k is None:
        return 0
    return round(experts // config.num_experts * router.experts_per_token(config.num_experts, config.top_k))


class MatmulCosts(NamedTuple):
    """The multiplications of the matmuls in a forward pass of the whole model.

    Norms and the lookup in the embedding are not matmuls. The head is one, even if it is tied to the embedding.
    """

    token: int
    """Multiplications per token, outside of attention and of the routed experts."""
    assignment: int
    """Multiplications of one routed expert for one token."""
    pair: int
    """Multiplications per query-key pair of one layer: H·C for the score and H·C for the value. (With latent attention
    values are narrower than keys. Zeros that pad them for a kernel are not counted.)"""

    def training_flops(self, tokens: int, assignments: int, pairs: int) -> int:
        """Return the FLOPs of a forward and a backward pass.

        A multiplication and its addition are 2 FLOPs. The backward pass computes two gradients per matmul, so it costs
        twice as much as the forward pass. Recomputed activations are not counted.

        Args:
            tokens: tokens without padding.
            assignments: tokens that the routed experts compute, summed over experts and layers. Dropped assignments do
                not count.
            pairs: query-key pairs, summed over layers, that the causal mask, the windows and the documents leave.
        """
        return 6 * (self.token * tokens + self.assignment * assignments + self.pair * pairs)


def matmul_costs(model: Transformer) -> MatmulCosts:
    """Return what one token, one assignment to an expert and one query-key pair cost in a whole model."""
    config, counts = model.config, count_parameters(model)
    vectors = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 1)
    lookup = 0 if config.tie_embeddings else model.embedding.numel()
    return MatmulCosts(
        token=counts.total - counts.experts - vectors - lookup,
        assignment=counts.experts // (config.num_experts * config.num_moe_layers) if config.num_experts else 0,
        pair=config.num_heads * (config.head_dim + config.value_dim),
    )


def forward_flops_per_token(model: Transformer, seq_len: int) -> float:
    """Return the FLOPs of the forward pass per token of a row that is one document of `seq_len` tokens.

    Each active parameter of a matmul (`ParameterCounts.active`) costs 2 FLOPs. Attention costs 4·H·C FLOPs per
    query-key pair and layer (`MatmulCosts.pair`), for the pairs that the causal mask and the window leave.
    """
    config, costs, counts = model.config, matmul_costs(model), count_parameters(model)
    matmul = costs.token + counts.active - (counts.total - counts.experts)
    pairs = sum(attended_pairs(config.window(layer), seq_len) for layer in range(config.num_layers))
    return 2 * matmul + 2 * costs.pair * pairs / seq_len


def training_flops_per_token(model: Transformer, seq_len: int) -> float:
    """Return the FLOPs of the forward and the backward pass per token: three times those of the forward pass.

    `MatmulCosts.training_flops` has the same count for the tokens, assignments and pairs of a real batch.
    """
    return 3 * forward_flops_per_token(model, seq_len)
