"""The plan of a layout: the memory of every pipeline rank, the bytes it sends and the time it idles. Plain numbers.

The memory of weights, gradients and optimizer state is exact: it is that of the model which `parallel/apply.py` builds
and of the optimizer. The memory of activations is an estimate of what autograd stores for the backward pass (the
estimate is 0.8 to 1.3 times the measured size for small models on a CPU). It is meant for comparing layouts and for a
first idea of what fits. The caching allocator, kernels and an uneven expert load need additional memory.

Letters: P pipeline ranks, m micro-batches of a step, v stages per rank.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from common.text import show_ranges
from moe.config import ModelConfig, is_gated
from parallel.config import ParallelConfig
from parallel.layout import Layout
from parallel.planning.traffic import Axis, fetched_positions, routed_rows, traffic
from parallel.planning.workload import Workload
from parallel.stages import Schedule, stage_layers
from parallel.weight_specs import WeightSpec, block_weights, count_weights, ranks_per_shard_group

CHUNK_LOGITS = 2**27
"""Logits that exist at once on GPUs (`moe/losses.py:CHUNK_ELEMENTS`). On CPUs they are fewer."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of the ranks at one position of the pipeline, in bytes: that of the rank which stores most."""

    layers: tuple[int, ...]
    parameters: int
    """Elements of the weights, as a number instead of bytes."""
    weights: int
    gradients: int
    moments: int
    """Optimizer state (AdamW: two moments)."""
    offloaded: bool
    """Whether weights, gradients and moments are in host memory."""
    casts: int
    """Weights in the compute dtype while they are used (estimate)."""
    activations: int
    """Tensors that are stored for the backward pass (estimate)."""
    accumulates: bool
    """Whether the gradients of one micro-batch are stored beside the activations of another one."""

    @property
    def state(self) -> int:
        """Weights, gradients and moments."""
        return self.weights + self.gradients + self.moments

    @property
    def device(self) -> int:
        """Device memory at its peak.

        The backward pass of the only micro-batch of a step frees activations while it makes gradients, so that the
        larger of the two counts.
        """
        if self.offloaded:
            return self.casts + self.activations
        passes = self.gradients + self.activations if self.accumulates else max(self.gradients, self.activations)
        return self.weights + self.moments + self.casts + passes

    @property
    def host(self) -> int:
        """Host memory that offloading needs for this rank."""
        return self.state if self.offloaded else 0


@dataclass(frozen=True)
class Plan:
    """The estimate for a layout."""

    layout: Layout
    stages: tuple[MemoryEstimate, ...]
    """One entry per pipeline rank; one entry without a pipeline."""
    traffic: dict[Axis, float]
    """Bytes that a rank sends in an optimizer step, in the mean over all ranks."""
    bubble: float
    """Share of a step in which a pipeline rank idles, if the passes of all stages take the same time."""

    @property
    def fullest(self) -> MemoryEstimate:
        """The pipeline rank that needs the most device memory."""
        return max(self.stages, key=lambda stage: stage.device)

    @property
    def sent(self) -> float:
        """Bytes that a rank sends in an optimizer step, over all axes."""
        return sum(self.traffic.values())


def plan(layout: Layout, parallel: ParallelConfig, workload: Workload) -> Plan:
    """Return the plan of a layout.

    Args:
        parallel: the configuration of `layout`, without `auto`.
    """
    return Plan(
        layout,
        estimate_memory(layout, parallel, workload),
        traffic(workload, layout, parallel),
        bubble(layout.pipeline, workload.accumulation, parallel.schedule),
    )


def bubble(ranks: int, micro_batches: int, schedule: Schedule) -> float:
    """Return the share of a step in which a pipeline rank idles: (P - 1)/(m + P - 1) (arXiv 2104.04473).

    With v = 2 stages per rank, each pass takes half the time. The zero bubble schedule fills two thirds of the rest
    with the computation of weight gradients (ZB-H1 in arXiv 2401.10241).
    """
    work = {"1f1b": 1, "interleaved": 2, "zero_bubble": 6}[schedule] * micro_batches
    return (ranks - 1) / (work + ranks - 1)


