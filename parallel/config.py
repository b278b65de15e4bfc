"""How the world of processes is cut into axes, mirrored by `conf/parallel`."""

from dataclasses import dataclass, replace
from typing import Literal

from common.checks import expect
from moe.config import ModelConfig
from parallel.layout import AXES, Layout

Size = Literal["auto"] | int


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the parallel axes, and what goes with them. `auto` is resolved by `parallel/planning/auto.py`."""

    expert: Size = "auto"
    """Ranks over which one set of experts is spread; they may be data-, context- and tensor-parallel ranks.
    `auto`: the largest that the stage and num_experts allow."""
    tensor: Size = 1
    """Ranks that share out heads, hidden widths and the vocabulary, and the sequence between these."""
    pipeline: Size = 1
    """Stages that the layers are cut into; micro-batches (`train.accumulation`) travel through them."""
    context: Size = 1
    """Ranks that share out the sequence."""
    shard: Size = 1
    """Data-parallel ranks that share out weights, gradients and optimizer state (FSDP2)."""
    replicate: Size = "auto"
    """Data-parallel ranks beside those. `auto`: all ranks that no other key claims."""
    expert_tensor: int = 1
    """Ranks that share out the hidden width of each expert."""
    schedule: Literal["1f1b", "interleaved", "zero_bubble"] = "1f1b"
    """Order of forward and backward passes in a pipeline. The latter two give every rank two stages."""
    stage_layers: tuple[int, ...] | None = None
    """Layers of each stage, in order; `null`: as even as they divide, the embedding and the head counted."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again instead of keeping: nothing; the hidden layers of experts and dense
    networks (no communication is repeated); whole blocks (routing decisions are kept)."""
    offload: bool = False
    """With `shard`: weights, gradients and optimizer state lie in CPU memory between uses."""
    start_timeout_s: float = 300.0
    """Seconds that start-up (rendezvous, first collective) may take."""
    timeout_s: float = 100.0
    """Seconds a collective may wait during training before the run ends."""

    def __post_init__(self) -> None:
        for field in ("expert", *AXES, "expert_tensor"):
            value = getattr(self, field)
            expect(value == "auto" or value >= 1, field, value, "an integer >= 1, or auto")
        for field in ("start_timeout_s", "timeout_s"):
            expect(getattr(self, field) > 0, field, getattr(self, field), "seconds > 0")
        stages = self.stage_layers
        expect(
            stages is None or all(layers >= 1 for layers in stages),
            "stage_layers",
            _shown(stages),
            "a list of integers >= 1",
        )
        expect(
            stages is None or self.pipeline != "auto",
            "stage_layers",
            _shown(stages),
            "a number for parallel.pipeline beside it, which is auto",
        )
        expect(
            stages is None or len(stages) == self.pipeline * self.stages_per_rank,
            "stage_layers",
            _shown(stages),
            f"one number a stage, {self.stages_per_rank} x parallel.pipeline={self.pipeline}",
        )
        expect(not self.offload or self.shard != 1, "offload", True, "parallel.shard > 1 beside it")

    @property
    def stages_per_rank(self) -> int:
        """Pipeline stages on one rank."""
        return 1 if self.schedule == "1f1b" or self.pipeline == 1 else 2

    def layout(self, world_size: int, model: ModelConfig, seq_len: int | None = None) -> Layout:
        """The sizes for a world, where none but `expert` and `replicate` is `auto`.

        Args:
            seq_len: of the rows; None: no context parallelism is meant.

        Raises:
            ValueError: the axes do not multiply to the world, or do not divide what they share out; starts with the
                field.
        """
        given = {axis: getattr(self, axis) for axis in AXES if axis != "replicate"}
        assert "auto" not in given.values(), given
        claimed = 1
        for size in given.values():
            claimed *= size
        rest = world_size // claimed if self.replicate == "auto" else self.replicate
        if rest * claimed != world_size or rest < 1:
            raise self._wrong_product(world_size)
        layout = Layout(**given, replicate=rest)
        ranks = layout.stage
        expect(
            ranks % self.expert_tensor == 0,
            "expert_tensor",
            self.expert_tensor,
            f"a divisor of {ranks}, the ranks of a stage",
        )
        expert = self._expert(ranks // self.expert_tensor, model)
        zigzag = seq_len is not None and self._balances(model, layout, seq_len)
        return replace(layout, expert=expert, expert_tensor=self.expert_tensor, zigzag=zigzag)

    def _balances(self, model: ModelConfig, layout: Layout, seq_len: int) -> bool:
        """Whether two pieces a rank are worth it (full attention in every layer) and possible."""
        windowless = all(model.window(layer) is None for layer in range(model.num_layers))
        # Tensor ranks cut what a context rank holds once more: each piece as a whole, or not at all.
        whole = layout.tensor == 1 or layout.tensor % 2 == 0
        return layout.context > 1 and windowless and whole and seq_len % (2 * layout.context) == 0

    def _expert(self, ranks: int, model: ModelConfig) -> int:
        if model.num_experts is None:
            expect(
                self.expert in ("auto", 1), "expert", self.expert, "1 or auto in a dense model (num_experts is null)"
            )
            expect(self.expert_tensor == 1, "expert_tensor", self.expert_tensor, "1 in a dense model")
            return 1
        fitting = [n for n in range(1, ranks + 1) if ranks % n == 0 and model.num_experts % n == 0]
        if self.expert == "auto":
            return fitting[-1]
        whose = "the world size" if self.expert_tensor == self.pipeline == 1 else "the ranks of a stage"
        expect(
            self.expert in fitting,
            "expert",
            self.expert,
            f"a divisor of both model.num_experts={model.num_experts} and {whose} {ranks}, one of "
            f"{', '.join(map(str, fitting))}",
        )
        return self.expert

    def _wrong_product(self, world_size: int) -> ValueError:
        """Names an axis that was given, and the values nearest to it that would fit."""
        given = {axis: getattr(self, axis) for axis in AXES if getattr(self, axis) not in ("auto", 1)}
        given = given or {"replicate": self.replicate}
        shown = " x ".join(f"{axis}={size}" for axis, size in given.items())
        exact = self.replicate != "auto"
        fits = []
        for axis, size in given.items():
            others = 1
            for other, other_size in given.items():
                others *= other_size if other != axis else 1
            valid = [
                n
                for n in range(1, world_size + 1)
                if (others * n == world_size if exact else world_size % (others * n) == 0)
            ]
            fits += [f"{axis}={n}" for n in sorted(valid, key=lambda n: (abs(n - size), n))[:2]]
        axis = max(given, key=lambda name: given[name])
        product = "whose product is" if exact else "whose product divides"
        nearest = f"the nearest are {', '.join(fits)}" if fits else "no single axis can mend it"
        return ValueError(
            f"{axis}={given[axis]}: expected axes {product} the world size {world_size}, found {shown}; {nearest}"
        )


def check_layout(
    layout: Layout,
    parallel: ParallelConfig,
    model: ModelConfig,
    *,
    seq_len: int,
    accumulation: int,
    pooled: bool = False,
) -> None:
    """Refuse a layout that the model, the sequence or the micro-batches cannot be cut into.

    Args:
        seq_len: S, of a whole row.
        accumulation: micro-batches of a step.
        pooled: the balance loss pools layers (`router.layer_reduction=hf_pooled`).

    Raises:
        ValueError: starts with the field of `parallel`.
    """
    tensor, stages = layout.tensor, layout.pipeline * parallel.stages_per_rank
    widths = {"num_heads": model.num_heads, "num_kv_heads": model.num_kv_heads}
    if model.num_moe_layers < model.num_layers:
        widths["hidden_dim"] = model.hidden_dim
    if model.num_shared_experts:
        widths["num_shared_experts x expert_hidden_dim"] = model.num_shared_experts * model.expert_width
    if model.vocab_size is not None:
        widths["vocab_size"] = model.vocab_size
    for name, size in widths.items():
        expect(size % tensor == 0, "tensor", tensor, f"a divisor of model.{name}={size}")
    if model.is_moe:
        width, parts = model.expert_width, layout.expert_tensor
        expect(width % parts == 0, "expert_tensor", parts, f"a divisor of the experts' hidden width {width}")
    for axis, parts in (("context", layout.context), ("tensor", layout.sequence)):
        also = f" (times parallel.context={layout.context})" if axis == "tensor" and layout.context > 1 else ""
        expect(seq_len % parts == 0, axis, getattr(layout, axis), f"a divisor of train.seq_len={seq_len}{also}")
    if layout.pipeline == 1:
        return
    expect(
        stages <= model.num_layers,
        "pipeline",
        layout.pipeline,
        f"at most {model.num_layers // parallel.stages_per_rank}: {parallel.stages_per_rank} stage(s) a rank, "
        f"model.num_layers={model.num_layers}",
    )
    layers = parallel.stage_layers
    expect(
        layers is None or sum(layers) == model.num_layers,
        "stage_layers",
        _shown(layers),
        f"numbers that add up to model.num_layers={model.num_layers}",
    )
    fitting = -(-accumulation // layout.pipeline) * layout.pipeline
    expect(
        accumulation >= layout.pipeline and (parallel.schedule == "1f1b" or accumulation % layout.pipeline == 0),
        "pipeline",
        layout.pipeline,
        f"at least so many micro-batches, train.accumulation={fitting} instead of {accumulation}"
        + (" (a multiple of the stages)" if parallel.schedule != "1f1b" else ""),
    )
    expect(
        not (parallel.schedule == "zero_bubble" and parallel.recompute == "full"),
        "recompute",
        "full",
        "none or selective with parallel.schedule=zero_bubble (it runs a backward pass in two parts)",
    )
    expect(not pooled, "pipeline", layout.pipeline, "1 with router.layer_reduction=hf_pooled (it pools all layers)")


def _shown(stages: tuple[int, ...] | None) -> str:
    return "null" if stages is None else f"[{','.join(map(str, stages))}]"
