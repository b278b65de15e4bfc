"""Every term of the loss (docs/losses.md has the formulas and their sources).

Shapes: B batch (sequences), S sequence, T tokens (B · S, or a chunk of them), D model, V vocabulary (or this rank's
part of it), L MoE layers, E experts, M figures of a layer (`LAYER_FIGURES`); N tokens of the global micro-batch.

All functions return *sums* over the tokens of this rank. `training.step` divides them, once, by the number of tokens
of the whole optimizer step. A plain sum over ranks and micro-batches is therefore the loss of the global batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from common.errors import expect
from moe.chunks import chunks
from moe.config import RouterConfig
from moe.device import on_gpu
from moe.kernels import use_kernels
from moe.router import ROUTERS, RouterStats

IGNORE = -100
"""Label of positions that are not predicted."""
CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**27}
"""Logits that exist at once. With more of them, adding the products of all chunks to the gradient of the head's weight
takes a smaller share of the time: 2 to 8 % for a vocabulary of 32,000."""
EAGER_ELEMENTS = {"cpu": 2**18, "cuda": 2**27}
"""Logits that eager code has in fp32 at once; on CPUs they fit into a core's cache."""


class CrossEntropy(NamedTuple):
    """The cross-entropy of the tokens of this rank, in nats, in at least fp32."""

    total: Tensor
    """`factor` times the sum of all entries of `nats_BS`. Carries the gradient."""
    nats_BS: Tensor
    """-log softmax(logits)[label]; 0 where there is no label. No gradient."""


class Vocabulary(NamedTuple):
    """The entries of the vocabulary whose logits this rank computes. The default is one rank with all of them."""

    first: int = 0
    """The index in the vocabulary of this rank's first entry."""
    join: Callable[[Tensor], Tensor] = lambda stats_3T: stats_3T
    """Joins the results of `softmax_statistics` of all ranks. Collective."""
    most: int | None = None
    """Entries of the rank that has most, on which the number of chunks depends; None: as many as this rank."""


def linear_cross_entropy(
    x_BSD: Tensor,
    weight_VD: Tensor,
    labels_BS: Tensor,
    factor: float | Tensor = 1.0,
    vocabulary: Vocabulary | None = None,
) -> CrossEntropy:
    """Return the cross-entropy of the logits x W^T, of which only one chunk of tokens exists at a time.

    The gradients are computed in the forward pass, while the logits exist, and one backward pass takes them. They are
    multiplied by `factor` in fp32 before the gradient of the logits is rounded to the compute dtype. A factor that is
    rounded to bf16, such as 1 / M for M label tokens, would change all gradients of the model by up to 0.4 %. The
    gradient of the weight is summed over chunks in at least fp32.

    Args:
        x_BSD: hidden states after the last norm. Their dtype is that of the matmuls.
        weight_VD: the weight of the head.
        labels_BS: indices in the vocabulary, or `IGNORE`.
        factor: a number, or a scalar on the device.
        vocabulary: seam: the part of the vocabulary that `weight_VD` belongs to; None: all of it.
    """
    vocabulary = vocabulary or Vocabulary()
    wide = _wide(x_BSD)
    counted_T = labels_BS.flatten() != IGNORE
    factor_T = counted_T.to(wide) * factor
    x_needs, weight_needs = (torch.is_grad_enabled() and tensor.requires_grad for tensor in (x_BSD, weight_VD))
    with torch.no_grad():
        x_TD, labels_T, weight = x_BSD.flatten(0, 1), labels_BS.flatten(), weight_VD.to(x_BSD.dtype)
        stats_3T = torch.empty(3, len(x_TD), dtype=wide, device=x_TD.device)
        grad_TD = torch.empty_like(x_TD) if x_needs else None
        grad_VD = torch.empty_like(weight, dtype=wide) if weight_needs else None
        for rows in chunks(len(x_TD), vocabulary.most or len(weight), _limit(CHUNK_ELEMENTS, x_TD)):
            logits_TV = F.linear(x_TD[rows], weight)
            stats_3T[:, rows] = vocabulary.join(softmax_statistics(logits_TV, labels_T[rows], vocabulary.first))
            if x_needs or weight_needs:
                write_logit_gradient(
                    logits_TV, labels_T[rows], vocabulary.first, stats_3T[:, rows], factor_T[rows], rows.start
                )
            if grad_TD is not None:
                torch.mm(logits_TV, weight, out=grad_TD[rows])
            if grad_VD is not None:
                _add_product(grad_VD, logits_TV, x_TD[rows], first=rows.start == 0)
            del logits_TV  # before the next chunk is allocated
        largest_T, sum_T, label_T = stats_3T
        nats_T = (sum_T.log() - (label_T - largest_T)).masked_fill(~counted_T, 0)
        total = nats_T.sum() * factor
    if grad_TD is not None:
        total = total + _StoredGradient.apply(x_BSD, grad_TD.view_as(x_BSD))
    if grad_VD is not None:
        total = total + _StoredGradient.apply(weight_VD, grad_VD)
    return CrossEntropy(total, nats_T.view_as(labels_BS))


