"""Running all jobs on all ranks, comparing each with the same model on one process, and what rank 0 prints.

Shapes: L MoE layers, E experts.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import Groups, build_mesh, close_process_group, init_process_group, mesh_of_one
from parallel.startup.launch import world_from_env
from parallel.startup.rendezvous import START_TIMEOUT_S, open_store
from training.device import pick_device
from training.parity.config import CASES, ONE_PROCESS, STEPS, Case, ParityConfig, Precision, configuration, rows_for
from training.parity.jobs import Job, configure, select_jobs, why_skipped
from training.parity.trial import Result, run_case
from training.report.terminal import show_line, show_table
from training.step import StepResult

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
    """Losses of all steps: the total, cross-entropy, balance loss and z-loss; the figures of every layer."""
    grad_norm: float
    gradients: float
    """Gradients of the first step; the norms of the weights and gradients of routers and experts in every step."""
    weights: float
    """Weights and buffers."""
    moments: float
    same_initial_weights: bool
    """Whether the initial weights are equal bit for bit."""
    same_counts: bool
    """Whether tokens, query-key pairs, and the assignments to every expert of every layer, before and after drops, are
    equal in every step."""
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
        figures=max(
            *(_difference(getattr(a, name), getattr(b, name)) for a, b in steps for name in figures),
            *(_layer_difference(a.layers, b.layers) for a, b in steps),
        ),
        grad_norm=max(_difference(a.grad_norm, b.grad_norm) for a, b in steps),
        gradients=max(
            *_tensor_differences(result.gradients, reference.gradients).values(),
            *(_norm_difference(a.norms_2LF, b.norms_2LF) for a, b in steps),
        ),
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


def _layer_difference(layers: Mapping[str, Sequence[float]], expected: Mapping[str, Sequence[float]]) -> float:
    """Return the largest difference of a figure of a layer."""
    pairs = [
        pair for name in layers.keys() & expected.keys() for pair in zip(layers[name], expected[name], strict=True)
    ]
    return max((_difference(*pair) for pair in pairs), default=0.0) if layers.keys() == expected.keys() else torch.inf


def _norm_difference(norms_2LF: Tensor | None, expected_2LF: Tensor | None) -> float:
    """Return the largest difference of the norm of a router or an expert."""
    if norms_2LF is None or expected_2LF is None:
        return 0.0 if norms_2LF is expected_2LF else torch.inf
    found, expected = (dict(zip(("weights", "gradients"), norms, strict=True)) for norms in (norms_2LF, expected_2LF))
    return max(_tensor_differences(found, expected).values())


def _tensor_differences(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    differences = dict.fromkeys(tensors.keys() ^ expected.keys(), torch.inf)
    for name in tensors.keys() & expected.keys():
        scale = expected[name].abs().max().item()
        largest = (tensors[name] - expected[name]).abs().max().item()
        # A NaN is not equal to itself.
        differences[name] = 0.0 if largest == 0 else largest / scale if scale > 0 and largest == largest else torch.inf
    return differences


def _counts(step: StepResult) -> tuple[Any, ...]:
    assignments = [None if counts is None else counts.tolist() for counts in (step.counts_LE, step.kept_LE)]
    return step.tokens, step.pairs, *assignments


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


def check_on_rank(config: ParityConfig) -> bool:
    """Start the process group, run the selected jobs, and print the results on rank 0. All ranks must call it.

    Returns:
        Whether every job that ran is within the tolerance, the same on all ranks.

    Raises:
        ConfigError: as `select_jobs`, before a process group exists.
    """
    world = world_from_env()
    jobs = select_jobs(config, world.world_size)
    device = pick_device(config.device, world.local_rank, world.local_world_size)
    init_process_group(open_store(world, START_TIMEOUT_S), world.rank, world.world_size, device, START_TIMEOUT_S)
    results: list[JobResult] = []
    for result in run_jobs(jobs, device, cases=config.cases(), precision=config.precision, steps=config.steps):
        results.append(result)
        show_progress(result, config.precision, len(results), len(jobs))
    if world.rank == 0:
        show_results(
            results,
            config.precision,
            f"{config.steps} steps; {world.world_size} processes, {device.type}, torch {torch.__version__}",
        )
    missed = torch.tensor(any(result.verdict(config.precision) == "MISS" for result in results), device=device).long()
    dist.broadcast(missed, src=0)
    close_process_group()
    return not missed


def run_jobs(
    jobs: Sequence[Job],
    device: torch.device,
    *,
    cases: Mapping[str, Case] = CASES,
    precision: Precision = "fp64",
    steps: int = STEPS,
) -> Iterator[JobResult]:
    """Run every job on all ranks, and compare it with the same model on the first rank alone.

    Collective over the initialised world: all ranks must iterate to the end, with the same arguments.

    Args:
        cases: the models that the jobs name.

    Yields:
        The result of each job, on the first rank. Other ranks get no results.
    """
    first, world_size = dist.get_rank() == 0, dist.get_world_size()
    single_mesh = mesh_of_one(device)
    references: dict[str, Result] = {}
    groups: Groups = {}
    for job in jobs:
        start_time, case = time.monotonic(), cases[job.model]
        reason = why_skipped(job, case, world_size, precision)
        if reason is not None:
            if first:
                yield JobResult(job, reason, None, 0.0)
            continue
        if first and job.model not in references:
            config = configuration(case, ONE_PROCESS, rows=rows_for(world_size), steps=steps, precision=precision)
            references[job.model] = run_case(case, config, single_mesh)
        config, layout = configure(job, case, world_size, steps=steps, precision=precision)
        result = run_case(case, config, build_mesh(device, layout, groups))
        is_split = layout.pipeline * layout.shard * layout.tensor * layout.expert * layout.expert_tensor > 1
        if first:
            assert job.engine != "native" or (result.share < 1) == is_split, (job, result.share)
            yield JobResult(job, None, compare(result, references[job.model]), time.monotonic() - start_time)
