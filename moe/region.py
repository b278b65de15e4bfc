"""Rectangles of tensors: which part of a parameter lies here."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Region(NamedTuple):
    """A rectangle of a tensor: its first corner and its size in every dim. `((), ())` is all of a 0-d tensor."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> "Region":
        """All of a tensor of `shape`."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def key(self, name: str) -> str:
        """The region's name inside a file, e.g. `experts.w1[4:8,0:64]`."""
        return f"{name}[{','.join(f'{o}:{o + n}' for o, n in zip(self.offset, self.shape, strict=True))}]"

    def intersect(self, other: "Region") -> "Region | None":
        """The rectangle common to both, None if there is none."""
        starts = [max(a, b) for a, b in zip(self.offset, other.offset, strict=True)]
        ends_self = (o + n for o, n in zip(self.offset, self.shape, strict=True))
        ends_other = (o + n for o, n in zip(other.offset, other.shape, strict=True))
        shape = [min(a, b) - start for a, b, start in zip(ends_self, ends_other, starts, strict=True)]
        return Region(tuple(starts), tuple(shape)) if all(n > 0 for n in shape) else None

    def slices(self, origin: "Region") -> tuple[slice, ...]:
        """Indices of this region inside the tensor that holds `origin`."""
        starts = (a - b for a, b in zip(self.offset, origin.offset, strict=True))
        return tuple(slice(start, start + n) for start, n in zip(starts, self.shape, strict=True))


class LocalShard(NamedTuple):
    """This rank's part of a parameter, a buffer, or what belongs to it (a gradient, a moment)."""

    local: Tensor
    """The part; for a parameter, its own memory."""
    shape: tuple[int, ...]
    """Of the whole."""
    region: Region
    """Where the part lies in the whole."""

    def like(self, local: Tensor) -> "LocalShard":
        """Another tensor that lies at the same place."""
        assert local.shape == self.local.shape, (local.shape, self.local.shape)
        return self._replace(local=local)


def whole_shard(name: str, tensor: Tensor) -> LocalShard:
    """`tensor`, all of which is here."""
    return LocalShard(tensor.detach(), tuple(tensor.shape), Region.whole(tensor.shape))
