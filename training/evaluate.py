"""Held-out loss, bits per byte and expert load per domain, over all ranks.

Shapes: B batch, S sequence, V vocabulary, L MoE layers, E experts, K top-k, G domains.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from data.batch import IGNORE, Batch
from training.engine import Engine
from training.step import move_to_device, token_nats


class Evaluation(NamedTuple):
    """The result of one evaluation, the same on every rank."""

    loss: float
    """Nats per label token."""
    bits_per_byte: dict[str, float]
    """Domain -> nats of its tokens / ln 2 / the UTF-8 bytes that they stand for. The end of a document costs bits, but
    stands for no bytes."""
    load_GLE: Tensor | None
    """Assignments per domain, layer and expert; None in a dense model."""


@torch.no_grad()
def evaluate(engine: Engine, batches: Iterable[Batch], domains: tuple[str, ...], token_bytes_V: Tensor) -> Evaluation:
    """Evaluate the model on every batch. Collective.

    Args:
        batches: batches of whole rows, the same number on every rank.
        domains: names of the domains, in the order of the indices in `Batch.domains_BS`.
        token_bytes_V: UTF-8 bytes that each token id stands for, on the device.
    """
    mesh, config = engine.mesh, engine.parts[0].config
    for model in engine.parts:
        model.eval()
    nats, labels, size = (torch.zeros(len(domains), dtype=torch.float64, device=mesh.device) for _ in range(3))
    shape = (len(domains), config.num_moe_layers, config.num_experts or 0)
    load_GLE = torch.zeros(shape, dtype=torch.int64, device=mesh.device)
    for batch in batches:
        inputs, batch = move_to_device(batch, mesh)
        for model, output in engine.forward(inputs):
            # Ranks of `mesh.tensor` have shards of the logits of the same tokens: one of them counts the tokens.
            if model.is_last:
                nats_BS = token_nats(output.logits_BSV, batch.labels_BS, mesh.tensor).nats_BS
                if mesh.tensor.rank() == 0:
                    predicted_BS = batch.labels_BS != IGNORE
                    domain_N = batch.domains_BS.flatten().long()
                    bytes_BS = token_bytes_V[batch.labels_BS.clamp(min=0)] * predicted_BS
                    for total, values_BS in ((nats, nats_BS), (labels, predicted_BS), (size, bytes_BS)):
                        total.index_add_(0, domain_N, values_BS.flatten().double())
            if output.stats is not None:
                domains_BS, valid_BS = model.slice_local(batch.domains_BS), model.slice_local(batch.documents_BS >= 0)
                load_GLE[:, model.moe_layers] += _load_by_domain(
                    output.stats.experts_BSK, domains_BS, valid_BS, *shape[::2]
                )
    for model in engine.parts:
        model.train()
    for total in (nats, labels, size, load_GLE):
        dist.all_reduce(total, group=mesh.world)
    bits = {
        name: value / math.log(2) / length if length else math.nan
        for name, value, length in zip(domains, nats.tolist(), size.tolist(), strict=True)
    }
    return Evaluation((nats.sum() / labels.sum()).item(), bits, load_GLE.cpu() if config.is_moe else None)


def _load_by_domain(
    experts_LBSK: Tensor, domains_BS: Tensor, valid_BS: Tensor, num_domains: int, num_experts: int
) -> Tensor:
    valid_N = valid_BS.flatten()
    domain_N = domains_BS.flatten().long()[valid_N]
    experts_LNK = experts_LBSK.flatten(1, 2)[:, valid_N]
    cell_LNK = domain_N.view(1, -1, 1) * num_experts + experts_LNK
    counts = [
        torch.bincount(cells[experts < num_experts], minlength=num_domains * num_experts)
        for cells, experts in zip(cell_LNK, experts_LNK, strict=True)
    ]
    return torch.stack(counts).view(experts_LBSK.shape[0], num_domains, num_experts).transpose(0, 1).contiguous()
