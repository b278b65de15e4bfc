"""What a layout means before it runs: who holds what, what is sent, how long pipelines idle. Numbers only.

State is exact: what `parallel/apply.py` builds and AdamW keeps. Activations are an estimate of what the backward pass
finds kept (0.8 to 1.3 times what autograd keeps of small models on a CPU), for a comparison of layouts and a first idea
of what fits; allocators and kernels add their own, and a batch whose load is uneven its own.

Letters: P pipeline ranks, m micro-batches of a step, v stages of a rank.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from moe.config import ModelConfig, RouterConfig, is_gated
from parallel.config import ParallelConfig
from parallel.layout import Layout
from parallel.planning.traffic import Axis, Step, fetched_places, routed_rows, traffic
from parallel.stages import Schedule, stage_layers
from parallel.weight_specs import WeightSpec, count_weights, sharers


@dataclass(frozen=True)
class MemoryEstimate:
    """Of the rank of a pipeline stage that holds most, in bytes."""

    layers: tuple[int, ...]
    parameters: int
    weights: int
    gradients: int
    moments: int
    """AdamW's two."""
    offloaded: bool
    """Weights, gradients and moments lie in host memory."""
    copies: int
    """Weights in the compute dtype, while they are used (estimate)."""
    activations: int
    """Kept for the backward pass (estimate)."""

    @property
    def state(self) -> int:
        return self.weights + self.gradients + self.moments

    @property
    def device(self) -> int:
        """Memory that has to be there beside the program."""
        return self.copies + self.activations + (0 if self.offloaded else self.state)

    @property
    def host(self) -> int:
        """Memory of the host, for this rank."""
        return self.state if self.offloaded else 0


@dataclass(frozen=True)
class Plan:
    layout: Layout
    stages: tuple[MemoryEstimate, ...]
    """A pipeline rank each; without a pipeline one."""
    traffic: dict[Axis, float]
    """Bytes that a rank sends in an optimizer step, in the mean over ranks."""
    bubble: float
    """Share of a step that a pipeline rank idles, were all passes of all stages equally long."""

    @property
    def fullest(self) -> MemoryEstimate:
        return max(self.stages, key=lambda stage: stage.device)

    @property
    def sent(self) -> float:
        return sum(self.traffic.values())


def plan(
    layout: Layout,
    parallel: ParallelConfig,
    model: ModelConfig,
    router: RouterConfig,
    *,
    rows: int,
    seq_len: int,
    accumulation: int,
    itemsize: int,
    weight_itemsize: int = 4,
    trained: float = 1.0,
) -> Plan:
    """What `layout` means for this model.

    Args:
        rows: of a micro-batch on one data rank.
        itemsize: bytes of a number in the forward pass.
        weight_itemsize: bytes of a number in weights, gradients and moments.
        trained: share of the parameters that train.
    """
    step = Step(rows, seq_len, accumulation, itemsize, weight_itemsize, trained, parallel.recompute)
    return Plan(
        layout,
        estimate_memory(layout, parallel, model, router, step),
        traffic(model, router, layout, step, number_of_stages(layout, parallel)),
        bubble(layout.pipeline, accumulation, parallel.schedule),
    )


def bubble(ranks: int, micro_batches: int, schedule: Schedule) -> float:
    """Idle share of P ranks and m micro-batches: (P - 1)/(m + P - 1), arXiv 2104.04473.

    With v = 2 stages a rank each pass is half as long; the zero bubble schedule fills with the weights' gradients all
    but a third of what is left (2401.10241, ZB-H1).
    """
    work = {"1f1b": 1, "interleaved": 2, "zero_bubble": 6}[schedule] * micro_batches
    return (ranks - 1) / (work + ranks - 1)


def number_of_stages(layout: Layout, parallel: ParallelConfig) -> int:
    return 1 if layout.pipeline == 1 else layout.pipeline * parallel.stages_per_rank


@lru_cache(maxsize=256)
def _stage_layers(model: ModelConfig, stages: int, given: tuple[int, ...] | None) -> list[range]:
    return stage_layers(model, stages, given)


def estimate_memory(
    layout: Layout,
    parallel: ParallelConfig,
    model: ModelConfig,
    router: RouterConfig,
    step: Step,
) -> tuple[MemoryEstimate, ...]:
    """One entry a pipeline rank."""
    held = []
    shared_by = sharers(layout)
    everything = count_weights(model, range(model.num_layers))
    parts = {weight: weight.largest_part(layout, shared_by[weight.kind]) for weight in everything}
    stages = _stage_layers(
        model, number_of_stages(layout, parallel), parallel.stage_layers if layout.pipeline > 1 else None
    )
    for rank in range(layout.pipeline):
        own = stages[rank :: layout.pipeline]
        weights: Counter[WeightSpec] = sum((count_weights(model, layers) for layers in own), Counter())
        elements = sum(parts[weight] * number for weight, number in weights.items())
        layers = [layer for part in own for layer in part]
        of_micro_batch = activation_bytes(layout, model, router, step, layers)
        in_flight = micro_batches_in_flight(rank, layout.pipeline, step.accumulation, parallel.schedule)
        trained = round(elements * step.trained)
        held.append(
            MemoryEstimate(
                layers=tuple(layers),
                parameters=elements,
                weights=elements * step.weight_itemsize,
                gradients=trained * step.weight_itemsize,
                moments=2 * trained * step.weight_itemsize,
                offloaded=parallel.offload,
                copies=_copies(weights, layout, step, len(layers)),
                activations=round(of_micro_batch * in_flight),
            )
        )
    return tuple(held)


