"""Every weight of a model by name, shape and how axes cut it: read off the configuration, without torch and in no time.

What torch builds (`moe.model.Transformer`) and cuts (`parallel/placement.py`) is the same; tests hold them together.

Letters: D model, H query heads, G key/value heads, C head dim, F hidden width, E experts, V vocabulary.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from moe.config import GATED, FeedForwardKind, ModelConfig
from parallel.layout import Layout

Kind = Literal["whole", "replicated", "tensor", "experts"]
"""Which axes cut it: none (routers), FSDP alone, tensor parallelism, or expert parallelism."""


@dataclass(frozen=True)
class Weight:
    shape: tuple[int, ...]
    """Of the whole."""
    kind: Kind
    dim: int | None = None
    """What tensor parallelism cuts it along, or `expert_tensor` where it is of experts."""
    root: bool = False
    """Outside of the blocks: embedding, last norm, head."""

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
        # experts whole where they divide, else by their rows (parallel/fsdp.py)
        dim = 1 if len(shape) == 3 and shape[0] % sharers and shape[1] % sharers == 0 else 0
        shape[dim] = -(-shape[dim] // sharers)
        return math.prod(shape)


def sharers(layout: Layout) -> dict[Kind, int]:
    """Ranks that FSDP shares a weight out among."""
    shard = layout.shard
    return {"whole": 1, "replicated": shard, "tensor": shard, "experts": layout.expert_shard}


def named_weights(model: ModelConfig) -> dict[str, Weight]:
    """All weights of the model, under their names in `Transformer`."""
    named = dict(_ends(model, first=True, last=True))
    for layer in range(model.num_layers):
        named |= {f"layers.{layer}.{name}": weight for name, weight in _block(model, model.is_moe_layer(layer))}
    return named


@lru_cache(maxsize=4096)
def count_weights(model: ModelConfig, layers: Sequence[int]) -> Counter[Weight]:
    """How many there are of each, in the pipeline stage of these layers (a range or a tuple)."""
    counted = Counter(weight for _, weight in _ends(model, first=0 in layers, last=model.num_layers - 1 in layers))
    for is_moe, number in Counter(map(model.is_moe_layer, layers)).items():
        for _, weight in _block(model, is_moe):
            counted[weight] += number
    return counted


def _ends(model: ModelConfig, first: bool, last: bool) -> Iterator[tuple[str, Weight]]:
    """What is outside of the blocks; a tied embedding is needed at both ends."""
    matrix = Weight((model.vocab_size or 0, model.dim), "tensor", 0, root=True)
    if first or (last and model.tie_embeddings):
        yield "embedding", matrix
    if last:
        yield "norm.weight", Weight((model.dim,), "replicated", root=True)
        if not model.tie_embeddings:
            yield "head.weight", matrix


def _block(model: ModelConfig, is_moe: bool) -> Iterator[tuple[str, Weight]]:
    dim, heads = model.dim, model.num_heads * model.head_dim
    kv_heads = model.num_kv_heads * model.head_dim
    yield "attention_norm.weight", Weight((dim,), "replicated")
    yield "ffn_norm.weight", Weight((dim,), "replicated")
    for name, width in (("wq", heads), ("wk", kv_heads), ("wv", kv_heads)):
        yield f"attention.{name}.weight", Weight((width, dim), "tensor", 0)
    yield "attention.wo.weight", Weight((dim, heads), "tensor", 1)
    if not is_moe:
        yield from _network("ffn", model.ffn, model.hidden_dim, dim)
        return
    experts, width = model.num_experts or 0, model.expert_width
    yield "ffn.router.weight", Weight((experts, dim), "whole")
    for name in _inward(model.expert_kind):
        yield f"ffn.experts.{name}", Weight((experts, width, dim), "experts", 1)
    yield "ffn.experts.w_down", Weight((experts, dim, width), "experts", 2)
    if model.num_shared_experts:
        yield from _network("ffn.shared", model.expert_kind, model.num_shared_experts * width, dim)


def _network(prefix: str, kind: FeedForwardKind, hidden: int, dim: int) -> Iterator[tuple[str, Weight]]:
    for name in _inward(kind):
        yield f"{prefix}.{name}.weight", Weight((hidden, dim), "tensor", 0)
    yield f"{prefix}.w_down.weight", Weight((dim, hidden), "tensor", 1)


def _inward(kind: FeedForwardKind) -> tuple[str, ...]:
    return ("w_gate", "w_up") if kind in GATED else ("w_up",)
