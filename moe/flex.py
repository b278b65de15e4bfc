"""Windowed and packed attention on GPUs: torch's flex_attention, compiled to a fused kernel that skips what is masked.

Shapes: B batch, S sequence, H query heads, G key/value heads, C head dim.

(FlexAttention, arXiv 2412.05496; torch has no backward of it on CPUs, where `moe/window.py` does the work.)
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


def flex(q_BHSC: Tensor, k_BGSC: Tensor, v_BGSC: Tensor, documents_BS: Tensor | None, window: int | None) -> Tensor:
    """Causal attention within documents and the window, [B, H, S, C]; compiled on GPUs, a plain loop elsewhere."""
    mask = block_mask(documents_BS, window, q_BHSC.shape[2], q_BHSC.device)
    attend: Any = _compiled(flex_attention) if q_BHSC.is_cuda else flex_attention
    out: Tensor = attend(q_BHSC, k_BGSC, v_BGSC, block_mask=mask, enable_gqa=q_BHSC.shape[1] != k_BGSC.shape[1])
    return out


_masks = WeakTensorKeyDictionary()
"""documents -> {(window, version): mask}, while the tensor lives: a forward pass's layers ask for the same ones."""


def block_mask(documents_BS: Tensor | None, window: int | None, length: int, device: torch.device) -> BlockMask:
    """Which blocks of queries and keys meet; made once for all layers that ask with the same `documents_BS`."""
    if documents_BS is None:
        return _mask_of_one_document(window, length, device)
    of_documents = _masks.setdefault(documents_BS, {})
    key = (window, documents_BS._version)
    if key not in of_documents:
        # Of a copy: a mask that holds its own key would keep both alive for ever.
        sees = mask_mod(documents_BS.clone(), window)
        of_documents[key] = _make(sees, documents_BS.shape[0], length, device)
    made: BlockMask = of_documents[key]
    return made


def mask_mod(documents_BS: Tensor | None, window: int | None) -> MaskMod:
    """Whether query place `q` of row `b` sees key place `k`, as flex_attention asks it: on index tensors."""

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = k <= q
        if window is not None:
            seen = seen & (k > q - window)
        if documents_BS is not None:
            seen = seen & (documents_BS[b, q] == documents_BS[b, k])
        return seen

    return sees


@lru_cache(maxsize=8)
def _mask_of_one_document(window: int | None, length: int, device: torch.device) -> BlockMask:
    return _make(mask_mod(None, window), None, length, device)


def _make(sees: MaskMod, batch: int | None, length: int, device: torch.device) -> BlockMask:
    # Compiled, it does not spell out the S x S mask.
    create: Any = _compiled(create_block_mask) if device.type == "cuda" else create_block_mask
    mask: BlockMask = create(sees, batch, None, length, length, device=device)
    return mask


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)
