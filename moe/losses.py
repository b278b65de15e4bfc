"""Every term of the loss (docs/losses.md has the formulas and their sources).

Shapes: B batch (sequences), S sequence, V vocabulary, L MoE layers, E experts; N tokens of the global micro-batch.

All functions return *sums* over the tokens of this rank. `training.step` divides them, once, by the number of tokens
of the whole optimizer step. A plain sum over ranks and micro-batches is therefore the loss of the global batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.errors import expect
from moe.config import RouterConfig
from moe.router import ROUTERS, RouterStats

IGNORE = -100
"""Label of positions that are not predicted."""
CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**27}
"""Logits that are processed at once: on CPUs they fit into a core's cache; on GPUs this bounds the fp32 copies."""


class TokenNats(NamedTuple):
    """The cross-entropy of the tokens of this rank, in nats, in at least fp32."""

    nats_BS: Tensor
    """-log softmax(logits)[label]; 0 where there is no label. No gradient."""
    sum: Tensor
    """The sum of all entries; carries the gradient."""


def token_nats(logits_BSV: Tensor, labels_BS: Tensor) -> TokenNats:
    """Return the cross-entropy -log softmax(logits)[label] of every position, for logits of the whole vocabulary."""
    total, nats_T = _CrossEntropy.apply(logits_BSV.flatten(0, 1), labels_BS.flatten())
    return TokenNats(nats_T.view_as(labels_BS), total)


