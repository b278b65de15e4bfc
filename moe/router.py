"""The router: which experts a token goes to, with what weight, and what the balance losses need to know about it.

Shapes: B batch (sequences), S sequence, T = B·S tokens, D model, E experts, K top-k.

Statistics are returned, one row a sequence, and never stored: whoever sums them decides over which tokens.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.config import RouterConfig


class Routing(NamedTuple):
    """One MoE layer's decision for the tokens at hand."""

    experts_TK: Tensor
    """Chosen experts, int64, best first; E where nothing is dispatched (padding, or dropped over capacity)."""
    weights_TK: Tensor
    """Combine weights, at least fp32; 0 where nothing is dispatched."""
    num_experts: int
    complete: bool
    """Every assignment is dispatched (known without looking at the tensors)."""


class RouterStats(NamedTuple):
    """What one layer saw, per sequence. Padding is excluded everywhere. Stacked over layers: a leading L."""

    counts_BE: Tensor
    """Assignments to each expert before any drop, int64."""
    prob_sum_BE: Tensor
    """Sum over tokens of the router's probabilities; carries the gradient of the balance loss."""
    z_sum_B: Tensor
    """Sum over tokens of logsumexp(logits)²; carries the gradient of the z-loss."""
    dropped_B: Tensor
    """Assignments dropped over capacity, int64."""
    tokens_B: Tensor
    """Tokens, int64."""
    experts_BSK: Tensor
    """The experts chosen for each token before any drop (padding included: mask it)."""


class Router(nn.Module):
    """`softmax_topk`: the top-k of softmax(x W^T) (Mixtral 2401.04088, GLaM 2112.06905; unscaled: Switch 2101.03961).

    Logits, probabilities and losses are in at least fp32 whatever the model's dtype. Ties go to the lower index.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int, config: RouterConfig) -> None:
        super().__init__()
        self.top_k = top_k
        self.normalize = config.normalizes(top_k)
        self.capacity_factor = config.capacity_factor
        self.weight = nn.Parameter(torch.empty(num_experts, dim))

    def forward(self, x_BSD: Tensor, valid_BS: Tensor | None) -> tuple[Routing, RouterStats]:
        """Route every token; `valid_BS` is False on padding (None: no padding)."""
        num_experts = self.weight.shape[0]
        wide = torch.promote_types(x_BSD.dtype, torch.float32)
        logits_BSE = F.linear(x_BSD.to(wide), self.weight.to(wide))
        probs_BSE = logits_BSE.softmax(dim=-1)
        experts_BSK = top_k_stable(logits_BSE.detach(), self.top_k)
        weights_BSK = probs_BSE.gather(-1, experts_BSK)
        if self.normalize:
            weights_BSK = weights_BSK / weights_BSK.sum(dim=-1, keepdim=True)

        mask_BS1 = torch.ones_like(experts_BSK[..., :1]) if valid_BS is None else valid_BS.unsqueeze(-1).long()
        taken_BSK = mask_BS1.expand_as(experts_BSK)
        counts_BE = _count(experts_BSK, taken_BSK, num_experts)
        kept_BSK = taken_BSK
        if self.capacity_factor is not None:
            kept_BSK = taken_BSK * within_capacity(experts_BSK, taken_BSK, num_experts, self.capacity_factor)
        stats = RouterStats(
            counts_BE=counts_BE,
            prob_sum_BE=(probs_BSE * mask_BS1).sum(dim=1),
            z_sum_B=(logits_BSE.logsumexp(dim=-1).square() * mask_BS1.squeeze(-1)).sum(dim=1),
            dropped_B=(taken_BSK - kept_BSK).sum(dim=(1, 2)),
            tokens_B=mask_BS1.sum(dim=(1, 2)),
            experts_BSK=experts_BSK,
        )
        complete = valid_BS is None and self.capacity_factor is None
        if not complete:
            weights_BSK = weights_BSK * kept_BSK
            experts_BSK = experts_BSK.where(kept_BSK.bool(), num_experts)
        return Routing(experts_BSK.flatten(0, 1), weights_BSK.flatten(0, 1), num_experts, complete), stats

    def extra_repr(self) -> str:
        experts, dim = self.weight.shape
        capacity = "dropless" if self.capacity_factor is None else f"capacity_factor={self.capacity_factor}"
        return f"{dim} -> {experts}, top_k={self.top_k}, normalize={self.normalize}, {capacity}"


def top_k_stable(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest scores of the last dimension, best first; equal scores: the lower index first."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def expert_capacity(capacity_factor: float, top_k: int, seq_len: int, num_experts: int) -> int:
    """Assignments an expert takes from one sequence of `seq_len` tokens."""
    return math.ceil(capacity_factor * top_k * seq_len / num_experts)


def within_capacity(experts_BSK: Tensor, taken_BSK: Tensor, num_experts: int, capacity_factor: float) -> Tensor:
    """1 where an assignment is among its expert's first C of the sequence, by position; 0 where it overflows.

    Later tokens are dropped first, so that no token can displace an earlier one (nothing leaks from the future).
    """
    _, seq_len, top_k = experts_BSK.shape
    chosen_BSE = torch.zeros(*experts_BSK.shape[:2], num_experts, dtype=torch.int64, device=experts_BSK.device)
    chosen_BSE.scatter_add_(-1, experts_BSK, taken_BSK)
    place_BSK = chosen_BSE.cumsum(dim=1).gather(-1, experts_BSK)
    return (place_BSK <= expert_capacity(capacity_factor, top_k, seq_len, num_experts)).long()


def _count(experts_BSK: Tensor, taken_BSK: Tensor, num_experts: int) -> Tensor:
    counts_BE = torch.zeros(experts_BSK.shape[0], num_experts, dtype=torch.int64, device=experts_BSK.device)
    return counts_BE.scatter_add_(1, experts_BSK.flatten(1), taken_BSK.flatten(1))
