"""Selection of experts by score: top-k, group limits, expert choice, capacity. No gradient passes through.

Shapes: B batch (sequences), S sequence, E experts, K top-k, G groups, C capacity.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor


def top_k_stable(scores: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest scores of the last dimension, best first. Of equal scores, the one with the
    lower index comes first."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def limit_to_groups(scores_BSE: Tensor, num_groups: int, topk_groups: int, best_of_group: int) -> Tensor:
    """Return the scores with -inf for every expert outside the token's `topk_groups` best groups.

    Args:
        num_groups: G. Groups consist of neighbouring experts and have equal size.
        topk_groups: number of groups that a token can use.
        best_of_group: a group's score is the sum of its `best_of_group` highest scores: 1 in DeepSeek-V2 (arXiv
            2405.04434), 2 in DeepSeek-V3 (2412.19437).
    """
    grouped_BSGe: Tensor = scores_BSE.unflatten(-1, (num_groups, -1))
    score_BSG = grouped_BSGe.topk(best_of_group, dim=-1).values.sum(dim=-1)
    outside_BSG = torch.ones_like(score_BSG, dtype=torch.bool)
    outside_BSG.scatter_(-1, top_k_stable(score_BSG, topk_groups), False)
    return grouped_BSGe.masked_fill(outside_BSG.unsqueeze(-1), -torch.inf).flatten(-2)


def choose_tokens(scores_BSE: Tensor, mask_BS: Tensor, capacity: int) -> Tensor:
    """Let each expert take the `capacity` highest-scored tokens of the sequence (expert choice, arXiv 2202.09368).

    Of tokens with equal scores, the earlier one is taken. An expert takes fewer tokens if the sequence has fewer.

    Args:
        mask_BS: False on padding, which no expert takes.

    Returns:
        True where the expert takes the token, [B, S, E].
    """
    scores_BSE = scores_BSE.masked_fill(~mask_BS.unsqueeze(-1), -torch.inf)
    best_BCE = scores_BSE.sort(dim=1, descending=True, stable=True).indices[:, :capacity]
    taken_BSE = torch.zeros_like(scores_BSE, dtype=torch.bool).scatter_(1, best_BCE, True)
    return taken_BSE & mask_BS.unsqueeze(-1)


def expert_capacity(capacity_factor: float, top_k: int, seq_len: int, num_experts: int) -> int:
    """Return how many assignments an expert takes from one sequence, C = ceil(capacity_factor * k * S / E).

    The factor is used as the decimal number that the configuration contains. In floating point, 1.1 * 3200 / 16 is
    220.00000000000003, and C would be 221.

    >>> expert_capacity(1.1, 1, 3200, 16)
    220
    """
    return math.ceil(Fraction(repr(float(capacity_factor))) * top_k * seq_len / num_experts)


def within_capacity(experts_BSK: Tensor, taken_BSK: Tensor, before_BE: Tensor, capacity: int) -> Tensor:
    """Return 1 where an assignment is among the first `capacity` assignments of its expert in the sequence, else 0.

    Later tokens are dropped first, so a token cannot displace an earlier one, and nothing leaks from the future.

    Args:
        experts_BSK: expert of each assignment.
        taken_BSK: 1 where the assignment counts, 0 elsewhere (padding).
        before_BE: number of assignments to each expert in the part of the sequence before these tokens, int64.

    Returns:
        int64 [B, S, K].
    """
    chosen_BSE = before_BE.new_zeros(*experts_BSK.shape[:2], before_BE.shape[-1])
    chosen_BSE.scatter_add_(-1, experts_BSK, taken_BSK)
    rank_BSK = (chosen_BSE.cumsum(dim=1) + before_BE.unsqueeze(1)).gather(-1, experts_BSK)
    return (rank_BSK <= capacity).long()


def most_probable(scores_BSK: Tensor, experts_BSK: Tensor, num_experts: int, capacity: int) -> Tensor:
    """Return 1 where an assignment is among the `capacity` highest-scored ones of its expert in the sequence, else 0.

    Of equal scores, that of the earlier token ranks higher. A later token can displace an earlier one, so this policy
    leaks the future.

    Args:
        scores_BSK: score of each assignment; -inf where the assignment does not count (padding).
        experts_BSK: expert of each assignment.

    Returns:
        int64 [B, S, K].
    """
    scores_BSE = scores_BSK.new_full((*experts_BSK.shape[:2], num_experts), -torch.inf)
    scores_BSE.scatter_(-1, experts_BSK, scores_BSK)
    order_BSE = scores_BSE.sort(dim=1, descending=True, stable=True).indices
    ranks = torch.arange(scores_BSE.shape[1], device=scores_BSE.device).view(1, -1, 1).expand_as(order_BSE)
    rank_BSE = torch.empty_like(order_BSE).scatter_(1, order_BSE, ranks)
    return (rank_BSE.gather(-1, experts_BSK) < capacity).long()


def count(experts_BSK: Tensor, taken_BSK: Tensor, num_experts: int) -> Tensor:
    """Count the assignments to each expert where `taken_BSK` is 1, int64 [B, E]."""
    counts_BE = torch.zeros(experts_BSK.shape[0], num_experts, dtype=torch.int64, device=experts_BSK.device)
    return counts_BE.scatter_add_(1, experts_BSK.flatten(1), taken_BSK.flatten(1))
