"""The time of an optimizer step, by part: what the devices compute, and what they wait for.

`estimate_times` is a formula for comparing many layouts. `training.planning.timing` adds up the operators and the
collectives of a traced step, in the same parts.

Letters: P pipeline ranks, n ranks of a group, i of them on each node.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

from moe.config import attended_pairs, is_gated
from parallel.config import ParallelConfig
from parallel.layout import Layout
from parallel.planning.hardware import Hardware
from parallel.planning.plan import activation_bytes, bubble
from parallel.planning.traffic import Axis, gradient_bytes, layer_positions, shard_bytes, traffic
from parallel.planning.workload import Workload
from parallel.weight_specs import ranks_per_shard_group

ADAM_BYTES = 7
"""How often AdamW reads or writes a number: weight, gradient and two moments, all but the gradient twice."""
PASSES_OVER_ACTIVATIONS = 6
"""How often a stored activation is read or written outside of matmuls, forward and backward (as in traced steps)."""
FSDP_BYTES = 42
"""Bytes that FSDP moves for each weight: two gathers in bf16, a gradient in fp32 (as in traced steps)."""
OPERATORS_PER_LAYER = 250
"""Operators of a micro-batch in a layer, forward and backward (as in traced steps of mixtures on GPUs)."""
ACCUMULATION_BYTES = 12
"""Bytes that are moved to add a gradient in fp32 to another one."""
CAST_BYTES = 12
"""Bytes that are moved to cast a weight from fp32 to bf16, in the forward and in the backward pass."""


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one optimizer step on the rank that takes longest."""

    matmul: float
    """Matmuls, with those that are recomputed."""
    attention: float
    """The core of attention."""
    memory_bound: float
    """All other operators, whose time is that of reading and writing memory, and of launching kernels."""
    update: float
    """The optimizer and the norm of the gradients."""
    exposed: Mapping[Axis, float] = field(hash=False)
    """Communication during which the device does not compute, by axis."""
    bubble: float
    """Idle time of the pipeline."""
    straggler: float = 0.0
    """How much longer the rank with most tokens takes than with balanced experts."""

    @property
    def communication(self) -> float:
        """All exposed communication."""
        return sum(self.exposed.values())

    @property
    def total(self) -> float:
        """The whole step."""
        computation = self.matmul + self.attention + self.memory_bound + self.update
        return computation + self.communication + self.bubble + self.straggler

    def scaled(self, factor: float) -> "StepTimes":
        """Return the times multiplied by a factor."""
        numbers = {name: value * factor for name, value in vars(self).items() if name != "exposed"}
        return StepTimes(**numbers, exposed={axis: seconds * factor for axis, seconds in self.exposed.items()})


def transfer_seconds(hardware: Hardware, inside: int, size: int, nbytes: float, *, ring: bool) -> float:
    """Return the time in which a rank of a group sends `nbytes`, without the start of the collective.

    Args:
        inside: i, ranks of the group on each node.
        size: n, ranks of the group.
        ring: a ring leaves each node once for all ranks of the group in the node. Otherwise every rank sends the
            same amount to all other ranks.
    """
    if inside >= size:
        return nbytes / hardware.link
    if ring:
        return nbytes * max(1 / hardware.link, 1 / hardware.network / inside)
    leaving = (size - inside) / (size - 1)
    return nbytes * (leaving / hardware.network + (1 - leaving) / hardware.link)


def start_seconds(hardware: Hardware, inside: int, size: int) -> float:
    """Return the time that a collective takes however little it sends. A ring of more than 8 ranks has more hops."""
    latency = hardware.link_latency_s if inside >= size else hardware.network_latency_s
    return latency * max(1, size / 8)


