"""Compare the predictions of `training.planning` with real steps on this machine, and print a table of the errors.

    python benchmarks/plan.py                      # all configurations, with 1, 2 and 4 processes
    python benchmarks/plan.py --quick              # a small part
    python benchmarks/plan.py --only deepspeed --json errors.json

Memory. Every rank takes six real steps, and the last five are measured: the tensors that exist before them, and how far
the events of torch's allocator rise above these (`training.planning.peak`). The step with the smallest peak counts.
`training.planning.trace` predicts the same without values, once with balanced routing and once with the shares of the
experts' assignments in the measured step: which experts are popular is an input of a prediction. The error of a
configuration is that of the rank with the largest error. The resident size is that of the process at its largest in the
same step, above that before the model existed.

Bytes sent. In another step, the experts of every token are those of a balanced prediction, and every collective is
counted (`benchmarks/traffic.py`).
"""

import argparse
import ctypes
import gc
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

if __name__ == "__main__":
    # This checkout's modules come first, whatever copy is installed and whatever the current directory is.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_stages.models import MODELS
from benchmarks.traffic import Traffic
from common.files import write_atomically
from common.strict import from_dict
from common.text import to_json
from data.batch import Batch
from moe.config import RouterConfig
from parallel.layout import Layout
from parallel.mesh import Groups, build_mesh, close_process_group, init_process_group
from parallel.planning.hardware import Hardware, with_rates
from parallel.planning.plan import Plan
from parallel.planning.times import StepTimes
from parallel.startup.launch import World, launch_workers, world_from_env
from parallel.startup.rendezvous import open_store
from scripts.cli.command_line import compose_config
from training.build import build_engine, build_parts
from training.config import Config
from training.device import compute_dtype
from training.engine import Engine
from training.layout import build_workload, resolve_layout
from training.planning.peak import AllocatorPeak
from training.planning.skew import Loads
from training.planning.timing import step_times
from training.planning.trace import Subject, Trace, example_batches, route_by_loads, trace_step
from training.report.terminal import show_table
from training.step import StepResult, train_step

CPU = torch.device("cpu")
MEASURED_STEPS = 5
"""Steps of which the one with the smallest peak counts."""
BASE = (
    "model.vocab_size=512", "train.seq_len=128", "train.global_batch=32", "train.compile=false",
    "train.precision=fp32", "tracking=disabled",
)  # fmt: skip
BUCKETS = Path(__file__).with_name("deepspeed_buckets.json")
DEEP = "model.num_layers=4"
DOCUMENT = 50
"""Tokens of a document where rows are packed."""


class Job(NamedTuple):
    """One configuration."""

    model: str
    """A preset."""
    ranks: int
    layout: str = ""
    """Keys of `parallel` joined by `+`."""
    keys: tuple[str, ...] = ()
    """Other overrides."""
    packed: bool = False
    """Whether rows have several documents."""
    quick: bool = False
    """Whether it belongs to the small part."""

    def __str__(self) -> str:
        hidden = (DEEP, "engine=deepspeed", f"engine.ds_config={BUCKETS}", "router.allow_noncausal=true")
        keys = [key.removeprefix("train.").removeprefix("engine.") for key in self.keys if key not in hidden]
        return ", ".join([self.model, *filter(None, [self.layout]), *keys, *(["packed"] if self.packed else [])])


def _zero(stage: int) -> tuple[str, ...]:
    # DeepSpeed's buckets have 2 GB by default, beside which a small model could not be seen.
    return "engine=deepspeed", f"engine.zero_stage={stage}", f"engine.ds_config={BUCKETS}"


