"""The answer to a question: the best layouts with all figures, as values that JSON can hold.

The first layouts are verified: their fullest rank and rank 0 are traced (`training.planning.trace`), which replaces the
estimates by the memory and the operators of the real step.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from moe.accounting.flops import meta_model, training_flops_per_token
from parallel.layout import AXES
from parallel.planning.times import StepTimes, expert_share, group_shapes, recomputed_share
from training.config import Config
from training.planning.search import (
    Option,
    Question,
    changes,
    fullest_rank,
    rank_shares,
    search,
    straggler_factor,
)
from training.planning.timing import step_times
from training.planning.trace import Subject, Trace, trace_step

DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
NUM_CHANGES = 3


@dataclass(frozen=True)
class Budget:
    """What a whole run trains on and costs."""

    tokens: float | None
    """Tokens of the run; None: no totals."""
    price: float | None
    """US dollars for one device and hour; None: no money."""


@dataclass(frozen=True)
class Verified:
    """An option after its trace."""

    option: Option
    ranks: tuple[int, ...]
    """The ranks that were traced. The first one is the fullest."""
    traces: tuple[Trace, ...]
    times: StepTimes

    @property
    def peak(self) -> int:
        """Bytes of the tensors of the fullest rank."""
        return max(trace.peak for trace in self.traces)


def answer(
    question: Question, config: Config, *, top: int, verify: int, document: int | None, budget: Budget
) -> dict[str, Any]:
    """Return the `top` best layouts and what was asked.

    Args:
        config: the configuration of a run, for the trace. Its model, router and batch are those of the question.
        verify: how many layouts to trace. If one does not fit then, others for which the estimates are as far off are
            left out, too.
        document: tokens of a document; None: each row is one document.

    Raises:
        ValueError: no layout is possible.
    """
    options = search(question)
    if not options[0].fits:
        return {"fits": False, "smallest": options[0]}
    verified, others, too_large = list[Verified](), list[Option](), 0
    ratio = 1.0  # The largest ratio of a traced peak to its estimate so far.
    for option in options:
        if len(verified) + len(others) == top:
            break
        if option.peak * ratio > question.limit:
            continue
        if len(verified) == verify:
            others.append(option)
            continue
        traced = trace_option(question, config, option, document)
        ratio = max(ratio, traced.peak / option.peak)
        if traced.peak <= question.limit:
            verified.append(traced)
        else:
            too_large += 1
    if not verified and not others:
        return {"fits": False, "smallest": min(options, key=lambda option: option.peak)}
    verified.sort(key=lambda each: each.times.total)
    flops = training_flops_per_token(meta_model(question.model, question.router), question.seq_len)
    flops *= (2 + question.workload(1).trained) / 3  # A third of them are the gradients of the weights that train.
    rows = [_row(question, each.option, each, flops, budget) for each in verified]
    # The times of the other layouts are corrected by what the formulas are wrong by for the best one.
    scale = verified[0].times.total / verified[0].option.times.total if verified else 1.0
    others = [replace(option, times=option.times.scaled(scale)) for option in others]
    rows += [_row(question, option, None, flops, budget) for option in others]
    return {
        "fits": True,
        "gpus": question.gpus,
        "gpu": asdict(question.hardware),
        "limit_bytes": question.limit,
        "found": len(options),
        "too_large_when_traced": too_large,
        "layouts": [{"rank": number, **row} for number, row in enumerate(rows, start=1)],
    }


def trace_option(question: Question, config: Config, option: Option, document: int | None) -> Verified:
    """Trace the fullest rank of an option, rank 0, and one of the last pipeline stage, which has the head."""
    train = replace(config.train, accumulation=option.accumulation)
    config = replace(config, train=train, parallel=option.parallel)
    last_stage = option.layout.world - option.layout.stage
    ranks = tuple(dict.fromkeys((fullest_rank(option, question.loads), 0, last_stage)))
    subject = Subject(
        config,
        option.layout,
        dtype=DTYPES[question.itemsize],
        capability=question.hardware.capability,
        loads=question.loads,
        document=document,
    )
    traces = tuple(trace_step(replace(subject, rank=rank)) for rank in ranks)
    times = [
        step_times(trace, option.layout, option.accumulation, option.parallel.schedule, question.hardware)
        for trace in traces
    ]
    longest = max(times, key=lambda each: each.total)
    return Verified(option, ranks, traces, _with_straggler(longest, question, option))


def _with_straggler(times: StepTimes, question: Question, option: Option) -> StepTimes:
    """Move the time of rows above the mean from `matmul` to `straggler`, and take the fullest rank of every layer."""
    if not question.loads:
        return times
    ranks = option.layout.expert
    rank = fullest_rank(option, question.loads) % option.layout.stage // option.layout.expert_tensor
    own = sum(rank_shares(layer, ranks)[rank] * ranks for layer in question.loads) / len(question.loads)
    balanced = times.matmul * expert_share(question.workload(option.accumulation)) / own
    straggler = balanced * (straggler_factor(question.loads, ranks) - 1)
    return replace(times, matmul=times.matmul - balanced * (own - 1), straggler=straggler)


def _row(question: Question, option: Option, verified: Verified | None, flops: float, budget: Budget) -> dict[str, Any]:
    """Return all figures of one layout."""
    layout, times = option.layout, option.times if verified is None else verified.times
    tokens = question.global_batch * question.seq_len
    peak = option.peak if verified is None else verified.peak
    row: dict[str, Any] = {
        "axes": {axis: getattr(layout, axis) for axis in (*AXES, "expert", "expert_tensor")},
        "accumulation": option.accumulation,
        "rows": question.workload(option.accumulation).rows(layout),
        "recompute": option.parallel.recompute,
        "schedule": option.parallel.schedule,
        "peak_bytes": peak,
        "free_bytes": round(question.hardware.usable - peak),
        "step_s": times.total,
        "tokens_per_s": tokens / times.total,
        "mfu": flops * tokens / times.total / question.gpus / question.hardware.peak,
        "times": {
            "matmul": times.matmul,
            "attention": times.attention,
            "memory-bound": times.memory_bound,
            "update": times.update,
            "exposed": dict(times.exposed),
            "bubble": times.bubble,
            "straggler": times.straggler,
        },
        "forward_share": forward_share(question, option, verified),
        "limits": limits(times, peak, question),
        "stages": [asdict(stage) | {"device": stage.device} for stage in option.plan.stages],
        "sent_bytes": sent_bytes(question, option),
        "verified": verified is not None,
        "traced": [] if verified is None else list(map(_traced, verified.ranks, verified.traces)),
        "changes": [asdict(change) for change in changes(question, option)[:NUM_CHANGES]],
        "overrides": overrides(option),
    }
    if budget.tokens is not None:
        hours = budget.tokens / row["tokens_per_s"] / 3600
        row |= {"hours": hours, "gpu_hours": hours * question.gpus}
        row["usd"] = None if budget.price is None else row["gpu_hours"] * budget.price
    return row


def forward_share(question: Question, option: Option, verified: Verified | None) -> float:
    """Return the share of the forward passes in the time that the operators of all passes take."""
    if verified is None:
        return 1 / (3 + recomputed_share(option.parallel, question.workload(option.accumulation)))
    seconds = {"forward": 0.0, "backward": 0.0}
    for operator in verified.traces[0].operators:
        if operator.phase in seconds:
            seconds[operator.phase] += operator.seconds(question.hardware)
    return seconds["forward"] / sum(seconds.values())


def _traced(rank: int, trace: Trace) -> dict[str, Any]:
    return {
        "rank": rank,
        "peak_bytes": trace.peak,
        "peak_phase": trace.peak_phase,
        "parts": trace.parts,
        "operators": len(trace.operators),
        "micro_batches": trace.micro_batches,
    }


def sent_bytes(question: Question, option: Option) -> dict[str, dict[str, Any]]:
    """Return axis -> the bytes that a rank sends in a step, and the slowest link over which they go."""
    node, layout = question.hardware.gpus_per_node, option.layout
    groups = group_shapes(layout)
    found: dict[str, dict[str, Any]] = {}
    for axis, nbytes in option.plan.traffic.items():
        stride, size = groups.get(axis, (1, layout.world))
        if nbytes:
            found[axis] = {"bytes": nbytes, "over": "node" if stride * size <= node else "network"}
    return found


def limits(times: StepTimes, peak: int, question: Question) -> str:
    """Return what most of the step is, and how full the memory is."""
    parts = {
        "matmuls": times.matmul,
        "attention": times.attention,
        "memory-bound operators": times.memory_bound,
        "the update": times.update,
        "the pipeline's idle time": times.bubble,
        "stragglers": times.straggler,
        **{f"exposed communication ({axis})": seconds for axis, seconds in times.exposed.items()},
    }
    name = max(parts, key=parts.__getitem__)
    seconds = parts[name]
    return f"{name}: {seconds / times.total:.0%} of the step; memory {peak / question.hardware.usable:.0%} full"


def overrides(option: Option) -> list[str]:
    """Return the arguments of `train.py` that choose this layout."""
    layout = option.layout
    axes = [f"parallel.{axis}={getattr(layout, axis)}" for axis in (*AXES, "expert", "expert_tensor")]
    chosen = [*axes, f"parallel.recompute={option.parallel.recompute}", f"train.accumulation={option.accumulation}"]
    if layout.pipeline > 1:
        chosen.append(f"parallel.schedule={option.parallel.schedule}")
    return chosen + (["parallel.overlap=true"] if layout.overlap else [])
