"""Whether tensors are on a GPU, for code that differs between GPUs and CPUs."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_planned: int | None = None
"""The compute capability (major number) of the GPU that a plan is made for; None: no plan is made."""


def on_gpu(x: Tensor | torch.device) -> bool:
    """Return whether `x` is on a GPU, or is one. Every device that is not a CPU counts as a GPU."""
    device = x if isinstance(x, torch.device) else x.device
    return _planned is not None or device.type != "cpu"


def cuda_capability(device: torch.device) -> int:
    """Return the major number of a GPU's compute capability; 0 for every device that is not a CUDA GPU."""
    if _planned is not None:
        return _planned
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


@contextmanager
def planned_for_gpu(capability: int) -> Iterator[None]:
    """Within the context, every device counts as a GPU.

    A plan for GPUs (`training.planning`) is made on a computer that may have none. Its tensors are on the CPU and have
    no values.

    Args:
        capability: major number of the GPU's compute capability.
    """
    global _planned
    before, _planned = _planned, capability
    try:
        yield
    finally:
        _planned = before
