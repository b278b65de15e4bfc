"""Where the time of a training step goes: a trace of torch's profiler, and its time by groups of operators.

`StepProfiler` traces a few steps of a run (`train.profile=true`). It writes `profile/trace.json.gz`, which
https://ui.perfetto.dev shows, and `profile.md`, one table. `summarize_trace` makes the table's numbers from a trace, so
that they can be computed again from the file.

A kernel belongs to the group that follows from three facts: its name, the operators that launched it, and the part of
the model whose forward pass they belong to. Hooks mark the parts. An operator of the backward pass has the part of the
forward operator with the same autograd sequence number. Blocks that torch.compile has compiled have no parts inside:
the names of their kernels decide.
"""

import gzip
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self
from unittest.mock import patch

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from moe.accounting.flops import MatmulCosts
from moe.config import ModelConfig
from moe.layer import Block, MoELayer
from moe.model import Transformer
from training.report.terminal import show_line
from training.step import StepResult

PREFIX = "part: "
"""The start of the names of the regions that mark parts of the model in a trace."""
DATA = f"{PREFIX}data"
"""The region in which the host makes the batches of a step."""
EXPERTS, DENSE, ATTENTION, HEAD = "experts' matmul", "dense matmul", "attention", "head and cross-entropy"
ROUTING, DISPATCH, OPTIMIZER = "routing", "dispatch and combine", "optimizer and clipping"
ELEMENTWISE, NORMS, CASTS, COPIES = "activations, elementwise", "norms and RoPE", "casts", "copies"
EMBEDDING, COMMUNICATION, MAKING_DATA, OTHER = "embedding", "communication", "data", "other"
IDLE = "idle"
"""Time in which the device has nothing to do. On a CPU: time outside of all operators, which Python spends."""
GROUPS = (
    *(EXPERTS, DENSE, ATTENTION, EMBEDDING, HEAD, ROUTING, DISPATCH, ELEMENTWISE, NORMS, OPTIMIZER),
    *(CASTS, COPIES, COMMUNICATION, MAKING_DATA, OTHER, IDLE),
)
"""The groups, in the order of the table."""

WAIT_STEPS, WARM_UP_STEPS, TRACED_STEPS = 3, 1, 3
"""Steps before the trace, steps in which the profiler runs but its trace is thrown away, and steps of the trace."""

_MATMUL = re.compile(r"\b(mm|addmm|bmm|baddbmm|matmul|linear)\b|gemm|nvjet|cutlass|xmma|cublas|cudnn_mm", re.I)
_BY_NAME = (
    (COMMUNICATION, re.compile(r"nccl|c10d::|gloo", re.I)),
    (OPTIMIZER, re.compile(r"optimizer\.step|adamw|_foreach_|multi_tensor|vector_norm|lpnorm", re.I)),
    (EXPERTS, re.compile(r"grouped_mm|grouped_gemm|groupproblemshape|loop_matmul", re.I)),
    (ATTENTION, re.compile(r"flash|fmha|flex|scaled_dot_product|sdpa|varlen|attention", re.I)),
    (ROUTING, re.compile(r"mixwright::wide_linear")),
    (HEAD, re.compile(r"entropy|log_softmax|nll_loss|logsumexp|softmax_statistics|logit_grad", re.I)),
)
"""Names that decide wherever they are found, in this order."""
_BY_WORD = (
    (DISPATCH, re.compile(r"_scatter(backward)?\b|_combine|combine_rows|scatter_rows|group_by|index_select", re.I)),
    (ROUTING, re.compile(r"sort|top_?k|router|routing|searchsorted|bincount|cumsum", re.I)),
    (NORMS, re.compile(r"rms_?norm|layer_norm|rsqrt|rope|rotary|_cos|_sin", re.I)),
    (ELEMENTWISE, re.compile(r"silu|gelu|swiglu|relu|sigmoid", re.I)),
)
"""Names that decide where no part of the model is known."""
_COPY = re.compile(r"aten::(copy_|clone|cat|stack|contiguous|fill_|zero_|zeros|ones|pad|constant_pad_nd)\b", re.I)
_ONLY_CAST = re.compile(r"triton_\w+?_fused(_(_to_copy|view|_unsafe_view|t|transpose|permute|clone|unsqueeze))+(_\d+)?")
_PART_GROUP = {
    "embedding": EMBEDDING,
    "routing": ROUTING,
    "dispatch": DISPATCH,
    "norm": NORMS,
    "attention": NORMS,
    "data": MAKING_DATA,
}
"""The group of what is neither a matmul nor a cast in a part."""
_MATMUL_GROUP = {"experts": EXPERTS, "routing": ROUTING, "dispatch": DISPATCH}