def estimate_times(layout: Layout, parallel: ParallelConfig, workload: Workload, hardware: Hardware) -> StepTimes:
    """Return the estimated times for a layout.

    Args:
        parallel: the configuration of `layout`, without `auto`.
    """
    model, tokens = workload.model, workload.global_batch * workload.seq_len
    # The forward pass, the gradients of activations, and those of the weights that train.
    passes = 2 + workload.trained + recomputed_share(parallel, workload)
    matmul = 2 * passes * active_parameters(workload) * tokens / layout.world / hardware.matmul
    matmul += 2 * passes * _repeated_maps(layout, workload) / hardware.matmul
    pairs = sum(attended_pairs(model.window(layer), workload.seq_len) for layer in range(model.num_layers))
    # The kernels pad values that are narrower than keys.
    attention_flops = 4 * model.num_heads * model.head_dim * pairs * workload.global_batch / layout.world
    forwards = 2 if parallel.recompute == "full" else 1
    attention = attention_flops * (forwards / hardware.attention_forward + 2.5 / hardware.attention_backward)
    launches = OPERATORS_PER_LAYER * model.num_layers / layout.pipeline * hardware.launch_s
    memory_bound = _moved_bytes(layout, parallel, workload) / hardware.bandwidth + launches
    memory_bound *= workload.accumulation
    shard_ranks = ranks_per_shard_group(layout)
    elements = sum(
        weight.mean_elements(layout) * number / shard_ranks[weight.kind] * workload.trained_share(weight)
        for weight, number in workload.weights.items()
    )
    update = elements / layout.pipeline * workload.weight_itemsize * ADAM_BYTES / hardware.bandwidth
    computation = matmul + attention + memory_bound
    exposed = _exposed(layout, parallel, workload, hardware, computation)
    idle = bubble(layout.pipeline, workload.accumulation, parallel.schedule)
    return StepTimes(matmul, attention, memory_bound, update, exposed, computation * idle / (1 - idle))


def _repeated_maps(layout: Layout, workload: Workload) -> float:
    """Return the multiplications with which a rank computes keys and values from latents of other context ranks."""
    model, micro_batches = workload.model, workload.accumulation
    if model.kv_lora_rank is None:
        return 0
    fetched = sum(layer_positions(model.window(layer), workload, layout) for layer in range(model.num_layers))
    width = model.num_heads * (model.head_dim - model.rotary_width + model.value_dim) / layout.tensor
    return micro_batches * workload.rows(layout) * fetched / layout.pipeline * model.kv_lora_rank * width


