"""The sizes of the parallel axes as the user configures them, mirrored by `conf/parallel`."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from common.errors import expect
from moe.config import ModelConfig
from parallel.layout import AXES, Layout

Size = Literal["auto"] | int


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the parallel axes, and options of the axes. `parallel/planning/auto.py` replaces `auto` by a number."""

    expert: Size = "auto"
    """Ranks that one set of experts is distributed over. They can be data-, context- and tensor-parallel ranks.
    `auto`: the largest size that the ranks of a stage and num_experts allow."""
    tensor: Size = 1
    """Ranks that the heads, the hidden widths and the vocabulary are sharded over, and the sequence between layers.
    With more ranks than key/value heads, several ranks store the same head."""
    pipeline: Size = 1
    """Pipeline ranks. Each computes one stage or two (`schedule`), and the micro-batches (`train.accumulation`) pass
    through all stages."""
    context: Size = 1
    """Ranks that the sequence is sharded over."""
    shard: Size = 1
    """Data-parallel ranks that weights, gradients and optimizer state are sharded over (FSDP2)."""
    replicate: Size = "auto"
    """Data-parallel replicas of those ranks. `auto`: all ranks that no other key claims."""
    expert_tensor: int = 1
    """Ranks that the hidden width of each expert is sharded over."""
    schedule: Literal["1f1b", "interleaved", "zero_bubble"] = "1f1b"
    """Order of forward and backward passes in a pipeline. `interleaved` and `zero_bubble` have two stages per rank."""
    stage_layers: tuple[int, ...] | None = None
    """Number of layers of each stage, in order. `null`: numbers that balance the cost of the stages, including the
    head."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass recomputes instead of storing it: nothing; the hidden layers of experts and dense
    networks (which repeats no communication); or whole blocks (the routing decisions are stored)."""
    offload: bool = False
    """With `shard`: keep weights, gradients and optimizer state in CPU memory while they are not used."""
    overlap: bool = False
    """With `expert`: exchange the rows of one half of a rank's tokens while the experts compute the other half. (The
    gain on GPUs has not been measured.)"""
    start_timeout_s: float = 300.0
    """Seconds that start-up (rendezvous, first collective) may take."""
    timeout_s: float = 100.0
    """Seconds that a collective may wait during training before the run ends."""

    def __post_init__(self) -> None:
        for field in ("expert", *AXES, "expert_tensor"):
            value = getattr(self, field)
            expect(value == "auto" or value >= 1, field, value, "an integer >= 1, or auto")
        for field in ("start_timeout_s", "timeout_s"):
            expect(getattr(self, field) > 0, field, getattr(self, field), "seconds > 0")
        stages = self.stage_layers
        if stages is not None:
            per_rank, pipeline = self.stages_per_rank, self.pipeline
            expect(all(layers >= 1 for layers in stages), "stage_layers", stages, "a list of integers >= 1")
            expect(pipeline != "auto", "stage_layers", stages, "a number for parallel.pipeline instead of auto")
            expect(
                len(stages) == pipeline * per_rank,
                "stage_layers",
                stages,
                f"one number per stage, {per_rank} x parallel.pipeline={pipeline}",
            )
        expect(not self.offload or self.shard != 1, "offload", True, "parallel.shard > 1 beside it")

    @property
    def stages_per_rank(self) -> int:
        """Pipeline stages on one rank."""
        return 1 if self.schedule == "1f1b" or self.pipeline == 1 else 2

    def num_stages(self, layout: Layout) -> int:
        """Return the number of pipeline stages on all ranks together."""
        return layout.pipeline * self.stages_per_rank

    def layout(self, world_size: int, model: ModelConfig, seq_len: int | None = None) -> Layout:
        """Return the sizes for a world. Only `expert` and `replicate` can still be `auto`.

        Args:
            seq_len: length of a row, S. None: the layout has no `zigzag`.

        Raises:
            ValueError: the axes do not multiply to the world size, or do not divide what they shard. The message starts
                with the field.
        """
        sizes = {axis: getattr(self, axis) for axis in AXES if axis != "replicate"}
        assert "auto" not in sizes.values(), sizes
        claimed = math.prod(sizes.values())
        rest = world_size // claimed if self.replicate == "auto" else self.replicate
        if rest * claimed != world_size or rest < 1:
            raise self._wrong_product(world_size)
        layout = Layout(**sizes, replicate=rest)
        ranks = layout.stage
        expect(
            ranks % self.expert_tensor == 0,
            "expert_tensor",
            self.expert_tensor,
            f"a divisor of {ranks}, the ranks of a stage",
        )
        expert = self._expert_size(ranks // self.expert_tensor, model)
        expect(not self.overlap or expert > 1, "overlap", True, f"parallel.expert > 1 beside it, found {expert}")
        zigzag = seq_len is not None and self._uses_zigzag(model, layout, seq_len)
        several = layout.tensor % model.num_kv_heads == 0
        return replace(
            layout,
            expert=expert,
            expert_tensor=self.expert_tensor,
            kv_copies=layout.tensor // model.num_kv_heads if several else 1,
            zigzag=zigzag,
            overlap=self.overlap,
        )

    def _uses_zigzag(self, model: ModelConfig, layout: Layout, seq_len: int) -> bool:
        """Return whether two pieces per context rank are useful (full attention in every layer) and possible."""
        windowless = all(model.window(layer) is None for layer in range(model.num_layers))
        # Tensor-parallel ranks divide a context rank's pieces further. Each must get a part of one piece only.
        divisible = layout.tensor == 1 or layout.tensor % 2 == 0
        return layout.context > 1 and windowless and divisible and seq_len % (2 * layout.context) == 0

    def _expert_size(self, ranks: int, model: ModelConfig) -> int:
        """Return the size of the expert axis in a stage with `ranks` ranks, without those of `expert_tensor`."""
        if model.num_experts is None:
            expect(
                self.expert in ("auto", 1), "expert", self.expert, "1 or auto in a dense model (num_experts is null)"
            )
            expect(self.expert_tensor == 1, "expert_tensor", self.expert_tensor, "1 in a dense model")
            return 1
        fitting = [n for n in range(1, ranks + 1) if ranks % n == 0 and model.num_experts % n == 0]
        if self.expert == "auto":
            return fitting[-1]
        divided = "the world size" if self.expert_tensor == self.pipeline == 1 else "the ranks of a stage"
        expect(
            self.expert in fitting,
            "expert",
            self.expert,
            f"a divisor of both model.num_experts={model.num_experts} and {divided} {ranks}, one of "
            f"{', '.join(map(str, fitting))}",
        )
        return self.expert

    def _wrong_product(self, world_size: int) -> ValueError:
        """Return the error that names an axis the user set, and the nearest sizes that fit the world size."""
        given = {axis: getattr(self, axis) for axis in AXES if getattr(self, axis) not in ("auto", 1)}
        given = given or {"replicate": self.replicate}
        shown = " x ".join(f"{axis}={size}" for axis, size in given.items())
        exact = self.replicate != "auto"
        fits = []
        for axis, size in given.items():
            others = math.prod(given[other] for other in given if other != axis)
            valid = [
                n
                for n in range(1, world_size + 1)
                if (others * n == world_size if exact else world_size % (others * n) == 0)
            ]
            fits += [f"{axis}={n}" for n in sorted(valid, key=lambda n: (abs(n - size), n))[:2]]
        axis = max(given, key=lambda name: given[name])
        product = "whose product is" if exact else "whose product divides"
        nearest = f"the nearest are {', '.join(fits)}" if fits else "no change of a single axis is enough"
        return ValueError(
            f"{axis}={given[axis]}: expected axes {product} the world size {world_size}, found {shown}; {nearest}"
        )
