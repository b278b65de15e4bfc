"""The bytes that a rank sends in an optimizer step, by parallel axis, with one function per formula.

`benchmarks/traffic.py` measures the same bytes. *Sent* bytes are those that leave a rank when a collective runs as a
ring or directly: in an all-gather n - 1 times the rank's part, in a reduce-scatter the same, in an all-reduce both, in
an all-to-all the rows for other ranks, point to point the payload. Where ranks send different amounts (the ends of a
pipeline, early and late context ranks), the figure is the mean over all ranks. A library can send more.

Letters: b rows of a micro-batch on a data-parallel rank, S sequence, T tokens that a rank routes, D model,
G key/value heads, C head dim, W window, k top-k, n ranks of an axis.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Literal

from moe.figures import LAYER_FIGURES
from parallel.config import ParallelConfig
from parallel.layout import Layout
from parallel.planning.workload import Workload
from parallel.weight_specs import WeightSpec, ranks_per_shard_group

Axis = Literal["expert", "expert_tensor", "tensor", "context", "pipeline", "shard", "gradients", "bookkeeping"]


def all_gather_bytes(ranks: int, part: float) -> float:
    """Return the bytes of an all-gather or a reduce-scatter of n parts: a ring passes n - 1 parts through a rank."""
    return (ranks - 1) * part


def all_reduce_bytes(ranks: int, whole: float) -> float:
    """Return the bytes of an all-reduce: a reduce-scatter and an all-gather of n parts of `whole` / n bytes."""
    return 2 * (ranks - 1) / ranks * whole


def routed_rows(workload: Workload, layout: Layout) -> float:
    """Return the rows that a rank sends to the experts of a MoE layer: k per token, or as many as capacities allow."""
    model, router = workload.model, workload.router
    assert model.num_experts is not None and model.top_k is not None
    factor = router.capacity_factor
    if layout.sequence > 1 or (factor is None and router.kind != "expert_choice"):
        # Capacities are those of whole sequences. The ranks exchange counts and send only the rows that are kept.
        return router.experts_per_token(model.num_experts, model.top_k) * workload.tokens(layout)
    from moe.selection import expert_capacity  # Imported here, because it needs torch and this module does not.

    # Each expert gets its capacity in rows, empty ones included, so that no rank has to know how many rows are used.
    capacity = expert_capacity(factor or 1.0, model.top_k, workload.seq_len, model.num_experts)
    return model.num_experts * workload.rows(layout) * capacity


def expert_bytes(rows: float, dim: int, ranks: int, itemsize: int, passes: int = 2) -> float:
    """Return the bytes of expert parallelism in a MoE layer, 4·k·T·D·(1 - 1/n) numbers with two passes.

    Rows are sent to the experts and back in each pass; 1/n of them stay on their rank.
    """
    return 2 * passes * rows * dim * (1 - 1 / ranks) * itemsize


def expert_tensor_bytes(rows: float, dim: int, ranks: int, itemsize: int, passes: int = 2) -> float:
    """Return the bytes of `expert_tensor` in a MoE layer.

    In each pass the n ranks that share an expert all-gather their rows and reduce-scatter the results.
    """
    return 2 * passes * all_gather_bytes(ranks, rows * dim * itemsize)


def tensor_bytes(tokens: int, dim: int, ranks: int, itemsize: int, transfers: int = 4) -> float:
    """Return the bytes of tensor parallelism around one network (attention or feed-forward).

    The forward pass all-gathers the tokens and reduce-scatters the results; the backward pass does the reverse.
    """
    return transfers * all_gather_bytes(ranks, tokens * dim * itemsize)


def norm_bytes(tokens: int, ranks: int, itemsize: int, passes: int = 2) -> float:
    """Return the bytes of the norms of queries and keys over the heads of all ranks, in one layer.

    A pass all-reduces one number per norm for n·T tokens.
    """
    return 2 * passes * all_reduce_bytes(ranks, ranks * tokens * max(4, itemsize))


def prediction_bytes(tokens: int, ranks: int, itemsize: int) -> float:
    """Return the bytes of the cross-entropy over a sharded vocabulary.

    It all-reduces the maximum, the sum of exponentials and the logit of the label for n·T tokens.
    """
    return all_reduce_bytes(ranks, 3 * ranks * tokens * max(4, itemsize))


def fetched_positions(window: int | None, length: int, ranks: int) -> float:
    """Return the positions whose keys and values a context rank sends (and receives), in the mean over the n ranks.

    Rank r has r·length positions before its part, and its queries see at most W - 1 of them (all without a window).
    """
    reach = (ranks - 1) * length if window is None else window - 1
    return sum(min(rank * length, reach) for rank in range(ranks)) / ranks


def layer_positions(window: int | None, workload: Workload, layout: Layout) -> float:
    """Return the positions of each row that a context rank receives in a layer, in the mean over the n ranks."""
    length = workload.seq_len // layout.context
    if layout.zigzag:  # It all-gathers the whole row.
        return all_gather_bytes(layout.context, length)
    return fetched_positions(window, length, layout.context)


def context_bytes(positions: float, rows: int, numbers: int, itemsize: int, passes: int = 2) -> float:
    """Return the bytes of context parallelism in one layer.

    A pass sends the keys and values [b, G, C] of the fetched positions, or with latent attention their latents, and in
    the backward pass the gradients of these.

    Args:
        numbers: those of one position, 2·G·C (`ModelConfig.cached`).
    """
    return passes * positions * rows * numbers * itemsize


def pipeline_bytes(tokens: int, dim: int, stages: int, ranks: int, itemsize: int) -> float:
    """Return the bytes of a pipeline for one micro-batch, in the mean over the n ranks.

    Every stage but the last sends [T, D] to the next stage, which sends the gradient back.
    """
    return 2 * (stages - 1) * tokens * dim * itemsize / ranks


def shard_bytes(weights: Mapping[WeightSpec, int], layout: Layout, workload: Workload) -> float:
    """Return the bytes of FSDP: weights are all-gathered in the compute dtype, gradients reduce-scattered in theirs.

    The weights of a block are gathered for the forward pass and again for the backward pass, those of the root once.
    A pipeline gathers all weights once per step. Shards are padded to the largest.
    """
    total = 0.0
    shard_ranks = ranks_per_shard_group(layout)
    for weight, number in weights.items():
        ranks = shard_ranks[weight.kind]
        gathers = 1 if weight.root or layout.pipeline > 1 else 2
        part = gathers * workload.shard_bytes(weight, layout, workload.itemsize)
        part += weight.largest_shard(layout, ranks) * workload.trained_share(weight) * workload.weight_itemsize
        total += all_gather_bytes(ranks, part * number)
    return total * (1 if layout.pipeline > 1 else workload.accumulation)


def gradient_bytes(weights: Mapping[WeightSpec, int], layout: Layout, workload: Workload) -> float:
    """Return the bytes of the gradients' all-reduce over the ranks with the same shard (`parallel/gradients.py`)."""
    replicas = {
        "router": layout.stage,
        "replicated": layout.replicate * layout.context * layout.tensor,
        "tensor": layout.replicate * layout.context,
        "kv_heads": layout.replicate * layout.context * layout.kv_copies,
        "experts": layout.expert_data // layout.expert_shard,
    }
    total = 0.0
    shard_ranks = ranks_per_shard_group(layout)
    for weight, number in weights.items():
        elements = weight.mean_elements(layout) / shard_ranks[weight.kind] * number * workload.trained_share(weight)
        total += all_reduce_bytes(replicas[weight.kind], elements * workload.weight_itemsize)
    return total