def _moved_bytes(layout: Layout, parallel: ParallelConfig, workload: Workload) -> float:
    """Return the bytes that a micro-batch reads and writes outside of matmuls and attention (estimate)."""
    layers = range(-(-workload.model.num_layers // layout.pipeline))
    activations = activation_bytes(layout, replace(parallel, recompute="none"), workload, layers)
    repeated = 1 + recomputed_share(parallel, workload) / 3
    per_weight = ACCUMULATION_BYTES if workload.accumulation > 1 and not _scatters_each(layout) else 0
    if layout.shard == 1 and workload.itemsize < workload.weight_itemsize:
        per_weight += CAST_BYTES
    return activations * repeated * PASSES_OVER_ACTIVATIONS + _unsharded_weights(layout, workload) * per_weight


def _scatters_each(layout: Layout) -> bool:
    """Return whether FSDP gathers weights and scatters gradients for each micro-batch."""
    return layout.shard > 1 and layout.pipeline == 1


def _unsharded_weights(layout: Layout, workload: Workload) -> float:
    """Return the weights of a rank, as FSDP gathers them."""
    numbers = workload.weights.items()
    return sum(math.prod(weight.local_shape(layout)) * number for weight, number in numbers) / layout.pipeline


def _exposed(
    layout: Layout, parallel: ParallelConfig, workload: Workload, hardware: Hardware, computation: float
) -> dict[Axis, float]:
    """Return the exposed communication by axis. FSDP gathers weights while the previous block computes.

    What FSDP copies is counted with its communication, because it runs at the same time as matmuls.
    """
    node = hardware.gpus_per_node

    def inside(stride: int, size: int) -> int:
        return max(1, min(size, node // stride))

    def seconds(axis: Axis, *, ring: bool = False) -> float:
        stride, size = groups[axis]
        return transfer_seconds(hardware, inside(stride, size), size, sent[axis], ring=ring)

    sent, groups = traffic(workload, layout, parallel), group_shapes(layout)
    exposed: dict[Axis, float] = {
        "expert": seconds("expert") * (0.5 if layout.overlap else 1),
        "expert_tensor": seconds("expert_tensor", ring=True),
        "tensor": seconds("tensor", ring=True),
        "context": seconds("context"),
        "pipeline": seconds("pipeline"),
        "gradients": 0.0,
    }
    copied = (
        FSDP_BYTES * _unsharded_weights(layout, workload) * workload.accumulation if _scatters_each(layout) else 0.0
    )
    gathers = copied / hardware.bandwidth
    for of_experts in (False, True):
        weights = {w: number for w, number in workload.weights.items() if (w.kind == "experts") == of_experts}
        stride = layout.expert_tensor * layout.expert if of_experts else layout.sequence
        shard = layout.expert_shard if of_experts else layout.shard
        replicas = layout.expert_data // shard if of_experts else layout.replicate
        nbytes = shard_bytes(weights, layout, workload) / layout.pipeline
        gathers += transfer_seconds(hardware, inside(stride, shard), shard, nbytes, ring=True)
        nbytes = gradient_bytes(weights, layout, workload) / layout.pipeline
        place = inside(stride * shard, replicas)
        exposed["gradients"] += transfer_seconds(hardware, place, replicas, nbytes, ring=True)
    # A CPU that sends does not compute.
    exposed["shard"] = gathers if hardware.capability is None else max(0.0, gathers - computation)
    for axis, starts in _starts(layout, workload).items():
        stride, size = groups[axis]
        latency = start_seconds(hardware, inside(stride, size), size)
        exposed[axis] += starts * latency * workload.accumulation / layout.pipeline
    return exposed


def group_shapes(layout: Layout) -> dict[Axis, tuple[int, int]]:
    """Return axis -> the distance between the numbers of neighbouring ranks of its groups, and their size."""
    return {
        "tensor": (1, layout.tensor),
        "context": (layout.tensor, layout.context),
        "shard": (layout.sequence, layout.shard),
        "expert_tensor": (1, layout.expert_tensor),
        "expert": (layout.expert_tensor, layout.expert),
        "pipeline": (layout.stage, layout.pipeline),
    }


def _starts(layout: Layout, workload: Workload) -> dict[Axis, int]:
    """Return how many collectives of a micro-batch must be waited for, without those that every layout has."""
    layers, moe = workload.model.num_layers, workload.model.num_moe_layers
    starts: dict[Axis, int] = {
        "tensor": (12 if workload.model.qk_norm == "width" else 8) * layers,
        "context": 2 * layers,
        "shard": 3 * (layers + moe),
        "pipeline": 4 * layout.pipeline,
    }
    return {axis: number for axis, number in starts.items() if getattr(layout, axis) > 1}


def active_parameters(workload: Workload) -> float:
    """Return the parameters that one token uses, in the mean over the tokens, without a lookup in the embedding."""
    model = workload.model
    others = sum(weight.numel * number for weight, number in workload.weights.items() if weight.kind != "experts")
    lookup = 0 if model.tie_embeddings else model.dim * (model.vocab_size or 0)
    return others - lookup + _active_expert_parameters(workload)


def _active_expert_parameters(workload: Workload) -> float:
    experts, top_k = workload.model.num_experts or 1, workload.model.top_k or 1
    total = sum(weight.numel * number for weight, number in workload.weights.items() if weight.kind == "experts")
    return total * workload.router.experts_per_token(experts, top_k) / experts


def recomputed_share(parallel: ParallelConfig, workload: Workload) -> float:
    """Return the share of the forward pass that is computed again. `selective`: the experts but for the last matmul."""
    if parallel.recompute == "selective":
        return expert_share(workload) * (2 / 3 if is_gated(workload.model.expert_kind) else 1 / 2)
    return float(parallel.recompute == "full")


def expert_share(workload: Workload) -> float:
    """Return the share of the routed experts in the parameters that one token uses."""
    return _active_expert_parameters(workload) / active_parameters(workload)


REFERENCE = Hardware(
    name="reference",
    memory=math.inf,
    reserved=0.0,
    precision="bf16",
    peak=989e12,
    matmul=405e12,
    grouped_matmul=405e12,
    attention_forward=405e12,
    attention_backward=405e12,
    wide_matmul=40e12,
    bandwidth=2.5e12,
    launch_s=3e-6,
    capability=9,
    gpus_per_node=8,
    link=450e9,
    network=50e9,
    link_latency_s=20e-6,
    network_latency_s=20e-6,
    price=None,
    sources=dict.fromkeys(
        {entry.name for entry in fields(Hardware)} - {"name", "price", "sources"},
        "data sheets of an H100 and of a 400 Gb/s network card; 400 TFLOP/s, which a whole step reaches",
    ),
)
"""The device for which a run compares layouts (`parallel.planning.auto`), because it does not know its own rates."""
