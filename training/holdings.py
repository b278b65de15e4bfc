"""What each rank really holds, counted on its own modules and gathered."""

import socket
from collections.abc import Sequence

import torch.distributed as dist

from moe.model import Transformer
from parallel.inventory import kind
from parallel.mesh import Mesh
from training.report import RankHoldings


def gather_holdings(parts: Sequence[Transformer], mesh: Mesh) -> list[RankHoldings]:
    """One entry a rank, in rank order, on every rank."""
    held = {name: part.locate(name, weight) for part in parts for name, weight in part.named_parameters()}
    of_experts = [weight for name, weight in held.items() if kind(name) == "experts"]
    experts = {weight.region.offset[0] + row for weight in of_experts for row in range(weight.region.shape[0])}
    layers = [number for part in parts for number, layer in enumerate(part.layers) if layer is not None]
    own = RankHoldings(
        rank=mesh.rank,
        host=socket.gethostname(),
        device=str(mesh.device),
        experts=sorted(experts),
        layers=layers,
        parameters=sum(weight.local.numel() for weight in held.values()),
        bytes=sum(weight.local.numel() * weight.local.element_size() for weight in held.values()),
        expert_parameters=sum(weight.local.numel() for weight in of_experts),
    )
    gathered: list[RankHoldings] = [own] * mesh.world_size
    dist.all_gather_object(gathered, own, group=mesh.world)
    return gathered