def group_of(names: Sequence[str], part: str | None, *, copies: bool = False) -> str:
    """Return the group, one of `GROUPS`, of a kernel or an operator.

    Args:
        names: of the kernel or operator, and of the operators that contain it, the innermost first.
        part: the part of the model that it belongs to, as `mark_parts` names it; None if it is not known.
        copies: whether it is a copy or a fill that no kernel executes.
    """
    if copies:
        return COPIES
    text = " ".join(names)
    for group, pattern in _BY_NAME:
        if pattern.search(text):
            return group
    if part in ("core", "head"):
        return ATTENTION if part == "core" else HEAD
    if any(map(_MATMUL.search, names[:2])):
        return _MATMUL_GROUP.get(part or "", DENSE)
    if "aten::_to_copy" in names or "join_kernel" in names[0] or _ONLY_CAST.fullmatch(names[0]):
        return CASTS
    if part in _PART_GROUP:
        return _PART_GROUP[part]
    for group, pattern in _BY_WORD:
        if pattern.search(text):
            return group
    if any(map(_COPY.match, names)):
        return COPIES
    known = part is not None or "aten::" in text or "triton" in text
    return ELEMENTWISE if known else OTHER


# ------------------------------------------------------------------------------------------------ reading a trace


class TraceSummary(NamedTuple):
    """The time of the steps in a trace, in milliseconds of one step."""

    step_ms: float
    group_ms: dict[str, float]
    """Group -> time. On a GPU, kernels that run at the same time share their time. The sum is `step_ms`."""
    names: list[tuple[str, str, float]]
    """(group, name, ms) of the kernels or operators that take most time, the longest first."""


@dataclass
class _Event:
    """An operator, a call of the CUDA runtime, or a region of a host thread."""

    name: str
    start: float
    end: float
    thread: tuple[Any, Any]
    arguments: Mapping[str, Any]
    region: bool
    parent: "_Event | None" = None
    children_us: float = 0.0

    def ancestors(self) -> Iterator["_Event"]:
        """Yield this event and those that contain it, the innermost first."""
        event: _Event | None = self
        while event is not None:
            yield event
            event = event.parent


_HOST = ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver")
_COPY_KINDS = ("gpu_memcpy", "gpu_memset")


def summarize_trace(events: Iterable[Mapping[str, Any]], steps: int, *, longest: int = 40) -> TraceSummary:
    """Return where the time of a trace goes.

    Args:
        events: `traceEvents` of a trace in Chrome's format that `torch.profiler` exported.
        steps: number of optimizer steps in the trace.
        longest: number of names to return.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    host = _nest(event for event in complete if event.get("cat") in _HOST)
    part_of_sequence = _parts_by_sequence(host)
    kernels = [event for event in complete if event.get("cat") in ("kernel", *_COPY_KINDS)]
    if kernels:
        timed, window = _device_times(kernels, host, part_of_sequence)
    else:
        timed, window = _host_times(host, part_of_sequence)
    scale = 1e-3 / steps
    totals: dict[str, float] = dict.fromkeys(GROUPS, 0.0)
    by_name: dict[tuple[str, str], float] = {}
    for group, name, time in timed:
        totals[group] += time
        by_name[group, name] = by_name.get((group, name), 0.0) + time
    totals[IDLE] += max(0.0, window - sum(totals.values()))
    order = sorted(by_name.items(), key=lambda item: -item[1])[:longest]
    return TraceSummary(
        window * scale,
        {group: time * scale for group, time in totals.items() if time},
        [(group, name, time * scale) for (group, name), time in order],
    )


def _nest(events: Iterable[Mapping[str, Any]]) -> list[_Event]:
    """Return the host's events with their parents: those of the same thread that contain them."""
    found = [
        _Event(
            str(event["name"]),
            float(event["ts"]),
            float(event["ts"]) + float(event.get("dur", 0)),
            (event.get("pid"), event.get("tid")),
            event.get("args", {}),
            event.get("cat") == "user_annotation",
        )
        for event in events
    ]
    found.sort(key=lambda event: (event.start, -event.end))
    open_events: dict[tuple[Any, Any], list[_Event]] = {}
    for event in found:
        stack = open_events.setdefault(event.thread, [])
        while stack and stack[-1].end <= event.start:
            stack.pop()
        if stack:
            event.parent = stack[-1]
            event.parent.children_us += event.end - event.start
        stack.append(event)
    return found


