"""The cost of a run's telemetry, as a share of the optimizer step, and the waits of the host that it adds on a GPU.

    OMP_NUM_THREADS=1 python benchmarks/telemetry.py
    OMP_NUM_THREADS=1 python benchmarks/telemetry.py --models fine --rounds 40

In each round, one process takes a step in every variant, in an order that changes from round to round, with one model:

- without: routers sum no figures of tokens, and no row of metrics is made.
- every step: the figures of tokens and of layers, and the row with the metrics of every step.
- measured: the step of every `telemetry.every`, with the norms of routers and experts and the straggler factors.

A ratio is that of two times in one round; the median and the quartiles are printed. What a step does for the metrics of
every step is also timed alone, without the sums over tokens and ranks, because it is less than the spread. With one
thread, a time is the CPU time of the process, which other work on the machine disturbs least; with more threads it is
the time on the clock. The waits are those of a step on the meta device (`benchmarks/fake_step.py`), which needs no GPU.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

if __name__ == "__main__":
    # This checkout's modules come first, whatever copy is installed and whatever the current directory is.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.fake_step import walk_step
from benchmarks.gpu_stages.stage import one_process
from benchmarks.train_step import LR, Setup, batch_of
from moe.config import ModelConfig, RouterConfig
from moe.figures import TOKEN_FIGURES
from moe.router import Router
from parallel.config import ParallelConfig
from parallel.mesh import Mesh
from training.build import build_engine, build_parts
from training.config import TelemetryConfig
from training.loop import step_row
from training.parity.config import Case, configuration
from training.step import train_step

ROUTER = RouterConfig(balance_coef=0.01, z_coef=0.001)
SETUPS = {
    "quickstart": Setup(
        ModelConfig(
            dim=192, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=48, hidden_dim=384, num_experts=8, top_k=2,
            sliding_window=64, vocab_size=4096,
        ),
        4,
        256,
    ),
    "fine": Setup(
        ModelConfig(
            dim=256, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64, hidden_dim=128, num_experts=64, top_k=6,
            vocab_size=4096,
        ),
        4,
        512,
    ),
}  # fmt: skip
"""The model and the batch of the quickstart, and two layers of 64 small experts."""


def no_figures(
    router: Router, logits_BSE: Tensor, log_sum_BS: Tensor, probs_BSE: Tensor, experts_BSK: Tensor
) -> Tensor:
    """Replace `Router.token_figures` in a step without telemetry. Returns zeros [B, S, M]."""
    return torch.zeros(len(TOKEN_FIGURES)).expand(*log_sum_BS.shape, -1)


class Stopwatch:
    """Adds up the time of the calls of some functions."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.seconds = clock, 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`, whose calls are timed."""

        @wraps(function)
        def call(*arguments: Any) -> Any:
            start = self.clock()
            result = function(*arguments)
            self.seconds += self.clock() - start
            return result

        return call


def variants(case: Setup, mesh: Mesh, watch: Stopwatch) -> dict[str, Callable[[], None]]:
    """Return name -> a function that takes one step.

    Args:
        watch: times what a step of `every step` does for the telemetry alone.
    """
    config = configuration(Case(case.model, ROUTER), ParallelConfig(), rows=case.rows, precision="fp32")
    engine = build_engine(config, build_parts(config, case.model, mesh, torch.float32, 0), mesh)
    batch = batch_of(case)
    figures, row = watch.timed(Router.token_figures), watch.timed(step_row)

    def without() -> None:
        with mock.patch.object(Router, "token_figures", no_figures):
            train_step(engine, [batch], ROUTER, LR)

    def every_step() -> None:
        with mock.patch.object(Router, "token_figures", figures):
            row(train_step(engine, [batch], ROUTER, LR), LR)

    def measured() -> None:
        step_row(train_step(engine, [batch], ROUTER, LR, measured=True), LR)

    return {"without": without, "every step": every_step, "measured": measured}


def measure(steps: dict[str, Callable[[], None]], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Return the seconds of a step of each variant in every round. A round before the first one allocates memory."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        names = list(steps)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = clock()
            steps[name]()
            times[name].append(clock() - start)
    return {name: found[1:] for name, found in times.items()}


def show(times: dict[str, list[float]], every: int) -> None:
    """Print the times and the ratios to a step without telemetry.

    Args:
        every: the number of steps of which one is measured.
    """
    base = times["without"]
    times = times | {
        f"a run, every={every}": [
            ((every - 1) * plain + measured) / every
            for plain, measured in zip(times["every step"], times["measured"], strict=True)
        ]
    }
    for name, found in times.items():
        low, middle, high = statistics.quantiles([a / b for a, b in zip(found, base, strict=True)], n=4)
        milliseconds = statistics.median(found) * 1e3
        print(f"  {name:<16}{milliseconds:9.1f} ms  {middle:7.4f} ({low:.4f} - {high:.4f})", flush=True)


def waits(model: ModelConfig, rows: int, measured: bool) -> int:
    """Return how often the host would wait for a GPU in a step."""
    model = replace(model, expert_kernel="grouped")  # as on a GPU
    short = Setup(model, rows, 16)
    return len(walk_step(model, ROUTER, [batch_of(short)], measured=measured).waits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SETUPS), default=list(SETUPS))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--every", type=int, default=TelemetryConfig().every, help="telemetry.every")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    print(f"torch {torch.__version__}, CPU, {options.threads} threads, fp32, {options.rounds} rounds")
    for name in options.models:
        case = SETUPS[name]
        model = case.model
        found = [waits(model, case.rows, measured) for measured in (False, True)]
        print(f"{name}: {model.num_layers} layers of {model.num_experts} experts, {case.rows} rows of {case.seq_len}")
        with one_process(torch.device("cpu")) as mesh:
            watch = Stopwatch(clock)
            times = measure(variants(case, mesh, watch), options.rounds, clock)
        show(times, options.every)
        mean = watch.seconds / (options.rounds + 1)
        share = mean / statistics.mean(times["every step"])
        print(f"  token figures and row of every step, timed alone: {mean * 1e3:.2f} ms, {share:.2%}")
        print(f"  waits of the host for a GPU in a step: {found[0]}, in a measured one: {found[1]}")


if __name__ == "__main__":
    main()