BF16, TWO, FOUR = "train.precision=bf16", "train.accumulation=2", "train.accumulation=4"
EXPERT_CHOICE = ("router=expert_choice", "router.allow_noncausal=true")
JOBS = (
    Job("mixtral_tiny", 1),
    Job("mixtral_tiny", 1, "recompute=selective"),
    Job("mixtral_tiny", 1, "recompute=full", (TWO,)),
    Job("mixtral_tiny", 1, "", (BF16, TWO), packed=True, quick=True),
    Job("mixtral_tiny", 1, "", EXPERT_CHOICE),
    Job("llama2_tiny", 1, "recompute=full", (BF16,)),
    Job("mistral_tiny", 1, packed=True),
    Job("switch_tiny", 1, "", (TWO,)),
    Job("glam_tiny", 1),
    Job("deepseek_moe_tiny", 1, "recompute=selective", (BF16,)),
    Job("deepseek_v3_tiny", 1, packed=True),
    Job("deepseek_v2_tiny", 1, "recompute=selective"),
    Job("olmoe_tiny", 1, packed=True),
    Job("mixtral_tiny", 2, "replicate=2", (FOUR,)),
    Job("mixtral_tiny", 2, "expert=2", quick=True),
    Job("mixtral_tiny", 2, "expert=2+overlap=true"),
    Job("mixtral_tiny", 2, "expert=2+recompute=full", (BF16,)),
    Job("mixtral_tiny", 2, "expert=2", EXPERT_CHOICE),
    Job("mixtral_tiny", 2, "expert_tensor=2", (TWO,)),
    Job("mixtral_tiny", 2, "tensor=2"),
    Job("mixtral_tiny", 2, "context=2", packed=True),
    Job("mixtral_tiny", 2, "pipeline=2", (FOUR, DEEP), quick=True),
    Job("mixtral_tiny", 2, "pipeline=2+schedule=interleaved", (FOUR, DEEP)),
    Job("mixtral_tiny", 2, "pipeline=2+schedule=zero_bubble", (FOUR, DEEP)),
    Job("llama2_tiny", 2, "tensor=2+recompute=full"),
    Job("llama2_tiny", 2, "context=2"),
    Job("mistral_tiny", 2, "shard=2", (TWO, BF16)),
    Job("switch_tiny", 2, "expert=2", (BF16, FOUR)),
    Job("glam_tiny", 2, "shard=2+expert=2+recompute=selective", quick=True),
    Job("deepseek_moe_tiny", 2, "shard=2"),
    Job("deepseek_v3_tiny", 2, "expert=2", (TWO,)),
    Job("deepseek_v3_tiny", 2, "tensor=2"),
    Job("qwen2_moe_tiny", 2, "expert=2", (BF16,)),
    Job("olmoe_tiny", 2, "tensor=2"),
    Job("mixtral_tiny", 2, "replicate=2", _zero(1)),
    Job("mixtral_tiny", 2, "expert=2", _zero(2)),
    Job("deepseek_moe_tiny", 2, "expert=2", (*_zero(3), BF16)),
    Job("llama2_tiny", 2, "replicate=2+recompute=full", (*_zero(3), TWO)),
    Job("mixtral_tiny", 4, "expert=4", packed=True),
    Job("mixtral_tiny", 4, "tensor=2+expert=4", (TWO,)),
    Job("mixtral_tiny", 4, "pipeline=4", (FOUR, DEEP)),
    Job("mixtral_tiny", 4, "pipeline=2+shard=2", (FOUR, DEEP, BF16)),
    Job("mixtral_tiny", 4, "pipeline=2+expert=2+schedule=zero_bubble", (FOUR, DEEP)),
    Job("llama2_tiny", 4, "shard=2+tensor=2"),
    Job("mistral_tiny", 4, "replicate=2+shard=2+recompute=selective", (TWO,), packed=True),
    Job("switch_tiny", 4, "context=2+tensor=2", (TWO,)),
    Job("glam_tiny", 4, "shard=4+expert=4+overlap=true", (BF16,)),
    Job("deepseek_moe_tiny", 4, "expert=2+expert_tensor=2"),
    Job("deepseek_v3_tiny", 4, "shard=4+expert=2+recompute=full", (BF16, FOUR)),
    Job("mixtral_tiny", 4, "expert=2", _zero(2)),
)


