"""Show how much of the exchange of rows between experts' ranks is hidden behind the experts' computation.

    python benchmarks/overlap.py                       # two processes of this machine, gloo
    python benchmarks/overlap.py --nproc 4 --dim 512 --tokens 4096

One MoE layer with expert parallelism runs forward and backward, with and without `parallel.overlap`. A trace records
when every exchange is started and when it has ended, and when the experts' matmuls run. An exchange is hidden while
matmuls run on the same rank. With gloo, a thread of the process sends and receives the rows.

The trace is for CPUs. On GPUs, compare the times of steps: `benchmarks/layouts.py --layouts expert=8
expert=8+overlap=true`.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

if __name__ == "__main__":
    # This checkout's modules come first, whatever copy is installed and whatever the current directory is.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moe.config import ModelConfig, RouterConfig
from moe.layer import Block, MoELayer
from moe.token_context import TokenContext
from parallel.apply import build_model
from parallel.collectives import RowExchange
from parallel.layout import Layout
from parallel.mesh import Groups, build_mesh, close_process_group, init_process_group
from parallel.startup.launch import run_in_workers, world_from_env
from parallel.startup.rendezvous import open_store

CPU = torch.device("cpu")
Interval = tuple[float, float]
"""Start and end, in seconds."""


class Event(NamedTuple):
    """Something that happened on this rank."""

    what: str
    """`start` or `wait` of an exchange of rows, `experts` for one or more of their matmuls, or `numbers` for an
    exchange of integers."""
    exchange: int | None = None
    """The number of the exchange of rows, in the order in which the forward pass starts them."""


class Trace(TorchDispatchMode):
    """Records the exchanges of rows and the experts' matmuls of this rank, in the forward and the backward pass.

    Attributes:
        events: what happened, in order.
        in_flight: when each exchange was started, and when it had ended.
        matmuls: when each matmul of the experts ran.
    """

    def __init__(self, width: int, numbers: dict[RowExchange, int]) -> None:
        """
        Args:
            width: hidden width of an expert, by which its matmuls are known. No other dimension may be equal to it.
            numbers: the numbers of the exchanges that other traces have seen.
        """
        super().__init__()
        self.width = width
        self.events: list[Event] = []
        self.in_flight: list[Interval] = []
        self.matmuls: list[Interval] = []
        self._numbers = numbers

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name()
        if name.startswith("c10d::alltoall_base") and not args[0].is_floating_point():
            self.events.append(Event("numbers"))
        start = time.perf_counter()
        result = function(*args, **kwargs or {})
        sizes = {size for argument in args if isinstance(argument, Tensor) for size in argument.shape}
        if "mm" in name and self.width in sizes:
            self.matmuls.append((start, time.perf_counter()))
            if not self.events or self.events[-1] != Event("experts"):
                self.events.append(Event("experts"))
        return result

    @contextmanager
    def record(self) -> Iterator[None]:
        """Record within this context."""
        begin, wait = RowExchange.begin, RowExchange.wait

        def recorded_begin(exchange: RowExchange, rows_RD: Tensor, *splits: list[int]) -> Tensor:
            self.events.append(Event("start", self._numbers.setdefault(exchange, len(self._numbers))))
            start = time.perf_counter()
            received = begin(exchange, rows_RD, *splits)
            assert exchange.work is not None
            exchange.work.get_future().add_done_callback(lambda _: self.in_flight.append((start, time.perf_counter())))
            return received

        def recorded_wait(exchange: RowExchange) -> Tensor:
            self.events.append(Event("wait", self._numbers[exchange]))
            return wait(exchange)

        with mock.patch.multiple(RowExchange, begin=recorded_begin, wait=recorded_wait), self:
            yield


def build_layer(
    config: ModelConfig, router: RouterConfig, layout: Layout, groups: Groups, dtype: torch.dtype
) -> MoELayer:
    """Return this rank's part of a MoE layer."""
    model = build_model(config, router, build_mesh(CPU, layout, groups), compute_dtype=dtype, seed=0)
    block = model.layers[0]
    assert isinstance(block, Block) and isinstance(block.ffn, MoELayer)
    return block.ffn


def union(intervals: Sequence[Interval]) -> list[Interval]:
    """Return disjoint intervals that cover the same times."""
    joined: list[Interval] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((start, end))
    return joined


def seconds(intervals: Sequence[Interval]) -> float:
    """Return the time that the intervals cover."""
    return sum(end - start for start, end in union(intervals))


def common(one: Sequence[Interval], other: Sequence[Interval]) -> list[Interval]:
    """Return the times that are in both."""
    pairs = ((max(a, c), min(b, d)) for a, b in union(one) for c, d in union(other))
    return [(start, end) for start, end in pairs if start < end]


def traced(layer: MoELayer, x_BSD: Tensor, grad_BSD: Tensor) -> Iterator[tuple[Trace, float]]:
    """Yield the trace and the seconds of a forward pass, and of its backward pass."""
    output: list[Tensor] = []
    numbers: dict[RowExchange, int] = {}
    for run in (lambda: output.append(layer(x_BSD, TokenContext())[0]), lambda: output[0].backward(grad_BSD)):
        trace = Trace(layer.experts.w_up.shape[1], numbers)
        start = time.perf_counter()
        with trace.record():
            run()
        yield trace, time.perf_counter() - start


def work(options: argparse.Namespace) -> None:
    """Trace the layer and print the table. The function of every worker."""
    world, groups = world_from_env(), Groups()
    init_process_group(open_store(world, 300.0), world.rank, world.world_size, CPU, 300.0)
    ranks = world.world_size
    config = ModelConfig(
        dim=options.dim, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2, hidden_dim=2 * options.dim + 2,
        num_experts=4 * ranks, top_k=2, vocab_size=16,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(world.rank)
    x_BSD, grad_BSD = torch.randn(2, 1, options.tokens, options.dim, generator=generator).unbind()
    rows = []
    for overlap in (False, True):
        layout = Layout(replicate=ranks, expert=ranks, overlap=overlap)
        layer = build_layer(config, RouterConfig(), layout, groups, torch.float32)
        passes: dict[str, list[tuple[float, float, float]]] = {"forward": [], "backward": []}
        for _ in range(options.rounds + 1):
            results = traced(layer, x_BSD.clone().requires_grad_(), grad_BSD)
            for measured, (trace, elapsed) in zip(passes.values(), results, strict=True):
                hidden = seconds(common(trace.in_flight, trace.matmuls))
                measured.append((elapsed, seconds(trace.in_flight), hidden))
        for name, measured in passes.items():
            elapsed, exchange, hidden = map(statistics.median, zip(*measured[1:], strict=True))  # round 0 warms up
            share = f"{hidden / exchange:.0%}"
            rows.append(
                (str(overlap).lower(), name, *(f"{1e3 * t:.1f} ms" for t in (elapsed, exchange, hidden)), share)
            )
    if world.rank == 0:
        from training.report.terminal import show_table

        show_table(
            f"a MoE layer, T={options.tokens} on each of {ranks} ranks, D={options.dim}, fp32; medians of "
            f"{options.rounds} rounds on rank 0, gloo, torch {torch.__version__}",
            ("overlap", "pass", "time", "rows in flight", "of which hidden", "share"),
            rows,
            left=("pass",),
        )
    close_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nproc", type=int, default=2, help="worker processes to start; ignored under torchrun")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of each rank")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    run_in_workers(work, (options,), nproc=options.nproc)


if __name__ == "__main__":
    main()
