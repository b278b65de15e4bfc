"""Time of a whole optimizer step of Mixwright and of transformers' Mixtral, with AdamW and the balance loss.

    OMP_NUM_THREADS=1 python benchmarks/train_step.py                       # all models, one thread, fp32
    python benchmarks/train_step.py --models fine --threads 2 --dtype bf16
    OMP_NUM_THREADS=1 python benchmarks/train_step.py --experts             # Mixwright, by the number of experts

A step is the forward and backward pass of one batch, clipping, and AdamW. With bf16, Mixwright has fp32 weights, and so
has transformers, which computes under autocast. With `--peer-weights bf16`, the weights, gradients and moments of
transformers are in bf16: it needs no casts, and loses updates that are smaller than a rounding error. In each round
every implementation takes one step, in one process. A ratio is that of two times in one round. With one thread, a time
is the CPU time of the process, which other work on the machine disturbs least; with more threads it is the time on the
clock.

transformers has a third implementation of experts, `batched_mm`. It copies the weights of its experts for every token:
16 GiB for 2,048 tokens, so it is left out.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

if __name__ == "__main__":
    # This checkout's modules come first, whatever copy is installed and whatever the current directory is.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_stages.models import transformers_model
from benchmarks.gpu_stages.stage import one_process
from data.batch import Batch
from moe.config import ModelConfig, RouterConfig
from parallel.config import ParallelConfig
from parallel.mesh import Mesh
from training.build import build_engine, build_parts
from training.config import OptimConfig
from training.device import compute_dtype
from training.parity.config import Case, configuration
from training.step import train_step

ROUTER = RouterConfig(balance_coef=0.01, z_coef=0.0, layer_reduction="hf_pooled")
LR = 1e-4
PEERS = ("eager", "grouped_mm")
Step = Callable[[], float]
"""Takes one optimizer step, and returns the loss."""


class Setup(NamedTuple):
    """A model, and the batch of a step."""

    model: ModelConfig
    rows: int
    seq_len: int


def setup(
    layers: int, experts: int, hidden: int, top_k: int, *, rows: int = 4, seq_len: int = 512, window: int | None = None
) -> Setup:
    model = ModelConfig(
        dim=512, num_layers=layers, num_heads=8, num_kv_heads=2, head_dim=64, hidden_dim=hidden, num_experts=experts,
        top_k=top_k, vocab_size=8192, sliding_window=window,
    )  # fmt: skip
    return Setup(model, rows, seq_len)


SETUPS = {
    "mixtral": setup(4, 8, 1024, 2),
    "fine": setup(2, 64, 256, 6),
    "window": setup(1, 8, 1024, 2, seq_len=4096, window=512),
}
BY_EXPERTS = {
    str(experts): setup(1, experts, hidden, 1024 // hidden, seq_len=1024)
    for experts, hidden in ((4, 1024), (8, 512), (16, 512), (32, 256), (64, 256), (128, 128), (256, 128))
}
"""Models of equal active FLOPs: each token has 1,024 hidden units."""


def batch_of(case: Setup) -> Batch:
    """Return full rows of one document with random tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, case.model.vocab_size or 0, (case.rows, case.seq_len + 1), generator=generator)
    zeros = torch.zeros_like(tokens[:, 1:])
    positions = torch.arange(case.seq_len).expand(case.rows, -1).clone()
    return Batch(tokens[:, :-1].clone(), tokens[:, 1:].clone(), positions, zeros.int(), zeros.to(torch.uint8))


def mixwright_step(case: Setup, dtype: str, mesh: Mesh) -> Step:
    config = configuration(Case(case.model, ROUTER), ParallelConfig(), rows=case.rows)
    config = replace(config, optim=OptimConfig(lr=LR, max_grad_norm=1.0))
    parts = build_parts(config, case.model, mesh, compute_dtype(dtype, mesh.device), 0)
    engine, batch = build_engine(config, parts, mesh), batch_of(case)
    return lambda: train_step(engine, [batch], ROUTER, LR).loss


def transformers_step(case: Setup, dtype: str, experts: str, weights_dtype: str) -> Step:
    torch.manual_seed(0)
    weights = torch.bfloat16 if dtype == weights_dtype == "bf16" else torch.float32
    options = {"output_router_logits": True, "router_aux_loss_coef": 0.01}
    peer = transformers_model(case.model, case.seq_len, weights, experts, **options)
    optim = OptimConfig(lr=LR)
    optimizer = torch.optim.AdamW(
        peer.parameters(), lr=LR, betas=(optim.beta1, optim.beta2), weight_decay=optim.weight_decay, fused=True
    )
    batch = batch_of(case)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16" and weights == torch.float32):
            loss = peer(input_ids=batch.tokens_BS, labels=batch.tokens_BS, shift_labels=batch.labels_BS).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def measure(steps: dict[str, Step], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Return the seconds of a step of each implementation in every round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            start = clock()
            loss = step()
            elapsed = clock() - start
            if number:  # the first round allocates memory
                times[name].append(elapsed)
            else:
                print(f"  {name}: loss {loss:.3f}", flush=True)
    return times


def show(times: dict[str, list[float]]) -> None:
    """Print the times, and the ratios to the first implementation within each round."""
    first = next(iter(times.values()))
    for name, measured in times.items():
        ratios = sorted(mine / base for mine, base in zip(measured, first, strict=True))
        print(
            f"  {name:<26}{statistics.median(measured) * 1e3:9.0f} ms  {statistics.median(ratios):6.2f} "
            f"({ratios[0]:.2f} - {ratios[-1]:.2f})",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SETUPS), default=list(SETUPS))
    parser.add_argument("--experts", action="store_true", help="time by the number of experts at equal active FLOPs")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="experts of transformers")
    parser.add_argument("--peer-weights", choices=["fp32", "bf16"], default="fp32", help="with --dtype bf16")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    print(f"torch {torch.__version__}, CPU, {options.threads} threads, {options.dtype}")
    with one_process(torch.device("cpu")) as mesh:
        measure_all(options, mesh, clock)


def measure_all(options: argparse.Namespace, mesh: Mesh, clock: Callable[[], float]) -> None:
    """Measure and print what the command line asks for."""
    if options.experts:
        print(f"by experts, {BY_EXPERTS['4'].rows} rows of {BY_EXPERTS['4'].seq_len} tokens")
        show(measure({k: mixwright_step(s, options.dtype, mesh) for k, s in BY_EXPERTS.items()}, options.rounds, clock))
        return
    for name in options.models:
        case = SETUPS[name]
        print(f"{name}: {case.model.num_layers} layers, {case.rows} rows of {case.seq_len} tokens")
        steps = {"Mixwright": mixwright_step(case, options.dtype, mesh)}
        for peer in options.peers:
            steps[f"transformers, {peer}"] = transformers_step(case, options.dtype, peer, options.peer_weights)
        show(measure(steps, options.rounds, clock))


if __name__ == "__main__":
    main()
