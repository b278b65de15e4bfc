"""The operators of a step: the bytes that they move, their floating-point operations, and what they belong to.

A *place* is `file:line` of the project that called an operator, or that called the one whose gradient it computes.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parallel.planning.hardware import Hardware

ROOT = str(Path(__file__).resolve().parents[2]) + "/"
SORT_PASSES = 8
"""How often a sort goes through its keys and values."""
VIEWS = {
    "view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "detach",
    "alias", "split", "split_with_sizes", "unbind", "as_strided", "unfold", "_reshape_alias", "lift_fresh", "unflatten",
    "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided",
}  # fmt: skip
"""Operators that move no bytes."""
GROUPS = {
    "moe/dispatch.py": "dispatch and combine",
    "moe/experts.py": "activation of experts",
    "moe/expert_loop.py": "activation of experts",
    "moe/feedforward.py": "activation of experts",
    "moe/losses.py": "cross-entropy",
    "moe/router.py": "router",
    "moe/routers": "router",
    "moe/selection.py": "router",
    "moe/noise.py": "router",
    "moe/linear.py": "RoPE, norms, residuals",
    "moe/low_rank.py": "adapters",
    "moe/token_context.py": "RoPE, norms, residuals",
    "moe/attention": "RoPE, norms, residuals",
    "moe/layer.py": "RoPE, norms, residuals",
    "parallel/expert.py": "dispatch and combine",
    "parallel/fsdp.py": "copies of FSDP",
    "parallel/gradients.py": "gradient norm",
}
"""The start of a file's name -> the group of the operators that it calls, and of those of their backward pass."""


COLLECTIVES, FSDP, ZERO = "parallel/collectives.py", "parallel/fsdp.py:0", "training/deepspeed/engine.py:0"


class Operator(NamedTuple):
    """One call of an operator of torch."""

    name: str
    phase: str
    """`forward`, `backward` or `update`."""
    place: str
    nbytes: int
    flops: int
    dtype: torch.dtype

    @property
    def group(self) -> str:
        """What the operator belongs to, in tables."""
        if self.name in ("attention", "attention_backward"):
            return "attention core"
        if self.name in ("_grouped_mm", "loop_matmul", "loop_matmul_weight"):
            return "grouped matmul"
        if self.name in ("mm", "addmm", "add_bf16_product", "bmm", "multiply_packed"):
            if self.place.startswith(("moe/expert_loop.py", "moe/experts.py")):
                return "grouped matmul"
            return "router" if self.place.startswith("moe/router") else "dense matmul"
        if self.name.startswith("wide_linear"):
            return "router"
        if "_adamw_" in self.name:
            return "AdamW"
        if self.name == "_to_copy":
            return "casts"
        return next((group for start, group in GROUPS.items() if self.place.startswith(start)), "other")

    def seconds(self, hardware: Hardware) -> float:
        """Return the estimated time: the longer of that of its bytes and that of its FLOPs."""
        passes = SORT_PASSES if self.name == "sort" else 1
        if self.group == "attention core":
            rate = hardware.attention_forward if self.name == "attention" else hardware.attention_backward
        elif self.name.startswith("wide_linear"):
            rate = hardware.matmul / 3  # Three matmuls in bf16 have the precision of one in fp32.
        elif self.group == "grouped matmul":
            rate = hardware.grouped_matmul
        else:
            narrow = self.name == "add_bf16_product" or self.dtype in (torch.bfloat16, torch.float16)
            rate = hardware.matmul if narrow else hardware.wide_matmul
        return max(passes * self.nbytes / hardware.bandwidth + hardware.launch_s, self.flops / rate)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def distinct_bytes(tensor: Tensor) -> int:
    """Return the bytes of the elements that differ: a dimension that was expanded counts once."""
    size = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= 1 if stride == 0 else length
    return size


def flops_of(name: str, inputs: Sequence[Tensor]) -> int:
    """Return the FLOPs of a matmul; 0 for every other operator."""
    if name in ("mm", "bmm", "_grouped_mm"):
        return 2 * inputs[0].numel() * inputs[1].shape[-1]
    if name in ("addmm", "add_bf16_product"):
        return 2 * inputs[1].numel() * inputs[2].shape[-1]
    if name in ("loop_matmul", "loop_matmul_weight"):
        return 2 * inputs[0].numel() * inputs[1].shape[1]
    if name.startswith("wide_linear"):
        return 2 * inputs[0].numel() * inputs[1].shape[0 if name == "wide_linear" else -1]
    return 0


def moved_bytes(name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
    """Return the bytes that an operator reads and writes."""
    if name in VIEWS:
        return 0
    read, written = sum(map(distinct_bytes, inputs)), sum(map(distinct_bytes, outputs))
    if name in ("index_select", "gather", "embedding", "index"):
        return 2 * written + distinct_bytes(inputs[-1])
    if name in ("scatter", "scatter_", "scatter_add", "scatter_add_"):
        return 4 * distinct_bytes(inputs[1]) + (0 if name.endswith("_") else 2 * distinct_bytes(inputs[0]))
    if name in ("zero_", "fill_") or not inputs:
        return written
    if name == "copy_":
        return distinct_bytes(inputs[0]) + distinct_bytes(inputs[-1])
    if name.startswith("_foreach") or name == "_fused_adamw_":
        # In place: the operator writes what it reads, but for the gradients of AdamW.
        return read * 7 // 4 if name == "_fused_adamw_" else read + (read if name.endswith("_") else 0)
    return read + (distinct_bytes(inputs[0]) if name.endswith("_") else written)


class Place(NamedTuple):
    """Where an operator was called."""

    line: str
    """The innermost line of the project."""
    caller: str
    """The innermost line that is not in `parallel/collectives.py`."""


class Places:
    """Finds the places of operators."""

    def __init__(self, *left_out: str) -> None:
        """
        Args:
            left_out: files whose lines are no places.
        """
        self._left_out = set(left_out)
        self._by_node: dict[int, Place] = {}
        """Sequence number of a node of autograd's graph -> the place that created it."""

    def find(self, *, backward: bool) -> Place:
        """Return where an operator was called, or the one whose gradient is computed.

        Args:
            backward: whether a backward pass runs.
        """
        node = torch._C._current_autograd_node() if backward else None
        of_node = None if node is None else self._by_node.get(node._sequence_nr())
        frame: FrameType | None = sys._getframe(1)
        line = ""
        while frame is not None:
            file = frame.f_code.co_filename
            if "/torch/distributed/fsdp/" in file:
                return Place(FSDP, FSDP)
            if of_node is None and "/site-packages/deepspeed/" in file:
                return Place(ZERO, ZERO)
            # The environment with torch can be a directory of the project.
            if of_node is None and file.startswith(ROOT) and "site-packages" not in file and file not in self._left_out:
                here = f"{file.removeprefix(ROOT)}:{frame.f_lineno}"
                line = line or here
                if not here.startswith(COLLECTIVES):
                    place = Place(line, here)
                    if not backward:
                        self._by_node[torch.autograd._get_sequence_nr() - 1] = place
                    return place
            frame = frame.f_back
        if of_node is not None:
            return of_node
        return Place(line or "autograd", line or "autograd")
