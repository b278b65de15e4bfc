"""Sizes for the axes that `parallel` leaves to us (`auto`), from the model, the batch and the ranks. Numbers only.

The rule:

1. **Plain if it can be.** All `auto` axes are 1, and the ranks are data-parallel ones with the experts spread over
   them, if the batch has rows for each and everything fits into their memory (unknown: it is taken to fit).
2. Else every way to cut the world is tried: sizes that divide what they cut, data-parallel ranks that the batch divides
   among, tensor parallelism inside a node, no more stages than micro-batches. Those that do not fit are out.
3. Of the rest the one is taken that should be fastest: computing, waiting for a pipeline to fill, and sending, where a
   byte between nodes counts `ACROSS` times one inside (`parallel.planning.traffic` counts bytes). What is equally good
   to a twentieth is decided by how few axes are cut.

If nothing fits, what needs least is taken, with a warning. The same numbers give the same choice: all ranks have to ask
with the same `memory`.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from moe.config import ModelConfig, RouterConfig
from parallel.config import ParallelConfig, check_layout
from parallel.layout import Layout
from parallel.planning.plan import bubble, estimate_memory, number_of_stages
from parallel.planning.traffic import Step, gradient_bytes, shard_bytes, traffic
from parallel.weight_specs import WeightSpec, count_weights

CHOSEN = ("shard", "context", "tensor", "pipeline")
"""Axes to choose, the simplest first. `replicate` takes the ranks that are left, `expert` as many as it can."""
ROOM = 0.9
"""Share of the memory to plan with: activations are an estimate."""
ACROSS = 9.0
"""Cost of a byte between nodes; inside one it is 1 (NVLink of an H100: 450 GB/s; a 400 Gb/s network card: 50)."""
FLOPS_A_BYTE = 900.0
"""Operations in the time of a byte inside a node (an H100 at 400 TFLOP/s)."""
LATENCY = 9e6
"""Cost of a collective of up to eight ranks, however little it sends: 20 microseconds, in bytes."""
ALIKE = 1.05


@dataclass(frozen=True)
class Choice:
    parallel: ParallelConfig
    """No axis is `auto` but `expert` and `replicate`, as given."""
    warning: str | None = None
    """What a user should know of it."""


def plain(parallel: ParallelConfig) -> ParallelConfig:
    """`parallel` with 1 for each axis that was to be chosen."""
    sizes: dict[str, Any] = {axis: 1 for axis in CHOSEN if getattr(parallel, axis) == "auto"}
    return replace(parallel, **sizes)


def resolve(
    parallel: ParallelConfig,
    model: ModelConfig,
    router: RouterConfig,
    *,
    world_size: int,
    local_world_size: int,
    global_batch: int,
    accumulation: int,
    seq_len: int,
    memory: int | None = None,
    itemsize: int = 2,
    weight_itemsize: int = 4,
    trained: float = 1.0,
) -> Choice:
    """Choose the axes that are `auto`.

    Args:
        local_world_size: ranks of a node.
        global_batch: rows of an optimizer step.
        memory: bytes of one rank's device; None: unknown.
        itemsize, weight_itemsize, trained: as of `parallel.planning.plan.plan`.

    Raises:
        ValueError: nothing is valid. Starts with the key to change: a field of `parallel`, or `global_batch`.
    """
    search = _Search(parallel, model, router, world_size, local_world_size, global_batch, accumulation, seq_len)
    if all(getattr(parallel, axis) != "auto" for axis in CHOSEN):
        search.require(parallel)
        return Choice(parallel)
    step = Step(0, seq_len, accumulation, itemsize, weight_itemsize, trained, parallel.recompute)
    sharded = parallel.offload and parallel.shard == "auto"  # to offload, something has to be sharded
    if not sharded:
        layout = search.valid(plain(parallel))
        if layout and (memory is None or search.needs(plain(parallel), layout, step) <= ROOM * memory):
            return Choice(plain(parallel))
    found = [(config, layout) for config in search.configs() if (layout := search.valid(config))]
    if not found:
        first = next(search.configs(), None) if sharded else None
        search.require(first or plain(parallel))  # says why
    needs = {layout: search.needs(config, layout, step) for config, layout in found}
    fitting = [pair for pair in found if memory is None or needs[pair[1]] <= ROOM * memory]
    warning = None
    if not fitting and memory is not None:
        least = min(needs.values())
        fitting = [pair for pair in found if needs[pair[1]] <= least * ALIKE]
        warning = (
            f"no layout of {world_size} ranks seems to fit: what needs least needs about {least / 1e9:.1f} GB of each "
            f"rank's {memory / 1e9:.1f} GB, and a tenth is to stay free; more ranks, parallel.recompute=full, "
            "parallel.offload=true or more train.accumulation may help"
        )
    costs = {layout: search.cost(config, layout, step) for config, layout in fitting}
    bound = min(costs.values()) * ALIKE
    best = min((pair for pair in fitting if costs[pair[1]] <= bound), key=lambda pair: _cuts(pair[1], costs[pair[1]]))
    return Choice(best[0], warning)


def _cuts(layout: Layout, cost: float) -> tuple[int, float]:
    """How much a layout cuts, to be compared."""
    return sum(getattr(layout, axis) > 1 for axis in CHOSEN), cost


@dataclass(frozen=True)
class _Search:
    parallel: ParallelConfig
    model: ModelConfig
    router: RouterConfig
    world_size: int
    local_world_size: int
    global_batch: int
    accumulation: int
    seq_len: int

    def configs(self) -> Iterator[ParallelConfig]:
        """All ways to give the `auto` axes sizes whose product divides the world."""
        given = [getattr(self.parallel, axis) for axis in (*CHOSEN, "replicate")]
        rest = self.world_size // math.prod(size for size in given if size != "auto")
        bounds = {
            "tensor": self.local_world_size,
            "pipeline": min(self.accumulation, self.model.num_layers),
            "shard": self.global_batch // self.accumulation,
        }
        free = [axis for axis in CHOSEN if getattr(self.parallel, axis) == "auto"]

        def sizes(axes: list[str], rest: int) -> Iterator[dict[str, Any]]:
            if not axes:
                yield {}
                return
            for size in _divisors(rest):
                if size <= bounds.get(axes[0], rest):
                    for others in sizes(axes[1:], rest // size):
                        yield {axes[0]: size, **others}

        for chosen in sizes(free, rest):
            if not (self.parallel.offload and chosen.get("shard") == 1):
                yield replace(self.parallel, **chosen)

    def valid(self, config: ParallelConfig) -> Layout | None:
        try:
            return self.require(config)
        except ValueError:
            return None

    def require(self, config: ParallelConfig) -> Layout:
        """Its layout, or why there is none."""
        layout = config.layout(self.world_size, self.model, self.seq_len)
        check_layout(
            layout,
            config,
            self.model,
            seq_len=self.seq_len,
            accumulation=self.accumulation,
            pooled=self.router.layer_reduction == "hf_pooled",
        )
        together = self.accumulation * layout.data
        if self.global_batch % together:
            fewer = self.global_batch // together * together
            near = [str(number) for number in (fewer, fewer + together) if number]
            raise ValueError(
                f"global_batch={self.global_batch}: expected a multiple of train.accumulation={self.accumulation} "
                f"times the {layout.data} data-parallel ranks, the nearest: {' or '.join(near)}"
            )
        return layout

    def step(self, layout: Layout, step: Step) -> Step:
        return replace(step, rows=self.global_batch // self.accumulation // layout.data)

    def needs(self, config: ParallelConfig, layout: Layout, step: Step) -> int:
        """Bytes of device memory on the fullest rank."""
        held = estimate_memory(layout, config, self.model, self.router, self.step(layout, step))
        return max(stage.device for stage in held)

    def cost(self, config: ParallelConfig, layout: Layout, step: Step) -> float:
        """Of an optimizer step, in bytes that could be sent inside a node in its time."""
        step = self.step(layout, step)
        sent = traffic(self.model, self.router, layout, step, number_of_stages(layout, config))
        sequence, of_experts = layout.sequence, layout.expert_tensor * layout.expert
        sending = sent["expert"] * self.between(layout.expert_tensor, layout.expert)
        sending += sent["expert_tensor"] * self.between(1, layout.expert_tensor, ring=True)
        sending += sent["tensor"] * self.between(1, layout.tensor, ring=True)
        sending += sent["context"] * self.between(layout.tensor, layout.context)
        sending += sent["pipeline"] * self.between(layout.stage, layout.pipeline)
        travelling = 0.0
        for experts in (False, True):
            weights = {w: number for w, number in self.weights.items() if (w.kind == "experts") == experts}
            stride = of_experts if experts else sequence
            shard = layout.expert_shard if experts else layout.shard
            copies = layout.expert_data // shard if experts else layout.replicate
            dear = self.between(stride, shard, ring=True)
            travelling += shard_bytes(weights, layout, step) / layout.pipeline * dear
            dear = self.between(stride * shard, copies, ring=True)
            sending += gradient_bytes(weights, layout, step) / layout.pipeline * dear
        passes = 4 if step.recompute == "full" else 3
        computing = 2 * passes * self.active * self.global_batch * self.seq_len / layout.world / FLOPS_A_BYTE
        sending += max(0.0, travelling - computing)  # FSDP's weights travel while the block before computes
        filled = 1 - bubble(layout.pipeline, self.accumulation, config.schedule)
        return computing / filled + sending + self.waiting(layout)

    def between(self, stride: int, size: int, ring: bool = False) -> float:
        """What a byte between `size` ranks that are `stride` apart costs: 1 inside a node.

        A ring leaves a node once, for all of its ranks in there; others send to all ranks alike.
        """
        inside = max(1, min(size, self.local_world_size // stride))
        if inside == size:
            return 1.0
        if ring:
            return max(1.0, ACROSS / inside)
        leaving = (size - inside) / (size - 1)
        return leaving * ACROSS + (1 - leaving)

    def waiting(self, layout: Layout) -> float:
        """For the collectives of a step, but for those that every layout has. Longer rings have more hops."""
        layers, moe = self.model.num_layers, self.model.num_moe_layers
        calls = {
            "tensor": 8 * layers,
            "context": 2 * layers,
            "shard": 3 * (layers + moe),
            "pipeline": 4 * layout.pipeline,
        }
        sizes = {axis: getattr(layout, axis) for axis in calls}
        each = sum(calls[axis] * max(1, size / 8) for axis, size in sizes.items() if size > 1)
        return LATENCY * self.accumulation * each / layout.pipeline

    @cached_property
    def weights(self) -> Mapping[WeightSpec, int]:
        return count_weights(self.model, range(self.model.num_layers))

    @cached_property
    def active(self) -> float:
        """Parameters that a token meets, the embedding's included."""
        experts, top_k = self.model.num_experts or 1, self.model.top_k or 1
        met = {"experts": top_k / experts}
        return sum(weight.numel * number * met.get(weight.kind, 1) for weight, number in self.weights.items())


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
