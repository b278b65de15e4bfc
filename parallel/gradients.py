"""Gradients across ranks: summed once, and their norm with every parameter element counted once.

Losses are already divided by the global token count (training/step.py), so gradients are summed, never averaged.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.mesh import Mesh
from parallel.weight_shards import replica_group

BUCKET_BYTES = 64 * 2**20


def sum_gradients(parameters: Mapping[str, nn.Parameter], mesh: Mesh, tied: frozenset[str] = frozenset()) -> None:
    """Sum each gradient over the ranks that hold the same part of its parameter (after FSDP's own sum over the rest).

    Given is what trains and lies here: all ranks that hold a part give the same, others may give more or nothing. A
    parameter no token reached has no gradient on this rank: it takes part with zeros.

    Args:
        tied: names of parameters that the first and the last pipeline stage both hold.
    """
    by_group: dict[dist.ProcessGroup, list[Tensor]] = {}
    for name, parameter in parameters.items():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        by_group.setdefault(replica_group(name, mesh), []).append(parameter.grad)
    for group, gradients in by_group.items():
        if group.size() > 1:
            _sum_in_buckets(gradients, group)
    for name in sorted(tied & parameters.keys()):
        dist.all_reduce(parameters[name].grad, group=mesh.ends)


def _sum_in_buckets(gradients: list[Tensor], group: dist.ProcessGroup) -> None:
    """All-reduce in place, bucket by bucket; one bucket travels while the next is packed, and no more are copied."""
    pending: list[tuple[list[Tensor], Tensor, dist.Work]] = []
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        work = dist.all_reduce(flat, group=group, async_op=True)
        assert work is not None
        pending.append((bucket, flat, work))
        if len(pending) > 1:
            _unpack(*pending.pop(0))
    for entry in pending:
        _unpack(*entry)


def _unpack(bucket: list[Tensor], flat: Tensor, work: dist.Work) -> None:
    work.wait()
    for gradient, summed in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def _buckets(gradients: list[Tensor]) -> Iterable[list[Tensor]]:
    bucket: list[Tensor] = []
    held = 0
    for gradient in gradients:
        bucket.append(gradient)
        held += gradient.numel() * gradient.element_size()
        if held >= BUCKET_BYTES:
            yield bucket
            bucket, held = [], 0
    if bucket:
        yield bucket


def global_grad_norm(parameters: Mapping[str, nn.Parameter], mesh: Mesh, tied: frozenset[str] = frozenset()) -> Tensor:
    """L2 norm over every parameter element that trains, each counted once; call it after `sum_gradients`.

    A part that m ranks hold counts 1/m on each of them. Returns an fp64 scalar that is the same on all ranks, NaN or
    infinite on all ranks if it is on one.
    """
    total = torch.zeros((), device=mesh.device, dtype=torch.float64)
    by_copies: dict[int, list[Tensor]] = {}
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            copies = replica_group(name, mesh).size() * (2 if name in tied else 1)
            by_copies.setdefault(copies, []).append(parameter.grad)
    for copies, gradients in by_copies.items():
        # Under offload routers' gradients are on the device, and others in host memory.
        norms = [norm.double().to(total.device) for norm in torch._foreach_norm(gradients)]
        total += torch.stack(norms).square().sum() / copies
    dist.all_reduce(total, group=mesh.world)
    return total.sqrt()


def scale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor) -> None:
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor.to(parameter.grad))
