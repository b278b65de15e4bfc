"""The memory that generating text takes on each device, and the speed that the device's memory allows.

`scripts/generate.py` distributes the experts over the ranks. Every rank stores all other weights and the whole
key/value cache.

Letters: G key/value heads, C head dim, V vocabulary.
"""

from dataclasses import asdict
from typing import Any

from moe.accounting.costs import (
    BYTES,
    DType,
    Parts,
    active_parts,
    cache_bytes,
    count_parts,
    moved_bytes,
    stored_bytes,
    workspace_bytes,
)
from moe.accounting.flops import meta_model
from moe.config import ModelConfig, RouterConfig
from moe.quantization import QuantizeConfig
from parallel.config import ParallelConfig
from parallel.planning.hardware import Hardware


def serving_figures(
    model: ModelConfig,
    router: RouterConfig,
    gpus: int,
    hardware: Hardware,
    *,
    quantize: QuantizeConfig,
    batch: int,
    context: int,
    prefill_chunk: int,
    margin: float,
) -> dict[str, Any]:
    """Return the memory of one device by part, whether it suffices, and the fewest devices that do.

    Args:
        quantize: the weights that are stored in few bits.
        batch: rows of the key/value cache.
        context: tokens of a row.
        prefill_chunk: tokens of each prompt that are processed at once.
        margin: share of the memory that must stay free.
    """
    limit, built = hardware.usable * (1 - margin), meta_model(model, router)
    parts = count_parts(built)
    built.quantize(quantize)
    weights = stored_bytes(built, hardware.precision)
    others = _other_memory(model, hardware.precision, batch, context, prefill_chunk)
    if quantize.kind is not None:
        others["a dequantised matrix"] = workspace_bytes(built, hardware.precision)
    memory = {number: _weights(weights, _expert_ranks(model, number)) | others for number in _numbers(gpus)}
    fewest = next((number for number, sizes in memory.items() if sum(sizes.values()) <= limit), None)
    moved = active_parts(moved_bytes(built, hardware.precision), model, router).total + others["key/value cache"]
    peak = sum(memory[gpus].values())
    return {
        "task": "generate",
        "gpus": gpus,
        "gpu": asdict(hardware),
        "batch": batch,
        "context": context,
        "total_params": parts.total,
        "active_params": active_parts(parts, model, router).total,
        "quantize": quantize.kind,
        "experts_ranks": _expert_ranks(model, gpus),
        "memory": memory[gpus],
        "peak_bytes": peak,
        "limit_bytes": limit,
        "fits": peak <= limit,
        "fewest_gpus": fewest,
        "tokens_per_s_limit": batch * hardware.bandwidth / moved,
    }


def _numbers(gpus: int) -> list[int]:
    """Return the numbers of devices that are compared: what was asked, and powers of two up to 1,024."""
    return sorted({gpus, *(2**power for power in range(11))})


def _expert_ranks(model: ModelConfig, gpus: int) -> int:
    return ParallelConfig().layout(gpus, model).expert


def _weights(weights: Parts, expert_ranks: int) -> dict[str, int]:
    """Return part -> bytes of the weights on one device."""
    return {
        "experts": weights.routed_experts // expert_ranks,
        "other weights": weights.total - weights.routed_experts,
    }


def _other_memory(model: ModelConfig, dtype: DType, batch: int, context: int, chunk: int) -> dict[str, int]:
    """Return part -> bytes on one device, for what is not weights."""
    itemsize, tokens = BYTES[dtype], batch * min(chunk, context)
    dense = tokens * (6 * model.dim + 3 * model.hidden_dim * (not model.is_moe))
    routed = tokens * (model.top_k or 0) * (2 * model.dim + 3 * model.expert_width) if model.is_moe else 0
    return {
        "key/value cache": cache_bytes(model, batch, context, dtype).rolling,
        "activations": (dense + routed) * itemsize + 2 * batch * (model.vocab_size or 0) * 4,
    }
