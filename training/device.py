"""The device of this process, its arithmetic, and its peak."""

import os
from typing import Any

import torch

from common.errors import ConfigError

PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "H800": 989.0, "A100": 312.0, "A800": 312.0, "B200": 2250.0, "L40S": 362.0}
"""Dense bf16 tensor-core peak of one GPU by what its name contains, from NVIDIA's data sheets (SXM versions)."""


def pick_device(wanted: str, local_rank: int, local_world_size: int) -> torch.device:
    """The GPU of this local rank, or the CPU: `auto` takes GPUs where every rank of this host gets one.

    Raises:
        ConfigError: `cuda` was asked for and is not there, or has fewer devices than this host has ranks.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and gpus < local_world_size):
        return torch.device("cpu")
    if gpus < local_world_size:
        raise ConfigError(f"train.device=cuda: expected a GPU for each of {local_world_size} local ranks; found {gpus}")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def check_memory(parameters: int, state: int, local_ranks: int) -> None:
    """Refuse a run on CPUs whose weights and optimizer state alone are more than this host's memory.

    Without this the system would end some process, not always ours, once memory is full.

    Args:
        parameters: of the whole model.
        state: bytes of weights, gradients and moments on one rank.
        local_ranks: ranks on this host.

    Raises:
        ConfigError: it cannot fit.
    """
    needed, memory = state * local_ranks, _host_memory()
    if needed > memory:
        raise ConfigError(
            f"train.device=cpu: expected a model that fits this host's {memory / 1e9:.1f} GB of memory; "
            f"{parameters:,} parameters need {needed / 1e9:.1f} GB on {local_ranks} ranks, activations left out"
        )


def make_deterministic() -> None:
    """Refuse kernels whose result depends on timing. Call it before the first CUDA matmul."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)  # type: ignore[no-untyped-call]


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Arithmetic of the forward pass for `train.precision`; `auto` is bf16 where the hardware multiplies it."""
    if precision == "auto":
        on_gpu = device.type == "cuda"
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else _cpu_multiplies_bf16()
        precision = "bf16" if has_bf16 else "fp32"
    return {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def peak_flops(device: torch.device, dtype: torch.dtype, given_tflops: float | None) -> float | None:
    """Peak FLOP/s of one device, as given or as known for its name in bf16; None where unknown."""
    if given_tflops is not None:
        return given_tflops * 1e12
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        return next((peak * 1e12 for part, peak in PEAK_TFLOPS.items() if part in name), None)
    return None


def _cpu_multiplies_bf16() -> bool:
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))


def memory_of_a_rank(device: torch.device, local_ranks: int) -> int:
    """Bytes of memory that one of `local_ranks` ranks on this host has at its disposal."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return _host_memory() // local_ranks


def _host_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
