"""The memory of a model, and how far back its attention reaches. `moe.accounting.flops` counts operations.

Letters: L layers, W window (keys that a query attends to, its own position included), n context, G key/value heads,
C head dim, E experts, k experts per token.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from moe.accounting.flops import active_expert_parameters
from moe.config import ModelConfig, RouterConfig, attended_pairs
from moe.layer import Block, MoELayer
from moe.model import Transformer

DType = Literal["bf16", "fp16", "fp32"]
BYTES: dict[DType, int] = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Parts:
    """Numbers of parameters, or of their bytes, by component. Each parameter is counted once."""

    embedding: int = 0
    head: int = 0
    """0 if the head is tied to the embedding."""
    attention: int = 0
    router: int = 0
    routed_experts: int = 0
    shared_experts: int = 0
    dense_ffn: int = 0
    """Feed-forward networks of the dense layers."""
    norms: int = 0

    @property
    def total(self) -> int:
        """The sum over all components."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class TrainingBytes:
    """Bytes of all ranks together, without activations."""

    weights: int
    gradients: int
    master: int
    """The fp32 copy of 16-bit weights; 0 for fp32 weights."""
    moments: int
    """Adam's two moments, in fp32."""
    optimizer: int
    """The sum of `master` and `moments`."""
    total: int


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of the keys and values of `batch` rows of `context` tokens."""

    full: int
    """With n entries in every layer."""
    rolling: int
    """With W entries in each layer that has a window, even if n < W, and n in the others (`moe.attention.cache`)."""


@dataclass(frozen=True)
class WindowSaving:
    """Query-key pairs of one head and one row of n tokens, with full attention and with a window W."""

    context: int
    window: int
    full: int
    """n·n: without a causal mask."""
    windowed: int
    """n·min(W, n)."""
    saved: float
    """The fraction of `full` that the window saves."""
    causal: int
    """n·(n + 1)/2: under a causal mask."""
    causal_windowed: int
    """Under a causal mask and the window."""
    saved_of_causal: float
    """The fraction of `causal` that the window saves, which is what a causal model saves."""


def count_parts(model: Transformer) -> Parts:
    """Count the parameters of a whole model by component. The model can be on the meta device."""
    parts = _sum_by_part(model, lambda part, parameter: parameter.numel())
    assert parts.total == sum(parameter.numel() for parameter in model.parameters()), "a module belongs to no component"
    return parts


def stored_bytes(model: Transformer, dtype: DType) -> Parts:
    """Return the bytes of the weights of a whole model, as `scripts/generate.py` stores them.

    Quantised weights (`Transformer.quantize`) have their own size. Routers are stored in fp32, all others in `dtype`.
    The model can be on the meta device.
    """

    return _sum_by_part(model, lambda part, parameter: parameter.numel() * _itemsize(part, parameter, dtype))


def moved_bytes(model: Transformer, dtype: DType) -> Parts:
    """Return the bytes that pass between memory and processor when each weight is used once.

    Quantised weights are read, and written and read once more in `dtype`.
    """
    packings = {id(model.get_parameter(name)): packing for name, packing in model.packings.items()}

    def moved(part: str, parameter: Tensor) -> int:
        stored = parameter.numel() * _itemsize(part, parameter, dtype)
        packing = packings.get(id(parameter))
        return stored + (0 if packing is None else 2 * BYTES[dtype] * packing.numel * parameter[..., 0].numel())

    return _sum_by_part(model, moved)


def _itemsize(part: str, parameter: Tensor, dtype: DType) -> int:
    return 1 if parameter.dtype == torch.uint8 else BYTES["fp32" if part == "router" else dtype]


def _sum_by_part(model: Transformer, size: Callable[[str, Tensor], int]) -> Parts:
    """Return the sums, by component, of what `size(component, parameter)` returns."""
    sums = dict.fromkeys(vars(Parts()), 0)
    sums["embedding"] = size("embedding", model.embedding)
    for part, module in _modules_by_part(model):
        sums[part] += sum(size(part, parameter) for parameter in module.parameters())
    return Parts(**sums)


def workspace_bytes(model: Transformer, dtype: DType) -> int:
    """Return the bytes of the largest matrix of a quantised model while it is dequantised; 0 without quantised ones."""
    sizes = (packing.workspace_bytes(BYTES[dtype]) for packing in model.packings.values())
    return max(sizes, default=0)


def active_parts(parts: Parts, config: ModelConfig, router: RouterConfig) -> Parts:
    """Return the numbers of parameters, or the bytes, that one token uses, in the mean over the tokens.

    These are those of `RouterConfig.experts_per_token` of the routed experts, and all of the others.
    """
    return replace(parts, routed_experts=active_expert_parameters(parts.routed_experts, config, router))


def training_bytes(parameters: int, dtype: DType | None = None, trained: int | None = None) -> TrainingBytes:
    """Return the memory of training with AdamW.

    Args:
        parameters: elements of all weights.
        dtype: of weights and gradients. A 16-bit type needs an fp32 master copy of the weights besides the moments
            (arXiv 1710.03740). None: the sizes in Mixwright, which stores weights, gradients and both moments in fp32
            and casts weights to the compute dtype where they are used.
        trained: elements of those that train; None: all. The others have no gradient, master copy and moments.
    """
    trained = parameters if trained is None else trained
    itemsize = 4 if dtype is None else BYTES[dtype]
    weights, gradients = parameters * itemsize, trained * itemsize
    master = 0 if itemsize == 4 else 4 * trained
    moments = 8 * trained
    return TrainingBytes(
        weights=weights,
        gradients=gradients,
        master=master,
        moments=moments,
        optimizer=master + moments,
        total=weights + gradients + master + moments,
    )


def cache_bytes(config: ModelConfig, batch: int, context: int, dtype: DType) -> CacheBytes:
    """Return the size of the key/value cache.

    An entry is a key and a value of one token and layer, 2·G·C numbers. With latent attention it is a latent and the
    part of the key with rotary embedding (`ModelConfig.cached`).

    Args:
        batch: rows.
        context: tokens per row.
    """
    entry = sum(heads * width for heads, width in config.cached) * BYTES[dtype] * batch
    windows = [config.window(layer) for layer in range(config.num_layers)]
    rolling = sum(context if window is None else window for window in windows)
    return CacheBytes(full=entry * context * config.num_layers, rolling=entry * rolling)


def receptive_field(config: ModelConfig) -> int | None:
    """Return Σ W over the layers, L·W, as Mistral 7B (arXiv 2310.06825) counts it; None if a layer has no window."""
    windows = [config.window(layer) for layer in range(config.num_layers)]
    finite = [window for window in windows if window is not None]
    return sum(finite) if len(finite) == len(windows) else None


def farthest_token(config: ModelConfig) -> int | None:
    """Return the distance, in tokens, from a logit to the oldest token that can change it; None: unlimited.

    It is Σ (W - 1) over the layers, because W includes the query's own position.
    """
    field = receptive_field(config)
    return None if field is None else field - config.num_layers


def window_saving(context: int, window: int) -> WindowSaving:
    """Return what a window of `window` keys saves for a row of `context` tokens."""
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


def _modules_by_part(model: Transformer) -> list[tuple[str, nn.Module]]:
    """Return the modules of a model, each with the field of `Parts` that counts it.

    The embedding is not among them, because it is a parameter without a module.
    """
    modules: list[tuple[str, nn.Module]] = [("norms", model.norm)]
    if model.head is not None:
        modules.append(("head", model.head))
    for block in model.layers:
        assert isinstance(block, Block)
        modules += [("norms", block.attention_norm), ("norms", block.ffn_norm), ("attention", block.attention)]
        if isinstance(block.ffn, MoELayer):
            modules += [("router", block.ffn.router), ("routed_experts", block.ffn.experts)]
            shared = (block.ffn.shared, block.ffn.shared_gate)
            modules += [("shared_experts", module) for module in shared if module is not None]
        else:
            modules.append(("dense_ffn", block.ffn))
    return modules
