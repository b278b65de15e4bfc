"""The adapter of one weight, or of the stacked weights of the experts: two low-rank factors (LoRA, arXiv 2106.09685).

A product x W^T becomes x W^T + s (x A^T) B^T. B is 0 at the start, so that the first output is that of the model
without adapters, bit for bit. With DoRA (arXiv 2402.09353), each output is then multiplied by m / |w|, where |w| is the
length of the row of W + s B A that makes it, and m is a parameter which is |w| at the start. |w| has no gradient.

Dropout is applied to the input of A. Like the routers' noise it depends on the token, not on the layout.

Shapes: B batch, S sequence, R rows, I input and O output width of the weight, r rank, e experts on this rank.
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.config import AdapterConfig, adapter_shapes
from moe.noise import uniform

Multiply = Callable[[Tensor, Tensor], Tensor]
"""Computes (x [..., I], weight [O, I], or stacked weights [e, O, I]) -> x W^T [..., O]."""


class LowRank(nn.Module):
    """The factors A [r, I] and B [O, r], or those of every expert [e, r, I] and [e, O, r]."""

    magnitude: nn.Parameter | None

    def __init__(self, shape: Sequence[int], config: AdapterConfig, name: str = "") -> None:
        """
        Args:
            shape: of the weight, [O, I], or of stacked weights, [e, O, I].
            name: the weight's name, from which every adapter draws its own dropout.
        """
        super().__init__()
        self.magnitude = None
        for part, size in adapter_shapes(shape, config).items():
            setattr(self, part, nn.Parameter(torch.empty(size)))
        self.a: nn.Parameter
        self.b: nn.Parameter
        self.scale, self.dropout = config.scale, config.dropout
        salt = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
        self.salt = torch.tensor(salt, device="cpu")  # as a number, each layer would be compiled separately

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        weight: Tensor,
        multiply: Multiply = F.linear,
        noise_keys_BS: Tensor | None = None,
    ) -> Tensor:
        """Return the product with the adapted weight, [..., O], in the dtype of `y`.

        Args:
            x: the input, [..., I].
            y: the product of `x` and the weight without the adapter, [..., O].
            weight: this weight, which only DoRA reads.
            multiply: how rows are multiplied with a factor. The experts multiply each row with that of its expert.
            noise_keys_BS: `moe.noise.noise_keys` of the tokens, from which dropout is drawn in training.

        Raises:
            ValueError: dropout in training without `noise_keys_BS`.
        """
        if self.dropout and self.training:
            if noise_keys_BS is None:
                raise ValueError(f"adapter.dropout={self.dropout}: expected noise keys of the tokens in training")
            kept = uniform(noise_keys_BS, self.salt, x.shape[-1], torch.float32) >= self.dropout
            x = x * (kept / (1 - self.dropout)).to(x.dtype)
        low = multiply(x.to(y.dtype), self.a.to(y.dtype))
        y = y + multiply(low * self.scale, self.b.to(y.dtype))
        return y if self.magnitude is None else y * (self.magnitude / self.row_norms(weight)).to(y.dtype)

    @torch.no_grad()
    def row_norms(self, weight: Tensor) -> Tensor:
        """Return the length of each row of W + s B A, [O], in the dtype of the factors."""
        adapted = torch.addmm(weight.to(self.a.dtype), self.b, self.a, alpha=self.scale)
        norms: Tensor = torch.linalg.vector_norm(adapted, dim=-1)
        return norms

    def extra_repr(self) -> str:
        """Return what `repr` shows in the parentheses: the rank, the factor s, and whether there are magnitudes."""
        return f"rank={self.b.shape[-1]}, scale={self.scale:g}{', dora' if self.magnitude is not None else ''}"