def softmax_statistics(logits_TV: Tensor, labels_T: Tensor, first: int) -> Tensor:
    """Return, in at least fp32 [3, T]: the largest logit, Σ exp(logit - largest), and the logit of the label.

    Args:
        logits_TV: logits of the entries first, first + 1, ... of the vocabulary. Without entries, the results are -inf,
            0 and 0.
        labels_T: indices in the vocabulary. The logit of a label that is not among the entries is 0.
    """
    if use_kernels(logits_TV):
        from moe.kernels import cross_entropy

        stats: Tensor = cross_entropy.softmax_statistics(logits_TV, labels_T, first)
        return stats
    stats_3T = torch.zeros(3, len(logits_TV), dtype=_wide(logits_TV), device=logits_TV.device)
    entries = logits_TV.shape[1]
    if not entries:
        stats_3T[0] = -torch.inf
        return stats_3T
    target_T1, here_T1 = _targets(labels_T, first, entries)
    for rows in chunks(len(logits_TV), entries, _limit(EAGER_ELEMENTS, logits_TV)):
        x_TV = logits_TV[rows].to(stats_3T.dtype)
        largest_T1 = x_TV.amax(dim=1, keepdim=True)
        label_T1 = x_TV.gather(1, target_T1[rows]).masked_fill(~here_T1[rows], 0)
        sum_T1 = (x_TV - largest_T1).exp_().sum(dim=1, keepdim=True)
        stats_3T[:, rows] = torch.cat((largest_T1, sum_T1, label_T1), dim=1).t()
    return stats_3T


def write_logit_gradient(
    logits_TV: Tensor, labels_T: Tensor, first: int, stats_3T: Tensor, factor_T: Tensor, number: int
) -> None:
    """Overwrite the logits by the gradient factor · (softmax(logits) - [entry is the label]), rounded once.

    The numbers of the labels are rounded to bf16 up or down in turn (`round_in_turn`), because they are nearly equal in
    a model that has not learned yet, and would all be rounded in the same direction.

    Args:
        logits_TV, labels_T, first: as for `softmax_statistics`.
        stats_3T: the statistics over the whole vocabulary.
        factor_T: the factor of each row, in at least fp32; 0 without a label.
        number: the number of the first row among all tokens, on which the rounding in turn depends.
    """
    if use_kernels(logits_TV):
        from moe.kernels import cross_entropy

        cross_entropy.write_logit_gradient(logits_TV, labels_T, first, stats_3T, factor_T, number)
        return
    entries = logits_TV.shape[1]
    if not entries:
        return
    target_T1, here_T1 = _targets(labels_T, first, entries)
    largest_T1, sum_T1, _ = stats_3T.unsqueeze(-1)
    factor_T1 = factor_T.unsqueeze(1)
    for rows in chunks(len(logits_TV), entries, _limit(EAGER_ELEMENTS, logits_TV)):
        chunk_TV = logits_TV[rows]
        grad_TV = chunk_TV.to(stats_3T.dtype)  # `chunk_TV` itself if it has this dtype
        grad_TV.sub_(largest_T1[rows]).exp_().mul_(factor_T1[rows] / sum_T1[rows])
        other_T1 = grad_TV.gather(1, target_T1[rows])
        label_T1 = other_T1 - factor_T1[rows]
        if chunk_TV.dtype == torch.bfloat16:
            label_T1 = round_in_turn(label_T1.squeeze(1), number + rows.start).unsqueeze(1)
        chunk_TV.copy_(grad_TV)
        chunk_TV.scatter_(1, target_T1[rows], label_T1.where(here_T1[rows], other_T1).to(chunk_TV.dtype))


def _targets(labels_T: Tensor, first: int, entries: int) -> tuple[Tensor, Tensor]:
    """Return the index of each label among this rank's entries [T, 1], and whether it is one of them, else index 0."""
    local_T1 = (labels_T - first).unsqueeze(1)
    here_T1 = (local_T1 >= 0) & (local_T1 < entries)
    return local_T1.masked_fill(~here_T1, 0), here_T1