class _CrossEntropy(torch.autograd.Function):
    """Works chunk by chunk and computes the gradient in the forward pass: there is no fp32 copy of all logits."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(logits_TV.dtype, torch.float32)
        p_TV = torch.empty_like(logits_TV) if ctx.needs_input_grad[0] else None
        rows = max(1, CHUNK_ELEMENTS.get(logits_TV.device.type, 2**27) // logits_TV.shape[1])
        total = torch.zeros((), dtype=wide, device=logits_TV.device)
        nats_T = torch.zeros(logits_TV.shape[0], dtype=wide, device=logits_TV.device)
        label_grad_T = torch.empty_like(nats_T)
        for start in range(0, logits_TV.shape[0], rows):
            labels = labels_T[start : start + rows].unsqueeze(1)
            counted = labels != IGNORE
            target = labels.clamp(min=0)
            log_p = logits_TV[start : start + rows].to(wide).log_softmax(dim=-1)
            label_log_p = log_p.gather(1, target) * counted
            nats_T[start : start + rows] -= label_log_p.squeeze(1)
            total -= label_log_p.sum()
            if p_TV is not None:
                p = log_p.exp_().mul_(counted)
                label_grad_T[start : start + rows] = (p.gather(1, target) - counted.to(wide)).squeeze(1)
                p_TV[start : start + rows] = p
        ctx.save_for_backward(p_TV, label_grad_T, labels_T)
        ctx.mark_non_differentiable(nats_T)
        return total, nats_T

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None]:
        p_TV, label_grad_T, labels_T = ctx.saved_tensors
        return scaled_gradient(p_TV, label_grad_T, labels_T.clamp(min=0), grad), None


def scaled_gradient(p_TV: Tensor, label_grad_T: Tensor, target_T: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of the logits: `grad` times the probabilities, and times `label_grad_T` in place of those of
    the labels.

    The products are computed in at least fp32 and rounded once. A factor that is rounded to bf16, such as 1 / M for M
    label tokens, would change all gradients of the model by up to 0.4 %. The numbers of the labels are rounded up or
    down in turn, because they are nearly equal in a model that has not learned yet, and would all be rounded in the
    same direction.

    Args:
        p_TV: probabilities in the dtype of the logits.
        label_grad_T: p - 1 of the labels, in at least fp32; 0 for other tokens.
        target_T: the index in V of each label.
        grad: gradient of the sum, a scalar in at least fp32.
    """
    label_grad_T = label_grad_T * grad
    if p_TV.dtype == torch.bfloat16:
        label_grad_T = round_in_turn(label_grad_T)
    if p_TV.dtype == grad.dtype:
        grad_TV = p_TV * grad
    elif p_TV.device.type == "cpu":
        grad_TV = p_TV * grad.item()  # the kernel computes in fp32 if the other factor is a number
    else:
        grad_TV = torch.empty_like(p_TV)
        rows = max(1, CHUNK_ELEMENTS["cuda"] // p_TV.shape[1])
        for chunk, p in zip(grad_TV.split(rows), p_TV.split(rows), strict=True):
            chunk.copy_(p.to(grad.dtype) * grad)
    grad_TV[torch.arange(len(target_T), device=target_T.device), target_T] = label_grad_T.to(p_TV.dtype)
    return grad_TV


def round_in_turn(x_T: Tensor) -> Tensor:
    """Round fp32 numbers to bf16 such that the errors of neighbours cancel out. The mean has no systematic error.

    A number between two bf16 numbers is rounded up for as large a share of the indices as its distance from the lower
    one is of the distance between the two. The thresholds of these indices are a Weyl sequence, which is evenly spread.
    """
    thresholds_T = torch.arange(len(x_T), dtype=torch.int32, device=x_T.device) * 40503 & 0xFFFF
    return (x_T.view(torch.int32) + thresholds_T & -0x10000).view(torch.float32).bfloat16()


class Auxiliary(NamedTuple):
    """The router losses of one micro-batch on this rank, and its global counts."""

    balance_sum: Tensor
    """This rank's contribution to N · L_bal."""
    z_sum: Tensor
    """This rank's contribution to N · L_z."""
    counts_LE: Tensor
    """Assignments to each expert over the global micro-batch, before any drop."""
    dropped: Tensor
    """Dropped assignments of the global micro-batch, over all layers."""
    router_sum: Tensor
    """This rank's contribution to N times the router kind's own term (`Router.auxiliary_loss`); 0 for most kinds."""
    extra_LX: Tensor
    """The router kind's own sums over the global micro-batch, fp64; X = 0 for most kinds."""


class Reductions(NamedTuple):
    """Sums over the ranks that share a micro-batch. The default is one rank.

    The reductions are not repeated when activations are recomputed, because they come after the blocks.
    """

    counts: Callable[[Tensor], Tensor] = lambda counts: counts
    """Sums a tensor over all ranks that have other tokens of the same micro-batch."""
    sequences: Callable[[Tensor], Tensor] = lambda counts: counts
    """Sums an integer tensor over the `sequence_parts` ranks that have other parts of the same sequences."""
    sequence_parts: int = 1


def auxiliary_losses(
    stats: RouterStats, config: RouterConfig, reductions: Reductions | None = None, layers: int | None = None
) -> Auxiliary:
    """Return the balance loss, the z-loss and the router kind's own term, from the statistics of all MoE layers.

    Args:
        stats: stacked over layers.
        config: scope and coefficients of the losses, and the reduction over layers.
        reductions: seam: sums over the ranks that share the micro-batch.
        layers: MoE layers of the whole model, if `stats` is that of a pipeline stage.
    """
    reductions = reductions or Reductions()
    stage_layers, _, num_experts = stats.counts_BE.shape
    layers = stage_layers if layers is None else layers
    if config.balance_scope != "global" and reductions.sequence_parts > 1:
        whole = reductions.sequences(torch.cat((stats.counts_BE, stats.tokens_B.unsqueeze(-1)), dim=-1))
        counts_LBE, tokens_LB = whole[..., :-1], whole[..., -1]
    else:
        counts_LBE, tokens_LB = stats.counts_BE, stats.tokens_B
    local_LE = stats.counts_BE.sum(dim=1)
    # Every rank that has a part of a sequence counts it, so it is counted `sequence_parts` times in all.
    sequences = (tokens_LB[0] > 0).sum()
    totals = torch.stack((stats.dropped_B.sum(), stats.tokens_B[0].sum(), sequences))
    reduced = reductions.counts(torch.cat((local_LE.flatten(), totals)))
    counts_LE = reduced[:-3].view(stage_layers, num_experts)
    dropped, tokens, sequences = reduced[-3:]

    if config.balance_scope == "global":
        balance_L = num_experts * (shares(counts_LE) * stats.prob_sum_BE.sum(dim=1)).sum(dim=-1)
    elif config.balance_scope == "rank":
        balance_L = num_experts * (shares(counts_LBE.sum(dim=1)) * stats.prob_sum_BE.sum(dim=1)).sum(dim=-1)
    else:
        mean_prob_LBE = stats.prob_sum_BE / tokens_LB.clamp(min=1).unsqueeze(-1)
        per_sequence_LB = num_experts * (shares(counts_LBE) * mean_prob_LBE).sum(dim=-1)
        sequence_weight = tokens.double() * reductions.sequence_parts / sequences.clamp(min=1)
        balance_L = per_sequence_LB.sum(dim=1) * sequence_weight
    z_L = stats.z_sum_B.sum(dim=1)
    router_L, extra_LX = _router_term(stats, config, reductions, tokens)
    if config.layer_reduction == "hf_pooled":
        counts = counts_LE if config.balance_scope == "global" else counts_LBE.sum(dim=1)
        pooled = _pooled(counts, stats, num_experts)
        return Auxiliary(pooled, z_L.mean(), counts_LE, dropped, router_L.mean(), extra_LX)
    share = layers if config.layer_reduction == "mean" else 1
    return Auxiliary(balance_L.sum() / share, z_L.sum() / share, counts_LE, dropped, router_L.sum() / share, extra_LX)


def _router_term(
    stats: RouterStats, config: RouterConfig, reductions: Reductions, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """Return this rank's contribution to N times the router kind's own term, per layer [L], and its sums over all
    ranks [L, X]."""
    local_LX = stats.extra_BX.sum(dim=1).double()
    if not local_LX.shape[1]:
        return local_LX.sum(dim=1), local_LX.detach()
    ones = local_LX.new_ones(local_LX.shape[0], 1)
    reduced = reductions.counts(torch.cat((local_LX.detach(), ones), dim=1))
    total_LX, ranks = reduced[:, :-1], reduced[0, -1]
    # The value is that of the sum over all ranks, the gradient that of this rank's part of it.
    term_L = ROUTERS[config.kind].auxiliary_loss(config, total_LX + local_LX - local_LX.detach(), tokens) * tokens
    expect(
        term_L.shape == total_LX.shape[:1],
        "router.kind",
        config.kind,
        f"auxiliary_loss to return one number per layer, [{len(total_LX)}], found {list(term_L.shape)}",
    )
    # Every rank computes the same value, and contributions are summed over ranks.
    return term_L - term_L.detach() * (1 - 1 / ranks), total_LX


def _pooled(counts_LE: Tensor, stats: RouterStats, num_experts: int) -> Tensor:
    """Return N times the balance loss of Hugging Face's Mixtral: f and P over the tokens of all layers, times k."""
    top_k = stats.experts_BSK.shape[-1]
    mean_prob_sum_E = stats.prob_sum_BE.sum(dim=1).mean(dim=0)
    return top_k * num_experts * (shares(counts_LE.sum(dim=0)) * mean_prob_sum_E).sum()


def shares(counts: Tensor) -> Tensor:
    """Return f_e = n_e / Σ n over the last dimension, fp64; zeros if there is no assignment."""
    return counts.double() / counts.sum(dim=-1, keepdim=True).clamp(min=1)
