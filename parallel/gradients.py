"""Gradients across ranks: their sum, and their global norm.

Gradients are summed and not averaged, because training/step.py divides the loss by the global token count.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.mesh import Mesh
from parallel.weight_shards import replica_group

BUCKET_BYTES = 64 * 2**20
"""Gradients are all-reduced in buckets of about this size."""


class GradientReducer:
    """Sums gradients over ranks, computes their norm and scales them. All methods but `scale` are collective.

    Args:
        parameters: the trainable parameters that this rank stores. Ranks that store the same shard must pass the same
            names. Ranks that store other shards can pass other names, or none.
        tied: names of parameters that both the first and the last pipeline stage store.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], mesh: Mesh, tied: frozenset[str] = frozenset()) -> None:
        self.parameters = dict(parameters)
        self.mesh = mesh
        self.tied = tied
        self.groups = {name: replica_group(name, mesh) for name in parameters}
        """The ranks that store the same shard of each parameter."""
        self.local_norms: dict[str, Tensor] = {}
        """Parameter -> the L2 norm of this rank's gradient before the last `sum`, a scalar on the gradient's device.
        With FSDP, this gradient is already the sum over the ranks that store other shards."""

    def sum(self) -> None:
        """Sum each gradient, in place, over the ranks that store the same shard of its parameter.

        FSDP has already summed the gradients over the ranks that store other shards. A parameter that no token of this
        rank has reached has no gradient, and takes part with zeros.
        """
        by_group: dict[dist.ProcessGroup, list[Tensor]] = {}
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            by_group.setdefault(self.groups[name], []).append(parameter.grad)
        if self.parameters:
            norms = torch._foreach_norm([p.grad for p in self.parameters.values() if p.grad is not None])
            self.local_norms = dict(zip(self.parameters, norms, strict=True))
        for group, gradients in by_group.items():
            if group.size() > 1:
                _sum_in_buckets(gradients, group)
        for name in sorted(self.tied & self.parameters.keys()):
            dist.all_reduce(self.parameters[name].grad, group=self.mesh.ends)

    def norm(self) -> Tensor:
        """Return the L2 norm of the gradients of all trainable parameters. Call it after `sum`.

        Every element of a parameter counts once: a shard that m ranks store counts 1/m on each of them.

        Returns:
            An fp64 scalar, the same on all ranks. If a gradient of any rank is not finite, it is NaN or infinite on
            all.
        """
        total = torch.zeros((), device=self.mesh.device, dtype=torch.float64)
        by_copies: dict[int, dict[str, Tensor]] = {}
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                copies = self.groups[name].size() * (2 if name in self.tied else 1)
                by_copies.setdefault(copies, {})[name] = parameter.grad
        for copies, gradients in by_copies.items():
            # The gradients that only this rank has are those of which `sum` has computed the norms.
            norms = (
                [self.local_norms[name] for name in gradients]
                if copies == 1
                else torch._foreach_norm(list(gradients.values()))
            )
            # With offload, the gradients of routers are on the device, and the others are in host memory.
            norms = [norm.double().to(total.device) for norm in norms]
            total += torch.stack(norms).square().sum() / copies
        dist.all_reduce(total, group=self.mesh.world)
        return total.sqrt()

    def scale(self, factor: Tensor) -> None:
        """Multiply every gradient by `factor`, in place."""
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                parameter.grad.mul_(factor.to(parameter.grad))


def _sum_in_buckets(gradients: list[Tensor], group: dist.ProcessGroup) -> None:
    """All-reduce in place, bucket by bucket. The next bucket is packed while one is being reduced, so that at most two
    buckets of copies exist."""
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
    nbytes = 0
    for gradient in gradients:
        bucket.append(gradient)
        nbytes += gradient.numel() * gradient.element_size()
        if nbytes >= BUCKET_BYTES:
            yield bucket
            bucket, nbytes = [], 0
    if bucket:
        yield bucket
