"""How many ranks each parallel axis has, and which place a rank takes on each. Plain numbers: no process group needed.

The world is `pipeline x replicate x shard x context x tensor`, tensor innermost: the more often ranks talk, the nearer
they are numbered (tensor in every layer and twice, context once a layer, shard and replicate once a step). The ranks
of one pipeline stage are, for the experts, `expert_data x expert x expert_tensor` ("parallel folding", arXiv
2504.14960): the ranks that exchange tokens may be data-, context- and tensor-parallel ones of the rest of the model.
"""

import math
from dataclasses import dataclass

AXES = ("pipeline", "replicate", "shard", "context", "tensor")


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes. Their product (without the experts' own) is the world size."""

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1
    expert_tensor: int = 1
    zigzag: bool = False
    """Each context rank holds two pieces of a row, one counted from its start and one from its end: the causal work of
    all ranks is the same. (Else one, so that a window reaches few neighbours.)"""

    def __post_init__(self) -> None:
        assert self.stage % (self.expert * self.expert_tensor) == 0, self

    @property
    def world(self) -> int:
        return math.prod(getattr(self, axis) for axis in AXES)

    @property
    def stage(self) -> int:
        """Ranks of a pipeline stage."""
        return self.world // self.pipeline

    @property
    def data(self) -> int:
        """Ranks that see different rows."""
        return self.replicate * self.shard

    @property
    def sequence(self) -> int:
        """Parts that a row is cut into."""
        return self.context * self.tensor

    @property
    def expert_data(self) -> int:
        """Ranks of a stage that hold the same experts."""
        return self.stage // (self.expert * self.expert_tensor)

    @property
    def expert_shard(self) -> int:
        """Of these, ranks that share the experts' weights out among them (FSDP): as many of `shard` as fit."""
        return math.gcd(self.shard, self.expert_data)

    @property
    def pieces(self) -> int:
        """Pieces of a row that context ranks hold between them."""
        return self.context * (2 if self.zigzag else 1)

    def pieces_of(self, context_rank: int) -> list[int]:
        """Numbers, in the sequence, of the pieces that a context rank holds."""
        return [context_rank, self.pieces - 1 - context_rank] if self.zigzag else [context_rank]

    def place(self, rank: int) -> dict[str, int]:
        """The rank's index on every axis."""
        place = {}
        for axis in reversed(AXES):
            rank, place[axis] = divmod(rank, getattr(self, axis))
        return place

    def data_rank(self, rank: int) -> int:
        """Which of the `data` parts of a batch the rank sees."""
        place = self.place(rank)
        return place["replicate"] * self.shard + place["shard"]

    def __str__(self) -> str:
        names = (*AXES, "expert", "expert_tensor")
        sizes = [f"{name}={getattr(self, name)}" for name in names if getattr(self, name) > 1]
        return " ".join(sizes) or "one process"