@dataclass(frozen=True)
class Setting:
    """A job as the parts of training need it."""

    config: Config
    layout: Layout
    dtype: torch.dtype
    closed_form: Plan
    document: int | None

    @property
    def depends_on_loads(self) -> bool:
        """Whether the rows of a rank depend on the popularity of experts. (In bf16, those of an expert are aligned.)"""
        aligned = self.dtype == torch.bfloat16
        return self.layout.expert > 1 or self.config.router.capacity_factor is not None or aligned


def setting_of(job: Job) -> Setting:
    """Return what a job trains."""
    layout = [f"parallel.{key}" for key in job.layout.split("+") if key]
    expert = [] if "expert=" in job.layout else ["parallel.expert=1"]
    axes = [f"parallel.{axis}=1" for axis in ("tensor", "pipeline", "context", "shard") if f"{axis}=" not in layout]
    overrides = [f"model={job.model}", *axes, *BASE, *expert, *layout, *job.keys]
    return _setting(overrides, job.ranks, DOCUMENT if job.packed else None)


def _setting(overrides: Sequence[str], ranks: int, document: int | None) -> Setting:
    config = from_dict(Config, compose_config("config", list(overrides)))
    dtype = compute_dtype(config.train.precision, CPU)
    workload = build_workload(config, config.model, itemsize=dtype.itemsize)
    config, plan, _ = resolve_layout(config, workload, World(world_size=ranks))
    return Setting(config, plan.layout, dtype, plan, document)


class Measured(NamedTuple):
    """What one rank did in real steps."""

    before: int
    """Bytes of tensors before the step."""
    above: int
    """How far the allocator's events rise in the step."""
    resident: int
    """The largest resident size in the step, above that before the model existed."""
    sent: dict[str, float]
    """Bytes by axis, with balanced routing."""
    loads: Loads | None
    """Shares of the assignments in the measured step, over all ranks."""

    @property
    def peak(self) -> int:
        return self.before + self.above


def measure(setting: Setting, groups: Groups) -> tuple[Measured, Any]:
    """Take real steps. Collective over the initialised world.

    Returns:
        The measurements, and the engine, which has to stay alive: closing DeepSpeed's ends it for the whole process.
    """
    config, layout, router = setting.config, setting.layout, setting.config.router
    known = _storages()
    resident = _resident("VmRSS")
    mesh = build_mesh(CPU, layout, groups)
    parts = build_parts(config, config.model, mesh, setting.dtype, config.run.seed)
    engine = build_engine(config, parts, mesh)
    torch.manual_seed(layout.data_rank(mesh.rank))
    batches = example_batches(config, layout, config.train.accumulation, setting.document)
    train_step(engine, batches, router, 1e-3)
    before = sum(nbytes for key, nbytes in _storages().items() if key not in known)
    steps = [_measure_step(engine, batches, router) for _ in range(MEASURED_STEPS)]
    # A thread of gloo can release its buffers some time after a collective has ended. The smallest peak has the fewest
    # such buffers.
    peak, highest, result = min(steps, key=lambda step: step[0])
    loads = None
    if result.counts_LE is not None:
        loads = tuple(tuple((row / row.sum()).tolist()) for row in result.counts_LE.double())
    route_by_loads(parts, None)
    counter = Traffic(mesh)
    with counter:
        train_step(engine, batches, router, 1e-3)
    return Measured(before, peak, highest - resident, dict(counter.sent), loads), engine


def _measure_step(engine: Engine, batches: Sequence[Batch], router: RouterConfig) -> tuple[int, int, StepResult]:
    """Take a step. Return how far the allocator's events rise, the largest resident size, and the step's result."""
    Path("/proc/self/clear_refs").write_text("5")  # The largest resident size starts again.
    with AllocatorPeak(CPU) as peak:
        result = train_step(engine, batches, router, 1e-3)
    return peak.above, _resident("VmHWM"), result


