"""Tensor parallelism: ranks share heads, hidden units and the vocabulary, and between these networks the sequence.

Shapes: B batch, S sequence (of the context rank), s = S/P of it on each of the P ranks, D model, V vocabulary, v = V/P
entries of it on each rank, rounded up. If P does not divide V, the last ranks have fewer entries, or none.

(Megatron-LM, arXiv 1909.08053, with sequence parallelism, 2205.05198.) Attention and dense networks gather the
sequence, compute with their shard of the weights, and scatter the sum of all ranks' results. Norms, routers and experts
work on [B, s, D]. Logits are never gathered: the cross-entropy is computed on [B, S, v].
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from moe.attention.attention import Attention
from moe.feedforward import FeedForward
from moe.losses import IGNORE, TokenNats, scaled_gradient
from moe.model import Lookup, Transformer
from parallel.collectives import GatherSequence, ScatterSequence, SliceSequence
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
    assert isinstance(model.lookup, Lookup) and model.config.vocab_size is not None
    model.lookup = ShardedLookup(model.lookup, group, model.config.vocab_size)
    model.gather, model.slice_local = GatherSequence(group), SliceSequence(group)


def sharded_token_nats(logits_BSv: Tensor, labels_BS: Tensor, group: dist.ProcessGroup, vocab_size: int) -> TokenNats:
    """Compute `moe.losses.token_nats` for logits that are sharded over the vocabulary. Collective over `group`.

    Args:
        logits_BSv: this rank's shard of the logits.
        vocab_size: V, the logits of all ranks.

    Returns:
        The same values on every rank. The gradient of the sum is that of this rank's shard of the logits.
    """
    first, entries = part_of(vocab_size, group.size(), group.rank())
    if not entries:  # One masked logit, so that this rank takes part in every sum.
        logits_BSv = F.pad(logits_BSv, (0, 1), value=-torch.inf)
    total, nats_BS = _ShardedCrossEntropy.apply(logits_BSv, labels_BS - first, labels_BS != IGNORE, group)
    return TokenNats(nats_BS, total)


class _ShardedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_BSv: Tensor, local_BS: Tensor, counted_BS: Tensor, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(logits_BSv.dtype, torch.float32)
        logits = logits_BSv.to(wide)
        largest_BS = logits.amax(dim=-1)
        dist.all_reduce(largest_BS, op=dist.ReduceOp.MAX, group=group)
        p_BSv = (logits - largest_BS.unsqueeze(-1)).exp_()
        on_rank_BS = (local_BS >= 0) & (local_BS < logits.shape[-1]) & counted_BS
        target_BS1 = local_BS.masked_fill(~on_rank_BS, 0).unsqueeze(-1)
        logit_BS = logits.gather(-1, target_BS1).squeeze(-1).masked_fill(~on_rank_BS, 0)
        sums = torch.stack((p_BSv.sum(dim=-1), logit_BS))
        dist.all_reduce(sums, group=group)
        nats_BS = (sums[0].log() + largest_BS - sums[1]) * counted_BS
        p_BSv.div_(sums[0].unsqueeze(-1)).mul_(counted_BS.unsqueeze(-1))
        # Where the label is in the shard of another rank, this is the number at index 0, which stays as it is.
        label_grad_BS1 = p_BSv.gather(-1, target_BS1) - on_rank_BS.to(wide).unsqueeze(-1)
        ctx.save_for_backward(p_BSv.to(logits_BSv.dtype), label_grad_BS1, target_BS1)
        ctx.mark_non_differentiable(nats_BS)
        return nats_BS.sum(), nats_BS

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None, None, None]:
        p_BSv, label_grad_BS1, target_BS1 = ctx.saved_tensors
        grad_Tv = scaled_gradient(p_BSv.flatten(0, 1), label_grad_BS1.flatten(), target_BS1.flatten(), grad)
        return grad_Tv.view_as(p_BSv), None, None, None
