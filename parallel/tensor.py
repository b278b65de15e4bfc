"""Tensor parallelism: ranks share heads, hidden units and the vocabulary, and between these networks the sequence.

Shapes: B batch, S sequence (of the context rank), s = S/P of it on each of the P ranks, D model, V vocabulary, v = V/P
entries of it on each rank, rounded up. If P does not divide V, the last ranks have fewer entries, or none.

(Megatron-LM, arXiv 1909.08053, with sequence parallelism, 2205.05198.) Attention and dense networks gather the
sequence, compute with their shard of the weights, and scatter the sum of all ranks' results. Norms, routers and experts
work on [B, s, D]. Logits are never gathered: ranks exchange the sums of the cross-entropy of their entries.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from moe.attention.attention import Attention, GroupedQueryAttention
from moe.feedforward import FeedForward
from moe.linear import Lookup, RMSNorm
from moe.losses import Vocabulary
from moe.model import Transformer
from parallel.collectives import GatherSequence, ScatterSequence, SliceSequence, sum_over_ranks
from parallel.mesh import Mesh
from parallel.weight_shards import local_slice
from parallel.weight_specs import kind, part_of


class ShardedLookup(nn.Module):
    """Looks up the tokens whose rows of the embedding this rank stores; the sum over ranks is split by sequence."""

    def __init__(self, inner: Lookup, group: dist.ProcessGroup, vocab_size: int) -> None:
        super().__init__()
        self.inner = inner
        self.first, self.entries = part_of(vocab_size, group.size(), group.rank())
        self.scatter = ScatterSequence(group)

    def forward(self, tokens_BS: Tensor, embedding_vD: Tensor) -> Tensor:
        """Return this rank's part of the embedded sequence, [B, s, D].

        Args:
            tokens_BS: token ids of the whole vocabulary.
            embedding_vD: this rank's rows of the embedding.
        """
        local_BS = tokens_BS - self.first
        on_other_ranks_BS1 = ((local_BS < 0) | (local_BS >= self.entries)).unsqueeze(-1)
        if not self.entries:  # One masked row, so that this rank takes part in the forward and the backward pass.
            embedding_vD = F.pad(embedding_vD, (0, 0, 0, 1))
        x_BSD = self.inner(local_BS.masked_fill(on_other_ranks_BS1.squeeze(-1), 0), embedding_vD)
        return self.scatter(x_BSD.masked_fill(on_other_ranks_BS1, 0))


class ShardedNorm(RMSNorm):
    """RMSNorm of queries or keys of all heads, of which each rank has an equal part [B, S, H·C/P].

    Every rank stores the whole weight. It is small, and its gradient is summed over all ranks as that of other norms.

    Args:
        inner: the norm of all heads.
        parts: number of different parts. Neighbouring ranks have the same part if there are fewer parts than ranks.
            All parts then have the same number of copies, so that the mean over the ranks is that over the heads.
    """

    def __init__(self, inner: RMSNorm, group: dist.ProcessGroup, parts: int) -> None:
        super().__init__(inner.weight.shape[0], inner.eps)
        self.weight = inner.weight
        self.group = group
        self.first, self.length = part_of(inner.weight.shape[0], parts, group.rank() * parts // group.size())

    def forward(self, x: Tensor) -> Tensor:
        """Normalise this rank's part `x` [B, S, H·C/P] by the root mean square of all parts."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        squares_BS1 = sum_over_ranks(wide.square().mean(dim=-1, keepdim=True), self.group)
        normed = wide * torch.rsqrt(squares_BS1 / self.group.size() + self.eps)
        return normed.to(x.dtype) * self.weight.narrow(0, self.first, self.length).to(x.dtype)


def shard_tensors(model: Transformer, mesh: Mesh) -> None:
    """Replace the weights that `parallel.weight_specs` marks as tensor-parallel by this rank's shards, and install the
    modules that gather and scatter the sequence around them."""
    group = mesh.tensor
    for prefix, module in model.named_modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            name = f"{prefix}.{leaf}" if prefix else leaf
            if kind(name) in ("tensor", "kv_heads"):
                setattr(module, leaf, nn.Parameter(local_slice(name, parameter, mesh)))
        if isinstance(module, Attention | FeedForward):
            module.gather, module.scatter = GatherSequence(group), ScatterSequence(group)
        if isinstance(module, GroupedQueryAttention) and model.config.qk_norm == "width":
            assert isinstance(module.q_norm, RMSNorm) and isinstance(module.k_norm, RMSNorm)
            module.q_norm = ShardedNorm(module.q_norm, group, group.size())
            module.k_norm = ShardedNorm(module.k_norm, group, group.size() // mesh.layout.kv_copies)
    assert isinstance(model.lookup, Lookup) and model.config.vocab_size is not None
    model.lookup = ShardedLookup(model.lookup, group, model.config.vocab_size)
    model.gather, model.slice_local = GatherSequence(group), SliceSequence(group)


def vocabulary_part(group: dist.ProcessGroup, vocab_size: int) -> Vocabulary:
    """Return the part of the vocabulary that this rank of `group` has, for `moe.losses.linear_cross_entropy`.

    Args:
        vocab_size: V, the entries of all ranks.
    """
    if group.size() == 1:
        return Vocabulary()
    first, _ = part_of(vocab_size, group.size(), group.rank())
    _, most = part_of(vocab_size, group.size(), 0)
    return Vocabulary(first=first, join=partial(_join_statistics, group), most=most)


def _join_statistics(group: dist.ProcessGroup, stats_3T: Tensor) -> Tensor:
    """Return the softmax statistics of the whole vocabulary (`moe.losses.softmax_statistics`). Collective."""
    local_T, sum_T, label_T = stats_3T
    largest_T = local_T.clone()
    dist.all_reduce(largest_T, op=dist.ReduceOp.MAX, group=group)
    sums_2T = torch.stack((sum_T * (local_T - largest_T).exp(), label_T))
    dist.all_reduce(sums_2T, group=group)
    return torch.cat((largest_T.unsqueeze(0), sums_2T))
