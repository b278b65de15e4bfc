"""The choice of the parallel axes that are `auto`, from the model, the batch and the ranks. Plain numbers.

The rule:

1. The simplest layout is chosen if it is possible: all `auto` axes are 1, so that the ranks are data-parallel and the
   experts are distributed over them. The batch must have rows for every rank, and the memory must suffice. If the size
   of the memory is unknown, it is assumed to suffice.
2. Otherwise the candidates are all layouts of the world that divide the model and the batch, with tensor parallelism
   inside one node and no more pipeline ranks than micro-batches. Candidates that do not fit into the memory are
   excluded.
3. The candidate with the lowest estimated time is chosen. The estimate adds computation, the idle time of the pipeline
   and communication, with the bytes of `parallel.planning.traffic`. Among candidates within a twentieth of the lowest
   time, the one that uses the fewest axes is chosen.

If no candidate fits, one that needs about the least memory is chosen, with a warning. Equal arguments give equal
choices, so all ranks must pass the same `memory`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from parallel.config import ParallelConfig
from parallel.layout import Layout
from parallel.planning.check import check_layout
from parallel.planning.plan import bubble, estimate_memory
from parallel.planning.traffic import gradient_bytes, shard_bytes, traffic
from parallel.planning.workload import Workload
from parallel.startup.launch import World

AUTO_AXES = ("shard", "context", "tensor", "pipeline")
"""The axes that are chosen, the simplest first. `replicate` gets the remaining ranks, `expert` as many as possible."""
USABLE_MEMORY = 0.9
"""Share of the memory that a layout may use, because the activations are an estimate."""
TOLERANCE = 1.05
"""Estimates whose ratio is at most this count as equal."""
INTER_NODE_COST = 9.0
"""Cost of a byte between nodes. Inside a node it is 1 (NVLink of an H100: 450 GB/s; a 400 Gb/s network card: 50)."""
FLOPS_PER_BYTE = 900.0
"""Floating-point operations in the time that a byte takes inside a node (an H100 at 400 TFLOP/s)."""
COLLECTIVE_COST = 9e6
"""Cost of starting a collective of up to eight ranks, however little it sends: 20 microseconds, in bytes."""


class Choice(NamedTuple):
    """The result of `resolve`."""

    parallel: ParallelConfig
    """The configuration. Only `expert` and `replicate` can still be `auto`."""
    warning: str | None = None
    """One line for the user if no layout fits into the memory."""


class _Candidate(NamedTuple):
    parallel: ParallelConfig
    layout: Layout
    memory: int
    """Bytes of device memory that the fullest rank needs."""


def without_auto(parallel: ParallelConfig) -> ParallelConfig:
    """Return `parallel` with 1 for each of `AUTO_AXES` that is `auto`."""
    sizes: dict[str, Any] = {axis: 1 for axis in AUTO_AXES if getattr(parallel, axis) == "auto"}
    return replace(parallel, **sizes)


def resolve(parallel: ParallelConfig, workload: Workload, world: World, memory: int | None = None) -> Choice:
    """Choose the axes that are `auto`.

    Args:
        memory: bytes of one rank's device; None: unknown.

    Raises:
        ValueError: no layout is possible. The message starts with the key to change, a field of `parallel` or
            `global_batch`.
    """
    search = _Search(parallel, workload, world)
    if all(getattr(parallel, axis) != "auto" for axis in AUTO_AXES):
        search.layout(parallel)
        return Choice(parallel)
    usable = math.inf if memory is None else USABLE_MEMORY * memory
    must_shard = parallel.offload and parallel.shard == "auto"  # Without FSDP there is nothing to offload.
    if not must_shard:
        simplest = search.candidate(without_auto(parallel))
        if simplest and simplest.memory <= usable:
            return Choice(simplest.parallel)
    candidates = [candidate for config in search.configs() if (candidate := search.candidate(config))]
    if not candidates:
        first = next(search.configs(), None) if must_shard else None
        search.layout(first or without_auto(parallel))  # This raises the reason.
    fitting = [candidate for candidate in candidates if candidate.memory <= usable]
    warning = None
    if not fitting and memory is not None:
        least = min(candidate.memory for candidate in candidates)
        fitting = [candidate for candidate in candidates if candidate.memory <= least * TOLERANCE]
        warning = (
            f"no layout of {world.world_size} ranks seems to fit: the smallest needs about {least / 1e9:.1f} GB of "
            f"each rank's {memory / 1e9:.1f} GB, of which a tenth must stay free; more ranks, parallel.recompute=full, "
            "parallel.offload=true or more train.accumulation may help"
        )
    costs = {candidate: search.cost(candidate) for candidate in fitting}
    bound = min(costs.values()) * TOLERANCE
    best = min(
        (candidate for candidate in fitting if costs[candidate] <= bound),
        key=lambda candidate: (_axes_used(candidate.layout), costs[candidate]),
    )
    return Choice(best.parallel, warning)


def _axes_used(layout: Layout) -> int:
    """Return how many of `AUTO_AXES` are larger than 1."""
    return sum(getattr(layout, axis) > 1 for axis in AUTO_AXES)


@dataclass(frozen=True)
class _Search:
    """The candidates for a configuration with `auto` axes, and their costs."""

    parallel: ParallelConfig
    workload: Workload
    world: World

    def configs(self) -> Iterator[ParallelConfig]:
        """Yield a configuration for all sizes of the `auto` axes whose product divides the world size."""
        fixed = [getattr(self.parallel, axis) for axis in (*AUTO_AXES, "replicate")]
        rest = self.world.world_size // math.prod(size for size in fixed if size != "auto")
        bounds = {
            "tensor": self.world.local_world_size,
            "pipeline": min(self.workload.accumulation, self.workload.model.num_layers),
            "shard": self.workload.global_batch // self.workload.accumulation,
        }

        def sizes(axes: list[str], rest: int) -> Iterator[dict[str, Any]]:
            if not axes:
                yield {}
                return
            for size in range(1, min(rest, bounds.get(axes[0], rest)) + 1):
                if rest % size == 0:
                    for others in sizes(axes[1:], rest // size):
                        yield {axes[0]: size, **others}

        for chosen in sizes([axis for axis in AUTO_AXES if getattr(self.parallel, axis) == "auto"], rest):
            if not (self.parallel.offload and chosen.get("shard") == 1):
                yield replace(self.parallel, **chosen)

    def layout(self, parallel: ParallelConfig) -> Layout:
        """Return the layout of a configuration without `auto` axes. Raises ValueError if it is not possible."""
        layout = parallel.layout(self.world.world_size, self.workload.model, self.workload.seq_len)
        check_layout(layout, parallel, self.workload)
        return layout

    def candidate(self, parallel: ParallelConfig) -> _Candidate | None:
        """Return the layout of a configuration and the memory it needs, or None if it is not possible."""
        try:
            layout = self.layout(parallel)
        except ValueError:
            return None
        estimates = estimate_memory(layout, parallel, self.workload)
        return _Candidate(parallel, layout, max(estimate.device for estimate in estimates))

    def cost(self, candidate: _Candidate) -> float:
        """Return the estimated time of an optimizer step, in the time that a byte takes inside a node."""
        parallel, layout, _ = candidate
        workload = self.workload
        sent = traffic(workload, layout, parallel)
        communication = sent["expert"] * self._byte_cost(layout.expert_tensor, layout.expert)
        communication += sent["expert_tensor"] * self._byte_cost(1, layout.expert_tensor, ring=True)
        communication += sent["tensor"] * self._byte_cost(1, layout.tensor, ring=True)
        communication += sent["context"] * self._byte_cost(layout.tensor, layout.context)
        communication += sent["pipeline"] * self._byte_cost(layout.stage, layout.pipeline)
        fsdp = 0.0
        for of_experts in (False, True):
            weights = {w: number for w, number in workload.weights.items() if (w.kind == "experts") == of_experts}
            stride = layout.expert_tensor * layout.expert if of_experts else layout.sequence
            shard = layout.expert_shard if of_experts else layout.shard
            replicas = layout.expert_data // shard if of_experts else layout.replicate
            fsdp += shard_bytes(weights, layout, workload) / layout.pipeline * self._byte_cost(stride, shard, ring=True)
            byte_cost = self._byte_cost(stride * shard, replicas, ring=True)
            communication += gradient_bytes(weights, layout, workload) / layout.pipeline * byte_cost
        passes = 4 if parallel.recompute == "full" else 3
        flops = 2 * passes * self._active_parameters * workload.global_batch * workload.seq_len
        computation = flops / layout.world / FLOPS_PER_BYTE
        communication += max(0.0, fsdp - computation)  # FSDP gathers weights while the previous block computes.
        busy = 1 - bubble(layout.pipeline, workload.accumulation, parallel.schedule)
        return computation / busy + communication + self._latency_cost(layout)

    def _byte_cost(self, stride: int, size: int, ring: bool = False) -> float:
        """Return the cost of a byte that a group sends; 1 if the group is inside a node.

        Args:
            stride: distance between the numbers of neighbouring ranks in the group.
            size: ranks of the group.
            ring: a ring leaves each node once for all ranks of the group in the node. Otherwise every rank sends the
                same amount to all other ranks.
        """
        inside = max(1, min(size, self.world.local_world_size // stride))
        if inside == size:
            return 1.0
        if ring:
            return max(1.0, INTER_NODE_COST / inside)
        leaving = (size - inside) / (size - 1)
        return leaving * INTER_NODE_COST + (1 - leaving)

    def _latency_cost(self, layout: Layout) -> float:
        """Return the cost of starting the collectives of a step, without those that every layout has."""
        layers, moe = self.workload.model.num_layers, self.workload.model.num_moe_layers
        calls = {
            "tensor": 8 * layers,
            "context": 2 * layers,
            "shard": 3 * (layers + moe),
            "pipeline": 4 * layout.pipeline,
        }
        sizes = {axis: getattr(layout, axis) for axis in calls}
        # A ring of more than eight ranks takes longer, in proportion to its hops.
        starts = sum(calls[axis] * max(1, size / 8) for axis, size in sizes.items() if size > 1)
        return COLLECTIVE_COST * self.workload.accumulation * starts / layout.pipeline

    @cached_property
    def _active_parameters(self) -> float:
        """Parameters that one token uses, in the mean over the tokens, including the embedding."""
        experts, top_k = self.workload.model.num_experts or 1, self.workload.model.top_k or 1
        share = {"experts": self.workload.router.experts_per_token(experts, top_k) / experts}
        weights = self.workload.weights.items()
        return sum(weight.numel * number * share.get(weight.kind, 1) for weight, number in weights)
