"""Windowed and packed attention on GPUs: torch's flex_attention, compiled to a fused kernel that skips what is masked.

Shapes: B batch, S queries, X >= S places of keys (the queries are the last S of them), H query heads, G key/value
heads, C head dim.

(FlexAttention, arXiv 2412.05496; torch has no backward of it on CPUs, where `moe/attention/window.py` does the work.)
"""

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.weak import WeakTensorKeyDictionary

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def fits_flex(x: Tensor) -> bool:
    """Whether the fused kernel exists for tensors like `x`."""
    return x.is_cuda and x.dtype in (torch.float32, torch.float16, torch.bfloat16)


def flex(q_BHSC: Tensor, k_BGXC: Tensor, v_BGXC: Tensor, documents_BX: Tensor | None, window: int | None) -> Tensor:
    """Causal attention within documents and the window, [B, H, S, C]; compiled on GPUs, a plain loop elsewhere."""
    mask = block_mask(documents_BX, window, q_BHSC.shape[2], k_BGXC.shape[2], q_BHSC.device)
    attend: Any = _compiled(flex_attention) if q_BHSC.is_cuda else flex_attention
    out: Tensor = attend(q_BHSC, k_BGXC, v_BGXC, block_mask=mask, enable_gqa=q_BHSC.shape[1] != k_BGXC.shape[1])
    return out


_masks = WeakTensorKeyDictionary()
"""documents -> {(window, queries, version): mask}, while the tensor lives: the layers ask for the same ones."""


def block_mask(
    documents_BX: Tensor | None, window: int | None, length: int, places: int, device: torch.device
) -> BlockMask:
    """Which blocks of the `length` queries and the `places` keys meet.

    Made once for all layers that ask with the same `documents_BX`.
    """
    if documents_BX is None:
        return _mask_of_one_document(window, length, places, device)
    of_documents = _masks.setdefault(documents_BX, {})
    key = (window, length, documents_BX._version)
    if key not in of_documents:
        # Of a copy: a mask that holds its own key would keep both alive for ever.
        sees = mask_mod(documents_BX.clone(), window, places - length)
        of_documents[key] = _make(sees, documents_BX.shape[0], length, places, device)
    made: BlockMask = of_documents[key]
    return made


def mask_mod(documents_BX: Tensor | None, window: int | None, earlier: int) -> MaskMod:
    """Whether query `q` of row `b`, at place `earlier + q`, sees the key at place `k`: on index tensors."""

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        place = q + earlier
        seen = k <= place
        if window is not None:
            seen = seen & (k > place - window)
        if documents_BX is not None:
            seen = seen & (documents_BX[b, place] == documents_BX[b, k])
        return seen

    return sees


@lru_cache(maxsize=8)
def _mask_of_one_document(window: int | None, length: int, places: int, device: torch.device) -> BlockMask:
    return _make(mask_mod(None, window, places - length), None, length, places, device)


def _make(sees: MaskMod, batch: int | None, length: int, places: int, device: torch.device) -> BlockMask:
    # Compiled, it does not spell out the S x X mask.
    create: Any = _compiled(create_block_mask) if device.type == "cuda" else create_block_mask
    mask: BlockMask = create(sees, batch, None, length, places, device=device)
    return mask


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)
