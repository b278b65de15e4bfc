"""A short hash of a model's weights, by which a run recognises the model that its adapters are added to."""

import hashlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from common.text import to_json
from moe.region import Region

ROWS, COLUMNS = 4, 256
"""The largest part of a matrix whose values are hashed. It begins in the middle row."""
Read = Callable[[str, Region, torch.dtype], Tensor]
"""Computes (name, region, dtype) -> the values of this region of a tensor."""


def fingerprint(shapes: Mapping[str, tuple[int, ...]], read: Read) -> str:
    """Return a hash of the names and shapes of all tensors, and of some values of each matrix.

    Stacked matrices are hashed one by one. A training step changes the hash, because it changes all values. The format
    and the dtype of the files do not, if they have the same values.

    Args:
        shapes: name -> shape of every tensor.
        read: reads a part of a tensor.
    """
    digest = hashlib.sha256()
    for name, shape in sorted(shapes.items()):
        digest.update(to_json([name, list(shape)]).encode())
        for region in _samples(shape):
            digest.update(read(name, region, torch.float64).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _samples(shape: tuple[int, ...]) -> Iterator[Region]:
    *stack, rows, columns = (1, *shape) if len(shape) < 2 else shape
    part = (min(ROWS, rows), min(COLUMNS, columns))
    first = min(rows // 2, rows - part[0])
    if len(shape) < 2:
        yield Region((0,) * len(shape), (part[1],) * len(shape))
    elif not stack:
        yield Region((first, 0), part)
    else:
        for index in range(stack[0]):
            yield Region((index, first, 0), (1, *part))
