"""How the layers of a model are divided into the stages of a pipeline. Plain numbers, no torch."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

from moe.config import ModelConfig, RouterConfig
from parallel.layout import Layout
from parallel.weight_specs import WeightSpec, block_weights

Schedule = Literal["1f1b", "interleaved", "zero_bubble"]


def stage_layers(
    model: ModelConfig, router: RouterConfig, stages: int, layers_per_stage: Sequence[int] | None = None
) -> list[range]:
    """Return the layers of each stage.

    Args:
        stages: number of stages, at most the number of layers.
        layers_per_stage: number of layers of each stage. None: the numbers that make the slowest stage as fast as
            possible, then the second slowest, and so on. The cost of a layer is the number of matmul parameters that
            one token uses; the last layer's includes the head.
    """
    counts = layers_per_stage if layers_per_stage is not None else _balanced(_layer_costs(model, router), stages)
    assert len(counts) == stages and sum(counts) == model.num_layers, (counts, stages, model.num_layers)
    ends = [sum(counts[: stage + 1]) for stage in range(stages)]
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


def stages_of(rank: int, layout: Layout, schedule: Schedule) -> list[int]:
    """Return the stages of a rank of `mesh.pipeline`: one with 1F1B, two with the other schedules."""
    return [rank] if schedule == "1f1b" else [rank, rank + layout.pipeline]


def _layer_costs(model: ModelConfig, router: RouterConfig) -> tuple[int, ...]:
    """Return the matmul parameters that one token uses in each layer; the last layer's include the head."""

    def active(weight: WeightSpec) -> int:
        if weight.kind != "experts":
            return weight.numel
        assert model.num_experts is not None and model.top_k is not None
        return round(weight.numel // model.num_experts * router.experts_per_token(model.num_experts, model.top_k))

    moe_layers = [model.is_moe_layer(layer) for layer in range(model.num_layers)]
    cost = {
        is_moe: sum(active(weight) for _, weight in block_weights(model, router, is_moe) if len(weight.shape) > 1)
        for is_moe in set(moe_layers)
    }
    *costs, last = (cost[is_moe] for is_moe in moe_layers)
    return (*costs, last + (model.vocab_size or 0) * model.dim)


@lru_cache(maxsize=256)
def _balanced(costs: tuple[int, ...], stages: int) -> tuple[int, ...]:
    """Return the number of layers of each stage whose stage costs, sorted in descending order, are the smallest in
    lexicographic order."""
    best: dict[tuple[int, int], tuple[tuple[int, ...], tuple[int, ...]]] = {(0, 0): ((), ())}
    """(stages, layers) -> (costs of these stages in descending order, layers of each stage)."""
    for stage in range(1, stages + 1):
        for end in range(stage, len(costs) - (stages - stage) + 1):
            best[stage, end] = min(
                (tuple(sorted((*before, sum(costs[start:end])), reverse=True)), (*counts, end - start))
                for start in range(stage - 1, end)
                if (stage - 1, start) in best
                for before, counts in [best[stage - 1, start]]
            )
    return best[stages, len(costs)][1]