def _parts_by_sequence(host: Iterable[_Event]) -> dict[int, str]:
    """Return autograd's sequence number -> the part of the model of the forward operator that has it.

    Operators that autograd does not record have the number of the next one that it does record, which comes last.
    Forward operators that the backward pass repeats have numbers of another thread's count, and are left out.
    """
    parts: dict[int, str] = {}
    for event in host:
        number = event.arguments.get("Sequence number")
        if number is None or any(above.arguments.get("Fwd thread id") for above in event.ancestors()):
            continue
        part = next((above.name for above in event.ancestors() if above.name.startswith(PREFIX)), None)
        if part is None:
            parts.pop(number, None)
        else:
            parts[number] = part.removeprefix(PREFIX)
    return parts


def _locate(event: _Event | None, part_of_sequence: Mapping[int, str]) -> tuple[list[str], str | None]:
    """Return the names of an event's operators, the innermost first, and its part of the model."""
    names: list[str] = []
    for above in () if event is None else event.ancestors():
        if above.name.startswith(PREFIX):
            return names, above.name.removeprefix(PREFIX)
        if not above.region or above.name.startswith("Optimizer."):
            names.append(above.name)
        if above.arguments.get("Fwd thread id") and above.arguments.get("Sequence number") in part_of_sequence:
            return names, part_of_sequence[above.arguments["Sequence number"]]
    return names, None


def _device_times(
    kernels: Sequence[Mapping[str, Any]], host: Sequence[_Event], part_of_sequence: Mapping[int, str]
) -> tuple[list[tuple[str, str, float]], float]:
    """Return (group, name, µs) of every kernel and copy, and the µs from the first to the end of the last."""
    launches = {event.arguments["correlation"]: event for event in host if "correlation" in event.arguments}
    timed, end = [], 0.0
    ordered = sorted(kernels, key=lambda kernel: float(kernel["ts"]))
    for kernel in ordered:
        launch = launches.get(kernel.get("args", {}).get("correlation"))
        names, part = _locate(None if launch is None else launch.parent, part_of_sequence)
        group = group_of([str(kernel["name"]), *names], part, copies=kernel["cat"] in _COPY_KINDS)
        start, stop = float(kernel["ts"]), float(kernel["ts"]) + float(kernel.get("dur", 0))
        timed.append((group, str(kernel["name"]), max(0.0, stop - max(start, end))))  # the time that only it has
        end = max(end, stop)
    first = float(ordered[0]["ts"])
    data = [(max(event.start, first), min(event.end, end)) for event in host if event.name == DATA]
    busy = [(float(kernel["ts"]), float(kernel["ts"]) + float(kernel.get("dur", 0))) for kernel in ordered]
    timed.append((MAKING_DATA, "the device waits while the host makes batches", _uncovered(data, busy)))
    return timed, end - first


def _uncovered(intervals: Iterable[tuple[float, float]], cover: Sequence[tuple[float, float]]) -> float:
    """Return the length of what `cover`, which is in order of its starts, leaves of `intervals`."""
    length = 0.0
    for start, end in intervals:
        for first, last in cover:
            if last > start and first < end:
                length += max(0.0, first - start)
                start = max(start, last)
        length += max(0.0, end - start)
    return length


