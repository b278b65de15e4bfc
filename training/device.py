"""This process: its rank, its device and data type, and the memory and peak speed of the device."""

import os
import time
from dataclasses import dataclass
from typing import Any

import torch

from common.errors import ConfigError, require
from parallel.startup.launch import World, world_from_env
from training.config import Config
from training.host import host_memory

DTYPE_NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16"}
"""Data type -> its name in `train.precision`."""
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "H800": 989.0, "A100": 312.0, "A800": 312.0, "B200": 2250.0, "L40S": 362.0}
"""Part of a GPU's name -> its dense bf16 tensor-core peak, from NVIDIA's data sheets (SXM versions)."""


@dataclass(frozen=True)
class Process:
    """This process as one of the processes that train."""

    world: World
    """Its rank, and the numbers of ranks."""
    device: torch.device
    dtype: torch.dtype
    """Data type of the forward and backward pass."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the run's files and prints."""
        return self.world.rank == 0


class Moment:
    """The time at which a device has done everything that was queued before: on a GPU by its own clock, on a CPU now.

    The host's clock would not do on a GPU, because the host can read the figures of a step long after its end.
    """

    def __init__(self, device: torch.device) -> None:
        self._host_s, self._event = time.monotonic(), None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Wait for the device."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: "Moment") -> float:
        """Return the time since an earlier moment of the same device, which must have done the work before this one."""
        if self._event is None or earlier._event is None:
            return self._host_s - earlier._host_s
        return float(earlier._event.elapsed_time(self._event)) / 1e3


def set_up_process(config: Config) -> Process:
    """Read this process's rank from the environment, choose its device and data type, and set torch's global state.

    Raises:
        ConfigError: `train.device=cuda`, and there are fewer GPUs than ranks on this host.
    """
    world = world_from_env()
    device = pick_device(config.train.device, world.local_rank, world.local_world_size)
    dtype = compute_dtype(config.train.precision, device)
    if config.run.deterministic:
        make_deterministic()
    return Process(world, device, dtype)


def pick_device(wanted: str, local_rank: int, local_world_size: int) -> torch.device:
    """Return the device of this local rank, and make a GPU the current device.

    Args:
        wanted: `cpu`, `cuda`, or `auto`, which chooses GPUs if there is one for every rank of this host.

    Raises:
        ConfigError: `cuda` is wanted, and there are fewer GPUs than ranks on this host.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and gpus < local_world_size):
        return torch.device("cpu")
    require(
        gpus >= local_world_size,
        ConfigError,
        f"train.device=cuda: expected a GPU for each of {local_world_size} local ranks; found {gpus}",
    )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def make_deterministic() -> None:
    """Make torch refuse kernels whose result depends on timing. To be called before the first CUDA matmul."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the data type of the forward pass for `train.precision`. `auto` is bf16 if the hardware multiplies it."""
    if precision == "auto":
        has_bf16 = (
            torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else _cpu_multiplies_bf16()
        )
        precision = "bf16" if has_bf16 else "fp32"
    return {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def peak_flops(device: torch.device, dtype: torch.dtype, given_tflops: float | None) -> float | None:
    """Return the peak of one device in FLOP/s, or None if it is unknown.

    Args:
        given_tflops: `train.peak_tflops`. None: look the GPU's name up in `PEAK_TFLOPS`, which has bf16 peaks.
    """
    if given_tflops is not None:
        return given_tflops * 1e12
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        return next((peak * 1e12 for part, peak in PEAK_TFLOPS.items() if part in name), None)
    return None


def memory_of_a_rank(device: torch.device, local_ranks: int) -> int:
    """Return the bytes of memory that one of the `local_ranks` ranks on this host can use."""
    return (
        torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else host_memory() // local_ranks
    )


def free_bytes(device: torch.device) -> int:
    """Return the bytes of memory that are free on the device now."""
    return (
        torch.cuda.mem_get_info(device)[0]
        if device.type == "cuda"
        else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    )


def _cpu_multiplies_bf16() -> bool:
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))