def _storages() -> dict[int, int]:
    """Return the address and the bytes of the memory of every tensor, after memory that is free is given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    found = {}
    for value in gc.get_objects():
        if issubclass(type(value), torch.Tensor) and type(value).__name__ != "DTensor" and value.device.type == "cpu":
            storage = value.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
    return found


def _resident(field: str) -> int:
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def work(jobs: Sequence[Job]) -> list[list[Measured]]:
    """Measure jobs, and return the measurements of all ranks for each. The function of every worker."""
    world = world_from_env()
    init_process_group(open_store(world, 300.0), world.rank, world.world_size, CPU, 300.0)
    groups: Groups = {}
    results, engines = [], {}
    for job in jobs:
        measured, engine = measure(setting_of(job), groups)
        engines[type(engine)] = engine
        by_rank: list[Any] = [None] * world.world_size
        dist.all_gather_object(by_rank, measured)
        results.append(by_rank)
        if world.rank == 0:
            print(f"measured: {job}", file=sys.stderr, flush=True)
    for engine in engines.values():
        engine.close()
    close_process_group()
    return results


class Compared(NamedTuple):
    """One rank: predictions and measurements, in bytes."""

    rank: int
    measured: int
    resident: int
    predicted: int
    """With the loads of the measured step."""
    balanced: int
    """With balanced routing."""
    closed_form: int
    """`parallel.planning.plan`."""
    sent: dict[str, int]
    """By axis, with balanced routing."""
    sent_predicted: dict[str, int]

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def balanced_error(self) -> float:
        return self.balanced / self.measured - 1

    @property
    def closed_form_error(self) -> float:
        return self.closed_form / self.measured - 1


def compare(setting: Setting, rank: int, measured: Measured) -> Compared:
    """Predict what was measured on a rank."""
    subject = Subject(setting.config, setting.layout, rank, setting.dtype, document=setting.document)
    balanced = trace_step(replace(subject, micro_batches=setting.config.train.accumulation))
    skewed = balanced
    if measured.loads is not None and setting.depends_on_loads:
        skewed = trace_step(replace(subject, loads=measured.loads))
    return Compared(
        rank,
        measured.peak,
        measured.resident,
        predicted=skewed.peak,
        balanced=balanced.peak,
        closed_form=setting.closed_form.stages[setting.layout.coordinates(rank)["pipeline"]].device,
        sent={axis: round(sent) for axis, sent in measured.sent.items()},
        sent_predicted=sent_of(balanced),
    )


def sent_of(trace: Trace) -> dict[str, int]:
    """Return the bytes that the traced rank sends, by axis."""
    total: Counter[str] = Counter()
    for collective in trace.collectives:
        if collective.sent:
            total[collective.axis] += collective.sent
    return dict(total)


def fullest_ranks(layout: Layout, measured: Sequence[Measured]) -> list[int]:
    """Return the rank with the largest measured peak at each position of the pipeline."""
    stages = [layout.coordinates(rank)["pipeline"] for rank in range(layout.world)]
    return [
        max((rank for rank in range(layout.world) if stages[rank] == stage), key=lambda rank: measured[rank].peak)
        for stage in range(layout.pipeline)
    ]


def compare_all(jobs: Sequence[Job], all_ranks: bool) -> Iterator[tuple[Job, list[Compared]]]:
    """Measure and predict jobs, those of each number of ranks together."""
    for ranks in sorted({job.ranks for job in jobs}):
        of_world = [job for job in jobs if job.ranks == ranks]
        for job, measured in zip(of_world, launch_workers(work, (of_world,), nproc=ranks)[0], strict=True):
            setting = setting_of(job)
            chosen = range(ranks) if all_ranks else fullest_ranks(setting.layout, measured)
            yield job, [compare(setting, rank, measured[rank]) for rank in chosen]


def show(results: Sequence[tuple[Job, list[Compared]]]) -> None:
    """Print the table, and how many predictions are close."""
    rows = []
    for job, ranks in results:
        worst = max(ranks, key=lambda rank: abs(rank.error))
        sizes = (worst.measured, worst.resident, worst.predicted)
        errors = (worst.error, worst.balanced_error, worst.closed_form_error)
        total, wrong = sum(sum(rank.sent.values()) for rank in ranks), differences(ranks)
        rows.append(
            (
                str(job), str(job.ranks), *(f"{size / 1e6:.2f}" for size in sizes),
                *(f"{error:+.1%}" for error in errors), f"{total / len(ranks):,.0f}", wrong or "equal",
            )
        )  # fmt: skip
    show_table("Memory of a step on the rank with the largest error, MB; bytes sent by a rank", COLUMNS, rows)
    for name, errors in (
        ("with the measured loads", [max(abs(rank.error) for rank in ranks) for _, ranks in results]),
        ("with balanced routing", [max(abs(rank.balanced_error) for rank in ranks) for _, ranks in results]),
        ("closed form", [max(abs(rank.closed_form_error) for rank in ranks) for _, ranks in results]),
    ):
        within = sum(error <= 0.05 for error in errors)
        print(f"memory, {name}: {within} of {len(errors)} within 5 %, the largest error {max(errors):.1%}")
    exact = sum(not differences(ranks) for _, ranks in results)
    print(f"bytes sent: {exact} of {len(results)} equal on every axis")


COLUMNS = (
    "configuration", "ranks", "measured", "resident", "predicted", "error", "balanced", "closed form", "sent", "traced",
)  # fmt: skip


def differences(ranks: Sequence[Compared]) -> str:
    """Return the axes whose traced bytes are not those that were sent, each with the difference."""
    found: dict[str, int] = {}
    for rank in ranks:
        for axis in rank.sent | rank.sent_predicted:
            found[axis] = found.get(axis, 0) + abs(rank.sent_predicted.get(axis, 0) - rank.sent.get(axis, 0))
    return ", ".join(f"{axis} {wrong:,}" for axis, wrong in found.items() if wrong)


def to_rows(results: Sequence[tuple[Job, list[Compared]]]) -> list[dict[str, Any]]:
    """Return what `--json` writes."""
    return [
        {"configuration": str(job), "world": job.ranks, **rank._asdict()} for job, ranks in results for rank in ranks
    ]


# Large models on GPUs: two predictions of the same memory.


class Large(NamedTuple):
    """A configuration that runs on GPUs."""

    name: str
    overrides: tuple[str, ...]
    ranks: int
    measured: float | None = None
    """Bytes on a real H100 (benchmarks/RESULTS.md, run 3, compiled blocks)."""


def _model(name: str) -> tuple[str, ...]:
    """Return overrides for a model of `benchmarks/gpu_stages/models.py`."""
    fields = asdict(MODELS[name]) | {"expert_kernel": "auto"}
    return "model=mixtral_tiny", *(f"model.{key}={_text(value)}" for key, value in fields.items())


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


LARGE = (
    Large("A, 4 rows of 4,096", (*_model("A"), "train.seq_len=4096", "train.global_batch=4"), 1, 66.9e9),
    Large("B, 4 rows of 4,096", (*_model("B"), "train.seq_len=4096", "train.global_batch=4"), 1, 67.7e9),
    Large("mixtral_8x7b", ("model=mixtral_8x7b", "train.seq_len=4096", "train.global_batch=64", "parallel.shard=64",
                           "parallel.expert=8", "parallel.recompute=full"), 64),
    Large("mixtral_8x7b", ("model=mixtral_8x7b", "train.seq_len=4096", "train.global_batch=64", "parallel.shard=8",
                           "parallel.tensor=4", "parallel.expert=8", "parallel.recompute=selective"), 32),
    Large("deepseek_moe_16b", ("model=deepseek_moe_16b", "train.seq_len=4096", "train.global_batch=32",
                               "parallel.shard=32", "parallel.expert=8", "parallel.recompute=full"), 32),
    Large("deepseek_moe_16b", ("model=deepseek_moe_16b", "train.seq_len=4096", "train.global_batch=64",
                               "train.accumulation=8", "parallel.pipeline=4", "parallel.shard=8",
                               "parallel.expert=8"), 32),
    Large("switch_c", ("model=switch_c", "train.seq_len=512", "train.global_batch=4096", "parallel.shard=1024",
                       "parallel.expert=1024", "parallel.recompute=full"), 1024),
)  # fmt: skip
DOCUMENT_OF_TEXT = 455
"""Tokens of a document: the text of the measurements had about 9 in a row of 4,096."""


def show_large() -> None:
    """Print the traced peak and the closed form of rank 0 of large models in bf16 on GPUs."""
    rows = []
    for large in LARGE:
        axes = [f"parallel.{axis}=1" for axis in ("tensor", "pipeline", "context", "shard", "expert")]
        overrides = [
            *large.overrides[:1],
            "model.vocab_size=32000",
            *axes,
            *large.overrides[1:],
            "train.precision=bf16",
        ]
        setting = _setting([*overrides, "tracking=disabled"], large.ranks, DOCUMENT_OF_TEXT)
        trace = trace_step(
            Subject(setting.config, setting.layout, 0, torch.bfloat16, capability=9, document=setting.document)
        )
        assert sum(trace.parts.values()) == trace.peak
        closed = setting.closed_form.stages[0].device
        measured = "" if large.measured is None else f"{large.measured / 1e9:.1f}"
        error = "" if large.measured is None else f"{trace.peak / large.measured - 1:+.1%}"
        parts = ", ".join(f"{part} {nbytes / 1e9:.1f}" for part, nbytes in list(trace.parts.items())[:4])
        layout = f"{setting.layout}, {setting.config.parallel.recompute}"
        sizes = (f"{trace.peak / 1e9:.1f}", f"{closed / 1e9:.1f}", f"{closed / trace.peak:.2f}")
        rows.append((large.name, layout, *sizes, measured, error, parts))
        print(f"traced: {large.name}, {layout}", file=sys.stderr, flush=True)
    columns = ("model", "layout, recompute", "traced", "closed form", "ratio", "measured", "error", "largest parts")
    show_table("Peak memory of rank 0 on GPUs, GB", columns, rows, left=["layout, recompute", "largest parts"])


# Time: do predictions rank layouts as measurements do?

SHAPE = ("model.dim=128", "model.head_dim=32", "model.hidden_dim=256", DEEP, "model.vocab_size=2048", FOUR)
TIMED = (
    *(Job("mixtral_tiny", 2, layout, SHAPE) for layout in (
        "replicate=2", "expert=2", "expert_tensor=2", "tensor=2", "tensor=2+expert=2", "context=2", "pipeline=2",
        "pipeline=2+schedule=interleaved", "shard=2", "shard=2+expert=2", "expert=2+recompute=full",
    )),
    *(Job("mixtral_tiny", 2, layout, (*SHAPE[:-1], "train.accumulation=1")) for layout in ("expert=2", "shard=2")),
)  # fmt: skip
"""Layouts of one model, with the same tokens in a step."""


def predict_seconds(trace: Trace, setting: Setting, hardware: Hardware) -> StepTimes:
    """Return the predicted time of a step by part."""
    train, parallel = setting.config.train, setting.config.parallel
    return step_times(trace, setting.layout, train.accumulation, parallel.schedule, hardware)


def work_timed(jobs: Sequence[Job], rounds: int) -> list[list[tuple[float, float]]]:
    """Time jobs in turn. The function of every worker.

    Returns:
        For each job and round: the seconds until the slower rank is done, and the CPU seconds of both processes.
    """
    world = world_from_env()
    init_process_group(open_store(world, 300.0), world.rank, world.world_size, CPU, 300.0)
    groups: Groups = {}
    running = []
    for setting in map(setting_of, jobs):
        mesh = build_mesh(CPU, setting.layout, groups)
        parts = build_parts(setting.config, setting.config.model, mesh, setting.dtype, 0)
        torch.manual_seed(setting.layout.data_rank(mesh.rank))
        batches = example_batches(setting.config, setting.layout, setting.config.train.accumulation, setting.document)
        running.append((build_engine(setting.config, parts, mesh), batches, setting.config.router))
    times: list[list[tuple[float, float]]] = [[] for _ in jobs]
    for number in range(rounds + 1):
        for (engine, batches, router), of_job in zip(running, times, strict=True):
            dist.barrier()
            began, used = time.perf_counter(), time.process_time()
            train_step(engine, batches, router, 1e-4)
            spent = torch.tensor([time.process_time() - used])
            dist.barrier()
            elapsed = time.perf_counter() - began
            dist.all_reduce(spent)
            if number:  # The first round allocates memory.
                of_job.append((elapsed, spent.item()))
    for engine, _, _ in running:
        engine.close()
    close_process_group()
    return times


def show_times(rounds: int, calibration: Path | None) -> None:
    """Print measured and predicted times of layouts with two ranks, and how well their orders agree."""
    hardware = from_dict(Hardware, compose_config("config", ["+gpu=cpu"])["gpu"], "gpu")
    if calibration is not None:
        hardware = with_rates(hardware, calibration)
    measured = launch_workers(work_timed, (TIMED, rounds), nproc=2)[0]
    predicted = []
    for job in TIMED:
        setting = setting_of(job)
        # The last stage of a pipeline has the head.
        ranks = {0, setting.layout.world - setting.layout.stage}
        subjects = [Subject(setting.config, setting.layout, rank, setting.dtype) for rank in ranks]
        times = [predict_seconds(trace_step(subject), setting, hardware) for subject in subjects]
        predicted.append(max(times, key=lambda each: each.total))
    fastest = [min(elapsed for elapsed, _ in of_job) for of_job in measured]
    median = [statistics.median(elapsed for elapsed, _ in of_job) for of_job in measured]
    cpu = [statistics.median(spent for _, spent in of_job) / 2 for of_job in measured]
    rows = [
        (str(job).replace("mixtral_tiny, ", ""), *(f"{1e3 * seconds:.0f}" for seconds in (*of_job, times.total)))
        for job, times, *of_job in zip(TIMED, predicted, fastest, median, cpu, strict=True)
    ]
    show_table("Time of a step, ms", ("layout", "fastest", "median", "CPU time of a rank", "predicted"), rows)
    totals = [times.total for times in predicted]
    busy = [times.total - times.bubble for times in predicted]
    for name, one, other in (
        ("fastest step", fastest, totals), ("median step", median, totals), ("CPU time, without bubbles", cpu, busy),
    ):  # fmt: skip
        print(f"Kendall tau, {name}: {kendall_tau(one, other):.2f}")


def kendall_tau(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the share of pairs in the same order less that of pairs in the opposite order (Kendall, 1938)."""
    pairs = [(a, b) for a in range(len(one)) for b in range(a)]
    return sum(1 if (one[a] - one[b]) * (other[a] - other[b]) > 0 else -1 for a, b in pairs) / len(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small part of the configurations")
    parser.add_argument("--only", default="", help="the configurations whose name contains this text")
    parser.add_argument("--all-ranks", action="store_true", help="not only the fullest rank of each pipeline stage")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--large", action="store_true", help="instead: large models on GPUs")
    parser.add_argument("--times", type=int, metavar="ROUNDS", help="instead: the times of layouts in so many rounds")
    parser.add_argument("--calibration", type=Path, help="with --times: a hardware.json of benchmarks/gpu.py")
    options = parser.parse_args()
    if options.large:
        show_large()
        return
    if options.times:
        show_times(options.times, options.calibration)
        return
    jobs = [job for job in JOBS if options.only in str(job) and (job.quick or not options.quick)]
    results = []
    for job, ranks in compare_all(jobs, options.all_ranks):
        results.append((job, ranks))
        print(f"{job}: {', '.join(f'{rank.error:+.1%}' for rank in ranks)}", file=sys.stderr, flush=True)
    show(results)
    if options.json is not None:
        write_atomically(options.json, to_json(to_rows(results)))


if __name__ == "__main__":
    main()
