"""Bytes that ranks send in an optimizer step, by axis: one formula a function. (The true ones: benchmarks/traffic.py.)

*Sent* is what leaves a rank when a collective runs as a ring or directly: all-gather n - 1 times the rank's part,
reduce-scatter the same, all-reduce both, all-to-all what goes to others, point to point the payload. Where ranks differ
(ends of a pipeline, early and late context ranks) it is the mean over all ranks. A library may send more.

Letters: b rows of a micro-batch on a data rank, S sequence, T tokens that a rank routes, D model, G key/value heads,
C head dim, W window, k top-k, E experts, V vocabulary, n ranks of an axis, m micro-batches of a step.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from moe.config import ModelConfig, RouterConfig
from parallel.layout import Layout
from parallel.weight_specs import WeightSpec, count_weights, sharers

Axis = Literal["expert", "expert_tensor", "tensor", "context", "pipeline", "shard", "gradients", "bookkeeping"]


@dataclass(frozen=True)
class Step:
    """What one optimizer step works on."""

    rows: int
    """b, of a micro-batch on one data rank."""
    seq_len: int
    accumulation: int
    """m."""
    itemsize: int
    """Bytes of a number in the forward pass."""
    weight_itemsize: int = 4
    """Bytes of a number in weights, gradients and moments."""
    trained: float = 1.0
    """Share of the parameters that train."""
    recompute: Literal["none", "selective", "full"] = "none"

    def tokens(self, layout: Layout) -> int:
        """T, of a micro-batch."""
        return self.rows * self.seq_len // layout.sequence


def gathered(ranks: int, part: float) -> float:
    """All-gather or reduce-scatter of `ranks` parts: a ring passes n - 1 of them through every rank."""
    return (ranks - 1) * part


def reduced(ranks: int, whole: float) -> float:
    """All-reduce: a reduce-scatter and an all-gather of parts of whole/n."""
    return 2 * (ranks - 1) / ranks * whole


def routed_rows(model: ModelConfig, router: RouterConfig, step: Step, layout: Layout) -> float:
    """Rows that a rank sends into a MoE layer: k a token, or what capacities leave room for."""
    assert model.num_experts is not None and model.top_k is not None
    wanted = model.top_k * step.tokens(layout)
    factor = router.capacity_factor
    if factor is None and router.kind != "expert_choice":
        return wanted
    if layout.sequence > 1:  # capacities are those of whole sequences, and rows are counted before they travel
        return wanted * (factor or 1.0) if router.kind == "expert_choice" else wanted * min(1.0, factor or 1.0)
    from moe.selection import expert_capacity  # it needs torch, which nothing else here does

    # each expert's capacity, filled or not: nobody has to know counts
    return model.num_experts * step.rows * expert_capacity(factor or 1.0, model.top_k, step.seq_len, model.num_experts)


def expert_bytes(rows: float, dim: int, ranks: int, itemsize: int, passes: int = 2) -> float:
    """A MoE layer: rows go out and come back, in each pass; 1/n of them belong to experts here. 4·k·T·D·(1 - 1/n)."""
    return 2 * passes * rows * dim * (1 - 1 / ranks) * itemsize


def expert_tensor_bytes(rows: float, dim: int, ranks: int, itemsize: int, passes: int = 2) -> float:
    """A MoE layer: every rank of an expert gets all n ranks' rows, and all add up each one's results."""
    return 2 * passes * gathered(ranks, rows * dim * itemsize)


def tensor_bytes(tokens: int, dim: int, ranks: int, itemsize: int, transfers: int = 4) -> float:
    """A network: its T tokens are gathered and its results scattered, forward; both the other way round, backward."""
    return transfers * gathered(ranks, tokens * dim * itemsize)


def prediction_bytes(tokens: int, ranks: int, itemsize: int) -> float:
    """Cross-entropy on n parts of the vocabulary: maximum, Σ exp and the label's logit of n·T tokens are reduced."""
    return reduced(ranks, 3 * ranks * tokens * max(4, itemsize))


def fetched_places(window: int | None, length: int, ranks: int) -> float:
    """Places whose keys and values a context rank sends, or receives, in the mean: W - 1, or all to its left.

    Rank r has r·length places to its left, and sees no more than W - 1 of them.
    """
    reach = (ranks - 1) * length if window is None else window - 1
    return sum(min(rank * length, reach) for rank in range(ranks)) / ranks


def context_bytes(places: float, rows: int, kv_width: int, itemsize: int, passes: int = 2) -> float:
    """A layer: keys and values [b, G, C] of these places travel, forward, and their gradients back."""
    return passes * places * rows * 2 * kv_width * itemsize


def pipeline_bytes(tokens: int, dim: int, stages: int, ranks: int, itemsize: int) -> float:
    """A micro-batch: [T, D] crosses each border between stages, and its gradient comes back; a mean over the ranks."""
    return 2 * (stages - 1) * tokens * dim * itemsize / ranks


def shard_bytes(weights: Mapping[WeightSpec, int], layout: Layout, step: Step) -> float:
    """FSDP's units: parts are gathered in the compute dtype, gradients scattered in the weights'.

    Blocks are gathered for the forward pass and again for the backward pass, the root once; a pipeline keeps all
    gathered for its step. Parts are padded to the largest.
    """
    total = 0.0
    shared_by = sharers(layout)
    for weight, number in weights.items():
        ranks = shared_by[weight.kind]
        part = weight.largest_part(layout, ranks) * number
        gathers = 1 if weight.root or layout.pipeline > 1 else 2
        total += gathered(ranks, part) * (gathers * step.itemsize + step.trained * step.weight_itemsize)
    return total * (1 if layout.pipeline > 1 else step.accumulation)


