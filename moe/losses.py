"""Every term of the loss (docs/losses.md has the formulas and their sources).

Shapes: B batch (sequences), S sequence, V vocabulary, L MoE layers, E experts; N tokens of the global micro-batch.

All functions return *sums* over the tokens of this rank. `training/step.py` divides them, once, by the number of
tokens of the whole optimizer step; so a plain sum over ranks and micro-batches is the loss of the global batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe.config import RouterConfig
from moe.router import RouterStats

IGNORE = -100
"""Label of positions that are not predicted."""


CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**27}
"""Logits looked at together: what stays in a core's cache; on GPUs, what bounds the fp32 copies."""


def cross_entropy_sum(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Sum over label tokens of -log softmax(logits)[label], in nats, in at least fp32."""
    return _CrossEntropySum.apply(logits_BSV.flatten(0, 1), labels_BS.flatten())


class _CrossEntropySum(torch.autograd.Function):
    """Chunk by chunk, with the gradient made on the way: no fp32 copy of all logits, in either direction."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, labels_T: Tensor) -> Tensor:
        wide = torch.promote_types(logits_TV.dtype, torch.float32)
        grad_TV = torch.empty_like(logits_TV) if ctx.needs_input_grad[0] else None
        rows = max(1, CHUNK_ELEMENTS.get(logits_TV.device.type, 2**27) // logits_TV.shape[1])
        total = torch.zeros((), dtype=wide, device=logits_TV.device)
        for start in range(0, logits_TV.shape[0], rows):
            labels = labels_T[start : start + rows].unsqueeze(1)
            counted = labels != IGNORE
            target = labels.clamp(min=0)
            log_p = logits_TV[start : start + rows].to(wide).log_softmax(dim=-1)
            total -= (log_p.gather(1, target) * counted).sum()
            if grad_TV is not None:
                p = log_p.exp_()
                p.scatter_add_(1, target, p.new_full((), -1.0).expand_as(target))
                grad_TV[start : start + rows] = p.mul_(counted)
        ctx.save_for_backward(grad_TV)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (grad_TV,) = ctx.saved_tensors
        return grad_TV * grad.to(grad_TV.dtype), None


class Auxiliary(NamedTuple):
    """Router losses of one micro-batch on this rank, and its global counts."""

    balance_sum: Tensor
    """Contribution to N · L_bal."""
    z_sum: Tensor
    """Contribution to N · L_z."""
    counts_LE: Tensor
    """Assignments to each expert over the global micro-batch, before any drop."""
    dropped: Tensor
    """Dropped assignments of the global micro-batch, over all layers."""


def _nothing(counts: Tensor) -> Tensor:
    return counts


def auxiliary_losses(
    stats: RouterStats,
    config: RouterConfig,
    reduce_counts: Callable[[Tensor], Tensor] = _nothing,
    reduce_sequences: Callable[[Tensor], Tensor] = _nothing,
    sequence_parts: int = 1,
    layers: int | None = None,
) -> Auxiliary:
    """Balance and z-loss from the statistics of all MoE layers.

    Args:
        stats: stacked over layers.
        config: scope of the balance loss and reduction over layers.
        reduce_counts: sum of an integer tensor over all ranks that hold other tokens of the same micro-batch (seam:
            an all-reduce; it stands outside of what recompute repeats).
        reduce_sequences: the same over the `sequence_parts` ranks that hold other parts of the same sequences.
        layers: MoE layers of the whole model, where `stats` is of a pipeline stage.
    """
    here, _, num_experts = stats.counts_BE.shape
    layers = here if layers is None else layers
    if config.balance_scope != "global" and sequence_parts > 1:
        whole = reduce_sequences(torch.cat((stats.counts_BE, stats.tokens_B.unsqueeze(-1)), dim=-1))
        counts_LBE, tokens_LB = whole[..., :-1], whole[..., -1]
    else:
        counts_LBE, tokens_LB = stats.counts_BE, stats.tokens_B
    local_LE = stats.counts_BE.sum(dim=1)
    # Every rank that holds a part of a sequence counts it: `sequence_parts` times in all.
    sequences = (tokens_LB[0] > 0).sum()
    totals = torch.stack((stats.dropped_B.sum(), stats.tokens_B[0].sum(), sequences))
    reduced = reduce_counts(torch.cat((local_LE.flatten(), totals)))
    counts_LE = reduced[:-3].view(here, num_experts)
    dropped, tokens, sequences = reduced[-3:]

    if config.balance_scope == "global":
        balance_L = num_experts * (shares(counts_LE) * stats.prob_sum_BE.sum(dim=1)).sum(dim=-1)
    elif config.balance_scope == "rank":
        balance_L = num_experts * (shares(counts_LBE.sum(dim=1)) * stats.prob_sum_BE.sum(dim=1)).sum(dim=-1)
    else:
        mean_prob_LBE = stats.prob_sum_BE / tokens_LB.clamp(min=1).unsqueeze(-1)
        per_sequence_LB = num_experts * (shares(counts_LBE) * mean_prob_LBE).sum(dim=-1)
        balance_L = per_sequence_LB.sum(dim=1) * (tokens.double() * sequence_parts / sequences.clamp(min=1))
    z_L = stats.z_sum_B.sum(dim=1)
    if config.layer_reduction == "hf_pooled":
        counts = counts_LE if config.balance_scope == "global" else counts_LBE.sum(dim=1)
        return Auxiliary(_pooled(counts, stats, num_experts), z_L.mean(), counts_LE, dropped)
    share = layers if config.layer_reduction == "mean" else 1
    return Auxiliary(balance_L.sum() / share, z_L.sum() / share, counts_LE, dropped)


def _pooled(counts_LE: Tensor, stats: RouterStats, num_experts: int) -> Tensor:
    """N times the balance loss of Hugging Face's Mixtral: f and P over the tokens of all layers together, times k."""
    top_k = stats.experts_BSK.shape[-1]
    mean_prob_sum_E = stats.prob_sum_BE.sum(dim=1).mean(dim=0)
    return top_k * num_experts * (shares(counts_LE.sum(dim=0)) * mean_prob_sum_E).sum()


def shares(counts: Tensor) -> Tensor:
    """f_e = n_e / Σ n over the last dimension, fp64; zeros where there is no assignment at all."""
    return counts.double() / counts.sum(dim=-1, keepdim=True).clamp(min=1)
