"""Released weights in FP8: `quantization_config` with a scale for each block of a matrix (DeepSeek-V3, 2412.19437)."""

from collections.abc import Mapping

from training.formats.fields import Fields
from training.formats.four_bits import METHOD

KEY = "quantization_config"
_ALLOWED = {
    "quant_method": ("fp8",),
    "fmt": ("e4m3", None),
    # Activations are not quantised here, so only their scales could matter.
    "activation_scheme": ("dynamic", None),
    "scale_fmt": ("ue8m0", "float", None),
}
_FREE = frozenset(("weight_block_size", "modules_to_not_convert", "ignored_layers"))
"""Keys with any value. Which tensors are in FP8 is read from the files."""


def read_block(fields: Fields) -> tuple[int, int] | None:
    """Return the rows and columns of a block that has one scale; None if no weight is in FP8.

    Raises:
        ModelError: the weights are quantised in another way.
    """
    value = fields.raw.get(KEY)
    if value is None or (isinstance(value, Mapping) and value.get("quant_method") == METHOD):
        return None  # For weights in 4 bits, see `training.formats.four_bits`.
    expected = "null, or quant_method fp8 with fmt e4m3, weight_block_size and dynamic scales, or bitsandbytes"
    fields.expect(isinstance(value, Mapping), KEY, value, expected)
    known = value.keys() <= _ALLOWED.keys() | _FREE
    fields.expect(known and all(value.get(key) in allowed for key, allowed in _ALLOWED.items()), KEY, value, expected)
    block = value.get("weight_block_size")
    pair = isinstance(block, list) and len(block) == 2 and all(type(size) is int and 0 < size < 2**31 for size in block)
    fields.expect(pair, f"{KEY}.weight_block_size", block, "a list of two integers >= 1")
    return block[0], block[1]
