"""Measure the time of an optimizer step under each layout, relative to data parallelism on the same processes.

    python benchmarks/layouts.py                                     # two processes of this machine
    python benchmarks/layouts.py --nproc 8 --dim 2048 --seq-len 4096 --rounds 20
    python benchmarks/layouts.py --layouts replicate=2 expert=2/deepspeed-3

Every layout is built once. In each round, every layout takes one step, so that other load on the machine affects all of
them. With two processes on one machine, the ratio shows the cost of a layout and not its benefit: less memory, and more
speed if each process has its own device. A layout is written as in scripts/parity.py. It can name an engine, as in
`expert=2/deepspeed-2` (ZeRO stage 2).
"""

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist

if __name__ == "__main__":
    # This checkout's modules come first, whatever copy is installed and whatever the current directory is.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.errors import ConfigError
from data.batch import Batch
from moe.config import ModelConfig, RouterConfig
from parallel.mesh import Groups, build_mesh, close_process_group, init_process_group
from parallel.startup.launch import World, run_in_workers, world_from_env
from parallel.startup.rendezvous import open_store
from training.build import build_engine, build_parts
from training.config import Config, TrainConfig
from training.device import compute_dtype, pick_device
from training.engine import Engine
from training.layout import build_workload, resolve_layout
from training.parity.config import ACCUMULATION, Case, EngineKind, configuration
from training.parity.jobs import parse_layout
from training.step import train_step

BASELINE = "replicate={}"
"""`{}` stands for the number of processes."""
LAYOUTS = (
    "expert={}",
    "expert_tensor={}",
    "tensor={}",
    "tensor={}+expert={}",
    "context={}",
    "pipeline={}",
    "pipeline={}+schedule=interleaved",
    "pipeline={}+schedule=zero_bubble",
    "shard={}",
    "shard={}+expert={}",
    "replicate={}/deepspeed-2",
    "expert={}/deepspeed-2",
    "expert={}+recompute=selective",
    "expert={}+recompute=full",
    "expert={}+overlap=true",
)


def case_of(options: argparse.Namespace) -> Case:
    """Return a small Mixtral: eight experts, top-2, grouped keys and values, a window."""
    model = ModelConfig(
        dim=options.dim, num_layers=options.layers, num_heads=8, num_kv_heads=4, head_dim=options.dim // 8,
        hidden_dim=2 * options.dim, num_experts=8, top_k=2, vocab_size=4096, sliding_window=options.seq_len // 2,
    )  # fmt: skip
    return Case(model, RouterConfig())


def config_of(name: str, case: Case, options: argparse.Namespace) -> Config:
    """Return the configuration of a layout that is named as on the command line."""
    layout, _, engine = name.partition("/")
    kind = cast(EngineKind, engine or "native")
    base = configuration(
        case,
        parse_layout(layout),
        rows=options.rows,
        steps=options.rounds + 1,
        engine=kind,
    )
    train = TrainConfig(
        steps=options.rounds + 1,
        seq_len=options.seq_len,
        global_batch=options.rows,
        accumulation=ACCUMULATION,
        precision=options.dtype,
    )
    return replace(base, train=train)


def rows_of(options: argparse.Namespace, data_rank: int, data_ranks: int) -> list[Batch]:
    """Return the micro-batches of a data-parallel rank: full rows of one document.

    Every rank draws the rows of all ranks and takes its part, so that all layouts compute the same batch.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 4096, (options.rows, options.seq_len + 1), generator=generator)
    micro = options.rows // ACCUMULATION
    local = micro // data_ranks
    batches = []
    for number in range(ACCUMULATION):
        start = number * micro + data_rank * local
        part = tokens[start : start + local]
        zeros = torch.zeros_like(part[:, 1:])
        positions = torch.arange(options.seq_len).expand(local, -1).clone()
        batches.append(Batch(part[:, :-1].clone(), part[:, 1:].clone(), positions, zeros.int(), zeros.to(torch.uint8)))
    return batches


def seconds(engine: Engine, batches: list[Batch], router: RouterConfig) -> float:
    """Return the seconds of one step, until the slowest rank is done."""
    cuda = engine.mesh.device.type == "cuda"
    dist.barrier()
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    train_step(engine, batches, router, 1e-4)
    if cuda:
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter() - began


def work(options: argparse.Namespace) -> None:
    """Time all layouts and print the table. The function of every worker."""
    world = world_from_env()
    device = pick_device("auto", world.local_rank, world.local_world_size)
    init_process_group(open_store(world, 300.0), world.rank, world.world_size, device, 300.0)
    case, size = case_of(options), world.world_size
    names = options.layouts or [BASELINE.format(size), *(name.replace("{}", str(size)) for name in LAYOUTS)]
    groups: Groups = {}
    running: dict[str, tuple[Engine, list[Batch]]] = {}
    for name in names:
        try:
            config = config_of(name, case, options)
            config, plan, _ = resolve_layout(config, build_workload(config, case.model), World(world_size=size))
            layout = plan.layout
        except ConfigError as error:
            if world.rank == 0:
                print(f"{name}: skipped, {error}")
            continue
        mesh = build_mesh(device, layout, groups)
        parts = build_parts(config, case.model, mesh, compute_dtype(options.dtype, device), 0)
        rank = layout.data_rank(world.rank)
        running[name] = build_engine(config, parts, mesh), rows_of(options, rank, layout.data)
    times: dict[str, list[float]] = {name: [] for name in running}
    for number in range(options.rounds + 1):
        for name, (engine, batches) in running.items():
            elapsed = seconds(engine, batches, case.router)
            if number:  # The first round allocates memory.
                times[name].append(elapsed)
    if world.rank == 0:
        show(times, options, device, size)
    # Closing a DeepSpeed engine releases what DeepSpeed stores once per process, so only one of them is closed.
    by_kind = {type(engine): engine for engine, _ in running.values()}
    for engine in by_kind.values():
        engine.close()
    close_process_group()


def show(times: dict[str, list[float]], options: argparse.Namespace, device: torch.device, size: int) -> None:
    """Print the times and their ratios to the first layout: of the fastest rounds, and within each round."""
    from training.report.terminal import show_table

    baseline = next(iter(times.values()))
    rows = []
    for name, measured in times.items():
        ratios = sorted(elapsed / base for elapsed, base in zip(measured, baseline, strict=True))
        rows.append(
            (
                name,
                f"{statistics.median(measured) * 1e3:.0f} ms",
                f"{min(measured) * 1e3:.0f} ms",
                f"{min(measured) / min(baseline):.2f}",
                f"{statistics.median(ratios):.2f}",
                f"{ratios[0]:.2f} - {ratios[-1]:.2f}",
            )
        )
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads each"
    tokens = options.rows * options.seq_len
    show_table(
        f"one step of {tokens:,} tokens, D={options.dim}, {options.layers} layers, {options.dtype}; {size} processes, "
        f"{where}, torch {torch.__version__}, {options.rounds} rounds",
        ("layout", "median", "fastest", "ratio of fastest", "ratio in a round: median", "range"),
        rows,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nproc", type=int, default=2, help="worker processes to start; ignored under torchrun")
    parser.add_argument("--layouts", nargs="*", help="the first is the baseline of the others")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rows", type=int, default=8, help="rows of one step over all ranks")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    run_in_workers(work, (options,), nproc=options.nproc)


if __name__ == "__main__":
    main()
