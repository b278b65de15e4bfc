"""How the layers of a model are dealt out to the stages of a pipeline. Plain numbers."""

from collections.abc import Sequence
from typing import Literal

from moe.config import ModelConfig
from parallel.layout import Layout
from parallel.weight_specs import named_weights

Schedule = Literal["1f1b", "interleaved", "zero_bubble"]


def stage_layers(model: ModelConfig, stages: int, given: Sequence[int] | None = None) -> list[range]:
    """The layers of each stage.

    Args:
        stages: at most as many as layers.
        given: how many layers each stage has. None: such that the slowest stage is as fast as can be, then the next
            slowest, and so on. Counted are the matmul parameters that a token meets, the head's with the last layer's.
    """
    counts = _balanced(_layer_costs(model), stages) if given is None else list(given)
    assert len(counts) == stages and sum(counts) == model.num_layers, (counts, stages, model.num_layers)
    ends = [sum(counts[: stage + 1]) for stage in range(stages)]
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


def stages_of(rank: int, layout: Layout, schedule: Schedule) -> list[int]:
    """Numbers of the stages on this rank of `mesh.pipeline`: one, or with the other schedules than 1F1B two."""
    return [rank] if schedule == "1f1b" else [rank, rank + layout.pipeline]


def _layer_costs(model: ModelConfig) -> list[int]:
    """Matmul parameters that a token meets, by layer; the head's are with the last."""
    costs = [0] * model.num_layers
    for name, weight in named_weights(model).items():
        if name.startswith("layers.") and len(weight.shape) > 1:
            active = weight.numel
            if weight.kind == "experts":
                assert model.num_experts is not None and model.top_k is not None
                active = active // model.num_experts * model.top_k
            costs[int(name.split(".")[1])] += active
    costs[-1] += (model.vocab_size or 0) * model.dim
    return costs


def _balanced(costs: Sequence[int], stages: int) -> list[int]:
    """Layers of each stage, such that their costs, the largest first, are the least in lexicographic order."""
    best: dict[tuple[int, int], tuple[tuple[int, ...], list[int]]] = {(0, 0): ((), [])}
    """Of (stages, layers): descending costs, layers of each stage."""
    for stage in range(1, stages + 1):
        for end in range(stage, len(costs) - (stages - stage) + 1):
            best[stage, end] = min(
                (tuple(sorted((*before, sum(costs[start:end])), reverse=True)), [*counts, end - start])
                for start in range(stage - 1, end)
                if (stage - 1, start) in best
                for before, counts in [best[stage - 1, start]]
            )
    return best[stages, len(costs)][1]
