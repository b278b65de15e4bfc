"""Released weights in 4 bits: the files that bitsandbytes writes, with `quantization_config` (QLoRA, arXiv 2305.14314).

A matrix `<name>` is stored as packed codes, and its scales and their description as tensors whose names begin with
`<name>.`: the parts of a `QuantState`. It is read as the matrix that bitsandbytes dequantises, in the dtype that it was
quantised from.
"""

import math
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.text import parse_json_object
from moe.packed import lay_out, library
from moe.quantization import BLOCK_SIZES, SCALES_PER_BLOCK, Packing
from training.formats.fields import Fields

KEY, METHOD = "quantization_config", "bitsandbytes"
STATE = ".quant_state.bitsandbytes__nf4"
"""What the name of the description of a matrix ends in. It is JSON, as bytes."""
MAX_STATE = 4096
"""The most bytes of a description."""
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
"""The other parts of a matrix. The nested ones exist with double quantisation."""
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_ALLOWED = {
    "quant_method": (METHOD,),
    "load_in_4bit": (True,),
    "_load_in_4bit": (True, None),
    "load_in_8bit": (False, None),
    "_load_in_8bit": (False, None),
    "bnb_4bit_quant_type": ("nf4",),
    "bnb_4bit_quant_storage": ("uint8", None),
}
_FREE = frozenset(
    ("bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype", "llm_int8_enable_fp32_cpu_offload", "llm_int8_threshold",
     "llm_int8_has_fp16_weight", "llm_int8_skip_modules")
)  # fmt: skip
"""Keys with any value. The files say which tensors are in 4 bits, and how their scales are stored."""


def read_four_bits(fields: Fields) -> bool:
    """Return whether weights are in 4 bits of bitsandbytes.

    Raises:
        ModelError: bitsandbytes has quantised them in another way, or is not installed.
    """
    value = fields.raw.get(KEY)
    if not isinstance(value, Mapping) or value.get("quant_method") != METHOD:
        return False
    known = value.keys() <= _ALLOWED.keys() | _FREE
    holds = known and all(value.get(key) in allowed for key, allowed in _ALLOWED.items())
    fields.expect(holds, KEY, value, "of bitsandbytes: load_in_4bit with bnb_4bit_quant_type nf4, stored as uint8")
    installed = find_spec("bitsandbytes") is not None
    fields.expect(installed, KEY, value, "the package bitsandbytes (pip install 'mixwright[quantize]')")
    return True


class FourBits(NamedTuple):
    """How a matrix is stored."""

    shape: tuple[int, int]
    dtype: torch.dtype
    """The dtype of the matrix that was quantised."""
    block_size: int
    nested_block_size: int | None
    """Scales that share an fp32 scale; None: the scales are fp32."""
    offset: float
    """The mean of the scales, with double quantisation."""

    @classmethod
    def parse(cls, text: bytes) -> "FourBits":
        """Read a description.

        Raises:
            ValueError: it is not one, or has a value that bitsandbytes does not write.
        """
        raw = parse_json_object(text)
        shape, nested = raw.get("shape"), raw.get("nested_blocksize")
        if not (
            raw.get("quant_type") == "nf4"
            and isinstance(shape, list)
            and len(shape) == 2
            and all(type(size) is int and 1 <= size < 2**31 for size in shape)
            and raw.get("dtype") in _DTYPES
            and raw.get("blocksize") in BLOCK_SIZES
            and (nested is None or nested in BLOCK_SIZES)
            and (nested is None or raw.get("nested_dtype") == "float32")
            and (nested is None or _is_finite(raw.get("nested_offset")))
        ):
            raise ValueError("expected nf4 with a shape of two sizes, and the sizes of blocks")
        offset = 0.0 if nested is None else float(raw["nested_offset"])
        return cls((shape[0], shape[1]), _DTYPES[raw["dtype"]], raw["blocksize"], nested, offset)

    def parts(self) -> dict[str, tuple[torch.dtype, int]]:
        """Return the dtype and the number of elements of the codes ("") and of every part."""
        numbers = self.shape[0] * self.shape[1]
        blocks = -(-numbers // self.block_size)
        expected = {"": (torch.uint8, -(-numbers // 2)), "quant_map": (torch.float32, 16)}
        if self.nested_block_size is None:
            return expected | {"absmax": (torch.float32, blocks)}
        return expected | {
            "absmax": (torch.uint8, blocks),
            "nested_absmax": (torch.float32, -(-blocks // self.nested_block_size)),
            "nested_quant_map": (torch.float32, 256),
        }

    def repack(self, parts: Mapping[str, Tensor], packing: Packing) -> Tensor | None:
        """Return the bytes of the matrix as `moe.packed.pack` lays them out; None if `packing` is another way.

        Args:
            parts: those that `parts` names.

        Raises:
            ValueError: as `dequantise`.
        """
        self._check_numbers(parts)
        same = packing == Packing("nf4", *self.shape, self.block_size, self.nested_block_size is not None)
        if same and packing.double_quant:
            table = library().create_dynamic_map()
            same = self.nested_block_size == SCALES_PER_BLOCK and torch.equal(
                parts["nested_quant_map"].flatten(), table
            )
        if not same:
            return None
        sections = {"codes": [parts[""]], "scales": [parts["absmax"]]}
        if packing.double_quant:
            sections["outer"] = [torch.tensor([self.offset]), parts["nested_absmax"]]
        return lay_out(sections, packing)

    def _check_numbers(self, parts: Mapping[str, Tensor]) -> None:
        if not torch.equal(parts["quant_map"].flatten(), library().get_4bit_type("nf4", device="cpu")):
            raise ValueError("expected the 16 numbers of nf4")

    def dequantise(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the matrix.

        Args:
            parts: those that `parts` names.

        Raises:
            ValueError: the table of the 16 numbers is not that of nf4.
        """
        self._check_numbers(parts)
        functional = library()
        state = functional.QuantState(
            absmax=parts["absmax"].flatten(),
            shape=torch.Size([2 * parts[""].numel()]),
            blocksize=self.block_size,
            quant_type="nf4",
            dtype=self.dtype,
        )
        if self.nested_block_size is not None:
            state.offset, state.nested = torch.tensor(self.offset), True
            state.state2 = functional.QuantState(
                absmax=parts["nested_absmax"].flatten(),
                code=parts["nested_quant_map"].flatten(),
                blocksize=self.nested_block_size,
                dtype=torch.float32,
            )
        matrix: Tensor = functional.dequantize_4bit(parts[""].reshape(-1, 1), state)
        return matrix.flatten()[: self.shape[0] * self.shape[1]].view(self.shape)


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