def gradient_bytes(weights: Mapping[WeightSpec, int], layout: Layout, step: Step) -> float:
    """All-reduce of each gradient over the ranks of a stage that hold the same part (parallel/gradients.py), once."""
    copies = {
        "whole": layout.stage,
        "replicated": layout.replicate * layout.context * layout.tensor,
        "tensor": layout.replicate * layout.context,
        "experts": layout.expert_data // layout.expert_shard,
    }
    total = 0.0
    shared_by = sharers(layout)
    for weight, number in weights.items():
        elements = math.prod(weight.local_shape(layout)) / shared_by[weight.kind] * number
        total += reduced(copies[weight.kind], elements * step.weight_itemsize * step.trained)
    return total


def bookkeeping_bytes(model: ModelConfig, router: RouterConfig, layout: Layout, step: Step) -> float:
    """At most: counts (8 bytes each) for the losses, for dispatch and for capacities; document numbers; scalars."""
    stage, experts, sequence = layout.stage, model.num_experts or 0, layout.sequence
    moe_layers = model.num_moe_layers / layout.pipeline
    each = reduced(stage, 8 * (moe_layers * experts + 3 * (moe_layers > 0)))
    if router.balance_scope != "global":
        each += reduced(sequence, 8 * moe_layers * step.rows * (experts + 1))
    passes = 2 if step.recompute == "full" else 1
    per_layer = 8 * experts * (1 - 1 / layout.expert) + gathered(layout.expert_tensor, 8 * experts)
    if router.kind == "expert_choice":  # scores of all tokens, and which are padding
        per_layer += gathered(sequence, step.tokens(layout) * (experts * max(4, step.itemsize) + 1))
    elif router.capacity_factor is not None and router.drop_policy == "prob":
        per_layer += gathered(sequence, step.tokens(layout) * (model.top_k or 0) * (max(4, step.itemsize) + 8))
    elif router.capacity_factor is not None:
        per_layer += gathered(sequence, 8 * step.rows * (2 if layout.zigzag else 1) * experts)
    each += passes * moe_layers * per_layer
    places = fetched_places(None, step.seq_len // layout.context, layout.context)
    each += 2 * 4 * step.rows * places  # of int32 documents, once a pass; twice where windows differ
    scalars = reduced(layout.world, 8 * (2 + 1 + 3))
    return step.accumulation * each + scalars + reduced(layout.pipeline, 8 * (model.num_moe_layers * experts + 1))


def traffic(model: ModelConfig, router: RouterConfig, layout: Layout, step: Step, stages: int = 1) -> dict[Axis, float]:
    """Bytes that a rank sends in one optimizer step, in the mean over all ranks, by axis.

    Args:
        stages: of the pipeline, on all ranks together.
    """
    weights = dict(count_weights(model, range(model.num_layers)))
    at_both_ends = layout.pipeline > 1 and model.tie_embeddings
    if at_both_ends:
        weights |= {weight: 2 for weight in weights if weight.root and weight.kind == "tensor"}
    size, tokens, dim = step.itemsize, step.tokens(layout), model.dim
    moe = model.num_moe_layers
    dense = model.num_layers - moe
    passes = 3 if step.recompute == "full" else 2  # forward, backward, and forward again

    micro: dict[Axis, float] = {"expert": 0.0, "expert_tensor": 0.0}
    if moe:
        rows = routed_rows(model, router, step, layout)
        micro["expert"] = moe * expert_bytes(rows, dim, layout.expert, size, passes)
        micro["expert_tensor"] = moe * expert_tensor_bytes(rows, dim, layout.expert_tensor, size, passes)
    # the scatter that ends a block is not repeated: nothing kept comes after it
    transfers = 2 * passes * (model.num_layers + moe * bool(model.num_shared_experts)) + (passes + 2) * dense
    transfers += 2 + 2  # after the embedding, before the head
    micro["tensor"] = tensor_bytes(tokens, dim, layout.tensor, size, transfers)
    micro["tensor"] += prediction_bytes(tokens, layout.tensor, size)
    micro["context"] = 0.0
    kv_width, length = model.num_kv_heads * model.head_dim // layout.tensor, step.seq_len // layout.context
    for window, number in Counter(map(model.window, range(model.num_layers))).items():
        places = fetched_places(window, length, layout.context)
        if layout.zigzag:  # all of the row, in an all-gather
            places = gathered(layout.context, length)
        micro["context"] += number * context_bytes(places, step.rows, kv_width, size, passes)
    for axis in ("expert", "expert_tensor", "tensor", "context"):
        micro[axis] /= layout.pipeline  # each layer is on one of so many ranks
    micro["pipeline"] = pipeline_bytes(tokens, dim, stages, layout.pipeline, size)

    sent: dict[Axis, float] = {axis: step.accumulation * value for axis, value in micro.items()}
    sent["shard"] = shard_bytes(weights, layout, step) / layout.pipeline
    sent["gradients"] = gradient_bytes(weights, layout, step) / layout.pipeline
    if at_both_ends:  # they add up the embedding's
        embedding = model.dim * (model.vocab_size or 0) // (layout.tensor * layout.shard)
        sent["gradients"] += 2 * reduced(2, embedding * step.weight_itemsize * step.trained) / layout.pipeline
    sent["bookkeeping"] = bookkeeping_bytes(model, router, layout, step)
    return sent
