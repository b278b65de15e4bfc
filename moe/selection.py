"""Selection of experts by score: top-k, group limits, expert choice, capacity. No gradient passes through.

Shapes: B batch (sequences), S sequence, D model, E experts, K top-k, G groups, C capacity, U unique rows.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor

from moe.device import on_gpu
from moe.kernels import MAX_EXPERTS, MAX_K, use_kernels


def top_k_stable(scores: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest scores of the last dimension, best first. Of equal scores, the one with the
    lower index comes first. NaN is the largest score."""
    if use_kernels(scores) and 0 < scores.shape[-1] <= MAX_EXPERTS and k <= MAX_K:
        from moe.kernels import top_k

        indices: Tensor = top_k.top_k(scores, k)
        return indices
    if not on_gpu(scores) and 4 * k < scores.shape[-1] and not torch.compiler.is_compiling():
        # Sorting all scores takes longer. `topk` orders equal scores in no particular way, nor those with NaN.
        best, indices = scores.topk(k + 1, dim=-1)
        unclear = ~(best[..., :-1] > best[..., 1:]).all(dim=-1)
        indices[unclear] = scores[unclear].sort(dim=-1, descending=True, stable=True).indices[..., : k + 1]
        return indices[..., :k]
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def margin(probs: Tensor, k: int) -> Tensor:
    """Return the k-th largest number of the last dimension minus the next one. k is smaller than the dimension."""
    best = probs.gather(-1, top_k_stable(probs, k + 1))
    return best[..., k - 1] - best[..., k]


def margin_of_choice(probs_BSE: Tensor, experts_BSK: Tensor) -> Tensor:
    """Return `margin` [B, S] of the probabilities, whose K largest are at `experts_BSK`, best first. K < E.

    It takes a tenth of the time of another `top_k_stable`.
    """
    others_BSE = probs_BSE.scatter(-1, experts_BSK, -torch.inf)
    return probs_BSE.gather(-1, experts_BSK[..., -1:]).squeeze(-1) - others_BSE.amax(dim=-1)


def first_equal_rows(weight_ED: Tensor) -> Tensor | None:
    """Return for each row of a matrix the index of the first row that is equal to it, int64 [E].

    Returns:
        None if all rows differ, and on devices other than CPUs: there, a matmul rounds all columns of its result in
        the same way.
    """
    if on_gpu(weight_ED):
        return None
    if torch.compiler.is_compiling():
        first_of_row_E: Tensor = _first_equal_rows(weight_ED)
        return first_of_row_E
    if len(weight_ED[:, 0].unique()) == len(weight_ED):
        return None
    unique_UD, unique_of_row_E = weight_ED.unique(dim=0, return_inverse=True)
    rows_E = torch.arange(len(weight_ED))
    first_U = rows_E.new_full((len(unique_UD),), len(weight_ED)).scatter_reduce_(0, unique_of_row_E, rows_E, "amin")
    return first_U[unique_of_row_E]


@torch.library.custom_op("mixwright::first_equal_rows", mutates_args=())
def _first_equal_rows(weight_ED: Tensor) -> Tensor:
    """Compute `first_equal_rows` as one operator of a compiled graph, whose shapes cannot depend on the values."""
    first_E = first_equal_rows(weight_ED)
    return torch.arange(len(weight_ED)) if first_E is None else first_E


@_first_equal_rows.register_fake
def _(weight_ED: Tensor) -> Tensor:
    return weight_ED.new_empty(len(weight_ED), dtype=torch.int64)


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


def tie_tolerance(compute_dtype: torch.dtype, score_dtype: torch.dtype) -> float:
    """Return by how much the log-odds ln(p / (1 - p)) of two scores that are equal by construction can differ after
    rounding.

    Hidden states are rounded to `compute_dtype`. Everything else accumulates the rounding errors of `score_dtype`,
    which were between 1 and 1,000 times its epsilon in models of up to eight layers (docs/losses.md).
    """
    return max(math.sqrt(torch.finfo(score_dtype).eps), 2 * torch.finfo(compute_dtype).eps)


