"""Packed and windowed attention on GPUs in bf16 and fp16: torch's FlashAttention 2 for sequences of any lengths.

(FlashAttention-2, arXiv 2307.08691.) The rows of a batch are one sequence of T = B·S tokens. It is divided into
segments, and attention stays within a segment. The kernel does not read keys of other segments or in front of the
window, and it takes grouped heads without copies of keys and values.

The number of segments and their lengths change with every batch. `Segments` has them in tensors of fixed shapes, so
that torch.compile makes one graph for all batches. They are read within the operator `mixwright::varlen`, and because
they are on the CPU, nothing waits for the GPU.

The backward pass adds the gradients of queries with atomics, in an order that changes from run to run. After
`torch.use_deterministic_algorithms(True)` it adds in a fixed order, and fewer blocks of threads share a long segment.

Shapes: B batch, S sequence, T tokens, H query heads, G key/value heads, C head dim, n segments.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MAX_HEAD_DIM = 256
"""The largest head dim of the kernel. Its head dims are multiples of 8."""


@dataclass(frozen=True)
class Segments:
    """Where the segments of a batch's rows begin and end: documents, runs of padding, or whole rows.

    (It is not a tuple, because FSDP copies all tensors of tuples to the GPU.)
    """

    offsets: Tensor
    """[T + 1], int32, on the device: the starts of the n segments among the T tokens, then T in all other places."""
    sizes: Tensor
    """[2], int64, on the CPU: n, and the length of the longest segment."""


def segments_of(documents_BS: Tensor, device: torch.device | str) -> Segments:
    """Return the segments of rows of packed documents: maximal runs of equal numbers within a row.

    Args:
        documents_BS: document numbers, on the CPU (a GPU would have to be waited for). The positions of a document
            are consecutive.
        device: of the offsets.
    """
    starts_BS = torch.ones_like(documents_BS, dtype=torch.bool)
    starts_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    starts = starts_BS.flatten().nonzero().flatten()
    offsets = torch.full((documents_BS.numel() + 1,), documents_BS.numel(), dtype=torch.int32)
    offsets[: len(starts)] = starts
    sizes = torch.tensor([len(starts), int(offsets.diff().max())])
    if torch.device(device).type != "cpu":
        offsets = offsets.pin_memory()  # otherwise the host would wait for the copy
    return Segments(offsets.to(device, non_blocking=True), sizes)


def takes(q_BHSC: Tensor) -> bool:
    """Return whether the kernel takes queries of this dtype and head dim."""
    head_dim = q_BHSC.shape[-1]
    return q_BHSC.dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= MAX_HEAD_DIM


def varlen(
    q_BHSC: Tensor,
    k_BGSC: Tensor,
    v_BGSC: Tensor,
    segments: Segments,
    window: int | None,
    scale: float | None = None,
) -> Tensor:
    """Return causal attention within segments and the window, [B, H, S, C].

    Args:
        segments: those of the rows, on the device of the queries.
        window: number of keys that a query attends to, its own position included; None: all earlier ones.
        scale: factor on the scores; None: 1/sqrt(C).
    """
    # Projections have the heads last, so these are views.
    q_THC, k_TGC, v_TGC = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHSC, k_BGSC, v_BGSC))
    out_THC, _ = _attend(q_THC, k_TGC, v_TGC, segments.offsets, segments.sizes, window, scale)
    return torch.unflatten(out_THC, 0, (q_BHSC.shape[0], -1)).transpose(1, 2)


@torch.library.custom_op("mixwright::varlen", mutates_args=())
def _attend(
    q_THC: Tensor,
    k_TGC: Tensor,
    v_TGC: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    window: int | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Return the mixed values [T, H, C] and the logarithms of the softmax's sums [H, T], fp32."""
    options = _options(offsets, sizes, window, scale)
    out_THC, sums_HT, *_ = flash_forward(q_THC, k_TGC, v_TGC, **options, return_debug_mask=False)
    return out_THC, sums_HT


@torch.library.custom_op("mixwright::varlen_backward", mutates_args=())
def _attend_backward(
    grad_THC: Tensor,
    inputs: list[Tensor],
    out_THC: Tensor,
    sums_HT: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    window: int | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the queries, keys and values `inputs`."""
    unused = offsets.new_empty(0)  # the state of random numbers for dropout
    options = _options(offsets, sizes, window, scale)
    q, k, v = flash_backward(grad_THC, *inputs, out_THC, sums_HT, **options, rng_state=unused, unused=unused)
    return q, k, v


flash_forward: Any = torch.ops.aten._flash_attention_forward
flash_backward: Any = torch.ops.aten._flash_attention_backward


def _options(offsets: Tensor, sizes: Tensor, window: int | None, scale: float | None) -> dict[str, Any]:
    number, longest = sizes.tolist()
    offsets = offsets[: number + 1]
    return {
        "cum_seq_q": offsets,
        "cum_seq_k": offsets,
        "max_q": longest,
        "max_k": longest,
        "dropout_p": 0.0,
        "is_causal": window is None,
        "window_size_left": -1 if window is None else window - 1,
        "window_size_right": 0,
        "scale": scale,
    }


@_attend.register_fake
def _(q_THC: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q_THC), q_THC.new_empty(q_THC.shape[1], q_THC.shape[0], dtype=torch.float32)


@_attend_backward.register_fake
def _(grad_THC: Tensor, inputs: list[Tensor], *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.empty_like(x) for x in inputs)
    return q, k, v


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_THC: Tensor, _: None) -> tuple[Tensor | None, ...]:
    q, k, v, offsets, sizes, out, sums = ctx.saved_tensors
    gradients = _attend_backward(grad_THC, [q, k, v], out, sums, offsets, sizes, ctx.window, ctx.scale)
    return *gradients, None, None, None, None


_attend.register_autograd(_backward, setup_context=_save)
