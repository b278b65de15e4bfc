"""Tensor parallelism: heads, hidden units and the vocabulary are cut over ranks, and between them the sequence is.

Shapes: B batch, S sequence (local to the context rank), s = S/P of it on each of the P ranks, D model, V vocabulary,
v = V/P rows of it on each rank.

(Megatron-LM, arXiv 1909.08053, with sequence parallelism, 2205.05198.) A network gathers the sequence, works with its
part of the weights, and scatters the sum of all ranks' results; norms, routers and experts see [B, s, D]. Logits are
never gathered: the cross-entropy is taken on [B, S, v].
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.attention.attention import Attention
from moe.feedforward import FeedForward
from moe.losses import IGNORE
from moe.model import Lookup, Transformer
from parallel.collectives import GatherSequence, ScatterSequence, SliceSequence
from parallel.mesh import Mesh
from parallel.weight_shards import local_slice
from parallel.weight_specs import kind


class ShardedLookup(nn.Module):
    """Each rank looks up the tokens that its rows of the embedding are for; summed, and the sequence cut."""

    def __init__(self, inner: Lookup, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.inner = inner
        self.group = group
        self.scatter = ScatterSequence(group)

    def forward(self, tokens_BS: Tensor, embedding_vD: Tensor) -> Tensor:
        local_BS = tokens_BS - self.group.rank() * embedding_vD.shape[0]
        elsewhere_BS1 = ((local_BS < 0) | (local_BS >= embedding_vD.shape[0])).unsqueeze(-1)
        x_BSD = self.inner(local_BS.masked_fill(elsewhere_BS1.squeeze(-1), 0), embedding_vD)
        part: Tensor = self.scatter(x_BSD.masked_fill(elsewhere_BS1, 0))
        return part


def shard_tensors(model: Transformer, mesh: Mesh) -> None:
    """Keep this rank's part of the weights that `parallel/weight_specs.py` names, and install the seams around them."""
    group = mesh.tensor
    for prefix, module in model.named_modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            name = f"{prefix}.{leaf}" if prefix else leaf
            if kind(name) == "tensor":
                setattr(module, leaf, nn.Parameter(local_slice(name, parameter, mesh)))
        if isinstance(module, Attention | FeedForward):
            module.gather, module.scatter = GatherSequence(group), ScatterSequence(group)
    assert isinstance(model.lookup, Lookup)
    model.lookup = ShardedLookup(model.lookup, group)
    model.gather, model.slice_local = GatherSequence(group), SliceSequence(group)


def cross_entropy(logits_BSv: Tensor, labels_BS: Tensor, group: dist.ProcessGroup) -> Tensor:
    """-log softmax(logits)[label] of every place [B, S], in nats, in at least fp32; 0 where there is no label.

    Every rank of `group` returns the same; each one's gradient is that of its own part of the logits.
    """
    nats: Tensor = _ShardedCrossEntropy.apply(logits_BSv, labels_BS, group)
    return nats


class _ShardedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_BSv: Tensor, labels_BS: Tensor, group: dist.ProcessGroup) -> Tensor:  # type: ignore[override]
        wide = torch.promote_types(logits_BSv.dtype, torch.float32)
        logits = logits_BSv.to(wide)
        largest_BS = logits.amax(dim=-1)
        dist.all_reduce(largest_BS, op=dist.ReduceOp.MAX, group=group)
        p_BSv = (logits - largest_BS.unsqueeze(-1)).exp_()
        local_BS = labels_BS - group.rank() * logits.shape[-1]
        here_BS = (local_BS >= 0) & (local_BS < logits.shape[-1]) & (labels_BS != IGNORE)
        target_BS1 = local_BS.masked_fill(~here_BS, 0).unsqueeze(-1)
        logit_BS = logits.gather(-1, target_BS1).squeeze(-1) * here_BS
        sums = torch.stack((p_BSv.sum(dim=-1), logit_BS))
        dist.all_reduce(sums, group=group)
        counted_BS = labels_BS != IGNORE
        nats_BS = (sums[0].log() + largest_BS - sums[1]) * counted_BS
        p_BSv.div_(sums[0].unsqueeze(-1)).scatter_add_(-1, target_BS1, -here_BS.to(wide).unsqueeze(-1))
        ctx.save_for_backward(p_BSv.mul_(counted_BS.unsqueeze(-1)).to(logits_BSv.dtype))
        return nats_BS

    @staticmethod
    def backward(ctx: Any, grad_BS: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (grad_BSv,) = ctx.saved_tensors
        return grad_BSv * grad_BS.unsqueeze(-1).to(grad_BSv.dtype), None, None
