"""All figures of one model in one dictionary: parameters, FLOPs, memory, and how far its attention reaches.

The counting itself is in `moe/accounting/costs.py` and `moe/accounting/flops.py`.
"""

from dataclasses import asdict
from typing import Any, get_args

from common.strict import to_dict
from moe.accounting.costs import (
    BYTES,
    DType,
    active_parts,
    cache_bytes,
    count_parts,
    farthest_token,
    receptive_field,
    stored_bytes,
    training_bytes,
    window_saving,
)
from moe.accounting.flops import forward_flops_per_token, meta_model, training_flops_per_token
from moe.config import ModelConfig, RouterConfig, split_adapter_name
from moe.quantization import Kind, QuantizeConfig


def model_figures(
    model: ModelConfig, router: RouterConfig, *, context: int, batch: int, dtype: DType, window: int
) -> dict[str, Any]:
    """Return the figures of a model as values that JSON can hold. Counts and bytes are exact integers.

    The model is built on the meta device, so no weight is allocated.

    Args:
        model: with a vocabulary size.
        context: tokens of a row, for FLOPs, the key/value cache and attention. The row is one document.
        batch: rows of the key/value cache.
        dtype: of weights, gradients and the key/value cache, and of the weights that `nf4` and `int8` do not quantise.
        window: the window that full attention is compared with if no layer of the model has one.

    Raises:
        ModelError: a tensor of the model would be larger than torch allows.
    """
    built = meta_model(model, router)
    parts = count_parts(built)
    weights = {name: parts.total * size for name, size in BYTES.items()}
    for kind in get_args(Kind):
        quantised = meta_model(model, router)
        quantised.quantize(QuantizeConfig(kind))
        weights[kind] = stored_bytes(quantised, dtype).total
    active = active_parts(parts, model, router)
    of_adapters = sum(weight.numel() for name, weight in built.named_parameters() if split_adapter_name(name)[1])
    trained = parts.total if model.adapter is None else of_adapters
    windows = sorted({size for layer in range(model.num_layers) if (size := model.window(layer)) is not None})
    return {
        "total_params": parts.total,
        "active_params": active.total,
        "trained_params": trained,
        "params": asdict(parts),
        "active": asdict(active),
        "context": context,
        "batch": batch,
        "dtype": dtype,
        "forward_flops_per_token": forward_flops_per_token(built, context),
        "training_flops_per_token": training_flops_per_token(built, context),
        "weights_bytes": weights,
        "training_bytes": asdict(training_bytes(parts.total, dtype, trained)),
        "training_bytes_here": asdict(training_bytes(parts.total, trained=trained)),
        "kv_cache_bytes": asdict(cache_bytes(model, batch, context, dtype)),
        "receptive_field": receptive_field(model),
        "farthest_token": farthest_token(model),
        "attention": [asdict(window_saving(context, size)) for size in windows or [window]],
        "model": to_dict(model),
        "router": to_dict(router) if model.is_moe else None,
    }
