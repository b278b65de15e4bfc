"""Regions and shards: which rectangle of a parameter this rank stores."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Region(NamedTuple):
    """A rectangle of a tensor. `Region((), ())` is the whole of a 0-d tensor."""

    offset: tuple[int, ...]
    """Index of the first element in every dim."""
    shape: tuple[int, ...]
    """Size in every dim."""

    @classmethod
    def whole(cls, shape: Sequence[int]) -> "Region":
        """Return the region that covers a whole tensor of `shape`."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    def key(self, name: str) -> str:
        """Return the key under which a file stores this region of the tensor `name`.

        >>> Region((4, 0), (4, 64)).key("w1")
        'w1[4:8,0:64]'
        """
        return f"{name}[{','.join(f'{o}:{o + n}' for o, n in zip(self.offset, self.shape, strict=True))}]"

    def intersect(self, other: "Region") -> "Region | None":
        """Return the region that is in both, or None if there is none.

        >>> Region((0, 0), (4, 64)).intersect(Region((2, 32), (4, 64)))
        Region(offset=(2, 32), shape=(2, 32))
        >>> Region((0, 0), (4, 64)).intersect(Region((4, 0), (4, 64))) is None
        True
        """
        starts = [max(a, b) for a, b in zip(self.offset, other.offset, strict=True)]
        ends_self = (o + n for o, n in zip(self.offset, self.shape, strict=True))
        ends_other = (o + n for o, n in zip(other.offset, other.shape, strict=True))
        shape = [min(a, b) - start for a, b, start in zip(ends_self, ends_other, starts, strict=True)]
        return Region(tuple(starts), tuple(shape)) if all(n > 0 for n in shape) else None

    def slices(self, origin: "Region") -> tuple[slice, ...]:
        """Return the indices of this region in a tensor that stores the region `origin`, which must contain it.

        >>> Region((5, 0), (2, 64)).slices(Region((4, 0), (4, 64)))
        (slice(1, 3, None), slice(0, 64, None))
        """
        starts = (a - b for a, b in zip(self.offset, origin.offset, strict=True))
        return tuple(slice(start, start + n) for start, n in zip(starts, self.shape, strict=True))


class LocalShard(NamedTuple):
    """The shard that this rank stores of a parameter, a buffer, or a tensor of the same shape, such as a gradient."""

    local: Tensor
    """The shard. For a parameter it shares the parameter's memory."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    region: Region
    """The region of the whole tensor that the shard covers."""

    def like(self, local: Tensor) -> "LocalShard":
        """Return the shard `local` of another tensor, with the same shape and region."""
        assert local.shape == self.local.shape, (local.shape, self.local.shape)
        return self._replace(local=local)


def whole_shard(name: str, tensor: Tensor) -> LocalShard:
    """Return `tensor` as its own shard. This is the default of `Transformer.local_shard`, for a model on one device."""
    return LocalShard(tensor.detach(), tuple(tensor.shape), Region.whole(tensor.shape))
