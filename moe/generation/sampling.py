"""The choice of the next token from its logits.

Shapes: B rows, V vocabulary.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import expect


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters, applied in this order: temperature, top-k, then nucleus sampling (top-p, arXiv 1904.09751)
    among the top-k tokens."""

    temperature: float = 0.0
    """The logits are divided by it. 0: greedy, and the other fields have no effect."""
    top_k: int | None = None
    """Sample from the k most probable tokens. None: from all tokens."""
    top_p: float = 1.0
    """Sample from the smallest set of most probable tokens whose probabilities sum to at least `top_p`."""
    seed: int = 0

    def __post_init__(self) -> None:
        expect(self.temperature >= 0, "temperature", self.temperature, "a number >= 0 (0: greedy)")
        expect(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "an integer >= 1, or null for all tokens")
        expect(0 < self.top_p <= 1, "top_p", self.top_p, "a number in (0, 1]")
        expect(0 <= self.seed < 2**63, "seed", self.seed, "an integer from 0 to 2**63 - 1")


class Chooser:
    """Chooses tokens for the rows of a batch. Row r has its own random number stream, seeded by (seed, r).

    A row takes one number from its stream per token. The tokens of a row therefore depend on its own logits only, and
    not on the number of other rows or on when they end.
    """

    def __init__(self, sampling: Sampling, rows: int) -> None:
        self.sampling = sampling
        self._streams = []
        for row in range(rows):
            digest = hashlib.sha256(f"generate/{sampling.seed}/{row}".encode()).digest()
            key = int.from_bytes(digest[:8], "little", signed=True)
            self._streams.append(torch.Generator().manual_seed(key))

    def __call__(self, logits_BV: Tensor, rows: Sequence[int]) -> list[int]:
        """Choose one token for each row in `rows`.

        Args:
            logits_BV: logits of these rows, in the order of `rows`.
        """
        if self.sampling.temperature == 0:
            return logits_BV.argmax(dim=-1).tolist()
        draws = [torch.rand((), generator=self._streams[row], dtype=torch.float64) for row in rows]
        # On a GPU, torch has no cumulative sum that is the same in every run.
        return pick(logits_BV.cpu(), self.sampling, torch.stack(draws)).tolist()


def pick(logits_BV: Tensor, sampling: Sampling, draws_B: Tensor) -> Tensor:
    """Return the token at a quantile of each row's distribution, whose tokens are sorted by falling probability.

    Args:
        draws_B: quantiles in [0, 1), fp64.

    Returns:
        Token ids [B].
    """
    wide_BV = logits_BV.double()
    scaled_BV = (wide_BV - wide_BV.amax(dim=-1, keepdim=True)) / sampling.temperature
    sorted_BV, order_BV = scaled_BV.sort(dim=-1, descending=True, stable=True)
    probs_BV = sorted_BV[:, : sampling.top_k].softmax(dim=-1)
    before_BV = probs_BV.cumsum(dim=-1) - probs_BV
    # The most probable token always remains: the probability before it is 0. Sums of equal probabilities, such as 0.1
    # three times, equal top_p only up to rounding.
    probs_BV = probs_BV.masked_fill(before_BV >= sampling.top_p * (1 - 1e-12), 0)
    reached_BV = probs_BV.cumsum(dim=-1)
    index_B = (reached_BV <= draws_B.unsqueeze(1) * reached_BV[:, -1:]).sum(dim=-1)
    last_B = (probs_BV > 0).sum(dim=-1) - 1
    return order_BV.gather(1, index_B.minimum(last_B).unsqueeze(1)).squeeze(1)
