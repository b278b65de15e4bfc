"""Which part of a parameter this rank stores, for code that shards, initialises, saves or counts parameters.

Tensor and expert parallelism shard a parameter along the dims that `parallel/weight_specs.py` names. FSDP
(`parallel.shard`) shards the result once more.
"""

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from moe.region import LocalShard, Region
from parallel.mesh import Mesh
from parallel.weight_specs import kind, tensor_dim


def group_by_dim(name: str, mesh: Mesh) -> dict[int, dist.ProcessGroup]:
    """Return dim -> process group whose ranks each store one of its equal, contiguous parts, without FSDP."""
    dim = tensor_dim(name)
    if dim is None:
        return {}
    return {0: mesh.expert, dim: mesh.expert_tensor} if kind(name) == "experts" else {dim: mesh.tensor}


def local_slice(name: str, tensor: Tensor, mesh: Mesh) -> Tensor:
    """Return a copy of this rank's part of a whole parameter, without FSDP. On the meta device it costs nothing."""
    part = tensor.detach()
    for dim, group in group_by_dim(name, mesh).items():
        part = part.chunk(group.size(), dim)[group.rank()]
    return part.clone()


def shard_locator(mesh: Mesh) -> Callable[[str, Tensor], LocalShard]:
    """Return the seam `Transformer.local_shard` for a model that is sharded over `mesh`."""

    def locate_shard(name: str, tensor: Tensor) -> LocalShard:
        local, region = local_of(tensor)
        shape, offset = list(tensor.shape), list(region.offset)
        for dim, group in group_by_dim(name, mesh).items():
            offset[dim] += group.rank() * shape[dim]
            shape[dim] *= group.size()
        return LocalShard(local, tuple(shape), Region(tuple(offset), region.shape))

    return locate_shard


def local_of(tensor: Tensor) -> tuple[Tensor, Region]:
    """Return the part of `tensor` that is in this rank's memory, and its region in `tensor`.

    This is the whole of a plain tensor. A DTensor of FSDP is sharded along one dim.
    """
    if not isinstance(tensor, DTensor):
        return tensor.detach(), Region.whole(tensor.shape)
    (placement,) = tensor.placements
    assert isinstance(placement, Shard), placement
    local, rank = tensor.to_local().detach(), tensor.device_mesh.get_local_rank()
    offset = [0] * tensor.dim()
    # FSDP shards as torch.chunk does: the last shards can be smaller, or empty.
    length, parts = tensor.shape[placement.dim], tensor.device_mesh.size()
    offset[placement.dim] = min(rank * -(-length // parts), length)
    return local, Region(tuple(offset), tuple(local.shape))


def replica_group(name: str, mesh: Mesh) -> dist.ProcessGroup:
    """Return the ranks of the stage that store the same shard of a parameter. Its gradient is summed over them."""
    return {
        "router": mesh.stage,
        "replicated": mesh.same_replicated,
        "tensor": mesh.same_tensor,
        "experts": mesh.same_experts,
    }[kind(name)]
