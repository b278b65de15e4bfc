"""What all layers of one forward pass know about its tokens.

Shapes: B batch, S sequence, X >= S key positions, C head dim.
"""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


class TokenContext:
    """The tokens' positions, documents, padding and noise keys, and what layers derive from them once and share.

    `Transformer.forward` creates one context per call, so nothing derived from the tokens of one micro-batch can be
    used for another.

    Attributes:
        rotary: cosine and sine of the rotary angles, two tensors [B, 1, S, C] (`moe.rope.rotary_table`); None where no
            layer applies rotary embedding.
        documents_BS: attention stays between equal numbers; None: each row is one document.
        valid_BS: False on padding, for the tokens that this rank routes; None: no padding.
        noise_keys_BS: one key per routed token (`moe.noise.noise_keys`); None outside training.
    """

    def __init__(
        self,
        *,
        rotary: tuple[Tensor, Tensor] | None = None,
        documents_BS: Tensor | None = None,
        valid_BS: Tensor | None = None,
        noise_keys_BS: Tensor | None = None,
    ) -> None:
        self.rotary = rotary
        self.documents_BS = documents_BS
        self.valid_BS = valid_BS
        self.noise_keys_BS = noise_keys_BS
        self._shared: dict[Hashable, Any] = {}

    def share(self, key: Hashable, make: Callable[[], T]) -> T:
        """The result of `make()`, called by the first layer that asks for `key`; later layers get the same object.

        A layer that is recomputed in the backward pass gets the object of the forward pass.
        """
        if key not in self._shared:
            self._shared[key] = make()
        result: T = self._shared[key]
        return result
