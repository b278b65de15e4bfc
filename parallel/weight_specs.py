"""Every weight of a model by name, shape and how axes cut it: read off the configuration, without torch and in no time.

What torch builds (`moe.model.Transformer`) has the same names and shapes; a test holds them together. How axes cut them
is said here, and only here.

Letters: D model, H query heads, G key/value heads, C head dim, F hidden width, E experts, V vocabulary.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from moe.config import ModelConfig, is_gated
from parallel.layout import Layout

Kind = Literal["whole", "replicated", "tensor", "experts"]
"""Which axes cut it: none (routers), FSDP alone, tensor parallelism, or expert parallelism."""


TENSOR_DIMS = {
    "embedding": 0,
    "head": 0,
    "wq": 0,
    "wk": 0,
    "wv": 0,
    "wo": 1,
    "w_gate": 0,
    "w_up": 0,
    "w_down": 1,
}
"""Weights [out, in] that tensor parallelism cuts, and along which dim: heads, hidden units, or the vocabulary."""
EXPERT_TENSOR_DIMS = {"w_gate": 1, "w_up": 1, "w_down": 2}
"""The same for stacked experts: their hidden units."""


def kind(name: str) -> Kind:
    """Which axes cut the parameter `name`: expert parallelism, tensor parallelism, FSDP alone, or (routers) none."""
    if ".experts." in name:
        return "experts"
    if ".router." in name:
        return "whole"
    return "tensor" if _leaf(name) in TENSOR_DIMS else "replicated"


def cut_dim(name: str) -> int | None:
    """The dim along which tensor parallelism (of experts: `expert_tensor`) cuts the parameter; None: it does not."""
    dims = {"experts": EXPERT_TENSOR_DIMS, "tensor": TENSOR_DIMS}.get(kind(name), {})
    return dims.get(_leaf(name))


def shard_dim(shape: Sequence[int], parts: int) -> int:
    """Along which FSDP cuts what is left: experts whole where they divide, else each one's rows; matrices by rows."""
    return 1 if len(shape) == 3 and shape[0] % parts and shape[1] % parts == 0 else 0


@dataclass(frozen=True)
class WeightSpec:
    shape: tuple[int, ...]
    """Of the whole."""
    kind: Kind
    dim: int | None = None
    """What tensor parallelism cuts it along, or `expert_tensor` where it is of experts."""
    root: bool = False
    """Outside of the blocks: embedding, last norm, head."""

    @classmethod
    def named(cls, name: str, *shape: int, root: bool = False) -> "WeightSpec":
        return cls(shape, kind(name), cut_dim(name), root)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def local_shape(self, layout: Layout) -> tuple[int, ...]:
        """After tensor and expert parallelism."""
        shape = list(self.shape)
        if self.kind == "experts":
            shape[0] //= layout.expert
        if self.dim is not None:
            shape[self.dim] //= layout.expert_tensor if self.kind == "experts" else layout.tensor
        return tuple(shape)

    def largest_part(self, layout: Layout, sharers: int) -> int:
        """Elements that the fullest rank holds: FSDP cuts along one dim, and its last parts may be shorter."""
        shape = list(self.local_shape(layout))
        dim = shard_dim(shape, sharers)
        shape[dim] = -(-shape[dim] // sharers)
        return math.prod(shape)


def sharers(layout: Layout) -> dict[Kind, int]:
    """Ranks that FSDP shares a weight out among."""
    shard = layout.shard
    return {"whole": 1, "replicated": shard, "tensor": shard, "experts": layout.expert_shard}


def named_weights(model: ModelConfig) -> dict[str, WeightSpec]:
    """All weights of the model, under their names in `Transformer`."""
    named = dict(_ends(model, first=True, last=True))
    for layer in range(model.num_layers):
        named |= {f"layers.{layer}.{name}": weight for name, weight in _block(model, model.is_moe_layer(layer))}
    return named


@lru_cache(maxsize=4096)
def count_weights(model: ModelConfig, layers: Sequence[int]) -> Counter[WeightSpec]:
    """How many there are of each, in the pipeline stage of these layers (a range or a tuple)."""
    counted = Counter(weight for _, weight in _ends(model, first=0 in layers, last=model.num_layers - 1 in layers))
    for is_moe, number in Counter(map(model.is_moe_layer, layers)).items():
        for _, weight in _block(model, is_moe):
            counted[weight] += number
    return counted


def _ends(model: ModelConfig, first: bool, last: bool) -> Iterator[tuple[str, WeightSpec]]:
    """What is outside of the blocks; a tied embedding is needed at both ends."""
    shapes: dict[str, tuple[int, ...]] = {}
    if first or (last and model.tie_embeddings):
        shapes["embedding"] = (model.vocab_size or 0, model.dim)
    if last:
        shapes["norm.weight"] = (model.dim,)
        if not model.tie_embeddings:
            shapes["head.weight"] = (model.vocab_size or 0, model.dim)
    return ((name, WeightSpec.named(name, *shape, root=True)) for name, shape in shapes.items())


def _block(model: ModelConfig, is_moe: bool) -> Iterator[tuple[str, WeightSpec]]:
    dim, heads = model.dim, model.num_heads * model.head_dim
    kv_heads = model.num_kv_heads * model.head_dim
    shapes: dict[str, tuple[int, ...]] = {"attention_norm.weight": (dim,), "ffn_norm.weight": (dim,)}
    for name, width in (("wq", heads), ("wk", kv_heads), ("wv", kv_heads)):
        shapes[f"attention.{name}.weight"] = (width, dim)
    shapes["attention.wo.weight"] = (dim, heads)
    if not is_moe:
        shapes |= _network("ffn", model.ffn, model.hidden_dim, dim)
    else:
        experts, width = model.num_experts or 0, model.expert_width
        shapes["ffn.router.weight"] = (experts, dim)
        for name in _inward(model.expert_kind):
            shapes[f"ffn.experts.{name}"] = (experts, width, dim)
        shapes["ffn.experts.w_down"] = (experts, dim, width)
        if model.num_shared_experts:
            shapes |= _network("ffn.shared", model.expert_kind, model.num_shared_experts * width, dim)
    return ((name, WeightSpec.named(name, *shape)) for name, shape in shapes.items())


def _network(prefix: str, kind: str, hidden: int, dim: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}.{name}.weight": (hidden, dim) for name in _inward(kind)}
    return shapes | {f"{prefix}.w_down.weight": (dim, hidden)}


def _inward(kind: str) -> tuple[str, ...]:
    return ("w_gate", "w_up") if is_gated(kind) else ("w_up",)


def _leaf(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]
