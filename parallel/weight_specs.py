"""Every parameter of a model by name, with its shape and the parallel axes that shard it. Plain numbers, no torch.

`moe.model.Transformer` creates parameters of exactly these names and shapes, and `check_weights` compares them when a
model is built. The rules about which axes shard a parameter are the tables at the top of this file. No other file
repeats them, and a parameter that no rule covers is an error.

Letters: D model, H query heads, G key/value heads, C head dim, F hidden width, E experts, V vocabulary.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from common.errors import ModelError, expect
from common.text import show_value
from moe.config import ModelConfig, RouterConfig, adapter_shapes, is_gated, split_adapter_name
from moe.quantization import Packing, QuantizeConfig, Target, target_of
from parallel.layout import Layout

Kind = Literal["router", "replicated", "tensor", "kv_heads", "experts"]
"""Which parallel axes shard a parameter:

- `router`: none. Every rank of the pipeline stage stores the whole parameter.
- `replicated`: FSDP (`parallel.shard`). Tensor-parallel ranks store the same values.
- `tensor`: tensor parallelism, along the dim in `TENSOR_DIMS`, and FSDP.
- `kv_heads`: as `tensor`, but `Layout.kv_copies` neighbouring tensor-parallel ranks store the same part.
- `experts`: expert parallelism along dim 0, `parallel.expert_tensor` along the dim in `EXPERT_TENSOR_DIMS`, and FSDP
  over the ranks that store the same experts (`Layout.expert_shard`).

An adapter (`moe.low_rank`) follows its weight. The factor A has the columns of the weight, B and the magnitudes have
its rows. If the weight is sharded along a dim that a parameter of its adapter has, that one is sharded in the same way,
and else it is `replicated`. Adapters of experts are `experts`.

Tensor parallelism divides a dim as `part_of` does: the last parts can be smaller, or empty.
"""
REPLICATED = (
    *("norm", "attention_norm", "ffn_norm", "q_norm", "k_norm", "wo.bias", "shared_gate"),
    *("wq_down", "wq_down_norm", "wkv_down", "wkv_down_norm"),
)
"""Parameters of the kind `replicated`. The latents of latent attention belong to all heads: every tensor-parallel rank
computes them, and has the part of their weights' gradients that comes from its heads."""
TENSOR_DIMS = {
    "embedding": 0,
    "head": 0,
    "wq": 0,
    "wk": 0,
    "wv": 0,
    "wq_up": 0,
    "wkv_up": 0,
    "wo": 1,
    "wq.bias": 0,
    "wk.bias": 0,
    "wv.bias": 0,
    "w_gate": 0,
    "w_up": 0,
    "w_down": 1,
}
"""Parameters [out, in] and biases [out] of the kinds `tensor` and `kv_heads` -> the dim that is sharded: heads, hidden
units or the vocabulary."""
KV_HEADS = ("wk", "wv", "wk.bias", "wv.bias")
"""Parameters of the kind `kv_heads`."""
EXPERT_TENSOR_DIMS = {"w_gate": 1, "w_up": 1, "w_down": 2}
"""Parameters of the kind `experts`, stacked over the experts -> the dim of the hidden units."""


def kind(name: str) -> Kind:
    """Return which parallel axes shard a parameter.

    Args:
        name: the parameter's name in `Transformer`, as in `layers.0.attention.wq.weight`. `<parameter>.<expert>` is
            one expert of a stacked parameter, as in `layers.0.ffn.experts.w_up.3` (`training/trainable.py`).

    Raises:
        ModelError: no rule covers the name.
    """
    if ".router." in name:
        return "router"
    weight, part = split_adapter_name(name)
    if part is not None:
        return "experts" if kind(weight) == "experts" else "replicated" if tensor_dim(name) is None else kind(weight)
    if ".experts." in name:
        if _leaf(re.sub(r"\.\d+$", "", name)) in EXPERT_TENSOR_DIMS:
            return "experts"
    elif _leaf(name) in KV_HEADS:
        return "kv_heads"
    elif _leaf(name) in TENSOR_DIMS:
        return "tensor"
    elif _leaf(name) in REPLICATED:
        return "replicated"
    raise ModelError(
        f"{name}: expected a parameter that a rule in parallel/weight_specs.py covers (REPLICATED, TENSOR_DIMS or "
        "EXPERT_TENSOR_DIMS; parameters of a router need none), found no rule"
    )


