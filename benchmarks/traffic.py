"""Measure the bytes that each rank sends in an optimizer step, and compare them with `parallel.planning.traffic`.

    python benchmarks/traffic.py                       # with two and with four processes on this machine
    python benchmarks/traffic.py --worlds 2 --dtype bf16 --accumulation 4

The benchmark counts every collective of the step, in the forward pass and in autograd's threads: Mixwright's and those
of torch's FSDP and pipelines. All of them are operators of `c10d`, which a dispatch mode sees. An operator that the
benchmark does not know is an error. A collective counts as a ring, as `parallel.planning.traffic` defines it.

The column `written` is an independent check: the bytes that the kernel saw each process write. Where gloo sends what is
counted (all-reduce, all-to-all, point to point), both agree except for headers. Its all-gathers and reduce-scatters
send more.

Shapes: W window, S sequence.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

if __name__ == "__main__":
    # This checkout's modules come first, whatever copy is installed and whatever the current directory is.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.batch import Batch
from moe.config import ModelConfig, RouterConfig
from parallel.layout import Layout
from parallel.mesh import Groups, Mesh, build_mesh, close_process_group, init_process_group
from parallel.planning.traffic import traffic
from parallel.startup.launch import World, launch_workers, world_from_env
from parallel.startup.rendezvous import open_store
from training.build import build_engine, build_parts
from training.config import TrainConfig
from training.device import compute_dtype
from training.layout import build_workload, resolve_layout
from training.parity.config import Case, configuration
from training.parity.jobs import parse_layout
from training.step import train_step

WINDOW = 16
LENGTH = 8 * WINDOW
MODEL = ModelConfig(
    dim=64, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=8, hidden_dim=96, num_experts=4, top_k=4,
    vocab_size=256, sliding_window=WINDOW,
)  # fmt: skip
CASES: Mapping[str, Case] = {
    # Every token is sent to every expert, so that the load is as even as in the formula.
    "even load": Case(MODEL, RouterConfig()),
    "top-2": Case(replace(MODEL, top_k=2), RouterConfig()),
    "capacity": Case(replace(MODEL, top_k=2), RouterConfig(capacity_factor=1.25)),
    "full attention": Case(replace(MODEL, sliding_window=None), RouterConfig()),
    "dense, shared": Case(replace(MODEL, first_k_dense=1, num_shared_experts=1, tie_embeddings=True), RouterConfig()),
    "norm of all heads": Case(replace(MODEL, qk_norm="width", attention_bias="all"), RouterConfig()),
    "latent": Case(
        replace(
            MODEL,
            num_kv_heads=8,
            kv_lora_rank=16,
            q_lora_rank=24,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=6,
            head_dim=12,
        ),
        RouterConfig(),
    ),
    "multi-query": Case(replace(MODEL, num_kv_heads=1, vocab_size=257), RouterConfig()),
}


class Job(NamedTuple):
    """One measurement."""

    case: str
    """A key of `CASES`."""
    layout: str
    """Keys of `parallel` joined by `+`."""
    zigzag: bool = True
    """Whether the layout may use `Layout.zigzag`."""

    def __str__(self) -> str:
        return f"{self.layout}, {self.case}" + ("" if self.zigzag else ", one piece per rank")


JOBS: Mapping[int, list[Job]] = {  # by world size
    2: [
        Job("even load", "replicate=2"),
        Job("even load", "expert=2"),
        Job("top-2", "expert=2"),
        Job("capacity", "expert=2"),
        Job("even load", "expert=2+recompute=full"),
        Job("even load", "expert=2+overlap=true"),
        Job("even load", "expert_tensor=2"),
        Job("even load", "tensor=2"),
        Job("dense, shared", "tensor=2"),
        Job("multi-query", "tensor=2"),
        Job("latent", "tensor=2"),
        Job("latent", "context=2"),
        Job("norm of all heads", "tensor=2+recompute=full"),
        Job("dense, shared", "tensor=2+recompute=full"),
        Job("even load", "context=2"),
        Job("full attention", "context=2", zigzag=False),
        Job("full attention", "context=2"),
        Job("capacity", "context=2"),
        Job("even load", "shard=2"),
        Job("even load", "shard=2+expert=2"),
        Job("even load", "shard=2+recompute=full"),
        Job("even load", "pipeline=2"),
        Job("dense, shared", "pipeline=2+schedule=interleaved"),
    ],
    4: [
        Job("even load", "expert=4"),
        Job("even load", "expert=2"),
        Job("even load", "expert=2+expert_tensor=2"),
        Job("even load", "tensor=4"),
        Job("even load", "context=4"),
        Job("full attention", "context=4", zigzag=False),
        Job("full attention", "context=4"),
        Job("even load", "shard=2+expert=2"),
        Job("even load", "shard=2+expert=2+overlap=true"),
        Job("even load", "pipeline=2+shard=2"),
        Job("even load", "tensor=2+expert=4"),
    ],
}


class Traffic(TorchDispatchMode):
    """A mode that counts the bytes that this rank sends, by axis."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.mesh = mesh
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in function.namespace:
            name = function.name().partition("::")[2]
            scripts = (argument for argument in args if isinstance(argument, torch.ScriptObject))
            group = next(ProcessGroup.unbox(script) for script in scripts if script._type().name() == "ProcessGroup")
            tensor = args[1] if name in SECOND_IS_INPUT else args[0]
            tensor = tensor[0] if isinstance(tensor, list) else tensor
            size = sent_bytes(name, tensor, group, args)
            if size:
                self.sent[self._axis(name, tensor, group)] += size
        return function(*args, **kwargs or {})

    def _axis(self, name: str, tensor: Tensor, group: ProcessGroup) -> str:
        """Return the axis of a collective, from its name, the calling files, the dtype and the ranks of the group."""
        callers = list(_callers())
        # Counts, and the metrics of the step.
        if not tensor.is_floating_point() or tensor.dtype == torch.float64 or not tensor.dim():
            return "bookkeeping"
        if name == "send":  # torch's pipeline also calls the backward pass, in which other axes communicate.
            return "pipeline"
        for axis, module in (("gradients", "parallel/gradients"), ("shard", "fsdp/")):
            if any(module in caller for caller in callers):
                return axis
        library = "/site-packages/deepspeed/"  # It also calls the backward pass, in which Mixwright communicates.
        if library in next((caller for caller in callers if library in caller or "/parallel/" in caller), ""):
            return "shard"
        layout = self.mesh.layout
        axes = ("tensor", "context", "expert_tensor", "expert")
        return next(axis for axis in axes if getattr(layout, axis) > 1 and same(getattr(self.mesh, axis), group))


