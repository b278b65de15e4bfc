"""Where this rank's part of a parameter lies in the whole: asked by whoever cuts, draws, saves or counts.

Tensor parallelism cuts what `parallel/weight_specs.py` names, expert parallelism the experts, and FSDP
(`parallel.shard`) what is left of either, once more.
"""

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from moe.region import LocalShard, Region
from parallel.mesh import Mesh
from parallel.weight_specs import cut_dim, kind


def cuts(name: str, mesh: Mesh) -> dict[int, dist.ProcessGroup]:
    """Dim -> the group whose ranks each hold one of its equal, contiguous parts (FSDP's cut apart)."""
    dim = cut_dim(name)
    if dim is None:
        return {}
    return {0: mesh.expert, dim: mesh.expert_tensor} if kind(name) == "experts" else {dim: mesh.tensor}


def local_slice(name: str, tensor: Tensor, mesh: Mesh) -> Tensor:
    """A copy of this rank's part of the whole `tensor` (on the meta device it costs nothing)."""
    part = tensor.detach()
    for dim, group in cuts(name, mesh).items():
        part = part.chunk(group.size(), dim)[group.rank()]
    return part.clone()


def shard_locator(mesh: Mesh) -> Callable[[str, Tensor], LocalShard]:
    """The seam `Transformer.local_shard` for a model that was cut over `mesh`."""

    def locate_shard(name: str, tensor: Tensor) -> LocalShard:
        local, inner = local_of(tensor)
        shape, offset = list(tensor.shape), list(inner.offset)
        for dim, group in cuts(name, mesh).items():
            offset[dim] += group.rank() * shape[dim]
            shape[dim] *= group.size()
        return LocalShard(local, tuple(shape), Region(tuple(offset), inner.shape))

    return locate_shard


def local_of(tensor: Tensor) -> tuple[Tensor, Region]:
    """The memory that lies here, and which region of `tensor` it is. FSDP's DTensors have one cut along one dim."""
    if not isinstance(tensor, DTensor):
        return tensor.detach(), Region.whole(tensor.shape)
    (placement,) = tensor.placements
    assert isinstance(placement, Shard), placement
    local, rank = tensor.to_local().detach(), tensor.device_mesh.get_local_rank()
    offset = [0] * tensor.dim()
    # as torch.chunk cuts: the last parts may be shorter, or empty
    length, parts = tensor.shape[placement.dim], tensor.device_mesh.size()
    offset[placement.dim] = min(rank * -(-length // parts), length)
    return local, Region(tuple(offset), tuple(local.shape))


def replica_group(name: str, mesh: Mesh) -> dist.ProcessGroup:
    """Ranks of the stage that hold the same part of the parameter: its gradients are summed over them."""
    return {
        "whole": mesh.stage,
        "replicated": mesh.same_replicated,
        "tensor": mesh.same_tensor,
        "experts": mesh.same_experts,
    }[kind(name)]