def micro_batches_in_flight(rank: int, ranks: int, micro_batches: int, schedule: Schedule) -> float:
    """Micro-batches whose activations a rank keeps at once, at most, each with all of the rank's layers.

    1F1B: as many as ranks from here to the end. With two stages a rank, its warm-up has 2·(P - 1 - rank) + P + 1
    passes of one of them.
    """
    if schedule == "1f1b" or ranks == 1:
        return min(micro_batches, ranks - rank)
    return min(2 * micro_batches, 2 * (ranks - 1 - rank) + ranks + 1) / 2


def _copies(weights: Counter[WeightSpec], layout: Layout, step: Step, layers: int) -> int:
    """Weights in the compute dtype.

    FSDP: the root's and two blocks', one in use and one on its way; a pipeline keeps all. Without it, what the forward
    pass casts stays for the backward pass, or under full recompute for a block's.
    """
    if layout.shard == 1 and step.itemsize >= step.weight_itemsize:
        return 0
    total = 0.0
    for weight, number in weights.items():
        if weight.kind == "whole":
            continue
        elements = math.prod(weight.local_shape(layout)) * number
        at_once = 1.0
        if not weight.root and layout.shard > 1 and layout.pipeline == 1:
            at_once = min(2, layers) / layers
        elif not weight.root and layout.shard == 1 and step.recompute == "full":
            at_once = 1 / layers
        total += elements * at_once
    return round(total * step.itemsize)


def activation_bytes(
    layout: Layout, model: ModelConfig, router: RouterConfig, step: Step, layers: Sequence[int]
) -> float:
    """Of one micro-batch in these layers (estimate): inputs of matmuls, norms and products, as autograd keeps them.

    `selective` keeps no hidden layer; `full` keeps each block's input, and what one block keeps while it is repeated.
    """
    tokens = step.tokens(layout)
    gathered = tokens * layout.tensor
    dim, heads = model.dim, model.num_heads
    rows = routed_rows(model, router, step, layout) * layout.expert_tensor if model.is_moe else 0.0
    kept, largest = 0.0, 0.0
    for (is_moe, window), number in Counter(map(_kinds(model).__getitem__, layers)).items():
        # two norms' inputs and outputs; queries and mixed values, keys and values, fetched ones too
        block = 4.0 * tokens * dim + 2 * gathered * model.head_dim * (heads + model.num_kv_heads) / layout.tensor
        length = step.seq_len // layout.context
        places = fetched_places(window, length, layout.context) * step.rows
        block += 2 * places * model.num_kv_heads * model.head_dim / layout.tensor
        hidden = 0.0
        networks = [(model.hidden_dim, model.ffn)] if not is_moe else []
        if is_moe:
            # rows at the experts, and their results back here; scores, probabilities
            block += rows * dim * (1 + 1 / layout.expert_tensor) + 3 * tokens * (model.num_experts or 0)
            hidden += rows * _hidden(model.expert_kind) * model.expert_width / layout.expert_tensor
            networks = [(model.num_shared_experts * model.expert_width, model.expert_kind)]
        for width, kind in networks:
            hidden += gathered * _hidden(kind) * width / layout.tensor
        if layout.tensor > 1:
            block += gathered * dim * (1 + (not is_moe or model.num_shared_experts > 0))
        whole = block + hidden
        kept += number * {"none": whole, "selective": block, "full": tokens * dim}[step.recompute]
        largest = max(largest, {"none": 0.0, "selective": hidden, "full": whole}[step.recompute])
    if model.num_layers - 1 in layers:  # logits and their gradient
        largest += gathered * (dim + 2 * (model.vocab_size or 0) / layout.tensor)
    return (kept + largest) * step.itemsize


@lru_cache(maxsize=64)
def _kinds(model: ModelConfig) -> tuple[tuple[bool, int | None], ...]:
    """Of each layer, whether it is a MoE layer, and its window."""
    return tuple((model.is_moe_layer(layer), model.window(layer)) for layer in range(model.num_layers))


def _hidden(kind: str) -> int:
    """Tensors of a hidden layer that are kept: gate, its activation, up, their product; or up and its activation."""
    return 4 if is_gated(kind) else 2


HEADER = ("stage", "layers", "parameters", "weights", "gradients", "moments", "casts ~", "activations ~", "in all ~")
"""Columns of `describe`, of which `~` marks estimates."""


def describe(made: Plan, size: Callable[[float], str]) -> list[tuple[str, ...]]:
    """Who holds what: a row under `HEADER` for each pipeline rank.

    Args:
        size: writes a number of bytes.
    """
    rows = []
    for number, stage in enumerate(made.stages):
        bytes_ = (stage.weights, stage.gradients, stage.moments, stage.copies, stage.activations, stage.device)
        rows.append((str(number), _runs(stage.layers), f"{stage.parameters:,}", *map(size, bytes_)))
    return rows


def describe_traffic(made: Plan, size: Callable[[float], str]) -> dict[str, str]:
    """What a rank sends in an optimizer step, by axis, where it sends anything; and how long a pipeline idles."""
    lines = {str(axis): size(sent) for axis, sent in made.traffic.items() if sent}
    if made.layout.pipeline > 1:
        lines["idle"] = f"{made.bubble:.0%} of a step"
    return lines


def _runs(layers: Sequence[int]) -> str:
    """`0-3` or `0-1,4-5`."""
    starts = [layer for layer in layers if layer - 1 not in layers]
    ends = [layer for layer in layers if layer + 1 not in layers]
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
