"""The process groups along the axes of a layout (`parallel/layout.py` defines the order of the ranks)."""

import math
from dataclasses import dataclass, fields
from datetime import timedelta

import torch
import torch.distributed as dist

from parallel.layout import AXES, Layout

EXPERT_AXES = ("pipeline", "expert_replicate", "expert_shard", "expert", "expert_tensor")
"""The axes that the experts see, the slowest varying first; `expert_data` is `expert_replicate x expert_shard`."""


@dataclass(frozen=True)
class Mesh:
    """The process groups of this rank.

    Keep a mesh in a local variable of `main`: process groups that still exist when the interpreter exits abort the
    process.
    """

    device: torch.device
    layout: Layout
    world: dist.ProcessGroup
    stage: dist.ProcessGroup
    """Ranks of this pipeline stage."""
    pipeline: dist.ProcessGroup
    """One rank of every stage: those with the same position in their stage as this rank."""
    shard: dist.ProcessGroup
    context: dist.ProcessGroup
    tensor: dist.ProcessGroup
    sequence: dist.ProcessGroup
    """Ranks that share the same rows, along context and tensor, in the order of their parts of the sequence."""
    expert: dist.ProcessGroup
    """Ranks that have different experts and exchange tokens."""
    expert_tensor: dist.ProcessGroup
    expert_data: dist.ProcessGroup
    """Ranks that have the same experts."""
    expert_shard: dist.ProcessGroup
    ends: dist.ProcessGroup | None
    """The first and the last rank of `pipeline`; None on other ranks, and without a pipeline."""
    same_replicated: dist.ProcessGroup
    """Ranks of the stage that store the same shards of `replicated` parameters (`parallel.weight_specs.Kind`)."""
    same_tensor: dist.ProcessGroup
    """Ranks of the stage that store the same shards of `tensor` parameters."""
    same_kv_heads: dist.ProcessGroup
    """Ranks of the stage that store the same shards of `kv_heads` parameters: those of `same_tensor`, unless several
    tensor-parallel ranks store the same heads (`Layout.kv_copies`)."""
    same_experts: dist.ProcessGroup
    """Ranks of the stage that store the same shards of the same experts."""

    @property
    def rank(self) -> int:
        """The rank of this process in the world."""
        return self.world.rank()

    @property
    def world_size(self) -> int:
        """The number of ranks in the world."""
        return self.world.size()

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """Every process group once. Axes with the same ranks share a group."""
        found = [value for value in vars(self).values() if isinstance(value, dist.ProcessGroup)]
        return list({id(group): group for group in found}.values())


Groups = dict[tuple[tuple[int, ...], ...], dist.ProcessGroup]
"""The ranks of every group along some axes -> the group of this rank."""


def build_mesh(device: torch.device, layout: Layout, groups: Groups | None = None) -> Mesh:
    """Create the process groups of `layout` in the initialised world. Collective: every rank passes the same layout.

    Args:
        groups: groups that earlier calls created in this process. They are reused, and new ones are added. Code that
            builds several meshes needs this, because torch caches facts about DTensors by the ranks of their group, so
            that a group cannot be destroyed and created again.
    """
    assert layout.world == dist.get_world_size(), (layout, dist.get_world_size())
    world = dist.group.WORLD
    assert world is not None
    groups = {} if groups is None else groups
    groups[(tuple(range(layout.world)),)] = world

    def group(*axes: str) -> dist.ProcessGroup:
        return _group_among(rank_lists(layout, *axes), groups)

    pipelines = rank_lists(layout, "pipeline")
    ends = _group_among([[ranks[0], ranks[-1]] for ranks in pipelines], groups) if layout.pipeline > 1 else None
    return Mesh(
        device=device,
        layout=layout,
        world=world,
        stage=group("replicate", "shard", "context", "tensor"),
        pipeline=group("pipeline"),
        shard=group("shard"),
        context=group("context"),
        tensor=group("tensor"),
        sequence=group("context", "tensor"),
        expert=group("expert"),
        expert_tensor=group("expert_tensor"),
        expert_data=group("expert_replicate", "expert_shard"),
        expert_shard=group("expert_shard"),
        ends=ends,
        same_replicated=group("replicate", "context", "tensor"),
        same_tensor=group("replicate", "context"),
        same_kv_heads=group("replicate", "context", "kv_copies"),
        same_experts=group("expert_replicate"),
    )