def best_of_sequence(scores_BSE: Tensor, capacity: int, tolerance: float) -> Tensor:
    """Return True where a score is among the `capacity` highest ones of its expert in the sequence, [B, S, E].

    Scores that are equal up to rounding to the lowest of these compete by position: the earlier ones are taken. Tokens
    with equal prefixes in a packed row have equal scores by construction, but kernels round them differently, depending
    on the layout. The set therefore depends on rounding only if a score lies at the edge of the tolerance.

    Args:
        scores_BSE: -inf where there is nothing to take.
        tolerance: the result of `tie_tolerance`.
    """
    sorted_BSE, order_BSE = scores_BSE.sort(dim=1, descending=True, stable=True)
    lowest_B1E = sorted_BSE[:, :capacity][:, -1:]
    # If the log-odds differ by d, probabilities differ by p (1 - p) d. Scores above 1 are not probabilities.
    spread_B1E = lowest_B1E.abs() * (1 - lowest_B1E).abs().clamp(max=1) * tolerance
    # The probabilities themselves are rounded, and numbers below the smallest normal one have few digits.
    limits = torch.finfo(scores_BSE.dtype)
    spread_B1E = (spread_B1E + 4 * limits.eps * lowest_B1E.abs() + limits.tiny).nan_to_num(posinf=0)
    higher_BSE = sorted_BSE > lowest_B1E + spread_B1E
    equal_BSE = (sorted_BSE >= lowest_B1E - spread_B1E) & ~higher_BSE
    # Only results of `sort` decide, which the recomputation of activations does not repeat (`moe.recompute`).
    level_BSE = torch.zeros_like(order_BSE, dtype=torch.int8)
    level_BSE.scatter_(1, order_BSE, 2 * higher_BSE.to(torch.int8) + equal_BSE.to(torch.int8))
    equal_BSE = level_BSE == 1
    places_B1E = capacity - higher_BSE.sum(dim=1, keepdim=True)
    return (level_BSE == 2) | (equal_BSE & (equal_BSE.cumsum(dim=1) <= places_B1E))


def choose_tokens(scores_BSE: Tensor, mask_BS: Tensor, capacity: int, tolerance: float) -> Tensor:
    """Let each expert take the `capacity` highest-scored tokens of the sequence (expert choice, arXiv 2202.09368).

    Of tokens whose scores are equal up to rounding, the earlier one is taken. An expert takes fewer tokens if the
    sequence has fewer.

    Args:
        mask_BS: False on padding, which no expert takes.
        tolerance: the result of `tie_tolerance`.

    Returns:
        True where the expert takes the token, [B, S, E].
    """
    mask_BS1 = mask_BS.unsqueeze(-1)
    return best_of_sequence(scores_BSE.masked_fill(~mask_BS1, -torch.inf), capacity, tolerance) & mask_BS1


def expert_capacity(capacity_factor: float, top_k: int, seq_len: int, num_experts: int) -> int:
    """Return how many assignments an expert takes from one sequence, C = ceil(capacity_factor * k * S / E).

    The factor is used as the decimal number that the configuration contains. In floating point, 1.1 * 3200 / 16 is
    220.00000000000003, and C would be 221.

    >>> expert_capacity(1.1, 1, 3200, 16)
    220
    """
    capacity: int = _expert_capacity(capacity_factor, top_k, seq_len, num_experts)
    return capacity


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # it cannot trace fractions
def _expert_capacity(capacity_factor: float, top_k: int, seq_len: int, num_experts: int) -> int:
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


def most_probable(scores_BSK: Tensor, experts_BSK: Tensor, num_experts: int, capacity: int, tolerance: float) -> Tensor:
    """Return 1 where an assignment is among the `capacity` highest-scored ones of its expert in the sequence, else 0.

    Of scores that are equal up to rounding, that of the earlier token ranks higher. A later token can displace an
    earlier one, so this policy leaks the future.

    Args:
        scores_BSK: score of each assignment; -inf where the assignment does not count (padding).
        experts_BSK: expert of each assignment.
        tolerance: the result of `tie_tolerance`.

    Returns:
        int64 [B, S, K].
    """
    scores_BSE = scores_BSK.new_full((*experts_BSK.shape[:2], num_experts), -torch.inf)
    scores_BSE.scatter_(-1, experts_BSK, scores_BSK)
    return best_of_sequence(scores_BSE, capacity, tolerance).gather(-1, experts_BSK).long()


def count(experts_BSK: Tensor, taken_BSK: Tensor, num_experts: int) -> Tensor:
    """Count the assignments to each expert where `taken_BSK` is 1, int64 [B, E]."""
    counts_BE = torch.zeros(experts_BSK.shape[0], num_experts, dtype=torch.int64, device=experts_BSK.device)
    return counts_BE.scatter_add_(1, experts_BSK.flatten(1), taken_BSK.flatten(1))
