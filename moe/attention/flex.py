"""Windowed and packed attention on GPUs: torch's flex_attention, compiled to a fused kernel that skips masked blocks.

(FlexAttention, arXiv 2412.05496. On CPUs torch has no backward pass for it; `window` and `masked` are used instead.)

Shapes: B batch, S queries, X >= S key positions (the queries are at the last S of them), H query heads, G key/value
heads, C head dim.
"""

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from moe.graph_limit import raise_graph_limit
from moe.token_context import TokenContext

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def flex(
    q_BHSC: Tensor,
    k_BGXC: Tensor,
    v_BGXC: Tensor,
    context: TokenContext,
    window: int | None,
    scale: float | None = None,
) -> Tensor:
    """Return causal attention within documents and the window, [B, H, S, C]. It is compiled on GPUs only.

    Args:
        context: its `documents_BS` has the documents of all X key positions, or is None if each row is one document.
        window: number of keys that a query attends to; None: all earlier ones.
        scale: factor on the scores; None: 1/sqrt(C).
    """
    mask = block_mask(context, window, q_BHSC.shape[2], k_BGXC.shape[2], q_BHSC.device)
    attend: Any = _compiled(flex_attention) if q_BHSC.is_cuda else flex_attention
    grouped = q_BHSC.shape[1] != k_BGXC.shape[1]
    out: Tensor = attend(q_BHSC, k_BGXC, v_BGXC, block_mask=mask, enable_gqa=grouped, scale=scale)
    return out


def block_mask(
    context: TokenContext, window: int | None, length: int, positions: int, device: torch.device
) -> BlockMask:
    """Return which blocks of the `length` queries and the `positions` keys can attend to each other.

    All layers with the same window share a mask. It is stored in `context`. If each row is one document, it depends on
    sizes only, and the masks of the last few sizes are stored for the whole process.
    """
    documents_BX = context.documents_BS
    if torch.compiler.is_compiling():  # The mask is a part of the graph of each layer, and costs little there.
        can_attend = mask_mod(documents_BX, window, positions - length)
        return _make(can_attend, None if documents_BX is None else len(documents_BX), length, positions, device)
    if documents_BX is None:
        return _mask_of_one_document(window, length, positions, device)
    can_attend = mask_mod(documents_BX, window, positions - length)
    return context.share(
        ("block_mask", window, length), lambda: _make(can_attend, documents_BX.shape[0], length, positions, device)
    )


def mask_mod(documents_BX: Tensor | None, window: int | None, earlier: int) -> MaskMod:
    """Return a function of index tensors: whether query `q` of row `b` attends to key `k`.

    Query `q` is at the position `earlier + q`.
    """

    def can_attend(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        position = q + earlier
        allowed = k <= position
        if window is not None:
            allowed = allowed & (k > position - window)
        if documents_BX is not None:
            allowed = allowed & (documents_BX[b, position] == documents_BX[b, k])
        return allowed

    return can_attend


@lru_cache(maxsize=8)
def _mask_of_one_document(window: int | None, length: int, positions: int, device: torch.device) -> BlockMask:
    return _make(mask_mod(None, window, positions - length), None, length, positions, device)


def _make(can_attend: MaskMod, batch: int | None, length: int, positions: int, device: torch.device) -> BlockMask:
    # The compiled function does not materialise the S x X mask.
    create: Any = _compiled(create_block_mask) if device.type == "cuda" else create_block_mask
    mask: BlockMask = create(can_attend, batch, None, length, positions, device=device)
    return mask


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the compiled function. It raises an error beyond the limit of graphs: uncompiled, it would store all
    scores."""
    if not torch.compiler.is_compiling():
        raise_graph_limit()
    return torch.compile(function, fullgraph=True)
