"""The proof that a layout changes no number: small models of every kind, trained on one process and on many.

Everything a step tells is compared, and every gradient, weight and moment, put together from the ranks that hold them.
docs/parity.md says what is proven with it.

Shapes: L MoE layers, E experts.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import ConfigError
from data.config import DataConfig
from moe.accounting.flops import meta_model
from moe.region import LocalShard, Region
from parallel.config import ParallelConfig
from parallel.mesh import Groups, Mesh, build_mesh, mesh_of_one
from parallel.startup.launch import World
from training.build import build_engine, build_parts
from training.checkpoint.shards import as_shard
from training.config import (
    CheckpointConfig,
    Config,
    EngineConfig,
    LaunchConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
)
from training.deepspeed.settings import check_choice
from training.device import compute_dtype
from training.engine import Engine
from training.layout import build_workload, resolve_layout
from training.parity.cases import (
    ACCUMULATION,
    CASES,
    LENGTH,
    OPTIM,
    SEED,
    STEPS,
    Case,
    global_batch,
    part_of,
    rows_for,
    silence_last_expert,
)
from training.parity.layouts import parse_layout
from training.schedule import learning_rate
from training.step import StepResult, train_step
from training.trainable import choose_trainable, format_patterns

Precision = Literal["fp64", "fp32"]
EngineKind = Literal["native", "deepspeed-1", "deepspeed-2", "deepspeed-3"]
"""The number is the ZeRO stage."""
ENGINES: tuple[EngineKind, ...] = get_args(EngineKind)


def configuration(
    case: Case,
    parallel: ParallelConfig,
    *,
    rows: int,
    steps: int = STEPS,
    precision: Precision = "fp64",
    engine: EngineKind = "native",
) -> Config:
    """What `train.py` would be given."""
    kind, _, stage = engine.partition("-")
    return Config(
        run=RunConfig(experiment="parity", seed=SEED),
        model=case.model,
        router=case.router,
        data=DataConfig(kind="embedded"),
        train=TrainConfig(
            steps=steps, seq_len=LENGTH, global_batch=rows, accumulation=ACCUMULATION, precision=precision
        ),
        optim=replace(OPTIM, train=case.train),
        parallel=parallel,
        engine=EngineConfig(kind, int(stage)) if stage else EngineConfig(),  # type: ignore[arg-type]
        checkpoint=CheckpointConfig(),
        tracking=TrackingConfig(wandb="disabled"),
        launch=LaunchConfig(),
    )


class Trial:
    """A model under one layout, as far as it lies on this rank, and its training. All methods are collective."""

    def __init__(self, case: Case, config: Config, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        dtype = compute_dtype(config.train.precision, mesh.device)
        parts = build_parts(config, case.model, mesh, dtype, SEED)
        if case.idle:
            silence_last_expert(parts)
        self.engine: Engine = build_engine(config, parts, mesh)

    def train(self, first: int, last: int) -> list[StepResult]:
        """Steps `first` to `last - 1`."""
        layout, config, results = self.mesh.layout, self.config, []
        for step in range(first, last):
            rows = global_batch(step, config.train.global_batch)
            batches = part_of(rows, layout.data_rank(self.mesh.rank), layout.data)
            lr = learning_rate(step, config.train.steps, config.optim)
            results.append(train_step(self.engine, batches, config.router, lr, config.run.seed))
        return results

    def whole(self) -> dict[str, Tensor]:
        """Weights, buffers and moments put together, on the mesh's first rank; nothing on others."""
        own = {name: LocalShard(*as_shard(tensor)) for name, tensor in self.engine.tensors().items()}
        own = {name: part._replace(local=part.local.detach().cpu().clone()) for name, part in own.items()}
        first = self.mesh.rank == 0
        of_ranks: list[Any] | None = [None] * self.mesh.world_size if first else None
        dist.gather_object(own, of_ranks, group=self.mesh.world, group_dst=0)
        return assemble(of_ranks) if of_ranks is not None else {}

    def largest(self) -> int:
        """Elements of weights on the rank that holds most."""
        weights = [tensor for name, tensor in self.engine.tensors().items() if name.startswith("model.")]
        own = torch.tensor(sum(as_shard(tensor).local.numel() for tensor in weights), device=self.mesh.device)
        dist.all_reduce(own, op=dist.ReduceOp.MAX, group=self.mesh.world)
        return int(own)


