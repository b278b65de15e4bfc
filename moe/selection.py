"""Which experts a token gets, given scores: top-k, group limits, expert choice, capacity.

Shapes: B batch (sequences), S sequence, E experts, K top-k, G groups. Nothing here carries a gradient.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor


def top_k_stable(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest scores of the last dimension, best first; equal scores: the lower index first."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def limit_to_groups(scores_BSE: Tensor, num_groups: int, topk_groups: int, best_of_group: int) -> Tensor:
    """The scores with -inf for every expert outside of the token's `topk_groups` best groups.

    Args:
        num_groups: groups of equal size, of neighbouring experts.
        best_of_group: a group's score is the sum of so many of its best scores: 1 in DeepSeek-V2 (arXiv 2405.04434),
            2 in DeepSeek-V3 (2412.19437).
    """
    grouped_BSGe = scores_BSE.unflatten(-1, (num_groups, -1))
    score_BSG = grouped_BSGe.topk(best_of_group, dim=-1).values.sum(dim=-1)
    outside_BSG = torch.ones_like(score_BSG, dtype=torch.bool)
    outside_BSG.scatter_(-1, top_k_stable(score_BSG, topk_groups), False)
    return grouped_BSGe.masked_fill(outside_BSG.unsqueeze(-1), -torch.inf).flatten(-2)


def choose_tokens(scores_BSE: Tensor, mask_BS: Tensor, capacity: int) -> Tensor:
    """Expert choice (arXiv 2202.09368): True where the expert takes the token, [B, S, E].

    Each expert takes the `capacity` tokens of the sequence with the highest scores, fewer where `mask_BS` (True on
    tokens, False on padding) leaves fewer. Ties go to the earlier token.
    """
    scores_BSE = scores_BSE.masked_fill(~mask_BS.unsqueeze(-1), -torch.inf)
    best_BCE = scores_BSE.sort(dim=1, descending=True, stable=True).indices[:, :capacity]
    taken_BSE = torch.zeros_like(scores_BSE, dtype=torch.bool).scatter_(1, best_BCE, True)
    return taken_BSE & mask_BS.unsqueeze(-1)


def expert_capacity(capacity_factor: float, top_k: int, seq_len: int, num_experts: int) -> int:
    """Assignments an expert takes from one sequence of `seq_len` tokens: C = ceil(capacity_factor * k * S / E).

    Of the factor as it is written: in floating point 1.1 * 3200 / 16 is 220.00000000000003, and C would be 221.
    """
    return math.ceil(Fraction(repr(float(capacity_factor))) * top_k * seq_len / num_experts)


def within_capacity(experts_BSK: Tensor, taken_BSK: Tensor, before_BE: Tensor, capacity: int) -> Tensor:
    """1 where an assignment is among its expert's first `capacity` of the sequence, by position; 0 where it overflows.

    Later tokens are dropped first, so that no token can displace an earlier one (nothing leaks from the future).

    Args:
        before_BE: each expert's assignments in the part of the sequence before these tokens, int64.
    """
    chosen_BSE = before_BE.new_zeros(*experts_BSK.shape[:2], before_BE.shape[-1])
    chosen_BSE.scatter_add_(-1, experts_BSK, taken_BSK)
    place_BSK = (chosen_BSE.cumsum(dim=1) + before_BE.unsqueeze(1)).gather(-1, experts_BSK)
    return (place_BSK <= capacity).long()


def most_probable(scores_BSK: Tensor, experts_BSK: Tensor, num_experts: int, capacity: int) -> Tensor:
    """1 where an assignment is among its expert's `capacity` best-scored of the sequence; ties: the earlier token.

    A later token can displace an earlier one: this leaks the future.

    Args:
        scores_BSK: of the chosen experts; -inf where the assignment does not hold.
    """
    scores_BSE = scores_BSK.new_full((*experts_BSK.shape[:2], num_experts), -torch.inf)
    scores_BSE.scatter_(-1, experts_BSK, scores_BSK)
    order_BSE = scores_BSE.sort(dim=1, descending=True, stable=True).indices
    place = torch.arange(scores_BSE.shape[1], device=scores_BSE.device).view(1, -1, 1).expand_as(order_BSE)
    place_BSE = torch.empty_like(order_BSE).scatter_(1, order_BSE, place)
    return (place_BSE.gather(-1, experts_BSK) < capacity).long()


def count(experts_BSK: Tensor, taken_BSK: Tensor, num_experts: int) -> Tensor:
    """Assignments to each expert where `taken_BSK` is 1, int64 [B, E]."""
    counts_BE = torch.zeros(experts_BSK.shape[0], num_experts, dtype=torch.int64, device=experts_BSK.device)
    return counts_BE.scatter_add_(1, experts_BSK.flatten(1), taken_BSK.flatten(1))
