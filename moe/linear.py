"""The two elementary modules: a linear map without bias, and RMSNorm.

Both compute in the dtype of the activations. An fp32 weight is cast where it is used, so its gradient is fp32 too.
autocast is not used: the precision of a line of code does not depend on a global state.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Linear(nn.Linear):
    """y = x W^T in the dtype of `x`, with a weight [out_features, in_features]."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Do nothing: `moe.init.init_parameters` initialises all weights."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features]."""
        return F.linear(x, self.weight.to(x.dtype))


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
