"""The differences between a training run and the reference, and how large they may be.

Shapes: L MoE layers, E experts.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from training.parity.cases import Precision
from training.parity.trial import Result
from training.step import StepResult


class Tolerance(NamedTuple):
    """Upper bounds of the relative differences."""

    figures: float
    """For losses and gradient norms."""
    gradients: float
    weights: float
    """For weights, buffers and moments."""


TOLERANCES: Mapping[Precision, Tolerance] = {
    "fp64": Tolerance(1e-9, 1e-9, 1e-9),
    "fp32": Tolerance(1e-5, 1e-4, float("inf")),
}
"""In fp32 Adam turns the rounding of a gradient near zero into a whole step, so weights have no bound."""


class Differences(NamedTuple):
    """The largest relative differences from the reference.

    The difference of a number is relative to the reference's number. The difference of a tensor is relative to the
    reference's largest element.
    """

    figures: float
    """Losses of all steps: the total, cross-entropy, balance loss and z-loss."""
    grad_norm: float
    gradients: float
    weights: float
    """Weights and buffers."""
    moments: float
    same_initial_weights: bool
    """Whether the initial weights are equal bit for bit."""
    same_counts: bool
    """Whether tokens, dropped assignments, and assignments to every expert of every layer are equal in every step."""
    share: float
    """The largest part of the weights that one rank stores. It shows that the layout was in effect."""

    def within(self, tolerance: Tolerance) -> bool:
        """Return whether all differences are within the tolerance."""
        return (
            self.same_initial_weights
            and self.same_counts
            and max(self.figures, self.grad_norm) <= tolerance.figures
            and self.gradients <= tolerance.gradients
            and max(self.weights, self.moments) <= tolerance.weights
        )


def compare(result: Result, reference: Result) -> Differences:
    """Return how far `result` is from `reference`.

    A difference is infinite if one of the two lacks a name, or if a number is NaN.
    """
    steps = list(zip(result.history, reference.history, strict=True))
    figures = ("loss", "ce", "balance", "z")
    final = _tensor_differences(result.final, reference.final)
    return Differences(
        figures=max(_difference(getattr(a, name), getattr(b, name)) for a, b in steps for name in figures),
        grad_norm=max(_difference(a.grad_norm, b.grad_norm) for a, b in steps),
        gradients=max(_tensor_differences(result.gradients, reference.gradients).values()),
        weights=max(difference for name, difference in final.items() if name.startswith("model.")),
        moments=max(difference for name, difference in final.items() if not name.startswith("model.")),
        same_initial_weights=max(_tensor_differences(result.initial, reference.initial).values()) == 0,
        same_counts=all(_counts(a) == _counts(b) for a, b in steps),
        share=result.share,
    )


def _difference(value: float | None, expected: float | None) -> float:
    if value is None or expected is None or value == expected:
        return 0.0 if value == expected else torch.inf
    difference = abs(value - expected) / abs(expected) if expected else torch.inf
    return difference if difference == difference else torch.inf


def _tensor_differences(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    differences = dict.fromkeys(tensors.keys() ^ expected.keys(), torch.inf)
    for name in tensors.keys() & expected.keys():
        scale = expected[name].abs().max().item()
        largest = (tensors[name] - expected[name]).abs().max().item()
        # A NaN is not equal to itself.
        differences[name] = 0.0 if largest == 0 else largest / scale if scale > 0 and largest == largest else torch.inf
    return differences


def _counts(step: StepResult) -> tuple[Any, ...]:
    counts_LE = None if step.counts_LE is None else step.counts_LE.tolist()
    return step.tokens, step.dropped, counts_LE
