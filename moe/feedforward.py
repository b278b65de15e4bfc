"""The dense feed-forward network, and the hidden layer that it shares with the experts.

Shapes: D model, F hidden width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.registry import Registry
from moe.config import FEED_FORWARDS, FeedForwardSpec, is_gated
from moe.linear import Linear
from moe.recompute import Recompute, recomputes

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: Registry[Activation] = Registry("model.ffn")
"""The activation function of every kind of feed-forward network (`moe.config.FEED_FORWARDS`)."""
ACTIVATIONS.add("swiglu", F.silu)
ACTIVATIONS.add("geglu", F.gelu)
ACTIVATIONS.add("relu", torch.relu)
ACTIVATIONS.add("gelu", F.gelu)


def register_feed_forward(kind: str, activation: Activation, *, gated: bool, label: str) -> None:
    """Register a kind of feed-forward network under the name that `model.ffn` and `model.expert_ffn` take.

    Args:
        activation: an element-wise function without parameters.
        gated: three matrices, `act(gate) * up`, instead of two, `act(up)`.
        label: the kind's name in tables.

    Raises:
        ValueError: another kind has the name.
    """
    FEED_FORWARDS.add(kind, FeedForwardSpec(gated, label))
    ACTIVATIONS.add(kind, activation)


def hidden(kind: str, project: Callable[[str], Tensor]) -> Tensor:
    """The hidden layer: `act(gate) * up` for gated kinds (arXiv 2002.05202), `act(up)` for the others.

    Args:
        project: `project(name)` applies the matrix of that name, `w_gate` or `w_up`, to the input.
    """
    if is_gated(kind):
        return ACTIVATIONS[kind](project("w_gate")) * project("w_up")
    return ACTIVATIONS[kind](project("w_up"))


class FeedForward(nn.Module):
    """w_down(hidden(x)): a dense network, or one expert that takes every token.

    Attributes:
        gather, scatter: seams: join and split the sequence around the network (tensor parallelism).
    """

    def __init__(self, dim: int, hidden_dim: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if is_gated(kind):
            self.w_gate = Linear(dim, hidden_dim)
        self.w_up = Linear(dim, hidden_dim)
        self.w_down = Linear(hidden_dim, dim)
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
