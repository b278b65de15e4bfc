"""The jobs of a parity check: one model under one layout and one engine each."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

from common.errors import ConfigError
from moe.accounting.flops import meta_model
from parallel.config import ParallelConfig
from parallel.layout import Layout
from parallel.startup.launch import World
from training.config import Config
from training.deepspeed.settings import check_choice
from training.layout import build_workload, resolve_layout
from training.parity.cases import ENGINES, ONE_PROCESS, STEPS, Case, EngineKind, Precision, configuration, rows_for
from training.parity.config import COVER, EVERY, ParityConfig
from training.parity.layouts import parse_layout, select_layouts
from training.trainable import choose_trainable, format_patterns


class Job(NamedTuple):
    """One model to train under one layout with one engine."""

    model: str
    """The name of the model: a key of `ParityConfig.cases()`."""
    layout: str
    """The layout, as the user writes it."""
    parallel: ParallelConfig
    engine: EngineKind = "native"


def select_jobs(config: ParityConfig, world_size: int) -> list[Job]:
    """Return the jobs that `config` selects in a world of this size.

    Raises:
        ConfigError: a name is unknown, a model cannot be trained at all, or no job can run.
    """
    cases = config.cases()
    models = _names("models", config.models, (COVER, EVERY, *cases))
    engines = _names("engines", config.engines, ENGINES)
    layouts = select_layouts(config.layouts, world_size)
    for case in cases.values():
        configuration(case, ONE_PROCESS, rows=rows_for(world_size), precision=config.precision)
    jobs = []
    for layout, assigned in zip(layouts, assign_models(layouts, cases, world_size), strict=True):
        of_layout = [assigned] if COVER in models else list(cases) if EVERY in models else models
        jobs += [
            Job(model, layout, parse_layout(layout), cast(EngineKind, engine))
            for engine in engines
            for model in of_layout
        ]
    reasons = [why_skipped(job, cases[job.model], world_size, config.precision) for job in jobs]
    if all(reasons):
        raise ConfigError(f"layouts={config.layouts}: expected a layout that fits; {reasons[0] if reasons else 'none'}")
    return jobs


def _names(key: str, value: str, known: Sequence[str]) -> list[str]:
    names = value.split(",")
    for name in names:
        if name not in known:
            raise ConfigError(f"{key}={name}: expected one of {', '.join(known)}, or several with commas")
    return names


def configure(
    job: Job, case: Case, world_size: int, *, steps: int = STEPS, precision: Precision = "fp64"
) -> tuple[Config, Layout]:
    """Return the configuration and the layout of a job.

    Args:
        case: the model that the job names.

    Raises:
        ConfigError: the job cannot run, for example because an axis does not divide the model.
    """
    config = configuration(
        case, job.parallel, rows=rows_for(world_size), steps=steps, precision=precision, engine=job.engine
    )
    config, plan, _ = resolve_layout(config, build_workload(config, case.model), World(world_size=world_size))
    if job.engine != "native":
        trained = choose_trainable(meta_model(case.model, case.router), case.train)
        check_choice(trained.experts, format_patterns(case.train))
    return config, plan.layout


def why_skipped(job: Job, case: Case, world_size: int, precision: Precision = "fp64") -> str | None:
    """Return why a job cannot run; None if it can run."""
    try:
        configure(job, case, world_size, precision=precision)
    except ConfigError as error:
        return str(error)
    return None


def assign_models(layouts: Sequence[str], cases: Mapping[str, Case], world_size: int) -> list[str]:
    """Return one of the models for each layout, such that every model meets every axis about equally often."""
    met: Counter[tuple[str, str]] = Counter()
    assigned = []
    for layout in layouts:
        axes, parallel = [item.split("=")[0] for item in layout.split("+")], parse_layout(layout)
        fitting = [name for name in cases if not why_skipped(Job(name, layout, parallel), cases[name], world_size)]
        best = min(fitting or cases, key=lambda name: sum(met[axis, name] for axis in axes))
        met.update((axis, best) for axis in axes)
        assigned.append(best)
    return assigned
