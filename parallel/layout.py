"""The sizes of the parallel axes, and the position of each rank on every axis. Plain numbers: no process group needed.

The world is `pipeline x replicate x shard x context x tensor`, and `tensor` varies fastest with the rank. Axes whose
ranks communicate more often come later, so that their ranks have neighbouring numbers and share a node: tensor-parallel
ranks communicate several times in every layer, context-parallel ranks once per layer. For the experts, the ranks of one
pipeline stage form a second grid, `expert_data x expert x expert_tensor` ("parallel folding", arXiv 2504.14960): the
ranks that exchange tokens can be data-, context- and tensor-parallel ranks of the rest of the model.
"""

import math
from dataclasses import dataclass

AXES = ("pipeline", "replicate", "shard", "context", "tensor")
"""Axes whose sizes multiply to the world size, the slowest varying first."""


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel axes. The product of `AXES` is the world size.

    >>> layout = Layout(pipeline=2, shard=2, tensor=2)
    >>> layout.world, layout.data
    (8, 2)
    >>> layout.coordinates(5)
    {'tensor': 1, 'context': 0, 'shard': 0, 'replicate': 0, 'pipeline': 1}
    >>> [layout.data_rank(rank) for rank in range(8)]
    [0, 0, 1, 1, 0, 0, 1, 1]

    Every context rank has one piece of a row, or two pieces if `zigzag` is set:

    >>> [Layout(context=2).pieces_of(context_rank) for context_rank in range(2)]
    [[0], [1]]
    >>> [Layout(context=2, zigzag=True).pieces_of(context_rank) for context_rank in range(2)]
    [[0, 3], [1, 2]]
    """

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1
    expert_tensor: int = 1
    kv_copies: int = 1
    """Neighbouring tensor-parallel ranks that store the same key/value heads, if a model has fewer heads than ranks."""
    zigzag: bool = False
    """Each context rank has two pieces of a row, one counted from the start and one from the end, so that all ranks
    do the same amount of causal attention. Otherwise a rank has one piece, so that a window reaches few neighbours."""
    overlap: bool = False
    """A rank's tokens are exchanged with the ranks of other experts in two halves, each while the experts compute the
    other half."""

    def __post_init__(self) -> None:
        assert self.stage % (self.expert * self.expert_tensor) == 0, self
        assert self.tensor % self.kv_copies == 0, self
        assert self.expert > 1 or not self.overlap, self

    @property
    def world(self) -> int:
        """Number of ranks."""
        return math.prod(getattr(self, axis) for axis in AXES)

    @property
    def stage(self) -> int:
        """Ranks of one pipeline stage."""
        return self.world // self.pipeline

    @property
    def data(self) -> int:
        """Data-parallel ranks: the parts that the rows of a batch are divided into."""
        return self.replicate * self.shard

    @property
    def sequence(self) -> int:
        """Ranks that share the rows of one data-parallel rank, each with a part of the sequence."""
        return self.context * self.tensor

    @property
    def expert_data(self) -> int:
        """Ranks of a stage that have the same experts."""
        return self.stage // (self.expert * self.expert_tensor)

    @property
    def expert_shard(self) -> int:
        """Ranks with the same experts over which FSDP shards their weights: as many ranks of `shard` as possible."""
        return math.gcd(self.shard, self.expert_data)

    @property
    def pieces(self) -> int:
        """Pieces that a row is divided into over all context ranks."""
        return self.context * (2 if self.zigzag else 1)

    def pieces_of(self, context_rank: int) -> list[int]:
        """Return the pieces of a context rank, each by its index in the sequence."""
        return [context_rank, self.pieces - 1 - context_rank] if self.zigzag else [context_rank]

    def coordinates(self, rank: int) -> dict[str, int]:
        """Return the index of a rank on every axis."""
        coordinates = {}
        for axis in reversed(AXES):
            rank, coordinates[axis] = divmod(rank, getattr(self, axis))
        return coordinates

    def data_rank(self, rank: int) -> int:
        """Return which of the `data` parts of a batch a rank computes."""
        coordinates = self.coordinates(rank)
        return coordinates["replicate"] * self.shard + coordinates["shard"]

    def __str__(self) -> str:
        names = (*AXES, "expert", "expert_tensor")
        sizes = [f"{name}={getattr(self, name)}" for name in names if getattr(self, name) > 1]
        return " ".join(sizes) or "one process"
