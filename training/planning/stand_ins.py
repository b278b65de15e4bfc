"""Stand-ins for two kernels of GPUs which torch replaces by several operators on other devices.

The core of attention and RMSNorm are one kernel each way on a GPU. The stand-ins save for the backward pass what these
kernels save, and report each call. They compute nothing.

Shapes: B batch, S sequence, X key positions, H query heads, G key/value heads, C head dim.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor

from moe.attention.attention import AttentionCore
from moe.linear import RMSNorm
from moe.token_context import TokenContext


class Observer(Protocol):
    """Whoever the kernels are reported to."""

    def count(self, name: str, place: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], flops: int = 0) -> None:
        """Record an operator.

        Args:
            place: a file of the project (`training.planning.operators`).
            flops: floating-point operations; 0: those of a matmul, or none.
        """


@contextmanager
def gpu_kernels(observer: Observer, mean_pairs: Callable[[int | None], float] | None = None) -> Iterator[None]:
    """Use the stand-ins within the context.

    Args:
        mean_pairs: the mean number of keys that a token attends to within a window (None: without a window). The
            default is that of rows of one document without a window, (S + 1)/2.
    """

    def core(module: AttentionCore, q_BHSC: Tensor, k_BGXC: Tensor, v_BGXC: Tensor, context: TokenContext) -> Tensor:
        places = k_BGXC.shape[2]
        window = None if module.window is None or module.window >= places else module.window
        pairs = (places + 1) / 2 if mean_pairs is None else mean_pairs(window)
        out: Tensor = _Core.apply(  # type: ignore[no-untyped-call]
            q_BHSC, k_BGXC, v_BGXC, observer, pairs
        )
        return out

    def norm(module: RMSNorm, x: Tensor) -> Tensor:
        out: Tensor = _Norm.apply(  # type: ignore[no-untyped-call]
            x, module.weight.to(x.dtype), observer
        )
        return out

    with mock.patch.object(AttentionCore, "attend", core), mock.patch.object(RMSNorm, "forward", norm):
        yield


class _Core(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BHSC: Tensor, k_BGXC: Tensor, v_BGXC: Tensor, observer: Observer, pairs: float) -> Tensor:
        batch, heads, length, width = q_BHSC.shape
        out_BHSC = q_BHSC.new_empty(batch, length, heads, width).transpose(1, 2)
        log_sums_BHS = q_BHSC.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(q_BHSC, k_BGXC, v_BGXC, out_BHSC, log_sums_BHS)
        ctx.observer, ctx.flops = observer, round(2 * batch * heads * length * width * pairs)
        observer.count("attention", "moe/attention", (q_BHSC, k_BGXC, v_BGXC), (out_BHSC,), 2 * ctx.flops)
        return out_BHSC

    @staticmethod
    def backward(ctx: Any, grad_BHSC: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        gradients = [torch.empty_like(tensor) for tensor in saved[:3]]
        ctx.observer.count("attention_backward", "moe/attention", (*saved, grad_BHSC), gradients, 5 * ctx.flops)
        return *gradients, None, None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, observer: Observer) -> Tensor:
        out = torch.empty_like(x)
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        ctx.observer = observer
        observer.count("_fused_rms_norm", "moe/linear.py", (x, weight), (out,))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, _ = ctx.saved_tensors
        gradients = torch.empty_like(x), torch.empty_like(weight)
        ctx.observer.count("_fused_rms_norm_backward", "moe/linear.py", (x, weight, grad), gradients)
        return *gradients, None
