"""What a model costs in memory, and how far it sees: parameters counted on its modules, the rest from its config.

Letters: L layers, W window (keys a query sees, itself included), n context, G key/value heads, C head dim, E experts,
k of them per token. Operations are counted in moe/accounting/flops.py.
"""

from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from moe.accounting.flops import attended_pairs
from moe.config import ModelConfig
from moe.layer import Block, MoELayer
from moe.model import Transformer

DType = Literal["bf16", "fp16", "fp32"]
BYTES: dict[DType, int] = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Parts:
    """Parameters by what they are part of; every one is counted once."""

    embedding: int = 0
    head: int = 0
    """0 when it is tied to the embedding."""
    attention: int = 0
    router: int = 0
    routed_experts: int = 0
    shared_experts: int = 0
    dense_ffn: int = 0
    """Feed-forward networks of the layers that are no MoE layers."""
    norms: int = 0

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class TrainingBytes:
    """Of all ranks together, activations not counted."""

    weights: int
    gradients: int
    master: int
    """fp32 copy of weights that are not fp32 themselves."""
    moments: int
    """Adam's two, fp32."""
    optimizer: int
    """`master` and `moments`."""
    total: int


@dataclass(frozen=True)
class CacheBytes:
    """Keys and values of `batch` rows of `context` tokens."""

    full: int
    """n entries in every layer."""
    rolling: int
    """W entries in a layer with a window, whatever n is (`moe.attention.cache.Cache`); n in the others."""


@dataclass(frozen=True)
class WindowSaving:
    """Query-key pairs of one head and one row of n tokens: full attention against a window W."""

    context: int
    window: int
    full: int
    """n·n, a mask that is not causal."""
    windowed: int
    """n·min(W, n)."""
    saved: float
    """Share of `full` that the window saves."""
    causal: int
    """n·(n + 1)/2: what full causal attention needs."""
    causal_windowed: int
    saved_of_causal: float
    """Share of `causal` that the window saves: what it is worth in a causal model."""


def count_parts(model: Transformer) -> Parts:
    """Parameters of a whole model (the meta device will do), by part."""
    counts = dict.fromkeys(vars(Parts()), 0)
    counts["embedding"] = model.embedding.numel()
    for part, module in _parts(model):
        counts[part] += sum(parameter.numel() for parameter in module.parameters())
    parts = Parts(**counts)
    assert parts.total == sum(parameter.numel() for parameter in model.parameters()), "a module belongs to no part"
    return parts


def active_parts(parts: Parts, config: ModelConfig) -> Parts:
    """What one token touches: k of E routed experts; router, shared experts and embedding in full."""
    if config.num_experts is None or config.top_k is None:
        return parts
    return replace(parts, routed_experts=parts.routed_experts // config.num_experts * config.top_k)


def training_bytes(parameters: int, dtype: DType | None = None) -> TrainingBytes:
    """Memory of AdamW's training.

    Args:
        dtype: `None`: as this project holds it, weights, gradients and both moments in fp32 whatever the arithmetic
            (weights are cast where they are used). Else weights and gradients in `dtype`; a 16-bit one needs an fp32
            master copy of the weights beside the moments (arXiv 1710.03740).
    """
    weights = parameters * (4 if dtype is None else BYTES[dtype])
    master = 0 if weights == 4 * parameters else 4 * parameters
    moments = 8 * parameters
    return TrainingBytes(
        weights=weights,
        gradients=weights,
        master=master,
        moments=moments,
        optimizer=master + moments,
        total=2 * weights + master + moments,
    )


def cache_bytes(config: ModelConfig, batch: int, context: int, dtype: DType) -> CacheBytes:
    """2·G·C numbers an entry: a key and a value."""
    entry = 2 * config.num_kv_heads * config.head_dim * BYTES[dtype] * batch
    windows = [config.window(layer) for layer in range(config.num_layers)]
    rolling = sum(context if window is None else window for window in windows)
    return CacheBytes(full=entry * context * config.num_layers, rolling=entry * rolling)


def receptive_field(config: ModelConfig) -> int | None:
    """Σ W over the layers: L·W, as Mistral 7B (arXiv 2310.06825) counts it; `None`: a layer sees everything."""
    windows = [config.window(layer) for layer in range(config.num_layers)]
    known = [window for window in windows if window is not None]
    return sum(known) if len(known) == len(windows) else None


def farthest_token(config: ModelConfig) -> int | None:
    """How many tokens back the oldest one lies that can reach a logit: Σ (W - 1), because W counts the query itself."""
    field = receptive_field(config)
    return None if field is None else field - config.num_layers


def window_saving(context: int, window: int) -> WindowSaving:
    full, windowed = context * context, context * min(window, context)
    causal, causal_windowed = attended_pairs(None, context), attended_pairs(window, context)
    return WindowSaving(
        context=context,
        window=window,
        full=full,
        windowed=windowed,
        saved=1 - windowed / full,
        causal=causal,
        causal_windowed=causal_windowed,
        saved_of_causal=1 - causal_windowed / causal,
    )


def _parts(model: Transformer) -> list[tuple[str, nn.Module]]:
    found: list[tuple[str, nn.Module]] = [("norms", model.norm)]
    if model.head is not None:
        found.append(("head", model.head))
    for block in model.layers:
        assert isinstance(block, Block)
        found += [("norms", block.attention_norm), ("norms", block.ffn_norm), ("attention", block.attention)]
        if isinstance(block.ffn, MoELayer):
            found += [("router", block.ffn.router), ("routed_experts", block.ffn.experts)]
            found += [] if block.ffn.shared is None else [("shared_experts", block.ffn.shared)]
        else:
            found.append(("dense_ffn", block.ffn))
    return found
