"""Stage `parity`: training of every parity model on the device against the same model in fp64 on the CPU.

A row has the largest relative differences of losses and gradient norms over all steps, and of the gradients of the
first step. The models are those of `training/parity/config.py`, with heads of 16 channels, because fused attention has
no narrower ones.
"""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
import torch._dynamo

from benchmarks.gpu_stages.stage import Stage, first_line, free_memory, one_process, run_stage, with_compile
from moe.kernels import eager_kernels
from moe.recompute import Recompute
from parallel.config import ParallelConfig
from parallel.mesh import Mesh
from training.parity.config import CASES, Case, configuration, rows_for
from training.parity.driver import compare
from training.parity.trial import Result, run_case

STEPS = 3
BOUNDS = {"fp64": (1e-9, 1e-9), "fp32": (1e-5, 2e-4), "bf16": (1e-2, 2e-2)}
"""Precision -> largest differences of figures and of gradients. In bf16, three times what bf16 on the CPU changes is
added. Rounding then changes which experts some tokens take, and one such change can change a gradient of an expert by
half. So gradients in bf16 are compared with a bound in `ALL_EXPERTS` only, where every token takes every expert."""
ALL_EXPERTS = "all_experts"
MODELS = {ALL_EXPERTS: replace(CASES["mixtral"], model=replace(CASES["mixtral"].model, top_k=8)), **CASES}


class Variant(NamedTuple):
    """One combination of a model, a precision and a way to compute."""

    model: str
    precision: str
    recompute: Recompute = "none"
    kernels: str = "on"
    compiled: str = "no"


def main(stage: Stage) -> None:
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # beyond the limit, kernels run unfused in silence
    with one_process(stage.device) as mesh:
        on_cpu = replace(mesh, device=torch.device("cpu"))
        references: dict[Variant, Result] = {}

        def reference(variant: Variant) -> Result:
            if variant not in references:
                references[variant] = train(variant, on_cpu)
            return references[variant]

        longest = 2.0
        for variant in variants(stage.tiny):
            start = time.monotonic()
            if stage.remaining_s < 1.5 * longest:
                stage.row(check="left out", result="no time", detail=f"from {' '.join(variant)} on")
                return
            bounds = BOUNDS[variant.precision]
            try:
                # Experts that choose take scores as equal that differ by less than fp32 resolves.
                wide = "fp32" if variant.precision == "fp32" and variant.model == "expert_choice" else "fp64"
                exact = reference(Variant(variant.model, wide))
                if variant.precision == "bf16":
                    rounded = compare(reference(Variant(variant.model, "bf16")), exact)
                    figures = max(rounded.figures, rounded.grad_norm)
                    bounds = bounds[0] + 3 * figures, bounds[1] + 3 * rounded.gradients
                found = compare(train(variant, mesh), exact)
            except Exception as error:
                stage.check(" ".join(variant), False, first_line(error))
                free_memory()
                continue
            longest = max(longest, time.monotonic() - start)
            figures = max(found.figures, found.grad_norm)
            counts = found.same_counts or variant.precision == "bf16"
            bounded = variant.precision != "bf16" or variant.model == ALL_EXPERTS
            passed = figures <= bounds[0] and (not bounded or found.gradients <= bounds[1]) and counts
            stage.failures += not passed
            stage.row(
                model=variant.model,
                precision=variant.precision,
                recompute=variant.recompute,
                kernels=variant.kernels,
                compiled=variant.compiled,
                figures=f"{figures:.0e}/{bounds[0]:.0e}",
                gradients=f"{found.gradients:.0e}/{f'{bounds[1]:.0e}' if bounded else '-'}",
                counts="equal" if found.same_counts else "differ",
                result="passed" if passed else "FAILED",
            )


def variants(tiny: bool) -> Iterator[Variant]:
    """Yield the combinations, the most telling ones first. Compilation takes long on CPUs, so `tiny` leaves it out."""
    yield Variant(ALL_EXPERTS, "bf16")
    if not tiny:
        yield Variant(ALL_EXPERTS, "bf16", compiled="yes")
        yield Variant("mixtral", "bf16", "selective", compiled="yes")
        yield Variant("deepseek", "bf16", compiled="yes")
    yield Variant(ALL_EXPERTS, "bf16", "full")
    for precision in ("fp64", "bf16", "fp32"):
        yield from (Variant(model, precision) for model in CASES)
    for precision in ("bf16", "fp32"):
        yield from (Variant(model, precision, kernels="off") for model in ("mixtral", "capacity", "deepseek"))
    if not tiny:
        yield from (Variant(model, "bf16", compiled="yes") for model in ("mixtral", "capacity"))
        yield from (Variant(model, "fp32", compiled="yes") for model in ("mixtral", "switch"))
    for recompute in ("full", "selective"):
        yield from (Variant(model, "fp64", recompute) for model in CASES)
        yield from (Variant(model, "bf16", recompute) for model in ("mixtral", "capacity", "deepseek"))
        if not tiny:
            yield Variant(ALL_EXPERTS, "bf16", recompute, compiled="yes")


def train(variant: Variant, mesh: Mesh) -> Result:
    """Train the model of `variant` for a few steps."""
    case: Case = MODELS[variant.model]
    rotary = case.model.qk_rope_head_dim
    parts = {} if rotary is None else {"qk_nope_head_dim": 16 - rotary}
    case = replace(case, model=replace(case.model, head_dim=16, **parts))
    parallel = ParallelConfig(expert=1, recompute=variant.recompute)
    precision = variant.precision
    config = configuration(case, parallel, rows=rows_for(1), steps=STEPS, precision=precision)  # type: ignore[arg-type]
    with eager_kernels() if variant.kernels == "off" else nullcontext():
        return run_case(case, with_compile(config, variant.compiled == "yes"), mesh)


if __name__ == "__main__":
    raise SystemExit(run_stage(main))