def bookkeeping_bytes(workload: Workload, layout: Layout, parallel: ParallelConfig) -> float:
    """Return an upper bound for all other communication.

    This is the counts for losses, dispatch and capacities (8 bytes each), document numbers, and scalars.
    """
    model, router, rows, tokens = workload.model, workload.router, workload.rows(layout), workload.tokens(layout)
    stage, experts, sequence = layout.stage, model.num_experts or 0, layout.sequence
    moe_layers = model.num_moe_layers / layout.pipeline
    micro = all_reduce_bytes(stage, 8 * (2 * moe_layers * experts + 2 * (moe_layers > 0)))  # before and after drops
    if router.balance_scope != "global":
        micro += all_reduce_bytes(sequence, 8 * moe_layers * rows * (experts + 1))
    passes = 2 if parallel.recompute == "full" else 1
    per_layer = 8 * experts * (1 - 1 / layout.expert) + all_gather_bytes(layout.expert_tensor, 8 * experts)
    per_layer *= 1 + layout.overlap  # the numbers of rows of each half
    if router.kind == "expert_choice":  # the scores of all tokens, and which tokens are padding
        per_layer += all_gather_bytes(sequence, tokens * (experts * max(4, workload.itemsize) + 1))
    elif router.capacity_factor is not None and router.drop_policy == "prob":
        per_layer += all_gather_bytes(sequence, tokens * (model.top_k or 0) * (max(4, workload.itemsize) + 8))
    elif router.capacity_factor is not None:
        per_layer += all_gather_bytes(sequence, 8 * rows * (2 if layout.zigzag else 1) * experts)
    micro += passes * moe_layers * per_layer
    positions = fetched_positions(None, workload.seq_len // layout.context, layout.context)
    micro += 2 * 4 * rows * positions  # int32 document numbers, once per pass; twice if layers have different windows
    if model.kv_lora_rank is not None:
        micro += 2 * 8 * rows * positions  # the noise keys, for the dropout of adapters
    scalars = all_reduce_bytes(layout.world, 8 * (3 + 1 + 3 + model.num_moe_layers * len(LAYER_FIGURES)))
    figures = all_reduce_bytes(layout.pipeline, 8 * 2 * model.num_moe_layers * experts)
    return workload.accumulation * micro + scalars + figures


def traffic(workload: Workload, layout: Layout, parallel: ParallelConfig) -> dict[Axis, float]:
    """Return the bytes that a rank sends in one optimizer step by axis, in the mean over all ranks."""
    model, size, tokens, dim = workload.model, workload.itemsize, workload.tokens(layout), workload.model.dim
    weights = dict(workload.weights)
    at_both_ends = layout.pipeline > 1 and model.tie_embeddings
    if at_both_ends:
        weights |= {weight: 2 for weight in weights if weight.root and weight.kind == "tensor"}
    moe = model.num_moe_layers
    dense = model.num_layers - moe
    passes = 3 if parallel.recompute == "full" else 2  # forward, backward, and the repeated forward

    micro: dict[Axis, float] = {"expert": 0.0, "expert_tensor": 0.0}
    if moe:
        rows = routed_rows(workload, layout)
        micro["expert"] = moe * expert_bytes(rows, dim, layout.expert, size, passes)
        micro["expert_tensor"] = moe * expert_tensor_bytes(rows, dim, layout.expert_tensor, size, passes)
    # Recomputing a dense block does not repeat its last reduce-scatter, because nothing that is stored comes after it.
    transfers = 2 * passes * (model.num_layers + moe * bool(model.num_shared_experts)) + (passes + 2) * dense
    transfers += 2 + 2  # after the embedding, and before the head
    micro["tensor"] = tensor_bytes(tokens, dim, layout.tensor, size, transfers)
    if model.qk_norm == "width":
        micro["tensor"] += model.num_layers * norm_bytes(tokens, layout.tensor, size, passes)
    micro["tensor"] += prediction_bytes(tokens, layout.tensor, size)
    micro["context"] = 0.0
    numbers = sum(heads * width for heads, width in model.cached)
    if model.kv_lora_rank is None:  # Tensor-parallel ranks have different heads, and the same latents.
        numbers = numbers * layout.kv_copies // layout.tensor
    for window, number in Counter(map(model.window, range(model.num_layers))).items():
        positions = layer_positions(window, workload, layout)
        micro["context"] += number * context_bytes(positions, workload.rows(layout), numbers, size, passes)
    for axis in ("expert", "expert_tensor", "tensor", "context"):
        micro[axis] /= layout.pipeline  # Each layer is on one of the pipeline's ranks.
    micro["pipeline"] = pipeline_bytes(tokens, dim, parallel.num_stages(layout), layout.pipeline, size)

    sent: dict[Axis, float] = {axis: workload.accumulation * value for axis, value in micro.items()}
    sent["shard"] = shard_bytes(weights, layout, workload) / layout.pipeline
    sent["gradients"] = gradient_bytes(weights, layout, workload) / layout.pipeline
    if at_both_ends:  # The two stages sum the gradients of the embedding.
        embedding = model.dim * (model.vocab_size or 0) / (layout.tensor * layout.shard)
        (spec,) = (weight for weight in workload.weights if weight.root and len(weight.shape) > 1)
        elements = embedding * workload.weight_itemsize * workload.trained_share(spec)
        sent["gradients"] += 2 * all_reduce_bytes(2, elements) / layout.pipeline
    sent["bookkeeping"] = bookkeeping_bytes(workload, layout, parallel)
    return sent
