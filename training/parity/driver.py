"""Running all jobs on all ranks, and comparing each with the same model on one process."""

import time
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist

from parallel.mesh import Groups, build_mesh, close_process_group, init_process_group, mesh_of_one
from parallel.startup.launch import world_from_env
from parallel.startup.rendezvous import open_store
from training.device import pick_device
from training.parity.compare import JobResult, compare, show_progress, show_results
from training.parity.config import CASES, ONE_PROCESS, STEPS, Case, ParityConfig, Precision, configuration, rows_for
from training.parity.jobs import Job, configure, select_jobs, why_skipped
from training.parity.trial import Result, run_case

START_TIMEOUT_S = 300.0


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
