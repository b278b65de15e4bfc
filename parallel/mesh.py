"""The world of processes, cut into axes.

One mesh today: (expert_data, expert). `expert` is innermost, so that the ranks that exchange tokens in every layer
are neighbours, inside one node where the launcher numbers them so; `expert_data` ranks hold the same experts and meet
once per step, to sum gradients. Every rank is data parallel: each sees other sequences.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class Mesh:
    """Process groups of the axes. Keep it inside `main`: groups that outlive it abort the process at exit."""

    device: torch.device
    device_mesh: DeviceMesh
    world: dist.ProcessGroup
    expert: dist.ProcessGroup
    """Ranks that hold different experts and exchange tokens."""
    expert_data: dist.ProcessGroup
    """Ranks that hold the same experts."""

    @property
    def rank(self) -> int:
        return self.world.rank()

    @property
    def world_size(self) -> int:
        return self.world.size()


def build_mesh(device: torch.device, expert_size: int) -> Mesh:
    """Cut the initialised world into `world / expert_size` x `expert_size`."""
    world_size = dist.get_world_size()
    assert world_size % expert_size == 0
    mesh = init_device_mesh(
        device.type, (world_size // expert_size, expert_size), mesh_dim_names=("expert_data", "expert")
    )
    world = dist.group.WORLD
    assert world is not None
    return Mesh(device, mesh, world, mesh.get_group("expert"), mesh.get_group("expert_data"))


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
    for group in (mesh.world, mesh.expert, mesh.expert_data):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


def broadcast_from_first(tensor: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Rank 0's `tensor`, in place, on every rank."""
    dist.broadcast(tensor, src=0, group=mesh.world)
    return tensor


def close_process_group() -> None:
    """Let every rank arrive, then take the groups down: what is left to the interpreter's end may abort there."""
    dist.barrier()
    dist.destroy_process_group()
