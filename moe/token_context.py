"""The positions, documents and padding of the tokens of one forward pass, and the rotary embedding.

Shapes: B batch, S sequence, H heads, C head dim, R <= C rotated numbers of a head.
"""

import math
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from moe.attention.varlen import Segments
from moe.config import RopeScaling
from moe.device import on_gpu

T = TypeVar("T")


class TokenContext:
    """The tokens' positions, documents, padding and noise keys, and objects that layers derive from them and share.

    `Transformer.forward` creates one context per call, so nothing derived from the tokens of one micro-batch can be
    used for another.

    Attributes:
        rotary: cosine and sine of the rotary angles, two tensors [B, 1, S, R] (`rotary_table`); None where no
            layer applies rotary embedding.
        documents_BS: attention stays between equal numbers; None: each row is one document.
        segments: where the documents or the rows of the batch begin and end; None if this is not known on the host.
        valid_BS: False on padding, for the tokens that this rank routes; None: no padding.
        noise_keys_BS: one key per routed token (`moe.noise.noise_keys`); None outside training.
    """

    def __init__(
        self,
        *,
        rotary: tuple[Tensor, Tensor] | None = None,
        documents_BS: Tensor | None = None,
        segments: Segments | None = None,
        valid_BS: Tensor | None = None,
        noise_keys_BS: Tensor | None = None,
    ) -> None:
        self.rotary = rotary
        self.documents_BS = documents_BS
        self.segments = segments
        self.valid_BS = valid_BS
        self.noise_keys_BS = noise_keys_BS
        self._shared: dict[Hashable, Any] = {}

    def share(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the result of `make()`. The first layer that passes `key` calls it; later layers get the same object.

        A layer that is recomputed in the backward pass gets the object of the forward pass.
        """
        if key not in self._shared:
            self._shared[key] = make()
        result: T = self._shared[key]
        return result


def rotary_frequencies(
    width: int, theta: float, scaling: RopeScaling | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the angle per position of each rotated pair, [R/2]: theta^(-2i/R) for pair i, scaled by `scaling`.

    - `linear`: all are divided by the factor (arXiv 2306.15595).
    - `llama3`: a frequency with more turns in `original_positions` than `high_freq_factor` stays. One with fewer than
      `low_freq_factor` is divided. Between them, the share that stays is linear in the number of turns (Llama 3.1).
    - `yarn`: the same with `beta_fast` and `beta_slow`, but the share is linear in the index of the pair
      (arXiv 2309.00071, section 3.2).

    Args:
        width: R.
        theta: base of the geometric sequence.
        dtype: of the computation and the result.
    """
    exponents = torch.arange(0, width, 2, device=device, dtype=dtype) / width
    frequencies = theta**-exponents
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    assert scaling.original_positions is not None
    if scaling.kind == "llama3":
        assert scaling.low_freq_factor is not None and scaling.high_freq_factor is not None
        turns = frequencies * (scaling.original_positions / (2 * math.pi))
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    else:
        slow, fast = scaling.turns
        first, last = (
            width * math.log(scaling.original_positions / (2 * math.pi * turns)) / (2 * math.log(theta))
            for turns in (fast, slow)
        )
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, width - 1)
        pairs = torch.arange(width // 2, device=device, dtype=dtype)
        kept = 1 - (pairs - first) / (last - first if last != first else 0.001)
    kept = kept.clamp(0, 1)
    return frequencies / scaling.factor * (1 - kept) + frequencies * kept


def rotary_table(
    positions_BS: Tensor, width: int, theta: float, dtype: torch.dtype, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Return the cosine and the sine of the rotation angles of every position (RoFormer, arXiv 2104.09864).

    Angles are computed in fp32 (fp64 for an fp64 model), because bf16 cannot represent all integers above 256.

    Args:
        positions_BS: position of each token in its document.
        width: R.
        theta: base of the geometric sequence of frequencies.
        dtype: of the result.
        scaling: of the frequencies. Cosine and sine are multiplied by its `rotary_factor`.

    Returns:
        Two tensors [B, 1, S, R].
    """
    wide = torch.promote_types(dtype, torch.float32)
    frequencies = rotary_frequencies(width, theta, scaling, wide, positions_BS.device)
    angles = positions_BS.to(wide).unsqueeze(-1) * frequencies
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
    cos, sin = angles.cos(), angles.sin()
    if scaling is not None and scaling.rotary_factor != 1:
        cos, sin = cos * scaling.rotary_factor, sin * scaling.rotary_factor
    return cos.to(dtype), sin.to(dtype)


def apply_rotary(x_BHSC: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair (x_i, x_{i + R/2}) by the angle of its position (the layout of Hugging Face's Llama family).

    Args:
        table: the result of `rotary_table`. If its width R is less than C, the last C - R numbers stay as they are.
    """
    cos, sin = table
    width = cos.shape[-1]
    if width < x_BHSC.shape[-1]:
        rotated_part, rest = x_BHSC.split((width, x_BHSC.shape[-1] - width), dim=-1)
        return torch.cat((apply_rotary(rotated_part, table), rest), dim=-1)
    if not on_gpu(x_BHSC) and not torch.compiler.is_compiling():
        rotated: Tensor = _Rotate.apply(x_BHSC, cos, sin)
        return rotated
    first, second = x_BHSC.chunk(2, dim=-1)
    return x_BHSC * cos + torch.cat((-second, first), dim=-1) * sin


class _Rotate(torch.autograd.Function):
    """Computes the same bits in fewer passes over memory. The gradient is rotated in the opposite direction."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, -1), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """Rotate by the angles of the table, or with `direction` -1 by their negatives."""
    y = x * cos
    (first, second), (sin_first, sin_second) = x.chunk(2, dim=-1), sin.chunk(2, dim=-1)
    y_first, y_second = y.chunk(2, dim=-1)
    y_first.sub_(second * sin_first, alpha=direction)  # `addcmul_` would round once, and give other bits
    y_second.add_(first * sin_second, alpha=direction)
    return y
