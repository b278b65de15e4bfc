"""The elementary modules: a linear map, the head, the embedding's lookup, and RMSNorm.

Matmuls and norms compute in the dtype of the activations, the linear maps of routers (`wide_linear`) in at least fp32.
An fp32 weight is cast where it is used, so its gradient is fp32 too. autocast is not used: the precision of a line of
code does not depend on a global state.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.kernels import use_kernels
from moe.low_rank import LowRank
from moe.packed import multiply_packed
from moe.quantization import Packing

Predict = Callable[[Tensor, Tensor], Tensor]
"""Computes (hidden states [B, S, D], weight of the head [V, D]) -> the model's result."""


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T in the dtype of `x`."""
    return F.linear(x, weight.to(x.dtype))


def wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T [..., E] in at least fp32, whatever the dtype of the tokens `x` [..., D].

    On GPUs, bf16 tokens are multiplied on tensor cores with the precision of an fp32 matmul. No fp32 copy of them is
    made (`moe.kernels.wide_linear`).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = weight.to(wide)
    if x.dtype == torch.bfloat16 and use_kernels(x):
        from moe.kernels import wide_linear as kernels

        logits: Tensor = kernels.wide_linear(x, weight)
        return logits
    return F.linear(x.to(wide), weight)


class Linear(nn.Linear):
    """y = x W^T + b in the dtype of `x`, with a weight [out_features, in_features] and an optional bias.

    Attributes:
        packings: how `weight` is stored if it is quantised (`moe.model.Transformer.quantize`); else empty.
        adapter: seam: adds to the product (`moe.adapter.install_adapters`). None: nothing does.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias)
        self.packings: dict[str, Packing] = {}
        self.adapter: LowRank | None = None

    def reset_parameters(self) -> None:
        """Do nothing: `moe.init.init_parameters` initialises all weights."""

    def forward(self, x: Tensor, noise_keys_BS: Tensor | None = None) -> Tensor:
        """Map [..., in_features] to [..., out_features].

        Args:
            noise_keys_BS: `moe.noise.noise_keys` of the tokens, from which an adapter draws dropout in training.
        """
        return self.add_bias(self.adapted(x, noise_keys_BS))

    def adapted(self, x: Tensor, noise_keys_BS: Tensor | None) -> Tensor:
        """Return x W^T, with what the adapter adds to it."""
        y = self.multiply(x)
        return y if self.adapter is None else self.adapter(x, y, self.weight, noise_keys_BS=noise_keys_BS)

    def add_bias(self, y: Tensor) -> Tensor:
        """Return y + b."""
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def multiply(self, x: Tensor) -> Tensor:
        """Return x W^T, the product with the stored weight alone. No other method reads the weight for a product."""
        packing = self.packings.get("weight")
        return linear(x, self.weight) if packing is None else multiply_packed(x, self.weight, packing)

    def extra_repr(self) -> str:
        """Return what `repr` shows in the parentheses: the widths, and the kind of a quantised weight."""
        kinds = "".join(f", {packing.kind}" for packing in self.packings.values())
        return f"{super().extra_repr()}{kinds}"


class OutputLinear(Linear):
    """A linear map whose input can be divided among ranks (tensor parallelism)."""

    def forward(  # type: ignore[override]
        self, x: Tensor, join: Callable[[Tensor], Tensor], noise_keys_BS: Tensor | None = None
    ) -> Tensor:
        """Map [..., in_features] to [..., out_features].

        Args:
            join: sums the products of all ranks. The bias is added to the sum, and so once.
            noise_keys_BS: as in `Linear`.
        """
        return self.add_bias(join(self.adapted(x, noise_keys_BS)))


class Head(Linear):
    """The last linear map, from hidden states to logits.

    The weight is used inside of the module's forward pass only, because FSDP and ZeRO gather it for that time. What is
    computed from it, such as the loss, is therefore passed to `forward`.
    """

    def forward(self, x: Tensor, predict: Predict = linear) -> Tensor:  # type: ignore[override]
        """Return `predict(x, weight)`: by default, map [..., in_features] to [..., out_features]."""
        return predict(x, self.weight)


class Lookup(nn.Module):
    """Looks up rows of the embedding [V, D], in the compute dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, tokens_BS: Tensor, embedding_VD: Tensor) -> Tensor:
        """Return the rows of `embedding_VD` for the token ids, [B, S, D] in the compute dtype."""
        return F.embedding(tokens_BS, embedding_VD).to(self.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (arXiv 1910.07467), with the mean square in at least fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` [..., D]; the result has the same shape and dtype."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)

    def extra_repr(self) -> str:
        """Return what `repr` shows in the parentheses: D and `eps`."""
        return f"{self.weight.shape[0]}, eps={self.eps}"
