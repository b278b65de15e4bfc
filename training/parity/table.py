"""The results of the jobs: the lines and the table that rank 0 prints."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from training.parity.cases import Precision
from training.parity.compare import TOLERANCES, Differences
from training.parity.jobs import Job
from training.report.terminal import show_line, show_table

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
    title = f"largest relative difference from one process, {precision}, {conditions}"
    show_table(title, COLUMNS, rows, left=("model", "engine"))
    show_line()
    for reason, layouts in skipped.items():
        show_line(f"skipped ({reason}): " + ", ".join(f"{name} x {number}" for name, number in layouts.items()))
    good, tolerance = sum(row[-1] == "ok" for row in rows), TOLERANCES[precision]
    weights = f"{tolerance.weights:g}" if math.isfinite(tolerance.weights) else "without a bound"
    limits = f"figures {tolerance.figures:g}, gradients {tolerance.gradients:g}, weights and moments {weights}"
    show_line()
    show_line(f"{good} of {len(rows)} within the tolerance ({limits}); {len(results) - len(rows)} skipped")