def assemble(of_ranks: Sequence[Mapping[str, LocalShard]]) -> dict[str, Tensor]:
    """Every tensor that any rank names, whole. NaN: an element that no rank holds, or that two hold differently."""
    whole: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    for of_rank in of_ranks:
        for name, (local, shape, region) in of_rank.items():
            if name not in whole:
                whole[name] = torch.full(shape, torch.nan, dtype=local.dtype)
                seen[name] = torch.zeros(shape, dtype=torch.bool)
            place = Region(*region).slices(Region.whole(shape))
            differs = seen[name][place] & (whole[name][place] != local)
            whole[name][place] = local.masked_fill(differs, torch.nan)
            seen[name][place] = True
    return whole


class Result(NamedTuple):
    """What a run of a few steps gave. Tensors are whole, and on the first rank only."""

    history: list[StepResult]
    initial: dict[str, Tensor]
    gradients: dict[str, Tensor]
    """Of the first step, before clipping."""
    final: dict[str, Tensor]
    """Weights, buffers and moments after the last step."""
    share: float
    """Largest part of the model's parameters that one rank holds."""


def run_case(case: Case, config: Config, mesh: Mesh) -> Result:
    """Train `case` from its first step to its last. Collective over `mesh`."""
    trial, steps = Trial(case, config, mesh), config.train.steps
    initial = trial.whole()
    history = trial.train(0, 1)
    # After one step Adam's first moment is (1 - beta1) times the clipped gradient, whatever the engine.
    norm, bound = history[0].grad_norm, config.optim.max_grad_norm
    clipped = bound / norm if bound is not None and norm > bound else 1.0
    factor = clipped * (1 - config.optim.beta1)
    gradients = {
        name.removeprefix("exp_avg."): moment / factor
        for name, moment in trial.whole().items()
        if name.startswith("exp_avg.")
    }
    history += trial.train(1, steps)
    final, largest = trial.whole(), trial.largest()
    trial.engine.close()
    total = sum(weight.numel() for name, weight in final.items() if name.startswith("model."))
    return Result(history, initial, gradients, final, largest / total if total else 0.0)


class Differences(NamedTuple):
    """The largest differences from the reference, relative: of figures to themselves, of tensors to their largest."""

    figures: float
    """Losses of all steps: the total, cross-entropy, balance and z-loss."""
    grad_norm: float
    gradients: float
    weights: float
    """And buffers."""
    moments: float
    same_start: bool
    """Initial weights are the same bit for bit."""
    same_counts: bool
    """Tokens, dropped assignments, and assignments to every expert of every layer, in every step."""
    share: float
    """Largest part of the parameters that one rank holds: that the layout was in effect."""

    def within(self, tolerance: "Tolerance") -> bool:
        return (
            self.same_start
            and self.same_counts
            and max(self.figures, self.grad_norm) <= tolerance.figures
            and self.gradients <= tolerance.gradients
            and max(self.weights, self.moments) <= tolerance.weights
        )


class Tolerance(NamedTuple):
    figures: float
    gradients: float
    weights: float


TOLERANCES: Mapping[Precision, Tolerance] = {
    "fp64": Tolerance(1e-9, 1e-9, 1e-9),
    "fp32": Tolerance(1e-5, 1e-4, float("inf")),
}
"""In fp32 Adam turns the rounding of a gradient near zero into a whole step: weights are not held against anything."""


def compare(result: Result, reference: Result) -> Differences:
    """How far `result` is from `reference`; infinitely where a name is missing or a number is none."""
    pairs = list(zip(result.history, reference.history, strict=True))
    figures = ("loss", "ce", "balance", "z")
    final = _apart(result.final, reference.final)
    return Differences(
        figures=max(_relative(getattr(a, name), getattr(b, name)) for a, b in pairs for name in figures),
        grad_norm=max(_relative(a.grad_norm, b.grad_norm) for a, b in pairs),
        gradients=max(_apart(result.gradients, reference.gradients).values()),
        weights=max(apart for name, apart in final.items() if name.startswith("model.")),
        moments=max(apart for name, apart in final.items() if not name.startswith("model.")),
        same_start=max(_apart(result.initial, reference.initial).values()) == 0,
        same_counts=all(_counted(a) == _counted(b) for a, b in pairs),
        share=result.share,
    )


