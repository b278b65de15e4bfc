"""Which part of a parameter this rank stores, for code that shards, initialises, saves or counts parameters.

Tensor and expert parallelism shard a parameter along the dims that `parallel/weight_specs.py` names. FSDP
(`parallel.shard`) shards the result once more.
"""

from collections.abc import Callable, Mapping

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from moe.region import LocalShard, Region
from parallel.mesh import Mesh
from parallel.weight_specs import WeightSpec, kind, part_of, parts_by_dim, tensor_dim


def part_by_dim(name: str, mesh: Mesh) -> dict[int, tuple[int, int]]:
    """Return dim -> (number of parts, index of this rank's part) for the dims that are divided, without FSDP."""
    of, sharded = kind(name), tensor_dim(name)
    groups = {sharded: mesh.expert_tensor, 0: mesh.expert} if of == "experts" else {sharded: mesh.tensor}
    # Neighbouring ranks of a group store the same part if there are fewer parts than ranks.
    return {
        dim: (parts, groups[dim].rank() * parts // groups[dim].size())
        for dim, parts in parts_by_dim(of, sharded, mesh.layout).items()
        if parts > 1
    }


def local_slice(name: str, tensor: Tensor, mesh: Mesh) -> Tensor:
    """Return a copy of this rank's part of a whole parameter, without FSDP. On the meta device it costs nothing."""
    part = tensor.detach()
    for dim, (parts, index) in part_by_dim(name, mesh).items():
        part = part.narrow(dim, *part_of(part.shape[dim], parts, index))
    return part.clone()


def shard_locator(mesh: Mesh, weights: Mapping[str, WeightSpec]) -> Callable[[str, Tensor], LocalShard]:
    """Return the seam `Transformer.local_shard` for a model that is sharded over `mesh`.

    Args:
        weights: the result of `parallel.weight_specs.named_weights`, for the shapes of the whole parameters.
    """

    def locate_shard(name: str, tensor: Tensor) -> LocalShard:
        local, region = local_of(tensor)
        shape, offset = list(tensor.shape), list(region.offset)
        for dim, (parts, index) in part_by_dim(name, mesh).items():
            shape[dim] = weights[name].shape[dim]
            first, length = part_of(shape[dim], parts, index)
            assert tensor.shape[dim] == length, (name, dim, tensor.shape, length)
            offset[dim] += first
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
        "kv_heads": mesh.same_kv_heads,
        "experts": mesh.same_experts,
    }[kind(name)]
