"""Where this rank's part of a parameter lies in the whole: one table, read by whoever cuts, draws, saves or counts.

Tensor parallelism cuts what the names below say, expert parallelism the experts, and FSDP (`parallel.shard`) what is
left of either, once more.
"""

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from moe.region import Held, Region
from parallel.inventory import Kind
from parallel.mesh import Mesh

TENSOR_DIMS = {
    "embedding": 0,
    "head": 0,
    "wq": 0,
    "wk": 0,
    "wv": 0,
    "wo": 1,
    "w_gate": 0,
    "w_up": 0,
    "w_down": 1,
}
"""Weights [out, in] that tensor parallelism cuts, and along which dim: heads, hidden units, or the vocabulary."""
EXPERT_TENSOR_DIMS = {"w_gate": 1, "w_up": 1, "w_down": 2}
"""The same for stacked experts: their hidden units."""


def kind(name: str) -> Kind:
    """Which axes cut the parameter `name`: expert parallelism, tensor parallelism, FSDP alone, or (routers) none."""
    if ".experts." in name:
        return "experts"
    if ".router." in name:
        return "whole"
    return "tensor" if _leaf(name) in TENSOR_DIMS else "replicated"


def cuts(name: str, mesh: Mesh) -> dict[int, dist.ProcessGroup]:
    """Dim -> the group whose ranks each hold one of its equal, contiguous parts (FSDP's cut apart)."""
    which = kind(name)
    if which == "experts":
        return {0: mesh.expert, EXPERT_TENSOR_DIMS[_leaf(name)]: mesh.expert_tensor}
    return {TENSOR_DIMS[_leaf(name)]: mesh.tensor} if which == "tensor" else {}


def own_part(name: str, tensor: Tensor, mesh: Mesh) -> Tensor:
    """A copy of this rank's part of the whole `tensor` (on the meta device it costs nothing)."""
    part = tensor.detach()
    for dim, group in cuts(name, mesh).items():
        part = part.chunk(group.size(), dim)[group.rank()]
    return part.clone()


def locator(mesh: Mesh) -> Callable[[str, Tensor], Held]:
    """The seam `Transformer.locate` for a model that was cut over `mesh`."""

    def locate(name: str, tensor: Tensor) -> Held:
        local, inner = local_of(tensor)
        shape, offset = list(tensor.shape), list(inner.offset)
        for dim, group in cuts(name, mesh).items():
            offset[dim] += group.rank() * shape[dim]
            shape[dim] *= group.size()
        return Held(local, tuple(shape), Region(tuple(offset), inner.shape))

    return locate


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


def same_ranks(name: str, mesh: Mesh) -> dist.ProcessGroup:
    """Ranks of the stage that hold the same part of the parameter: its gradients are summed over them."""
    return {
        "whole": mesh.stage,
        "replicated": mesh.same_replicated,
        "tensor": mesh.same_tensor,
        "experts": mesh.same_experts,
    }[kind(name)]


def _leaf(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]