def _relative(value: float | None, expected: float | None) -> float:
    if value is None or expected is None or value == expected:
        return 0.0 if value == expected else torch.inf
    apart = abs(value - expected) / abs(expected) if expected else torch.inf
    return apart if apart == apart else torch.inf


def _apart(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Largest difference, relative to the largest element expected, by name."""
    found = dict.fromkeys(tensors.keys() ^ expected.keys(), torch.inf)
    for name in tensors.keys() & expected.keys():
        scale = expected[name].abs().max().item()
        apart = (tensors[name] - expected[name]).abs().max().item()
        found[name] = 0.0 if apart == 0 else apart / scale if scale > 0 and apart == apart else torch.inf
    return found


def _counted(step: StepResult) -> tuple[Any, ...]:
    counts_LE = None if step.counts_LE is None else step.counts_LE.tolist()
    return step.tokens, step.dropped, counts_LE


class Job(NamedTuple):
    model: str
    """A key of `CASES`."""
    layout: str
    """What to call it."""
    parallel: ParallelConfig
    engine: EngineKind = "native"


class Outcome(NamedTuple):
    job: Job
    refused: str | None
    """Why there is nothing to compare."""
    differences: Differences | None
    seconds: float


def refusal(job: Job, world: World, precision: Precision = "fp64") -> str | None:
    """Why the layout cannot be: an axis does not divide what it cuts, say."""
    case, rows = CASES[job.model], rows_for(world.world_size)
    try:
        config = configuration(case, job.parallel, rows=rows, precision=precision, engine=job.engine)
        resolve_layout(config, build_workload(config, case.model), world)
        if job.engine != "native":
            check_choice(
                choose_trainable(meta_model(case.model, case.router), case.train).experts, format_patterns(case.train)
            )
    except ConfigError as error:
        return str(error)
    return None


def covering(layouts: Sequence[str], models: Sequence[str], world_size: int) -> list[str]:
    """One of `models` for each layout, such that every model meets every axis about equally often."""
    met: Counter[tuple[str, str]] = Counter()
    chosen = []
    for layout in layouts:
        parallel, words = parse_layout(layout), layout.split("+")
        fitting = [m for m in models if refusal(Job(m, layout, parallel), World(world_size=world_size)) is None]
        best = min(fitting or models, key=lambda model: sum(met[word.split("=")[0], model] for word in words))
        met.update((word.split("=")[0], best) for word in words)
        chosen.append(best)
    return chosen


def prove(
    jobs: Sequence[Job],
    device: torch.device,
    *,
    precision: Precision = "fp64",
    steps: int = STEPS,
    report: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Run every job on all ranks, and hold it against the first rank alone. Collective over the initialised world.

    Args:
        jobs: the same on all ranks.
        report: called on the first rank, after each job.

    Returns:
        One outcome a job, on the first rank; nothing on others.
    """
    first, world = dist.get_rank() == 0, World(world_size=dist.get_world_size())
    alone = mesh_of_one(device)
    references: dict[str, Result] = {}
    outcomes: list[Outcome] = []
    groups: Groups = {}
    for job in jobs:
        began, case = time.monotonic(), CASES[job.model]
        refused = refusal(job, world, precision)
        if refused is not None:
            outcomes.append(Outcome(job, refused, None, 0.0))
            if first:
                report(outcomes[-1])
            continue
        rows = rows_for(world.world_size)
        plain = configuration(case, ParallelConfig(expert=1), rows=rows, steps=steps, precision=precision)
        if first and job.model not in references:
            references[job.model] = run_case(case, plain, alone)
        config = configuration(case, job.parallel, rows=rows, steps=steps, precision=precision, engine=job.engine)
        config, plan, _ = resolve_layout(config, build_workload(config, case.model), world)
        layout = plan.layout
        result = run_case(case, config, build_mesh(device, layout, groups))
        cut = layout.pipeline * layout.shard * layout.tensor * layout.expert * layout.expert_tensor > 1
        if first:
            assert job.engine != "native" or (result.share < 1) == cut, (job, result.share)
            differences = compare(result, references[job.model])
            outcomes.append(Outcome(job, None, differences, time.monotonic() - began))
            report(outcomes[-1])
    return outcomes if first else []