def tensor_dim(name: str) -> int | None:
    """Return the dim that tensor parallelism shards (for experts: `parallel.expert_tensor`), or None without one."""
    weight, part = split_adapter_name(name)
    if part is not None:
        dim, stacked = tensor_dim(weight), kind(weight) == "experts"
        # A has the last dim of the weight, and the other parameters have the one before it.
        return dim if dim is not None and (part == "a") == (dim == 1 + stacked) else None
    of = kind(name)
    dims = {"experts": EXPERT_TENSOR_DIMS, "tensor": TENSOR_DIMS, "kv_heads": TENSOR_DIMS}.get(of, {})
    return dims.get(_leaf(name))


def part_of(size: int, parts: int, index: int) -> tuple[int, int]:
    """Return the offset and the length of one of the contiguous parts of a dim, all as long as possible but the last.

    >>> [part_of(5, 4, index) for index in range(4)]
    [(0, 2), (2, 2), (4, 1), (5, 0)]
    """
    length = -(-size // parts)
    offset = min(index * length, size)
    return offset, min(length, size - offset)


def parts_by_dim(of: Kind, dim: int | None, layout: Layout) -> dict[int, int]:
    """Return dim -> number of different parts that expert and tensor parallelism divide a parameter into.

    Args:
        of: the parameter's kind.
        dim: the result of `tensor_dim` for its name.
    """
    if of == "experts":
        return {0: layout.expert} | ({} if dim is None else {dim: layout.expert_tensor})
    if dim is None:
        return {}
    return {dim: layout.tensor // (layout.kv_copies if of == "kv_heads" else 1)}


def shard_dim(shape: Sequence[int], parts: int, *, stacked: bool) -> int:
    """Return the dim along which FSDP shards a parameter, after tensor and expert parallelism.

    This is dim 0, except for stacked experts whose number `parts` does not divide. Those are sharded along dim 1 if
    `parts` divides it.
    """
    return 1 if stacked and shape[0] % parts and shape[1] % parts == 0 else 0


@dataclass(frozen=True)
class WeightSpec:
    """The shape of a parameter and how parallel axes shard it."""

    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    kind: Kind
    tensor_dim: int | None = None
    """The dim that `tensor_dim` returns for the parameter's name."""
    root: bool = False
    """Whether it is outside of the blocks (embedding, last norm, head). FSDP gathers these as one unit, the root."""
    target: Target | None = None
    """What `quantize.targets` calls it; None: it is never quantised."""
    adapter: bool = False
    """Whether it belongs to an adapter."""

    @classmethod
    def named(cls, name: str, *shape: int, root: bool = False) -> "WeightSpec":
        """Return the spec of the parameter `name`. The name can be relative to the block."""
        adapter = split_adapter_name(name)[1] is not None
        return cls(shape, kind(name), tensor_dim(name), root, target_of(name), adapter)

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return math.prod(self.shape)

    def local_shape(self, layout: Layout) -> tuple[int, ...]:
        """Return the largest shape on a rank after tensor and expert parallelism, before FSDP."""
        parts = parts_by_dim(self.kind, self.tensor_dim, layout)
        return tuple(part_of(size, parts.get(dim, 1), 0)[1] for dim, size in enumerate(self.shape))

    def mean_elements(self, layout: Layout) -> float:
        """Return the mean number of elements on a rank after tensor and expert parallelism, before FSDP."""
        return self.numel / math.prod(parts_by_dim(self.kind, self.tensor_dim, layout).values())

    def packing(self, quantize: QuantizeConfig) -> Packing | None:
        """Return how its matrices are stored in few bits; None: they are not."""
        return quantize.packing(self.target, self.shape)

    def packed(self, packing: Packing) -> "WeightSpec":
        """Return the spec of its bytes, [P] or [E, P], which take the place of its numbers."""
        return replace(self, shape=(*self.shape[:-2], packing.nbytes), tensor_dim=None, target=None)

    def largest_shard(self, layout: Layout, ranks: int) -> int:
        """Return the elements on the rank that stores most of them. FSDP's last shards can be smaller.

        Args:
            ranks: ranks over which FSDP shards the parameter.
        """
        shape = list(self.local_shape(layout))
        dim = shard_dim(shape, ranks, stacked=self.kind == "experts")
        shape[dim] = -(-shape[dim] // ranks)
        return math.prod(shape)


def ranks_per_shard_group(layout: Layout) -> dict[Kind, int]:
    """Return the number of ranks over which FSDP shards a parameter of each kind."""
    dense: tuple[Kind, ...] = ("replicated", "tensor", "kv_heads")
    return {"router": 1, **dict.fromkeys(dense, layout.shard), "experts": layout.expert_shard}


def named_weights(model: ModelConfig, router: RouterConfig) -> dict[str, WeightSpec]:
    """Return all parameters of a model under their names in `Transformer`."""
    named = dict(_weights_outside_blocks(model, first=True, last=True))
    for layer in range(model.num_layers):
        block = block_weights(model, router, model.is_moe_layer(layer))
        named |= {f"layers.{layer}.{name}": weight for name, weight in block}
        named |= adapter_weights(model, router, layer)
    return named


def count_weights(model: ModelConfig, router: RouterConfig, layers: Sequence[int]) -> Counter[WeightSpec]:
    """Return how many parameters of each spec a pipeline stage with these layers has."""
    outside = _weights_outside_blocks(model, first=0 in layers, last=model.num_layers - 1 in layers)
    counted = Counter(weight for _, weight in outside)
    for is_moe, number in Counter(map(model.is_moe_layer, layers)).items():
        for _, weight in block_weights(model, router, is_moe):
            counted[weight] += number
    for layer in layers if model.adapter is not None else ():
        counted.update(adapter_weights(model, router, layer).values())
    return counted


def adapter_weights(model: ModelConfig, router: RouterConfig, layer: int) -> dict[str, WeightSpec]:
    """Return the parameters of the adapters in a block under their names in `Transformer`."""
    if model.adapter is None:
        return {}
    found = {}
    for name, weight in block_weights(model, router, model.is_moe_layer(layer)):
        target = f"layers.{layer}.{name}".removesuffix(".weight")
        if weight.kind in ("router", "experts"):  # which can have further parameters
            is_matrix = name == "ffn.router.weight" or len(weight.shape) == 3
        else:
            is_matrix = name.endswith(".weight") and len(weight.shape) == 2
        if is_matrix and model.adapter.chooses(target):
            prefix, _, last = target.rpartition(".")
            owner = f"{prefix}.adapters.{last}" if weight.kind == "experts" else f"{target}.adapter"
            for part, shape in adapter_shapes(weight.shape, model.adapter).items():
                found[f"{owner}.{part}"] = WeightSpec.named(f"{owner}.{part}", *shape)
    return found


def check_weights(parameters: Mapping[str, Sequence[int]], model: ModelConfig, router: RouterConfig) -> None:
    """Check that a built model has exactly the parameters of `named_weights`.

    Args:
        parameters: name -> shape of every parameter of the whole model.

    Raises:
        ModelError: names the first parameter that is missing, unexpected or of another shape.
    """
    expected = {name: weight.shape for name, weight in named_weights(model, router).items()}
    for name in dict.fromkeys([*parameters, *expected]):
        wanted, found = (
            f"shape {show_value(list(shapes[name]))}" if name in shapes else "no parameter of this name"
            for shapes in (expected, parameters)
        )
        if wanted != found:
            raise ModelError(
                f"{name}: expected {wanted}, found {found} (parallel/weight_specs.py lists every parameter of a model; "
                f"the weight_shapes of a router's configuration, here {type(router).__name__}, those of its router)"
            )


def block_weights(model: ModelConfig, router: RouterConfig, is_moe: bool) -> tuple[tuple[str, WeightSpec], ...]:
    """Return (name relative to the block, spec) for every parameter of a MoE block or a dense block."""
    if not is_moe:
        return _block_weights(model, None)
    # The cache gets the shapes instead of `router`, because a plugin's configuration may not be hashable.
    shapes = router.weight_shapes(model.dim, model.num_experts or 0)
    expect(
        isinstance(shapes, dict) and all(isinstance(shape, tuple | list) and shape for shape in shapes.values()),
        "router.kind",
        router.kind,
        f"{type(router).__name__}.weight_shapes to return name -> shape, with at least one size, found {shapes}",
    )
    return _block_weights(model, tuple((name, tuple(shape)) for name, shape in shapes.items()))


@lru_cache(maxsize=256)
def _block_weights(
    model: ModelConfig, router_shapes: tuple[tuple[str, tuple[int, ...]], ...] | None
) -> tuple[tuple[str, WeightSpec], ...]:
    """Compute `block_weights` from the shapes of the router's parameters; None for a dense block."""
    dim = model.dim
    shapes: dict[str, tuple[int, ...]] = {"attention_norm.weight": (dim,), "ffn_norm.weight": (dim,)}
    shapes |= {f"attention.{name}": shape for name, shape in _attention_shapes(model).items()}
    if router_shapes is None:
        shapes |= _feed_forward_shapes("ffn", model.ffn, model.hidden_dim, dim)
    else:
        experts, width = model.num_experts or 0, model.expert_width
        shapes |= {f"ffn.router.{name}": shape for name, shape in router_shapes}
        for name in _input_matrices(model.expert_kind):
            shapes[f"ffn.experts.{name}"] = (experts, width, dim)
        shapes["ffn.experts.w_down"] = (experts, dim, width)
        if model.num_shared_experts:
            shapes |= _feed_forward_shapes("ffn.shared", model.expert_kind, model.shared_width, dim)
        if model.shared_gate:
            shapes["ffn.shared_gate.weight"] = (1, dim)
    return tuple((name, WeightSpec.named(name, *shape)) for name, shape in shapes.items())


def _weights_outside_blocks(model: ModelConfig, first: bool, last: bool) -> Iterator[tuple[str, WeightSpec]]:
    """Yield the parameters outside of the blocks for a pipeline stage that is the `first`, the `last`, or both.

    The first and the last stage both store a tied embedding.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    if first or (last and model.tie_embeddings):
        shapes["embedding"] = (model.vocab_size or 0, model.dim)
    if last:
        shapes["norm.weight"] = (model.dim,)
        if not model.tie_embeddings:
            shapes["head.weight"] = (model.vocab_size or 0, model.dim)
    return ((name, WeightSpec.named(name, *shape, root=True)) for name, shape in shapes.items())


def _attention_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return name -> shape for an attention module."""
    dim, heads, rank = model.dim, model.num_heads * model.head_dim, model.q_lora_rank
    matrices: dict[str, tuple[int, ...]] = {"wq": (heads, dim)}
    vectors: dict[str, tuple[int, ...]] = {}
    if model.kv_lora_rank is None:
        kv_heads = model.num_kv_heads * model.head_dim
        matrices |= {"wk": (kv_heads, dim), "wv": (kv_heads, dim)}
        if model.qk_norm is not None:
            each = model.qk_norm == "head"
            vectors = {
                "q_norm.weight": (model.head_dim if each else heads,),
                "k_norm.weight": (model.head_dim if each else kv_heads,),
            }
    else:
        if rank is not None:
            matrices = {"wq_down": (rank, dim), "wq_down_norm": (rank,), "wq_up": (heads, rank)}
        up = model.num_heads * (model.head_dim - model.rotary_width + model.value_dim)
        matrices["wkv_down"] = (model.kv_lora_rank + model.rotary_width, dim)
        matrices |= {"wkv_down_norm": (model.kv_lora_rank,), "wkv_up": (up, model.kv_lora_rank)}
    matrices["wo"] = (dim, model.num_heads * model.value_dim)
    biased = {None: (), "qkv": ("wq", "wk", "wv"), "all": ("wq", "wk", "wv", "wo")}[model.attention_bias]
    vectors |= {f"{name}.bias": matrices[name][:1] for name in biased}
    return {f"{name}.weight": shape for name, shape in matrices.items()} | vectors


def _feed_forward_shapes(prefix: str, kind: str, hidden: int, dim: int) -> dict[str, tuple[int, ...]]:
    """Return name -> shape for a feed-forward network of one kind (`model.ffn`)."""
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}.{name}.weight": (hidden, dim) for name in _input_matrices(kind)}
    return shapes | {f"{prefix}.w_down.weight": (dim, hidden)}


def _input_matrices(kind: str) -> tuple[str, ...]:
    """Return the names of the matrices that a feed-forward network of this kind applies to its input."""
    return ("w_gate", "w_up") if is_gated(kind) else ("w_up",)


def _leaf(name: str) -> str:
    """Return the last part of a parameter's name, without a final `.weight`; with the part before a final `.bias`."""
    name = name.removesuffix(".weight")
    parts = 2 if name.endswith(".bias") else 1
    return ".".join(name.split(".")[-parts:])
