"""Triton kernels of the MoE layer for GPUs. Each computes what the eager code beside its call computes.

The eager code is the specification. It runs on CPUs, in fp64, and where Triton is not installed. The kernels accumulate
in fp32 and round once, so their results can differ from those of eager code by rounding. No kernel adds to an address
from two programs: results are equal bit for bit on every run.

The kernels are operators of the namespace `mixwright` (`torch.library.custom_op`), which `torch.compile` keeps as they
are. Their modules import Triton, so they are imported in the functions that use them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor

from moe.device import on_gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""The dtypes of activations that the kernels take."""

MAX_EXPERTS = 1024
MAX_K = 32
"""The top-k kernel keeps the scores of a token in registers, and makes a pass over them for each choice."""

_devices = {"cuda"} if find_spec("triton") else set[str]()
"""The types of devices on which the kernels are used."""


def use_kernels(x: Tensor) -> bool:
    """Return whether the kernels are used for activations like `x`: on GPUs, in `DTYPES`, if Triton is installed."""
    in_use = x.device.type in _devices or ("cuda" in _devices and on_gpu(x))
    return in_use and x.dtype in DTYPES


@contextmanager
def eager_kernels() -> Iterator[None]:
    """Use the eager code everywhere within the context, for comparison."""
    global _devices
    devices, _devices = _devices, set()
    try:
        yield
    finally:
        _devices = devices
