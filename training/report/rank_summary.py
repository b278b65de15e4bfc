"""What each rank really holds, counted on its own modules and gathered."""

import socket
from collections.abc import Sequence

import torch.distributed as dist

from moe.model import Transformer
from parallel.mesh import Mesh
from parallel.weight_specs import kind
from training.report.tables import RankSummary


def gather_rank_summaries(parts: Sequence[Transformer], mesh: Mesh) -> list[RankSummary]:
    """One entry a rank, in rank order, on every rank."""
    held = {name: part.local_shard(name, weight) for part in parts for name, weight in part.named_parameters()}
    of_experts = [weight for name, weight in held.items() if kind(name) == "experts"]
    experts = {weight.region.offset[0] + row for weight in of_experts for row in range(weight.region.shape[0])}
    layers = [number for part in parts for number, layer in enumerate(part.layers) if layer is not None]
    own = RankSummary(
        rank=mesh.rank,
        host=socket.gethostname(),
        device=str(mesh.device),
        experts=sorted(experts),
        layers=layers,
        parameters=sum(weight.local.numel() for weight in held.values()),
        bytes=sum(weight.local.numel() * weight.local.element_size() for weight in held.values()),
        expert_parameters=sum(weight.local.numel() for weight in of_experts),
    )
    gathered: list[RankSummary] = [own] * mesh.world_size
    dist.all_gather_object(gathered, own, group=mesh.world)
    return gathered
