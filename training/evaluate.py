"""Held-out loss, bits per byte and expert load, by domain, over all ranks.

Shapes: B batch, S sequence, V vocabulary, L MoE layers, E experts, K top-k, G domains.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from data.batch import IGNORE, Batch
from moe.model import Transformer
from parallel.mesh import Mesh
from training.step import forward


class Evaluation(NamedTuple):
    loss: float
    """Nats per label token."""
    bits_per_byte: dict[str, float]
    """By domain: nats of its tokens / ln 2 / the UTF-8 bytes they stand for. Ends of documents cost bits, not bytes."""
    load_GLE: Tensor | None
    """Assignments by domain, layer and expert; None in a dense model."""


@torch.no_grad()
def evaluate(
    model: Transformer, batches: Iterable[Batch], domains: tuple[str, ...], token_bytes_V: Tensor, mesh: Mesh
) -> Evaluation:
    """Run every batch through the model; `batches` has the same length on every rank."""
    model.eval()
    nats, labels, size = (torch.zeros(len(domains), dtype=torch.float64, device=mesh.device) for _ in range(3))
    load_GLE = None
    for batch in batches:
        output, batch = forward(model, batch, mesh.device)
        predicted_BS = batch.labels_BS != IGNORE
        wide = torch.promote_types(output.logits_BSV.dtype, torch.float32)
        nats_N = F.cross_entropy(
            output.logits_BSV.flatten(0, 1).to(wide), batch.labels_BS.flatten(), ignore_index=IGNORE, reduction="none"
        )
        domain_N = batch.domains_BS.flatten().long()
        bytes_BS = token_bytes_V[batch.labels_BS.clamp(min=0)] * predicted_BS
        for total, values in ((nats, nats_N), (labels, predicted_BS.flatten()), (size, bytes_BS.flatten())):
            total.index_add_(0, domain_N, values.double())
        if output.stats is not None:
            counts = _load_by_domain(output.stats.experts_BSK, batch, len(domains), output.stats.counts_BE.shape[-1])
            load_GLE = counts if load_GLE is None else load_GLE + counts
    model.train()
    for total in (nats, labels, size) if load_GLE is None else (nats, labels, size, load_GLE):
        dist.all_reduce(total, group=mesh.world)
    bits = {
        name: value / math.log(2) / length if length else math.nan
        for name, value, length in zip(domains, nats.tolist(), size.tolist(), strict=True)
    }
    loss = (nats.sum() / labels.sum()).item()
    return Evaluation(loss, bits, None if load_GLE is None else load_GLE.cpu())


def _load_by_domain(experts_LBSK: Tensor, batch: Batch, num_domains: int, num_experts: int) -> Tensor:
    layers = experts_LBSK.shape[0]
    valid_N = (batch.documents_BS >= 0).flatten()
    domain_N = batch.domains_BS.flatten().long()[valid_N]
    experts_LNK = experts_LBSK.flatten(1, 2)[:, valid_N]
    cell_LNK = domain_N.view(1, -1, 1) * num_experts + experts_LNK
    counts = [
        torch.bincount(cells[experts < num_experts], minlength=num_domains * num_experts)
        for cells, experts in zip(cell_LNK, experts_LNK, strict=True)
    ]
    return torch.stack(counts).view(layers, num_domains, num_experts).transpose(0, 1).contiguous()