def _limit(elements: dict[str, int], x: Tensor) -> int:
    """Return the number for the device of `x`."""
    return elements["cuda" if on_gpu(x) else "cpu"]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def round_in_turn(x_T: Tensor, number: int = 0) -> Tensor:
    """Round fp32 numbers to bf16 such that the errors of neighbours cancel out. The mean has no systematic error.

    A number between two bf16 numbers is rounded up for as large a share of the indices as its distance from the lower
    one is of the distance between the two. The thresholds of these indices are a Weyl sequence, which is evenly spread.

    Args:
        number: the index of the first number.
    """
    index_T = torch.arange(number, number + len(x_T), dtype=torch.int32, device=x_T.device)
    return (x_T.view(torch.int32) + (index_T * 40503 & 0xFFFF) & -0x10000).view(torch.float32).bfloat16()


def _add_product(sum_VD: Tensor, grad_TV: Tensor, x_TD: Tensor, first: bool) -> None:
    """Add `grad_TV^T x_TD` to `sum_VD`, which has at least fp32, or write it there if it is the first one."""
    beta = 0 if first else 1
    if sum_VD.dtype == x_TD.dtype:
        torch.addmm(sum_VD, grad_TV.t(), x_TD, beta=beta, out=sum_VD)
    elif on_gpu(x_TD):
        _add_bf16_product(sum_VD, grad_TV, x_TD, beta)
    elif first:
        sum_VD.copy_(grad_TV.t() @ x_TD)
    else:
        sum_VD.add_(grad_TV.t() @ x_TD)


@torch.library.custom_op("mixwright::add_bf16_product", mutates_args=("sum_VD",))
def _add_bf16_product(sum_VD: Tensor, grad_TV: Tensor, x_TD: Tensor, beta: int) -> None:
    """Compute `sum_VD = beta * sum_VD + grad_TV^T x_TD` with a matmul that adds to fp32 numbers, without rounding.

    It is an operator of its own because torch cannot trace the one that it calls.
    """
    torch.ops.aten.addmm.dtype_out(sum_VD, grad_TV.t(), x_TD, torch.float32, beta=beta, out=sum_VD)


@_add_bf16_product.register_fake
def _(sum_VD: Tensor, grad_TV: Tensor, x_TD: Tensor, beta: int) -> None:
    """Do nothing, because the shape of `sum_VD` does not change."""


class _StoredGradient(torch.autograd.Function):
    """Returns 0, whose gradient with respect to `x` is known. One backward pass multiplies it in place and returns it.

    Every input has a function of its own, because a zero bubble schedule computes the gradients of hidden states and of
    weights in two backward passes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient, ctx.dtype = gradient, x.dtype
        return torch.zeros((), dtype=_wide(x), device=x.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("linear_cross_entropy: expected one backward pass, found a second")
        return gradient.to(grad.dtype).mul_(grad).to(ctx.dtype), None


class Auxiliary(NamedTuple):
    """The router losses of one micro-batch on this rank, and its global counts."""

    balance_sum: Tensor
    """This rank's contribution to N · L_bal."""
    z_sum: Tensor
    """This rank's contribution to N · L_z."""
    counts_LE: Tensor
    """Assignments to each expert over the global micro-batch, before any drop."""
    kept_LE: Tensor
    """Those that are dispatched."""
    figures_LM: Tensor
    """This rank's contribution to N times `LAYER_FIGURES` of each layer, fp64. No gradient."""
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
    local_2LE = torch.stack((stats.counts_BE.sum(dim=1), stats.kept_BE.sum(dim=1)))
    # Every rank that has a part of a sequence counts it, so it is counted `sequence_parts` times in all.
    sequences = (tokens_LB[0] > 0).sum()
    totals = torch.stack((stats.tokens_B[0].sum(), sequences))
    reduced = reductions.counts(torch.cat((local_2LE.flatten(), totals)))
    counts_LE, kept_LE = reduced[:-2].view_as(local_2LE)
    tokens, sequences = reduced[-2:]

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
    figures_LM = torch.cat((torch.stack((balance_L, z_L), dim=1), stats.figures_BM.sum(dim=1)), dim=1).detach().double()
    if config.layer_reduction == "hf_pooled":
        counts = counts_LE if config.balance_scope == "global" else counts_LBE.sum(dim=1)
        pooled = _pooled(counts, stats, num_experts)
        return Auxiliary(pooled, z_L.mean(), counts_LE, kept_LE, figures_LM, router_L.mean(), extra_LX)
    share = layers if config.layer_reduction == "mean" else 1
    return Auxiliary(
        balance_L.sum() / share, z_L.sum() / share, counts_LE, kept_LE, figures_LM, router_L.sum() / share, extra_LX
    )


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