def estimate_memory(layout: Layout, parallel: ParallelConfig, workload: Workload) -> tuple[MemoryEstimate, ...]:
    """Return the memory of every pipeline rank, in order. Arguments as for `plan`."""
    estimates = []
    model, router, itemsize = workload.model, workload.router, workload.weight_itemsize
    shard_ranks = ranks_per_shard_group(layout)
    nbytes = {weight: workload.shard_bytes(weight, layout, itemsize) for weight in workload.weights}
    largest = {weight: weight.largest_shard(layout, shard_ranks[weight.kind]) for weight in workload.weights}
    layers_per_stage = parallel.stage_layers if layout.pipeline > 1 else None
    stages = stage_layers(model, router, parallel.num_stages(layout), layers_per_stage)
    for rank in range(layout.pipeline):
        stages_of_rank = stages[rank :: layout.pipeline]
        layers = [layer for stage in stages_of_rank for layer in stage]
        weights: Counter[WeightSpec] = sum((count_weights(model, router, stage) for stage in stages_of_rank), Counter())
        elements = sum(largest[weight] * number for weight, number in weights.items())
        trained = round(
            sum(largest[weight] * number * workload.trained_share(weight) for weight, number in weights.items())
        )
        micro_batch = activation_bytes(layout, parallel, workload, layers)
        in_flight = micro_batches_in_flight(rank, layout.pipeline, workload.accumulation, parallel.schedule)
        estimates.append(
            MemoryEstimate(
                layers=tuple(layers),
                parameters=elements,
                weights=round(sum(nbytes[weight] * number for weight, number in weights.items())),
                gradients=trained * itemsize,
                moments=workload.moments * trained * itemsize,
                offloaded=parallel.offload,
                casts=_cast_bytes(layout, parallel, workload, layers),
                activations=round(micro_batch * in_flight),
                accumulates=workload.accumulation > 1,
            )
        )
    return tuple(estimates)


def micro_batches_in_flight(rank: int, ranks: int, micro_batches: int, schedule: Schedule) -> float:
    """Return the largest number of micro-batches whose activations a pipeline rank stores at the same time.

    A micro-batch counts with all layers of the rank. With 1F1B, rank r stores P - r of them. With two stages per rank,
    its warm-up has 2·(P - 1 - r) + P + 1 forward passes of one stage each.
    """
    if schedule == "1f1b" or ranks == 1:
        return min(micro_batches, ranks - rank)
    return min(2 * micro_batches, 2 * (ranks - 1 - rank) + ranks + 1) / 2


def _cast_bytes(layout: Layout, parallel: ParallelConfig, workload: Workload, layers: Sequence[int]) -> int:
    """Return the bytes of the weights in the compute dtype on a rank with these layers.

    With FSDP they are those of the root and of two blocks, one in use and one being gathered; a pipeline keeps all
    weights and gradients gathered. Without FSDP, autograd stores the weights that the forward pass casts. What is
    recomputed stores none but those of one block. The lookup in the embedding casts the rows that it finds, not the
    embedding. Of quantised weights there is one matrix at a time.
    """
    if layout.shard == 1 and workload.itemsize >= workload.weight_itemsize:
        return workload.workspace
    model, router = workload.model, workload.router
    stored, of_block, total, gathered = 0, 0, 0, 0.0
    for is_moe, number in Counter(map(model.is_moe_layer, layers)).items():
        recomputed = 0
        for name, weight in block_weights(model, router, is_moe):
            if weight.kind == "router":
                continue
            elements = math.prod(weight.local_shape(layout))
            total += elements * number
            gathered += workload.gathered_bytes(weight, layout) * number
            if weight.packing(workload.quantize) is not None:
                continue
            if layout.overlap and weight.kind == "experts" and parallel.recompute != "selective":
                elements *= 2  # cast for each half of the tokens
            # All weights of a feed-forward network or of experts belong to a hidden layer.
            if parallel.recompute == "full" or (parallel.recompute == "selective" and name.startswith("ffn.")):
                recomputed += elements
            else:
                stored += elements * number
        of_block = max(of_block, recomputed)
    root = [weight for weight in count_weights(model, router, layers).elements() if weight.root]
    sizes = [math.prod(weight.local_shape(layout)) for weight in root]
    if layout.shard == 1:
        head = max(sizes) if model.num_layers - 1 in layers else 0
        return round((stored + of_block + head) * workload.itemsize) + workload.workspace
    of_root = sum(sizes) * workload.itemsize + workload.workspace
    if layout.pipeline > 1:  # Their gradients are added up before they are scattered.
        counted = count_weights(model, router, layers)
        trained = sum(
            math.prod(weight.local_shape(layout)) * number * workload.trained_share(weight)
            for weight, number in counted.items()
            if weight.kind != "router"
        )
        gradients = trained * workload.weight_itemsize
        return round(gathered + of_root + gradients)
    return round(gathered * min(2, len(layers)) / len(layers) + of_root)


