"""The world of processes, cut into axes, and the process groups along them (`parallel/layout.py` has the order)."""

import math
from dataclasses import dataclass, fields
from datetime import timedelta

import torch
import torch.distributed as dist

from parallel.layout import AXES, Layout

EXPERT_AXES = ("pipeline", "expert_replicate", "expert_shard", "expert", "expert_tensor")


@dataclass(frozen=True)
class Mesh:
    """Process groups of this rank. Keep it inside `main`: groups that outlive it abort the process at exit."""

    device: torch.device
    layout: Layout
    world: dist.ProcessGroup
    stage: dist.ProcessGroup
    """Ranks of this pipeline stage."""
    pipeline: dist.ProcessGroup
    """One rank of every stage: those at this rank's place in theirs."""
    shard: dist.ProcessGroup
    context: dist.ProcessGroup
    tensor: dist.ProcessGroup
    sequence: dist.ProcessGroup
    """Ranks that see the same rows, in the order of their parts of them: context and tensor."""
    expert: dist.ProcessGroup
    """Ranks that hold different experts and exchange tokens."""
    expert_tensor: dist.ProcessGroup
    expert_data: dist.ProcessGroup
    """Ranks that hold the same experts."""
    expert_shard: dist.ProcessGroup
    ends: dist.ProcessGroup | None
    """The first and the last rank of `pipeline`; None on others, and without a pipeline."""
    same_replicated: dist.ProcessGroup
    """Ranks of the stage that hold, under FSDP, the same part of what tensor parallelism leaves whole."""
    same_tensor: dist.ProcessGroup
    """Ranks of the stage that hold the same part of what tensor parallelism cuts."""
    same_experts: dist.ProcessGroup
    """Ranks of the stage that hold the same part of the same experts."""

    @property
    def rank(self) -> int:
        return self.world.rank()

    @property
    def world_size(self) -> int:
        return self.world.size()

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        found = [value for value in vars(self).values() if isinstance(value, dist.ProcessGroup)]
        return list({id(group): group for group in found}.values())


Groups = dict[tuple[tuple[int, ...], ...], dist.ProcessGroup]
"""All ranks, cut into the groups of one axis -> this rank's."""


def build_mesh(device: torch.device, layout: Layout, made: Groups | None = None) -> Mesh:
    """Cut the initialised world as `layout` says. Collective: every rank calls it, with the same layout.

    Args:
        made: groups of other layouts in this process, to be used again; new ones are added. (torch keeps what it knows
            of DTensors by their ranks, so that groups cannot be taken down and made anew.)
    """
    assert layout.world == dist.get_world_size(), (layout, dist.get_world_size())
    world = dist.group.WORLD
    assert world is not None
    expert_sizes = (
        layout.pipeline,
        layout.expert_data // layout.expert_shard,
        layout.expert_shard,
        layout.expert,
        layout.expert_tensor,
    )
    ranks = torch.arange(layout.world)
    dense = ranks.view([getattr(layout, axis) for axis in AXES])
    experts = ranks.view(expert_sizes)
    made = {} if made is None else made
    made[(tuple(ranks.tolist()),)] = world

    def group(*axes: str) -> dist.ProcessGroup:
        """This rank's group along `axes`, in rank order; groups of the same ranks are one."""
        names, cube = (AXES, dense) if set(axes) <= set(AXES) else (EXPERT_AXES, experts)
        along = [names.index(axis) for axis in axes]
        size = math.prod(cube.shape[i] for i in along)
        others = [i for i in range(len(names)) if i not in along]
        return of_parts(cube.permute(*others, *along).reshape(-1, size).tolist())

    def of_parts(parts: list[list[int]]) -> dist.ProcessGroup:
        key = tuple(map(tuple, parts))
        if key not in made:
            own = next((part for part in parts if world.rank() in part), [])
            if len(own) == 1:  # no agreement with others needed: thousands of ranks need not hear of each other's
                made[key] = dist.new_group(own, use_local_synchronization=True)
            else:
                made[key], _ = dist.new_subgroups_by_enumeration(parts)
        return made[key]

    columns = dense.flatten(1).t().tolist()
    ends = of_parts([[column[0], column[-1]] for column in columns]) if layout.pipeline > 1 else None
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
        same_experts=group("expert_replicate"),
    )


def mesh_of_one(device: torch.device) -> Mesh:
    """This rank alone, in a world of any size: what the others' results are compared with. Not collective."""
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    groups = {field.name: alone for field in fields(Mesh) if field.name not in ("device", "layout", "ends")}
    return Mesh(device=device, layout=Layout(), ends=None, **groups)


def init_process_group(store: dist.Store, rank: int, world_size: int, device: torch.device, timeout_s: float) -> None:
    """Start the default process group: NCCL on GPUs (gloo beside it for CPU tensors), gloo on CPUs."""
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
    """Bound every collective from now on; start-up, which compiles and reads, was given longer."""
    for group in mesh.groups:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


def broadcast_from_first(tensor: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Rank 0's `tensor`, in place, on every rank."""
    dist.broadcast(tensor, src=0, group=mesh.world)
    return tensor


def close_process_group() -> None:
    """Let every rank arrive, then take the groups down: what is left to the interpreter's end may abort there."""
    dist.barrier()
    dist.destroy_process_group()