def same(one: ProcessGroup, other: ProcessGroup) -> bool:
    """Return whether two groups have the same ranks."""
    return dist.get_process_group_ranks(one) == dist.get_process_group_ranks(other)


SECOND_IS_INPUT = ("_allgather_base_", "_reduce_scatter_base_", "alltoall_base_")
"""Operators with the arguments (output, input, ...)."""


def sent_bytes(name: str, tensor: Tensor, group: ProcessGroup, args: Any) -> float:
    """Return the bytes that leave this rank.

    Args:
        name: a `c10d` operator.
        tensor: its input.
        args: all its arguments.

    Raises:
        LookupError: the operator is not known here.
    """
    ranks, size = group.size(), tensor.numel() * tensor.element_size()
    if name == "allreduce_":
        return 2 * (ranks - 1) / ranks * size
    if name == "_allgather_base_":
        return (ranks - 1) * size
    if name == "_reduce_scatter_base_":
        return (ranks - 1) / ranks * size
    if name == "alltoall_base_":
        splits = args[4] or [tensor.shape[0] // ranks] * ranks
        row = size // max(1, tensor.shape[0])
        return row * (sum(splits) - splits[group.rank()])
    if name in ("send", "recv_", "barrier"):
        return size if name == "send" else 0
    raise LookupError(f"c10d::{name}: expected an operator whose bytes are counted above")


def _callers() -> Iterator[str]:
    """Yield the source file of every frame on the stack."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame.f_code.co_filename
        frame = frame.f_back  # type: ignore[assignment]


def written() -> int:
    """Return the bytes that this process has written, including to sockets, as Linux counts them; 0 elsewhere."""
    path = Path("/proc/self/io")
    fields = dict(line.split(": ") for line in path.read_text().splitlines()) if path.exists() else {}
    return int(fields.get("wchar", 0))


class Measured(NamedTuple):
    """What one rank sent in one step."""

    sent: dict[str, float]
    """Bytes by axis."""
    written: int
    """Bytes that the kernel saw."""


def measure(
    job: Job, device: torch.device, options: argparse.Namespace, groups: Groups
) -> tuple[list[Measured], dict[str, float]]:
    """Return what each rank sends, and what the formulas give. Collective over the initialised world.

    Args:
        groups: as for `build_mesh`.
    """
    case, size = CASES[job.case], dist.get_world_size()
    train = TrainConfig(2, LENGTH, options.rows, accumulation=options.accumulation, precision=options.dtype)
    config = replace(configuration(case, parse_layout(job.layout), rows=options.rows, steps=2), train=train)
    world = World(world_size=size, local_world_size=size)
    dtype = compute_dtype(options.dtype, device)
    workload = build_workload(config, case.model, itemsize=dtype.itemsize)
    config, estimate, _ = resolve_layout(config, workload, world)
    layout = estimate.layout if job.zigzag else replace(estimate.layout, zigzag=False)
    mesh = build_mesh(device, layout, groups)
    parts = build_parts(config, case.model, mesh, dtype, 0)
    engine = build_engine(config, parts, mesh)
    batches = batches_of(layout, mesh.rank, options)
    train_step(engine, batches, case.router, 1e-3)  # The first step also allocates and compiles.
    dist.barrier()
    before, counter = written(), Traffic(mesh)
    with counter:
        train_step(engine, batches, case.router, 1e-3)
    measured = Measured(dict(counter.sent), written() - before)
    by_rank: list[Any] = [None] * size
    dist.all_gather_object(by_rank, measured)
    engine.close()
    return by_rank, {str(axis): value for axis, value in traffic(workload, layout, config.parallel).items()}


def batches_of(layout: Layout, rank: int, options: argparse.Namespace) -> list[Batch]:
    """Return the micro-batches of a data-parallel rank: full rows of one document, with the same tokens in each."""
    rows = options.rows // options.accumulation // layout.data
    tokens = torch.randint(0, 256, (rows, LENGTH), generator=torch.Generator().manual_seed(layout.data_rank(rank)))
    zeros = torch.zeros_like(tokens)
    positions = torch.arange(LENGTH).expand(rows, -1).clone()
    return [Batch(tokens, tokens, positions, zeros.int(), zeros.to(torch.uint8))] * options.accumulation


def work(options: argparse.Namespace) -> None:
    """Measure all jobs of this world size and print the table. The function of every worker."""
    world, device = world_from_env(), torch.device("cpu")
    init_process_group(open_store(world, 300.0), world.rank, world.world_size, device, 300.0)
    groups: Groups = {}
    rows: list[tuple[str, ...]] = []
    for job in JOBS[world.world_size]:
        by_rank, expected = measure(job, device, options, groups)
        rows += lines(str(job), by_rank, expected)
    if world.rank == 0:
        from training.report.terminal import show_table

        title = f"{world.world_size} ranks, {options.dtype}, {options.accumulation} micro-batches, S = 8 W = {LENGTH}"
        columns = ("layout, model", "axis", "sent", "formula", "ratio", "written")
        show_table(f"Bytes a rank sends in a step, mean over ranks: {title}", columns, rows, left=["axis"])
    close_process_group()


def lines(name: str, by_rank: list[Measured], expected: Mapping[str, float]) -> list[tuple[str, ...]]:
    """Return the table rows of a job: one with all bytes, and one per axis that sends or should send."""
    rows = []
    for axis, formula in expected.items():
        sent = sum(rank.sent.get(axis, 0) for rank in by_rank) / len(by_rank)
        if sent or formula:
            ratio = f"{sent / formula:.4f}" if formula else "-"
            rows.append(("", axis, f"{sent:,.0f}", f"{formula:,.0f}", ratio, ""))
    total = sum(sum(rank.sent.values()) for rank in by_rank) / len(by_rank)
    seen = sum(rank.written for rank in by_rank) / len(by_rank)
    return [(name, "all", f"{total:,.0f}", "", "", f"{seen:,.0f}"), *rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="*", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--rows", type=int, default=8, help="rows of one step over all ranks")
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    options = parser.parse_args()
    for size in options.worlds:
        launch_workers(work, (options,), nproc=size)


if __name__ == "__main__":
    main()
