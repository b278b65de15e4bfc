"""What each rank really holds, counted on its own module and gathered."""

import socket

import torch.distributed as dist

from moe.experts import Experts
from moe.flops import count_parameters
from moe.model import Transformer
from parallel.mesh import Mesh
from training.report import RankHoldings


def gather_holdings(model: Transformer, mesh: Mesh) -> list[RankHoldings]:
    """One entry a rank, in rank order, on every rank."""
    counts = count_parameters(model)
    experts = next((module for module in model.modules() if isinstance(module, Experts)), None)
    held = [] if experts is None else range(experts.first_expert, experts.first_expert + experts.held)
    own = RankHoldings(
        rank=mesh.rank,
        host=socket.gethostname(),
        device=str(mesh.device),
        experts=list(held),
        parameters=counts.total,
        bytes=sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
        expert_parameters=counts.experts,
    )
    gathered: list[RankHoldings] = [own] * mesh.world_size
    dist.all_gather_object(gathered, own, group=mesh.world)
    return gathered
