"""What each rank stores, counted on its own modules and gathered from all ranks."""

import socket
from collections.abc import Sequence

import torch.distributed as dist

from moe.model import Transformer
from parallel.mesh import Mesh
from parallel.weight_specs import kind
from training.report.tables import RankSummary


def gather_rank_summaries(parts: Sequence[Transformer], mesh: Mesh) -> list[RankSummary]:
    """Return one summary per rank, in the order of the ranks, on every rank. Collective.

    Args:
        parts: the modules of this rank: the model, or one module for each of its pipeline stages.
    """
    shards = {name: part.local_shard(name, weight) for part in parts for name, weight in part.named_parameters()}
    expert_shards = [shard for name, shard in shards.items() if kind(name) == "experts"]
    experts = {shard.region.offset[0] + row for shard in expert_shards for row in range(shard.region.shape[0])}
    layers = [number for part in parts for number, layer in enumerate(part.layers) if layer is not None]
    summary = RankSummary(
        rank=mesh.rank,
        host=socket.gethostname(),
        device=str(mesh.device),
        experts=sorted(experts),
        layers=layers,
        parameters=sum(shard.local.numel() for shard in shards.values()),
        bytes=sum(shard.local.numel() * shard.local.element_size() for shard in shards.values()),
        expert_parameters=sum(shard.local.numel() for shard in expert_shards),
    )
    summaries: list[RankSummary] = [summary] * mesh.world_size
    dist.all_gather_object(summaries, summary, group=mesh.world)
    return summaries
