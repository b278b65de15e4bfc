"""Weights in 4 or 8 bits (`moe.quantization`): matrices to bytes and back, and products with the bytes.

bitsandbytes quantises and dequantises. A product dequantises one matrix at a time to the dtype of its input, and frees
the result afterwards. The backward pass dequantises it again: only the bytes are kept.

Shapes: N rows of the input, O output and I input width, P bytes of a matrix, e experts on this rank.
"""

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moe.expert_loop import rows_of_experts
from moe.quantization import SCALES_PER_BLOCK, Packing
from moe.region import Region

QUANTISED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""The dtypes that bitsandbytes reads and writes."""
CHUNK = 2**20
"""Numbers of a matrix that are quantised at once. On CPUs, bitsandbytes needs about 16 bytes for each. It is a multiple
of all sizes of a block, so that the result does not depend on it."""


@cache
def library() -> Any:
    """Return the module `bitsandbytes.functional`.

    On some processors, the import looks for the package `kernels`, and would download code with it. Mixwright does not
    use this code, so that package is hidden, and the warning about it is not printed.
    """
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level, hidden = logger.level, sys.modules.get("kernels")
    logger.setLevel(logging.ERROR)
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        from bitsandbytes import functional
    finally:
        logger.setLevel(level)
        del sys.modules["kernels"]
        if hidden is not None:
            sys.modules["kernels"] = hidden
    return functional


def pack(weight_OI: Tensor, packing: Packing) -> Tensor:
    """Quantise a matrix. Return its bytes [P] (uint8), on the device of the matrix.

    Equal values give equal bytes in bf16 and fp32. `int8` rounds the matrix to fp16 first, as bitsandbytes does.
    """
    functional = library()
    if packing.kind == "int8":
        rows = max(1, CHUNK // packing.columns)
        found = [functional.int8_vectorwise_quant(part.half())[:2] for part in weight_OI.split(rows)]
    else:
        weight_OI = weight_OI if weight_OI.dtype in QUANTISED_DTYPES else weight_OI.float()
        found = [
            functional.quantize_4bit(part, blocksize=packing.block_size, quant_type="nf4")
            for part in weight_OI.flatten().split(CHUNK)
        ]
        found = [(codes, state.absmax) for codes, state in found]
    sections = {"codes": [codes for codes, _ in found], "scales": [scales for _, scales in found]}
    if packing.kind == "nf4" and packing.double_quant:
        scales = torch.cat(sections["scales"])
        mean = scales.mean()
        codes, state = functional.quantize_blockwise(scales - mean, blocksize=SCALES_PER_BLOCK)
        sections |= {"scales": [codes], "outer": [mean.reshape(1), state.absmax]}
    return lay_out(sections, packing)


def lay_out(sections: Mapping[str, Sequence[Tensor]], packing: Packing) -> Tensor:
    """Return the bytes [P] of a matrix.

    Args:
        sections: name of each section (`Packing.sections`) -> the tensors whose bytes it has, one after the other.
    """
    device = sections["codes"][0].device
    packed_P = torch.zeros(packing.nbytes, dtype=torch.uint8, device=device)
    for name, (first, length) in packing.sections.items():
        parts = [part.flatten().view(torch.uint8) for part in sections[name]]
        torch.cat(parts, out=packed_P[first : first + length])
    return packed_P


def unpack(packed_P: Tensor, packing: Packing, dtype: torch.dtype) -> Tensor:
    """Return the matrix [O, I] that the bytes stand for, in `dtype`."""
    functional = library()
    # Before torch 2.13, FSDP gathers bytes as numbers of the compute dtype, which has all of them exactly.
    packed_P = packed_P.to(torch.uint8)
    parts = {name: packed_P[offset : offset + length] for name, (offset, length) in packing.sections.items()}
    if packing.kind == "int8":
        codes_OI = parts["codes"].view(torch.int8).view(packing.rows, packing.columns)
        weight_OI: Tensor = functional.int8_vectorwise_dequant(codes_OI, parts["scales"].view(torch.float32))
        return weight_OI.to(dtype)
    state = functional.QuantState(
        absmax=parts["scales"] if packing.double_quant else parts["scales"].view(torch.float32),
        # One row of an even length: on CPUs, other shapes take a path that calls torch.compile.
        shape=torch.Size([2 * len(parts["codes"])]),
        dtype=dtype if dtype in QUANTISED_DTYPES else torch.float32,
        blocksize=packing.block_size,
        quant_type="nf4",
    )
    if packing.double_quant:
        outer = parts["outer"].view(torch.float32)
        inner = functional.QuantState(
            absmax=outer[1:], code=_code_of_scales(packed_P.device), blocksize=SCALES_PER_BLOCK, dtype=torch.float32
        )
        state.offset, state.state2, state.nested = outer[0], inner, True
    flat: Tensor = functional.dequantize_4bit(parts["codes"].unsqueeze(1), state)
    return flat.flatten()[: packing.numel].view(packing.rows, packing.columns).to(dtype)


def matrices_in(local: Tensor, region: Region) -> Iterator[tuple[int | None, Tensor, slice]]:
    """Yield every matrix of which a shard has bytes.

    Args:
        local: bytes of a matrix, or of stacked matrices.
        region: where they are in the bytes [P] or [E, P] of the whole parameter.

    Yields:
        (its index in the stack, or None without one; its bytes in `local`; where they are in all its bytes).
    """
    part = slice(region.offset[-1], region.offset[-1] + region.shape[-1])
    if len(region.shape) == 1:
        yield None, local, part
    else:
        yield from ((region.offset[0] + row, bytes_P, part) for row, bytes_P in enumerate(local))


@cache
def _code_of_scales(device: torch.device) -> Tensor:
    """Return the 256 values of quantised scales, which bitsandbytes uses if it is given none."""
    code: Tensor = library().create_dynamic_map().to(device)
    return code


def multiply_packed(x: Tensor, packed_P: Tensor, packing: Packing) -> Tensor:
    """Return x W^T [..., O], in the dtype of `x` [..., I]. The gradient is that of `x` alone."""
    y: Tensor = _multiply(x.flatten(0, -2), packed_P.unsqueeze(0), None, False, *packing)
    return y.view(*x.shape[:-1], packing.rows)


def multiply_packed_experts(rows_NI: Tensor, packed_eP: Tensor, counts_e: Tensor, packing: Packing) -> Tensor:
    """Return the product of each row and the transposed matrix of its expert, [N, O], in the dtype of the rows.

    Args:
        rows_NI: rows grouped by expert.
        counts_e: number of rows of each expert. An expert without rows is not dequantised.
    """
    y_NO: Tensor = _multiply(rows_NI, packed_eP, counts_e, False, *packing)
    return y_NO


@torch.library.custom_op("mixwright::multiply_packed", mutates_args=())
def _multiply(
    x: Tensor,
    packed_eP: Tensor,
    counts_e: Tensor | None,
    backward: bool,
    kind: str,
    rows: int,
    columns: int,
    block_size: int,
    double_quant: bool,
) -> Tensor:
    """Return x W^T [N, O] of `x` [N, I], or with `backward` x W [N, I] of `x` [N, O].

    One operator, so that torch.compile does not look into it and a plan needs no values.

    Args:
        counts_e: rows of each matrix; None: all, and there is one matrix.
        kind, rows, columns, block_size, double_quant: the fields of `Packing`.
    """
    packing = Packing(kind, rows, columns, block_size, double_quant)  # type: ignore[arg-type]
    y = x.new_empty(x.shape[0], columns if backward else rows)
    for matrix, of_matrix in [(0, slice(None))] if counts_e is None else rows_of_experts(counts_e):
        weight_OI = unpack(packed_eP[matrix], packing, x.dtype)
        torch.mm(x[of_matrix], weight_OI if backward else weight_OI.t(), out=y[of_matrix])
    return y


@_multiply.register_fake
def _(
    x: Tensor, packed_eP: Tensor, counts_e: Tensor | None, backward: bool, kind: str, rows: int, columns: int, *_: Any
) -> Tensor:
    return x.new_empty(x.shape[0], columns if backward else rows)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed_eP, counts_e, _, *packing = inputs
    ctx.save_for_backward(packed_eP, counts_e)
    ctx.packing = packing


def _gradients(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
    packed_eP, counts_e = ctx.saved_tensors
    return _multiply(grad_NO, packed_eP, counts_e, True, *ctx.packing), *[None] * 8


_multiply.register_autograd(_gradients, setup_context=_save)