def rank_lists(layout: Layout, *axes: str) -> list[list[int]]:
    """Return the ranks of every group along some axes, all of `AXES` or all of `EXPERT_AXES`.

    `kv_copies` can be named beside `AXES`: the tensor-parallel ranks that store the same key/value heads.

    >>> rank_lists(Layout(context=2, tensor=2), "context")
    [[0, 2], [1, 3]]
    >>> rank_lists(Layout(tensor=4, kv_copies=2), "kv_copies")
    [[0, 1], [2, 3]]
    >>> rank_lists(Layout(context=2, tensor=2, expert=4), "expert")
    [[0, 1, 2, 3]]
    """
    sizes = {axis: getattr(layout, axis) for axis in AXES}
    if "kv_copies" in axes:
        sizes |= {"tensor": layout.tensor // layout.kv_copies, "kv_copies": layout.kv_copies}
    elif not set(axes) <= set(AXES):
        replicas = layout.expert_data // layout.expert_shard
        expert_sizes = (layout.pipeline, replicas, layout.expert_shard, layout.expert, layout.expert_tensor)
        sizes = dict(zip(EXPERT_AXES, expert_sizes, strict=True))
    order = sorted(sizes, key=lambda axis: axes.index(axis) if axis in axes else -1)  # the other axes first
    ranks = torch.arange(layout.world).view(*sizes.values()).permute([list(sizes).index(axis) for axis in order])
    return ranks.reshape(-1, math.prod(sizes[axis] for axis in axes)).tolist()


def _group_among(lists: list[list[int]], groups: Groups) -> dist.ProcessGroup:
    """Return the process group of this rank among the groups with these ranks. Collective, unless `groups` has it."""
    key = tuple(map(tuple, lists))
    if key not in groups:
        ranks = next((ranks for ranks in lists if dist.get_rank() in ranks), [])
        if len(ranks) == 1:  # A rank alone needs no agreement with others. With thousands of ranks that saves time.
            groups[key] = dist.new_group(ranks, use_local_synchronization=True)
        else:
            groups[key], _ = dist.new_subgroups_by_enumeration(lists)
    return groups[key]


def mesh_of_one(device: torch.device) -> Mesh:
    """Return the mesh of this rank alone, in a world of any size. Not collective.

    The results of a layout are compared with those of this mesh.
    """
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    groups = {field.name: alone for field in fields(Mesh) if field.name not in ("device", "layout", "ends")}
    return Mesh(device=device, layout=Layout(), ends=None, **groups)


def init_process_group(store: dist.Store, rank: int, world_size: int, device: torch.device, timeout_s: float) -> None:
    """Start the default process group: NCCL on GPUs (with gloo for CPU tensors), gloo on CPUs.

    Args:
        timeout_s: seconds that a collective may take, until `set_timeout` changes it.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if device.type == "cuda" else None,
    )


def set_timeout(mesh: Mesh, timeout_s: float) -> None:
    """Set the seconds that a collective may take from now on. Start-up, which compiles and reads files, gets more."""
    for group in mesh.groups:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


def broadcast_from_first(tensor: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Overwrite `tensor` on every rank with rank 0's, and return it."""
    dist.broadcast(tensor, src=0, group=mesh.world)
    return tensor


def close_process_group() -> None:
    """Wait for every rank and destroy the process groups. If the interpreter's exit destroys them, it can abort."""
    dist.barrier()
    dist.destroy_process_group()
