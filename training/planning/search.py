"""The layouts of a model on a number of devices, ranked by their estimated time, and what would make one faster.

The search compares formulas (`parallel.planning`): the memory of every pipeline rank and the time of a step. It tries
all sizes of the axes that are `auto`, several numbers of micro-batches, and more recomputation for what does not fit.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from common.errors import ConfigError
from moe.config import ModelConfig, RouterConfig
from moe.quantization import FULL_PRECISION, QuantizeConfig
from moe.recompute import Recompute
from parallel.config import ParallelConfig
from parallel.layout import Layout
from parallel.planning.auto import Search
from parallel.planning.hardware import Hardware
from parallel.planning.plan import Plan, plan
from parallel.planning.times import StepTimes, estimate_times, expert_share
from parallel.planning.workload import Workload
from parallel.startup.launch import World
from training.planning.skew import Loads

RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
MAX_ROWS = 64
"""The most rows of a micro-batch on one rank that are tried."""


@dataclass(frozen=True)
class Question:
    """What is planned."""

    model: ModelConfig
    router: RouterConfig
    parallel: ParallelConfig
    """Axes that are `auto` are searched."""
    gpus: int
    hardware: Hardware
    seq_len: int
    global_batch: int
    accumulation: int | None
    """None: searched."""
    recompute: tuple[Recompute, ...]
    """The modes that are tried in this order, until the layout fits."""
    itemsize: int
    """Bytes of a number in the forward pass."""
    moments: int
    margin: float
    """Share of the memory that must stay free, for fragmentation."""
    loads: Loads | None
    """The shares of the experts; None: balanced."""
    quantize: QuantizeConfig = FULL_PRECISION
    """The weights that are stored in few bits."""

    @property
    def limit(self) -> float:
        """Bytes that the tensors of a rank may take."""
        return self.hardware.usable * (1 - self.margin)

    def workload(self, accumulation: int) -> Workload:
        """Return what a step computes."""
        workload = Workload(
            self.model,
            self.router,
            self.global_batch,
            accumulation,
            self.seq_len,
            self.itemsize,
            moments=self.moments,
            quantize=self.quantize,
        )
        return replace(workload, trained=workload.adapter_share) if self.model.adapter is not None else workload


@dataclass(frozen=True)
class Option:
    """A layout with its estimates."""

    parallel: ParallelConfig
    layout: Layout
    accumulation: int
    plan: Plan
    times: StepTimes
    fits: bool

    @property
    def peak(self) -> int:
        """Bytes of the fullest rank (estimate)."""
        return self.plan.fullest.device


def search(question: Question) -> list[Option]:
    """Return the layouts that fit, the fastest first. If none fits: those that need least memory, the smallest first.

    Raises:
        ValueError: no layout is possible. The message starts with a field of `parallel` or with `global_batch`.
    """
    found, reasons = list[Option](), list[ValueError]()
    for accumulation in accumulations(question):
        finder = Search(question.parallel, question.workload(accumulation), world_of(question))
        for parallel in finder.configs():
            try:
                layout = finder.layout(parallel)
            except ValueError as error:
                reasons.append(error)
                continue
            if question.accumulation is None and finder.workload.rows(layout) > MAX_ROWS:
                continue
            found.append(consider(question, parallel, layout, accumulation))
    if not found:
        raise reasons[0] if reasons else ValueError(f"gpus={question.gpus}: expected a number that the axes divide")
    fitting = [option for option in found if option.fits]
    return (
        sorted(fitting, key=lambda option: option.times.total)
        if fitting
        else sorted(found, key=lambda option: option.peak)
    )


def world_of(question: Question) -> World:
    """Return the world of the devices."""
    return World(world_size=question.gpus, local_world_size=min(question.gpus, question.hardware.gpus_per_node))


def accumulations(question: Question) -> Iterator[int]:
    """Yield the numbers of micro-batches that are tried: divisors of the batch that are powers of two, or the batch."""
    if question.accumulation is not None:
        yield question.accumulation
        return
    number = 1
    while number <= question.global_batch:
        if question.global_batch % number == 0:
            yield number
        number *= 2
    if question.global_batch & (question.global_batch - 1):
        yield question.global_batch


def consider(question: Question, parallel: ParallelConfig, layout: Layout, accumulation: int) -> Option:
    """Return the option with the first mode of recomputation that fits, or with the last one."""
    workload = question.workload(accumulation)
    for mode in question.recompute:
        if mode == "full" and parallel.schedule == "zero_bubble" and layout.pipeline > 1:
            continue
        tried = replace(parallel, recompute=mode)
        planned = plan(layout, tried, workload)
        fits = planned.fullest.device <= question.limit
        if fits:
            break
    return Option(tried, layout, accumulation, planned, times_of(question, tried, layout, accumulation), fits)


def times_of(question: Question, parallel: ParallelConfig, layout: Layout, accumulation: int) -> StepTimes:
    """Return the estimated times, with those of the rank that has most tokens."""
    times = estimate_times(layout, parallel, question.workload(accumulation), question.hardware)
    factor = straggler_factor(question.loads, layout.expert)
    share = expert_share(question.workload(accumulation))
    return replace(times, straggler=times.matmul * share * (factor - 1))


def straggler_factor(loads: Loads | None, ranks: int) -> float:
    """Return the rows of the fullest of n expert ranks over the mean, in the mean over the layers."""
    if not loads:
        return 1.0
    factors = [max(rank_shares(layer, ranks)) * ranks for layer in loads]
    return sum(factors) / len(factors)


def rank_shares(shares: tuple[float, ...], ranks: int) -> list[float]:
    """Return the share of each expert rank."""
    per_rank = len(shares) // ranks
    return [math.fsum(shares[rank * per_rank : (rank + 1) * per_rank]) for rank in range(ranks)]


def fullest_rank(option: Option, loads: Loads | None) -> int:
    """Return a rank of the pipeline stage that needs most memory, and there one whose experts have most tokens."""
    stages = option.plan.stages
    stage = max(range(len(stages)), key=lambda index: stages[index].device)
    layout = option.layout
    expert = 0
    if loads:
        totals = [sum(rank_shares(layer, layout.expert)[rank] for layer in loads) for rank in range(layout.expert)]
        expert = totals.index(max(totals))
    return stage * layout.stage + expert * layout.expert_tensor


@dataclass(frozen=True)
class Change:
    """A change of the configuration, and what it saves."""

    override: str
    """As on the command line."""
    seconds: float
    """Seconds of a step that it saves (estimate); 0 if it is for the memory."""
    nbytes: int
    """Bytes of the fullest rank that it saves (estimate); negative if it needs more."""
    fits: bool


def changes(question: Question, option: Option) -> list[Change]:
    """Return changes that make a step faster or, if nothing fits, smaller: the most useful first."""
    layout, parallel = option.layout, option.parallel
    tried: list[tuple[str, ParallelConfig, int]] = []
    for mode in RECOMPUTE:
        tried.append((f"parallel.recompute={mode}", replace(parallel, recompute=mode), option.accumulation))
    for schedule in ("1f1b", "interleaved", "zero_bubble") if layout.pipeline > 1 else ():
        tried.append((f"parallel.schedule={schedule}", replace(parallel, schedule=schedule), option.accumulation))
    if layout.expert > 1:
        overlap = not parallel.overlap
        tried.append(
            (f"parallel.overlap={str(overlap).lower()}", replace(parallel, overlap=overlap), option.accumulation)
        )
    for accumulation in (option.accumulation * 2, option.accumulation // 2):
        tried.append((f"train.accumulation={accumulation}", parallel, accumulation))
    found = []
    for override, changed, accumulation in tried:
        if (changed == parallel and accumulation == option.accumulation) or accumulation < 1:
            continue
        other = _alternative(question, changed, accumulation)
        if other is not None:
            saved, nbytes = option.times.total - other.times.total, option.peak - other.peak
            found.append(Change(override, saved, nbytes, other.fits))
    if question.loads:
        found.append(Change("balanced experts", option.times.straggler, 0, option.fits))
    if option.fits:
        return sorted((each for each in found if each.fits and each.seconds > 0), key=lambda each: -each.seconds)
    return sorted((each for each in found if each.nbytes > 0), key=lambda each: -each.nbytes)


def _alternative(question: Question, parallel: ParallelConfig, accumulation: int) -> Option | None:
    """Return the option with another configuration of the same layout, or None if it is not possible."""
    finder = Search(parallel, question.workload(accumulation), world_of(question))
    try:
        layout = finder.layout(parallel)
    except ValueError:
        return None
    return consider(replace(question, recompute=(parallel.recompute,)), parallel, layout, accumulation)


def nowhere(question: Question, smallest: Option) -> ConfigError:
    """Return the error for a model that fits on none of the layouts, with what would help."""
    ways = []
    for gpus in (question.gpus * factor for factor in (2, 4, 8, 16, 32)):
        more = replace(question, gpus=gpus)
        try:
            options = search(more)
        except ValueError:
            continue
        if options[0].fits:
            ways.append(f"gpus={gpus}")
            break
    ways.append(f"model.num_layers={max(1, int(question.model.num_layers * question.limit / smallest.peak))}")
    state = smallest.plan.fullest.state
    if state > question.limit / 2 and question.parallel.shard != 1 and not question.parallel.offload:
        ways.append("parallel.offload=true")
    if state < question.limit and question.seq_len > 1:  # Shorter rows make only the activations smaller.
        ways.append(f"train.seq_len={question.seq_len // 2}")
    chosen = f"train.accumulation={smallest.accumulation}, parallel.recompute={smallest.parallel.recompute}"
    peak, state_size, limit = (f"{nbytes / 1e9:.1f} GB" for nbytes in (smallest.peak, state, question.limit))
    return ConfigError(
        f"gpus={question.gpus}: expected enough memory for the model; the smallest layout ({smallest.layout}, "
        f"{chosen}) needs {peak}, with {state_size} of weights, gradients and moments; each {question.hardware.name} "
        f"has {limit} for tensors; this would help: {', '.join(ways)}"
    )
