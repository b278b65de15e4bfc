"""Whether every layout computes what one process computes, on the machines at hand.

    python scripts/parity.py layouts=all launch.nproc=4
    python scripts/parity.py layouts=expert,tensor models=mixtral,switch launch.nproc=2
    python scripts/parity.py layouts=tensor=2+expert=4,pipeline=2+schedule=zero_bubble models=all launch.nproc=4
    torchrun --nproc-per-node 8 scripts/parity.py layouts=all

Exit status 0: all differences are within the tolerance; 1: some are not. docs/parity.md explains the table.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, cast

from common.checks import expect
from common.errors import ConfigError
from parallel.startup.launch import World, die_with_parent, world_from_env
from scripts.cli.tools import run_tool
from scripts.cli.workers import in_processes
from training.config import LaunchConfig

if TYPE_CHECKING:  # the command line does not wait for torch
    from training.parity.trial import Differences, Job, Outcome

START_TIMEOUT_S = 300.0
COVER, EVERY = "cover", "all"


@dataclass(frozen=True)
class ParityConfig:
    """Mirrored by conf/parity.yaml."""

    layouts: str = "all"
    models: str = COVER
    engines: str = "native"
    precision: Literal["fp64", "fp32"] = "fp64"
    steps: int = 3
    device: Literal["auto", "cpu", "cuda"] = "auto"
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        expect(self.steps >= 2, "steps", self.steps, "an integer >= 2")


def check_parity(config: ParityConfig) -> None:
    """Run everything, here or in own workers; ends the process with status 1 where something differs."""
    if "RANK" in os.environ:
        die_with_parent()
        same = work(config, jobs_for(config, world_from_env().world_size))
    else:
        same = in_processes(config.launch, work, config, jobs_for(config, config.launch.nproc))
    if not same:
        raise SystemExit(1)


def jobs_for(config: ParityConfig, world_size: int) -> "list[Job]":
    """What to run in a world of this size.

    Raises:
        ConfigError: a name that stands for nothing, or nothing that could be run.
    """
    from training.parity.cases import CASES
    from training.parity.layouts import chosen, parse_layout
    from training.parity.trial import ENGINES, EngineKind, Job, covering, refusal

    names = _named("models", config.models, (COVER, EVERY, *CASES))
    engines = _named("engines", config.engines, ENGINES)
    layouts = chosen(config.layouts, world_size)
    jobs = []
    for layout, model in zip(layouts, covering(layouts, list(CASES), world_size), strict=True):
        models = [model] if COVER in names else list(CASES) if EVERY in names else names
        jobs += [
            Job(model, layout, parse_layout(layout), cast(EngineKind, engine)) for engine in engines for model in models
        ]
    reasons = [refusal(job, World(world_size=world_size), config.precision) for job in jobs]
    if all(reasons):
        raise ConfigError(f"layouts={config.layouts}: expected a layout that fits; {reasons[0] if reasons else 'none'}")
    return jobs


def _named(key: str, value: str, known: Sequence[str]) -> list[str]:
    names = value.split(",")
    for name in names:
        if name not in known:
            raise ConfigError(f"{key}={name}: expected one of {', '.join(known)}, or several with commas")
    return names


def work(config: ParityConfig, jobs: "Sequence[Job]") -> bool:
    """One rank's life: all ranks compute, rank 0 compares and speaks. Whether everything is the same, on all ranks."""
    import torch
    import torch.distributed as dist

    from parallel.mesh import close_process_group, init_process_group
    from parallel.startup.rendezvous import open_store
    from training.device import pick_device
    from training.parity.trial import prove
    from training.report.terminal import show_line

    world = world_from_env()
    device = pick_device(config.device, world.local_rank, world.local_world_size)
    store = open_store(world, START_TIMEOUT_S)
    init_process_group(store, world.rank, world.world_size, device, START_TIMEOUT_S)
    done = 0

    def report(outcome: "Outcome") -> None:
        nonlocal done
        done += 1
        job = outcome.job
        found = outcome.differences
        said = f"skipped: {outcome.refused}" if found is None else _verdict(found, config)
        show_line(f"[{done}/{len(jobs)}] {job.layout}  {job.model}  {job.engine}: {said} ({outcome.seconds:.1f} s)")

    outcomes = prove(jobs, device, precision=config.precision, steps=config.steps, report=report)
    found = [outcome.differences for outcome in outcomes if outcome.differences is not None]
    missed = any(_verdict(differences, config) != "ok" for differences in found)
    if world.rank == 0:
        show_outcomes(config, outcomes, f"{world.world_size} processes, {device.type}, torch {torch.__version__}")
    verdict = torch.tensor(not missed, dtype=torch.int64, device=device)
    dist.broadcast(verdict, src=0)
    close_process_group()
    return bool(verdict)


def _verdict(differences: "Differences", config: ParityConfig) -> str:
    from training.parity.trial import TOLERANCES

    return "ok" if differences.within(TOLERANCES[config.precision]) else "MISS"


def show_outcomes(config: ParityConfig, outcomes: "Sequence[Outcome]", where: str) -> None:
    """The table, what was skipped and why, and the sum of it."""
    from training.parity.trial import TOLERANCES
    from training.report.terminal import show_line, show_table

    rows: list[tuple[str, ...]] = []
    skipped: dict[str, dict[str, int]] = {}
    for outcome in outcomes:
        job, found = outcome.job, outcome.differences
        if found is None:
            of_reason = skipped.setdefault(outcome.refused or "", {})
            of_reason[job.layout] = of_reason.get(job.layout, 0) + 1
            continue
        numbers = (found.figures, found.grad_norm, found.gradients, found.weights, found.moments)
        rows.append(
            (
                job.layout,
                job.model,
                job.engine,
                f"{found.share:.0%}",
                *(f"{number:.1e}" for number in numbers),
                "equal" if found.same_start and found.same_counts else "DIFFER",
                _verdict(found, config),
            )
        )
    show_table(
        f"largest relative difference from one process, {config.precision}, {config.steps} steps; {where}",
        (
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
        ),
        rows,
        left=("model", "engine"),
    )
    show_line()
    for reason, layouts in skipped.items():
        show_line(f"skipped ({reason}): " + ", ".join(f"{name} x {number}" for name, number in layouts.items()))
    missed = sum(row[-1] != "ok" for row in rows)
    tolerance = TOLERANCES[config.precision]
    weights = f"{tolerance.weights:g}" if math.isfinite(tolerance.weights) else "not held against anything"
    limits = f"figures {tolerance.figures:g}, gradients {tolerance.gradients:g}, weights and moments {weights}"
    show_line()
    show_line(
        f"{len(rows) - missed} of {len(rows)} within the tolerance ({limits}); {len(outcomes) - len(rows)} skipped"
    )


def main() -> None:
    run_tool("parity", ParityConfig, check_parity, free_text=("layouts", "models", "engines"))


if __name__ == "__main__":
    # Under its own name, so that workers can import what they run.
    from scripts.parity import main as main_of_module

    main_of_module()