def activation_bytes(layout: Layout, parallel: ParallelConfig, workload: Workload, layers: Sequence[int]) -> float:
    """Return the bytes that autograd stores for one micro-batch in these layers (estimate).

    These are the inputs of matmuls, norms and products. `recompute=selective` stores no hidden layers. `full` stores
    the input of each block, and all tensors of one block while it is recomputed. The loss computes the
    gradients of the head in the forward pass, from a chunk of logits at a time.
    """
    wide = max(4, workload.itemsize) / workload.itemsize  # routers compute scores, and jitter, in at least fp32
    jitter = workload.router.jitter > 0
    model, tokens = workload.model, workload.tokens(layout)
    gathered_tokens = tokens * layout.tensor
    dim, heads, kv_heads = model.dim, model.num_heads, model.num_kv_heads * layout.kv_copies
    rows = routed_rows(workload, layout) * layout.expert_tensor if model.is_moe else 0.0
    stored, largest = 0.0, 0.0
    for (is_moe, window), number in Counter(map(_layer_kinds(model).__getitem__, layers)).items():
        # The inputs and outputs of two norms; queries, mixed values, keys and values, and the fetched ones.
        block = 4.0 * tokens * dim + 2 * gathered_tokens * model.head_dim * (heads + kv_heads) / layout.tensor
        if model.qk_norm is not None:
            # The projected queries and keys; with a mean over ranks, also in at least fp32, and normalised.
            copies = 2 + wide if model.qk_norm == "width" and layout.tensor > 1 else 1
            block += copies * gathered_tokens * model.head_dim * (heads + kv_heads) / layout.tensor
        block += gathered_tokens * _latent_width(model)
        length = workload.seq_len // layout.context
        positions = fetched_positions(window, length, layout.context) * workload.rows(layout)
        block += 2 * positions * kv_heads * model.head_dim / layout.tensor
        block += positions * (model.kv_lora_rank or 0)
        hidden = 0.0
        networks = [(model.hidden_dim, model.ffn)] if not is_moe else []
        if is_moe:
            if jitter:
                # The factors and the products. Nothing stores the output of the norm, unless shared experts do.
                block += tokens * dim * (2 * wide - (not model.num_shared_experts))
            # The rows at the experts, and their results on the rank of the token; scores and probabilities.
            block += rows * dim * (1 + 1 / layout.expert_tensor) + 3 * wide * tokens * (model.num_experts or 0)
            hidden += rows * _hidden_tensors(model.expert_kind) * model.expert_width / layout.expert_tensor
            networks = [(model.shared_width, model.expert_kind)]
            block += tokens * dim * model.shared_gate  # the output of the shared experts, which the gate multiplies
        for width, kind in networks:
            hidden += gathered_tokens * _hidden_tensors(kind) * width / layout.tensor
        if layout.tensor > 1:
            block += gathered_tokens * dim * (1 + (not is_moe or model.num_shared_experts > 0))
        everything = block + hidden
        stored += number * {"none": everything, "selective": block, "full": tokens * dim}[parallel.recompute]
        largest = max(largest, {"none": 0.0, "selective": hidden, "full": everything}[parallel.recompute])
    if model.num_layers - 1 in layers:
        # The input of the last norm. The gradients of the head's input and weight, computed from a chunk of logits.
        entries = (model.vocab_size or 0) / layout.tensor
        stored += (tokens + gathered_tokens) * dim + entries * dim * workload.weight_itemsize / workload.itemsize
        largest = max(largest, min(gathered_tokens * entries, CHUNK_LOGITS))
    return (stored + largest) * workload.itemsize


def _latent_width(model: ModelConfig) -> int:
    """Return the numbers of a token that latent attention stores beside what grouped-query attention does.

    These are the inputs and outputs of the norms of the latents. The core's values are as wide as its keys.
    """
    if model.kv_lora_rank is None:
        return 0
    return 2 * (model.kv_lora_rank + (model.q_lora_rank or 0)) + model.rotary_width


@lru_cache(maxsize=64)
def _layer_kinds(model: ModelConfig) -> tuple[tuple[bool, int | None], ...]:
    """Return for each layer whether it is a MoE layer, and its window."""
    return tuple((model.is_moe_layer(layer), model.window(layer)) for layer in range(model.num_layers))


def _hidden_tensors(kind: str) -> int:
    """Return the tensors that autograd stores of a hidden layer.

    With a gate: the gate, its activation, `up` and the product. Without: `up` and its activation. The kernel of SwiGLU
    for GPUs (`moe.kernels.swiglu`) computes the activation again.
    """
    return 3 if kind == "swiglu" else 4 if is_gated(kind) else 2


HEADER = ("stage", "layers", "parameters", "weights", "gradients", "moments", "casts ~", "activations ~", "in all ~")
"""Columns of `describe`. `~` marks estimates."""


def describe(plan: Plan, size: Callable[[float], str]) -> list[tuple[str, ...]]:
    """Return one row under `HEADER` per pipeline rank.

    Args:
        size: formats a number of bytes.
    """
    rows = []
    for number, stage in enumerate(plan.stages):
        sizes = (stage.weights, stage.gradients, stage.moments, stage.casts, stage.activations, stage.device)
        rows.append((str(number), show_ranges(stage.layers), f"{stage.parameters:,}", *map(size, sizes)))
    return rows


def describe_traffic(plan: Plan, size: Callable[[float], str]) -> dict[str, str]:
    """Return axis -> what a rank sends in an optimizer step, for axes that send, and `idle` for a pipeline's idle time.

    Args:
        size: formats a number of bytes.
    """
    lines = {str(axis): size(sent) for axis, sent in plan.traffic.items() if sent}
    if plan.layout.pipeline > 1:
        lines["idle"] = f"{plan.bubble:.0%} of a step"
    return lines
