"""The positions, documents and padding of the tokens of one forward pass, and the rotary embedding.

Shapes: B batch, S sequence, H heads, C head dim.
"""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from moe.attention.varlen import Segments
from moe.device import on_gpu

T = TypeVar("T")


class TokenContext:
    """The tokens' positions, documents, padding and noise keys, and objects that layers derive from them and share.

    `Transformer.forward` creates one context per call, so nothing derived from the tokens of one micro-batch can be
    used for another.

    Attributes:
        rotary: cosine and sine of the rotary angles, two tensors [B, 1, S, C] (`rotary_table`); None where no
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


def rotary_table(positions_BS: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the cosine and the sine of the rotation angles of every position (RoFormer, arXiv 2104.09864).

    Angles are computed in fp32 (fp64 for an fp64 model), because bf16 cannot represent all integers above 256.

    Args:
        positions_BS: position of each token in its document.
        head_dim: C.
        theta: base of the geometric sequence of frequencies.
        dtype: of the result.

    Returns:
        Two tensors [B, 1, S, C].
    """
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, head_dim, 2, device=positions_BS.device, dtype=wide) / head_dim
    angles = positions_BS.to(wide).unsqueeze(-1) * theta**-exponents
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x_BHSC: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair (x_i, x_{i + C/2}) by the angle of its position (the layout of Hugging Face's Llama family).

    Args:
        table: the result of `rotary_table`.
    """
    cos, sin = table
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
