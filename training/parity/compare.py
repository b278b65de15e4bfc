"""The differences between a training run and the reference, how large they may be, and the table that rank 0 prints.

Shapes: L MoE layers, E experts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from training.parity.config import Precision
from training.parity.jobs import Job
from training.parity.trial import Result
from training.report.terminal import show_line, show_table
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
    return step.tokens, step.dropped, (None if step.counts_LE is None else step.counts_LE.tolist())


COLUMNS = (
    "layout",
    "model",
    "engine",
    "share",
    "losses",
    "norm",
    "gradients",
    "weights",
    "moments",
    "start, counts",
    "",
)


class JobResult(NamedTuple):
    """A job with its differences from the reference, or with the reason why it was skipped."""

    job: Job
    why_skipped: str | None
    differences: Differences | None
    seconds: float

    def verdict(self, precision: Precision) -> Literal["ok", "MISS", "skipped"]:
        """Return whether the differences are within the tolerance."""
        if self.differences is None:
            return "skipped"
        return "ok" if self.differences.within(TOLERANCES[precision]) else "MISS"


def show_progress(result: JobResult, precision: Precision, number: int, total: int) -> None:
    """Print one line for a job that has ended, the `number`-th of `total`."""
    job, reason = result.job, f": {result.why_skipped}" if result.why_skipped else ""
    show_line(
        f"[{number}/{total}] {job.layout}  {job.model}  {job.engine}: {result.verdict(precision)}{reason} "
        f"({result.seconds:.1f} s)"
    )


def show_results(results: Sequence[JobResult], precision: Precision, conditions: str) -> None:
    """Print the table of the jobs that ran, why others were skipped, and how many are within the tolerance.

    Args:
        conditions: the rest of the table's title: the number of steps and processes, the device, the version of torch.
    """
    rows: list[tuple[str, ...]] = []
    skipped: dict[str, dict[str, int]] = {}
    for result in results:
        job, found = result.job, result.differences
        if found is None:
            layouts = skipped.setdefault(result.why_skipped or "", {})
            layouts[job.layout] = layouts.get(job.layout, 0) + 1
            continue
        numbers = (found.figures, found.grad_norm, found.gradients, found.weights, found.moments)
        rows.append(
            (
                job.layout,
                job.model,
                job.engine,
                f"{found.share:.0%}",
                *(f"{number:.1e}" for number in numbers),
                "equal" if found.same_initial_weights and found.same_counts else "DIFFER",
                result.verdict(precision),
            )
        )
    show_table(
        f"largest relative difference from one process, {precision}, {conditions}",
        COLUMNS,
        rows,
        left=("model", "engine"),
    )
    show_line()
    for reason, layouts in skipped.items():
        show_line(f"skipped ({reason}): " + ", ".join(f"{name} x {number}" for name, number in layouts.items()))
    good, tolerance = sum(row[-1] == "ok" for row in rows), TOLERANCES[precision]
    weights = f"{tolerance.weights:g}" if math.isfinite(tolerance.weights) else "without a bound"
    limits = f"figures {tolerance.figures:g}, gradients {tolerance.gradients:g}, weights and moments {weights}"
    show_line()
    show_line(f"{good} of {len(rows)} within the tolerance ({limits}); {len(results) - len(rows)} skipped")
