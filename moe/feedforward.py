"""The dense feed-forward network, and the activation functions that it shares with the experts."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.registry import Registry
from moe.config import FEED_FORWARDS, FeedForwardSpec, is_gated
from moe.kernels import use_kernels
from moe.linear import Linear

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


def gated(activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
    """Return activation(gate) * up, for two tensors of one shape."""
    if activation is F.silu and use_kernels(gate):
        from moe.kernels import swiglu

        hidden: Tensor = swiglu.swiglu(gate, up)
        return hidden
    return activation(gate) * up


class FeedForward(nn.Module):
    """w_down(act(w_gate x) * w_up x) for gated kinds (arXiv 2002.05202), w_down(act(w_up x)) for the others.

    Attributes:
        gather, scatter: seams: join and split the sequence around the network (tensor parallelism).
    """

    RECOMPUTE: ClassVar[dict[str, str]] = {"selective": "_apply_to"}

    def __init__(self, dim: int, hidden_dim: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.activation, self.gated = ACTIVATIONS[kind], is_gated(kind)
        if self.gated:
            self.w_gate = Linear(dim, hidden_dim)
        self.w_up = Linear(dim, hidden_dim)
        self.w_down = Linear(hidden_dim, dim)
        self.gather: nn.Module = nn.Identity()
        self.scatter: nn.Module = nn.Identity()

    def forward(self, x: Tensor, noise_keys_BS: Tensor | None = None) -> Tensor:
        """Apply the network to [..., D]; the hidden layer is [..., F].

        Args:
            noise_keys_BS: as in `moe.linear.Linear`.
        """
        y: Tensor = self.scatter(self._apply_to(self.gather(x), noise_keys_BS))
        return y

    def _apply_to(self, x: Tensor, noise_keys_BS: Tensor | None) -> Tensor:
        if self.gated:
            hidden = gated(self.activation, self.w_gate(x, noise_keys_BS), self.w_up(x, noise_keys_BS))
        else:
            hidden = self.activation(self.w_up(x, noise_keys_BS))
        y: Tensor = self.w_down(hidden, noise_keys_BS)
        return y

    def extra_repr(self) -> str:
        """Return what `repr` shows in the parentheses: the kind."""
        return self.kind
