"""The dense feed-forward network, and what it shares with the experts: the kinds of hidden layer.

Shapes: D model, F hidden width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.config import is_gated
from moe.linear import Linear
from moe.recompute import Recompute, recomputes

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "relu": torch.relu,
    "gelu": F.gelu,
}


def hidden(kind: str, project: Callable[[str], Tensor]) -> Tensor:
    """The hidden layer: `act(gate) * up` for the gated kinds (arXiv 2002.05202), `act(up)` for the plain ones.

    Args:
        project: `project(name)` applies the matrix of that name, `w_gate` or `w_up`, to the input.
    """
    if is_gated(kind):
        return ACTIVATIONS[kind](project("w_gate")) * project("w_up")
    return ACTIVATIONS[kind](project("w_up"))


class FeedForward(nn.Module):
    """w_down(hidden(x)): one expert that takes every token."""

    def __init__(self, dim: int, hidden_dim: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if is_gated(kind):
            self.w_gate = Linear(dim, hidden_dim)
        self.w_up = Linear(dim, hidden_dim)
        self.w_down = Linear(hidden_dim, dim)
        # Seams: tensor parallelism cuts the sequence between this network and the rest of the model.
        self.gather: nn.Module = nn.Identity()
        self.scatter: nn.Module = nn.Identity()
        self.recompute: Recompute = "none"

    def forward(self, x: Tensor) -> Tensor:
        return self.scatter(self._apply_to(self.gather(x)))

    @recomputes("selective")
    def _apply_to(self, x: Tensor) -> Tensor:
        y: Tensor = self.w_down(hidden(self.kind, lambda name: getattr(self, name)(x)))
        return y

    def extra_repr(self) -> str:
        return self.kind