def _host_times(
    host: Sequence[_Event], part_of_sequence: Mapping[int, str]
) -> tuple[list[tuple[str, str, float]], float]:
    """Return (group, name, µs) of every operator without those inside it, on the thread with most operators."""
    operators = [event for event in host if not event.region or event.name == DATA]
    if not operators:
        return [], 0.0
    threads: dict[tuple[Any, Any], int] = {}
    for event in operators:
        threads[event.thread] = threads.get(event.thread, 0) + 1
    main = max(threads, key=lambda thread: threads[thread])
    timed = []
    for event in operators:
        if event.thread == main:
            names, part = _locate(event, part_of_sequence)
            own = max(0.0, event.end - event.start - event.children_us)
            timed.append((group_of(names or [event.name], part), event.name, own))
    of_main = [event for event in host if event.thread == main]
    return timed, max(event.end for event in of_main) - min(event.start for event in of_main)


def read_trace(path: Path) -> list[dict[str, Any]]:
    """Return the events of a compressed trace file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return events


# ------------------------------------------------------------------------------------------------ the FLOPs of a step


def flops_by_group(result: StepResult, costs: MatmulCosts, config: ModelConfig) -> dict[str, float]:
    """Return group -> FLOPs of one optimizer step, for the groups whose FLOPs are known. Their sum is that of the step.

    The router's matmuls count as dense ones, which are about a thousand times larger.
    """
    head = config.dim * (config.vocab_size or 0)
    return {
        EXPERTS: 6.0 * costs.assignment * result.assignments,
        DENSE: 6.0 * (costs.token - head) * result.tokens,
        ATTENTION: 6.0 * costs.pair * result.pairs,
        HEAD: 6.0 * head * result.tokens,
    }


def profile_lines(
    summary: TraceSummary, flops: Mapping[str, float], peak: float | None, about: Mapping[str, str]
) -> list[str]:
    """Return the lines of `profile.md`.

    Args:
        flops: what `flops_by_group` returned.
        peak: FLOP/s of the device; None if unknown.
        about: further facts of the run, by their names.
    """
    lines = ["# Profile", "", *(f"- {name}: {value}" for name, value in about.items())]
    total = sum(flops.values()) / summary.step_ms / 1e9
    of_peak = "" if peak is None else f", {total * 1e12 / peak:.1%} of the peak"
    lines += [f"- time of a step: {summary.step_ms:.1f} ms, {total:.3g} TFLOP/s of the model{of_peak}", ""]
    lines += ["| group | ms a step | share | TFLOP/s | of the peak |", "|---|--:|--:|--:|--:|"]
    for group, time in summary.group_ms.items():
        speed = flops[group] / time / 1e9 if flops.get(group) and time else None
        cells = [group, f"{time:.2f}", f"{time / summary.step_ms:.1%}", "" if speed is None else f"{speed:.3g}"]
        cells.append("" if speed is None or peak is None else f"{speed * 1e12 / peak:.1%}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| longest kernels or operators | group | ms a step |", "|---|---|--:|"]
    lines += [f"| `{name[:90].replace('|', '/')}` | {group} | {time:.3f} |" for group, name, time in summary.names]
    return lines


# --------------------------------------------------------------------------------------------------- making a trace


@contextmanager
def mark_parts(models: Sequence[Transformer]) -> Iterator[None]:
    """Mark the parts of the models in traces, while the context is open."""
    with ExitStack() as stack:
        for model in models:
            for module, part in _parts(model):
                regions: list[Any] = []
                stack.callback(module.register_forward_pre_hook(_opener(regions, part)).remove)
                stack.callback(module.register_forward_hook(_closer(regions)).remove)
            for block in _marked_blocks(model):
                if isinstance(block.ffn, MoELayer):
                    experts = block.ffn.experts
                    stack.enter_context(patch.object(experts, "apply_to", _marked(experts.apply_to, "experts")))
        yield


def _marked(method: Callable[..., Any], part: str) -> Callable[..., Any]:
    """Return a method that is marked as a part. (Parts that are modules are marked by hooks.)"""

    def marked(*arguments: Any) -> Any:
        with record_function(f"{PREFIX}{part}"):
            return method(*arguments)

    return marked


def _opener(regions: list[Any], part: str) -> Any:
    def open_region(module: nn.Module, arguments: Any) -> None:
        region = record_function(f"{PREFIX}{part}")
        region.__enter__()
        regions.append(region)

    return open_region


def _closer(regions: list[Any]) -> Any:
    def close_region(module: nn.Module, arguments: Any, output: Any) -> None:
        regions.pop().__exit__(None, None, None)

    return close_region


def _marked_blocks(model: Transformer) -> list[Block]:
    """Return the blocks in which parts are marked. Compiled blocks are left out: a hook would compile them again."""
    # A pipeline stage has None in place of other layers.
    return [block for block in model.layers if isinstance(block, Block) and model.run_block is Block.__call__]


def _parts(model: Transformer) -> Iterator[tuple[nn.Module, str]]:
    """Yield modules and their parts."""
    for block in _marked_blocks(model):
        yield from ((block.attention_norm, "norm"), (block.ffn_norm, "norm"))
        yield from ((block.attention, "attention"), (block.attention.core, "core"))
        if isinstance(block.ffn, MoELayer):
            yield from ((block.ffn, "dispatch"), (block.ffn.router, "routing"))
        network = block.ffn.shared if isinstance(block.ffn, MoELayer) else block.ffn
        if network is not None:
            yield network, "dense"
    for module, part in ((model.lookup, "embedding"), (model.norm, "norm"), (model.head, "head")):
        if module is not None:
            yield module, part


def activities(device: torch.device) -> list[ProfilerActivity]:
    """Return what the profiler records: the host, and the GPU if there is one."""
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]


class StepProfiler:
    """Traces a few steps of a run, and writes `profile/trace.json.gz` and `profile.md` into its directory.

    The steps are after the first ones, which compile and allocate. A short run has fewer of each.

    Args:
        models: this rank's part of the model.
        directory: the run's directory.
        steps: number of steps that this process trains, at least 1.
        costs: what the matmuls of the whole model cost.
        ranks: number of ranks, which share the FLOPs of a step.
        peak: FLOP/s of the device; None if unknown.
        about: facts of the run, for the table.
    """

    def __init__(
        self,
        models: Sequence[Transformer],
        device: torch.device,
        directory: Path,
        *,
        steps: int,
        first_step: int,
        costs: MatmulCosts,
        ranks: int,
        peak: float | None,
        about: Mapping[str, str],
    ) -> None:
        self.models, self.device, self.directory, self.first_step = models, device, directory, first_step
        self.costs, self.ranks, self.peak, self.about = costs, ranks, peak, about
        warm_up = min(WARM_UP_STEPS, steps - 1)
        self.traced = min(TRACED_STEPS, steps - warm_up)
        wait = min(WAIT_STEPS, steps - warm_up - self.traced)
        self.untraced = wait + warm_up
        self.results: list[StepResult] = []
        """Of the steps so far, until the last one that is traced."""
        self._open = ExitStack()
        plan = schedule(wait=wait, warmup=warm_up, active=self.traced, repeat=1)
        self._profile = profile(activities=activities(device), schedule=plan, acc_events=True)

    def __enter__(self) -> Self:
        self._open.enter_context(mark_parts(self.models))
        self._profile.start()
        self._open.callback(self._profile.stop)
        return self

    def pauses_after(self, done: int) -> bool:
        """Return whether the trace begins or ends after step `done`, so that no later step may have been started."""
        return done - self.first_step in (self.untraced, self.untraced + self.traced)

    def step(self, result: StepResult) -> None:
        """Receive the result of the optimizer step that has just been done."""
        last = self.untraced + self.traced
        if len(self.results) == last:
            return
        self.results.append(result)
        if len(self.results) < last:
            self._profile.step()
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # The trace has kernels that have run.
        self._open.close()
        self._write()

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def _write(self) -> None:
        folder = self.directory / "profile"
        folder.mkdir(exist_ok=True)
        trace = folder / "trace.json.gz"
        self._profile.export_chrome_trace(str(trace))
        summary = summarize_trace(read_trace(trace), self.traced)
        known = [flops_by_group(result, self.costs, self.models[0].config) for result in self.results[self.untraced :]]
        flops = {group: sum(step[group] for step in known) / len(known) / self.ranks for group in known[0]}
        first = self.first_step + self.untraced + 1
        about = {**self.about, "steps": f"{first} to {first + self.traced - 1}"}
        file = self.directory / "profile.md"
        file.write_text("\n".join(profile_lines(summary, flops, self.peak, about)) + "\n", encoding="utf-8")
        show_line(f"profile of the steps {about['steps']}: {file}")
