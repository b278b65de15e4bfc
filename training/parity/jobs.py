"""The jobs of a parity check: one model under one layout and one engine each.

A layout is written like `tensor=2+expert=4`. The layouts to compare depend on the number of ranks.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

from common.errors import ConfigError, require
from common.strict import from_dict
from moe.accounting.flops import meta_model
from moe.quantization import expect_library
from parallel.config import ParallelConfig
from parallel.layout import Layout
from parallel.startup.launch import World
from training.config import Config
from training.deepspeed.settings import check_choice
from training.layout import build_workload, resolve_layout
from training.parity.config import (
    COVER,
    ENGINES,
    EVERY,
    ONE_PROCESS,
    STEPS,
    Case,
    EngineKind,
    ParityConfig,
    Precision,
    configuration,
    rows_for,
)
from training.trainable import choose_trainable, format_patterns

AXES = ("replicate", "shard", "expert", "expert_tensor", "tensor", "context", "pipeline")
SPLIT_AXES = AXES[1:]
DENSE_AXES = ("tensor", "context", "shard")
TEMPLATES = {
    # Experts can share the ranks of another axis, or use these and more.
    "pairs": (
        *(f"{axis}={{a}}+expert={size}" for axis in DENSE_AXES for size in ("{a}", "{ab}")),
        *(f"{axis}={{a}}+expert_tensor={{a}}" for axis in DENSE_AXES),
        "expert={a}+expert_tensor={b}",
        *(f"pipeline={{a}}+{axis}={{b}}" for axis in ("shard", "expert", "expert_tensor", "tensor", "context")),
        "tensor={a}+context={b}",
        "shard={a}+tensor={b}",
        "shard={a}+context={b}",
        "replicate={r}+shard={a}",
    ),
    "triples": (
        "shard={a}+context={b}+tensor={c}",
        "shard={a}+context={b}+tensor={c}+expert={abc}",
        "pipeline={a}+context={b}+tensor={c}",
        "pipeline={a}+context={b}+tensor={c}+expert={bc}",
        "pipeline={a}+shard={b}+tensor={c}",
        "pipeline={a}+shard={b}+tensor={c}+expert={bc}",
        "pipeline={a}+shard={b}+context={c}",
        "pipeline={a}+shard={b}+context={c}+expert={bc}",
        "shard={a}+expert={b}+expert_tensor={c}",
        "tensor={a}+expert={b}+expert_tensor={c}",
        "pipeline={a}+expert={b}+expert_tensor={c}",
        "pipeline={a}+tensor={b}+expert={bc}+schedule=zero_bubble",
        "pipeline={a}+shard={b}+expert={bc}+schedule=interleaved+recompute=full",
        "shard={ab}+expert={c}",
        "shard={a}+tensor={b}+expert={abc}+recompute=full",
    ),
    "schedules": (
        "pipeline={a}+schedule=interleaved",
        "pipeline={a}+schedule=zero_bubble",
        "pipeline={a}+stage_layers=1:3",
        "pipeline={a}+expert={b}+schedule=zero_bubble",
        "pipeline={a}+shard={b}+schedule=interleaved",
        "pipeline={a}+tensor={b}+schedule=zero_bubble",
    ),
    "memory": (
        *(f"{axis}={{a}}+recompute=full" for axis in SPLIT_AXES),
        *(f"{axis}={{a}}+recompute=selective" for axis in ("expert", "expert_tensor", "shard")),
        "shard={a}+offload=true",
        "shard={a}+expert={a}+offload=true",
    ),
}
"""The layouts of each group. a, b and c are the prime factors of the number of ranks, the smallest first, and r is the
number of ranks divided by a. `{ab}` is a·b. A layout is left out if one of its factors does not exist."""
TEMPLATES["overlap"] = tuple(
    f"{template}+overlap=true"
    for template in ("expert={a}", "expert={ab}", *itertools.chain.from_iterable(TEMPLATES.values()))
    if re.search(r"\bexpert=", template)
)


def layout_groups(world_size: int) -> dict[str, list[str]]:
    """Return the layouts to compare in a world of this size, by group.

    Each of them fits some model, as far as the number of ranks goes.

    - `single`: each axis alone, at every size.
    - `pairs`: the sensible combinations of two axes.
    - `triples`: the sensible combinations of three axes.
    - `schedules`: pipeline schedules, and pipeline stages of different lengths.
    - `memory`: recompute and offload, with each axis.
    - `overlap`: all layouts with expert parallelism, with overlapping exchanges.
    """
    sizes = [size for size in range(2, world_size + 1) if world_size % size == 0]
    groups = {"single": [f"replicate={world_size}", *(f"{axis}={size}" for axis in SPLIT_AXES for size in sizes)]}
    factors, rest = {}, world_size
    for letter in "abc":
        factors[letter] = next((size for size in range(2, rest + 1) if rest % size == 0), 1)
        rest //= factors[letter]
    factors["r"] = world_size // factors["a"]
    for group, templates in TEMPLATES.items():
        groups[group] = [layout for template in templates if (layout := _fill(template, factors))]
    return groups


def _fill(template: str, factors: Mapping[str, int]) -> str | None:
    fields = re.findall(r"{(\w+)}", template)
    # stage_layers=1:3 has two numbers, so it needs two stages.
    if any(factors[letter] == 1 for letter in "".join(fields)) or ("stage_layers" in template and factors["a"] != 2):
        return None
    return template.format(**{field: math.prod(factors[letter] for letter in field) for field in fields})


def parse_layout(text: str) -> ParallelConfig:
    """Return the configuration of a layout that is written like `tensor=2+expert=4`.

    Raises:
        ConfigError: a key is unknown, or a value is not allowed.
    """
    values: dict[str, object] = {"expert": 1}
    for item in text.split("+"):
        key, _, value = item.partition("=")
        if key == "stage_layers":
            values[key] = [int(number) if number.isdecimal() else number for number in value.split(":")]
        else:
            values[key] = int(value) if value.isdecimal() else value == "true" if value in ("true", "false") else value
    return from_dict(ParallelConfig, values, "parallel")


def select_layouts(selection: str, world_size: int) -> list[str]:
    """Return the layouts that `layouts=<selection>` selects, each once.

    Args:
        selection: words separated by commas. Each is `all`, the name of a group, the name of an axis (all layouts that
            name the axis), or a single layout.

    Raises:
        ConfigError: a word is none of these, or a layout cannot be read.
    """
    groups = layout_groups(world_size)
    everything = [layout for layouts in groups.values() for layout in layouts]
    selected: dict[str, None] = {}
    for word in selection.split(","):
        if "=" in word:
            parse_layout(word)
            selected[word] = None
        elif word == "all":
            selected |= dict.fromkeys(everything)
        elif word in groups:
            selected |= dict.fromkeys(groups[word])
        elif word in AXES:
            selected |= dict.fromkeys(layout for layout in everything if f"+{word}=" in f"+{layout}")
        else:
            words = ", ".join(("all", *groups, *AXES))
            raise ConfigError(f"layouts={word}: expected one of {words}, or a layout like tensor=2+expert=4")
    return list(selected)


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
    require(
        not all(reasons),
        ConfigError,
        f"layouts={config.layouts}: expected a layout that fits; {reasons[0] if reasons else 'none'}",
    )
    return jobs


def _names(key: str, value: str, known: Sequence[str]) -> list[str]:
    names = value.split(",")
    for name in names:
        require(name in known, ConfigError, f"{key}={name}: expected one of {', '.join(known)}, or several with commas")
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
    expect_library(case.quantize)
    config = configuration(
        case, job.parallel, rows=rows_for(world_size), steps=steps, precision=precision, engine=job.engine
    )
    config, plan, _ = resolve_layout(config, build_workload(config, case.model), World(world_size=world_size))
    if job.engine != "native":
        check_choice(
            choose_trainable(meta_model(case.model, case.router), case.train).experts, format_patterns(case.train)
        )
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
