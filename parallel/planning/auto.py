"""The choice of the parallel axes that are `auto`, from the model, the batch and the ranks. Plain numbers.

The rule:

1. The simplest layout is chosen if it is possible: all `auto` axes are 1, so that the ranks are data-parallel and the
   experts are distributed over them. The batch must have rows for every rank, and the memory must suffice. If the size
   of the memory is unknown, it is assumed to suffice.
2. Otherwise the candidates are all layouts of the world that divide the model and the batch, with tensor parallelism
   inside one node and no more pipeline ranks than micro-batches. Candidates that do not fit into the memory are
   excluded.
3. The candidate with the lowest estimated time (`parallel.planning.times`) is chosen. Among candidates within a
   twentieth of the lowest time, the one that uses the fewest axes is chosen.

If no candidate fits, one that needs about the least memory is chosen, with a warning. Equal arguments give equal
choices, so all ranks must pass the same `memory`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from parallel.config import ParallelConfig
from parallel.layout import Layout
from parallel.planning.check import check_layout
from parallel.planning.plan import estimate_memory
from parallel.planning.times import REFERENCE, estimate_times
from parallel.planning.workload import Workload
from parallel.startup.launch import World

AUTO_AXES = ("shard", "context", "tensor", "pipeline")
"""The axes that are chosen, the simplest first. `replicate` gets the remaining ranks, `expert` as many as possible."""
USABLE_MEMORY = 0.9
"""Share of the memory that a layout may use, because the activations are an estimate."""
TOLERANCE = 1.05
"""Estimates whose ratio is at most this count as equal."""


class Choice(NamedTuple):
    """The result of `resolve`."""

    parallel: ParallelConfig
    """The configuration. Only `expert` and `replicate` can still be `auto`."""
    warning: str | None = None
    """One line for the user if no layout fits into the memory."""


class Candidate(NamedTuple):
    """A layout that is possible."""

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
    search = Search(parallel, workload, world)
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
    times = {candidate: search.seconds(candidate) for candidate in fitting}
    bound = min(times.values()) * TOLERANCE
    best = min(
        (candidate for candidate in fitting if times[candidate] <= bound),
        key=lambda candidate: (_axes_used(candidate.layout), times[candidate]),
    )
    return Choice(best.parallel, warning)


def _axes_used(layout: Layout) -> int:
    """Return how many of `AUTO_AXES` are larger than 1."""
    return sum(getattr(layout, axis) > 1 for axis in AUTO_AXES)


@dataclass(frozen=True)
class Search:
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

    def candidate(self, parallel: ParallelConfig) -> Candidate | None:
        """Return the layout of a configuration and the memory it needs, or None if it is not possible."""
        try:
            layout = self.layout(parallel)
        except ValueError:
            return None
        estimates = estimate_memory(layout, parallel, self.workload)
        return Candidate(parallel, layout, max(estimate.device for estimate in estimates))

    def seconds(self, candidate: Candidate) -> float:
        """Return the estimated time of an optimizer step on GPUs like `REFERENCE`."""
        hardware = replace(REFERENCE, gpus_per_node=self.world.local_world_size)
        return estimate_times(candidate.layout, candidate.parallel, self.workload, hardware).total
