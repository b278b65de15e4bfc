"""Gradients across ranks: summed once, and their norm with every parameter element counted once.

Losses are already divided by the global token count (training/step.py), so gradients are summed, never averaged.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.mesh import Mesh

BUCKET_BYTES = 64 * 2**20


def sum_gradients(dense: list[nn.Parameter], experts: list[nn.Parameter], mesh: Mesh) -> None:
    """Sum dense gradients over the world and expert gradients over the ranks that hold the same experts.

    Given is what trains (all of an expert's ranks give the same, those of another expert may give more or nothing).
    A parameter no token reached has no gradient on this rank: it takes part with zeros.
    """
    for parameters, group in ((dense, mesh.world), (experts, mesh.expert_data)):
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if group.size() > 1:
            _sum_in_buckets([parameter.grad for parameter in parameters if parameter.grad is not None], group)


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


def global_grad_norm(dense: list[nn.Parameter], experts: list[nn.Parameter], mesh: Mesh) -> Tensor:
    """L2 norm over every parameter element that trains, each counted once; call it after `sum_gradients`.

    Returns an fp64 scalar that is the same on all ranks, NaN or infinite on all ranks if it is on one.
    """
    dense_square = _sum_of_squares(dense, mesh.device)
    expert_square = _sum_of_squares(experts, mesh.device)
    dist.all_reduce(expert_square, group=mesh.expert)
    return (dense_square + expert_square).sqrt()


def _sum_of_squares(parameters: list[nn.Parameter], device: torch.device) -> Tensor:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros((), device=device, dtype=torch.float64)
    norms = torch._foreach_norm(gradients)
    return torch.stack([norm.double() for norm in norms]).square().sum()


def scale_gradients(parameters: list[nn.Parameter], factor: Tensor) -> None:
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor.to(parameter.grad.dtype))
