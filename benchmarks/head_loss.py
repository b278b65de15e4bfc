"""Time and memory of the head and the cross-entropy, forward and backward: in chunks, and on all logits.

    python benchmarks/head_loss.py                            # V = 32,000, T = 4,096, D = 512 in fp32 and bf16
    python benchmarks/head_loss.py --device cuda --tokens 16384 --dim 2048 --dtypes bf16

- `Mixwright`: `moe.losses.linear_cross_entropy`; on GPUs also with eager code in place of the kernels.
- `all logits`: the head, then `linear_cross_entropy`'s softmax on one chunk of all tokens.
- `torch`: `F.linear`, then `F.cross_entropy` on logits in fp32, whose gradient autograd computes.

In each round, every implementation runs once. Times are medians, also of the ratio to `torch` in the same round. Memory
is the peak beyond inputs and weight: what CUDA's allocator gave out, or on CPUs what a new process has resident.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

if __name__ in ("__main__", "__mp_main__"):
    # This checkout's modules come first, whatever copy is installed and whatever the current directory is.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moe import losses
from moe.kernels import eager_kernels
from training.device import compute_dtype, pick_device

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden states [1, T, D], weight [V, D], labels [1, T]) -> mean loss."""


def in_chunks(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return losses.linear_cross_entropy(x, weight, labels, 1 / labels.numel()).total


def in_chunks_eager(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    with eager_kernels():
        return in_chunks(x, weight, labels)


def all_logits(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    with mock.patch.dict(losses.CHUNK_ELEMENTS, {x.device.type: 2**62}):
        return in_chunks(x, weight, labels)


def by_torch(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(x, weight.to(x.dtype))
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def implementations(device: torch.device) -> dict[str, Loss]:
    eager = {"Mixwright, eager": in_chunks_eager} if device.type == "cuda" else {}
    return {"Mixwright": in_chunks, **eager, "all logits": all_logits, "torch": by_torch}


def inputs(
    tokens: int, dim: int, vocabulary: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states in the compute dtype, an fp32 weight and labels."""
    torch.manual_seed(0)
    x = torch.randn(1, tokens, dim, device=device).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, dim, device=device).mul_(0.02).requires_grad_()
    return x, weight, torch.randint(0, vocabulary, (1, tokens), device=device)


def run(loss: Loss, data: tuple[Tensor, Tensor, Tensor]) -> float:
    """Return the seconds of a forward and a backward pass."""
    x, weight, _ = data
    x.grad = weight.grad = None
    if x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    loss(*data).backward()
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(name: str, sizes: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> int:
    """Return the peak of the memory of one forward and backward pass, with the gradients."""
    data = inputs(*sizes, device, dtype)
    x, weight, labels = data
    few = x[:, :8].detach().requires_grad_(), weight[:64].detach().requires_grad_(), labels[:, :8] % 64
    run(by_torch, few)  # loads the libraries
    loss = implementations(device)[name]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(loss, data)
        return torch.cuda.max_memory_allocated() - before
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(loss, data)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--dtypes", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    device = pick_device(options.device, 0, 1)
    sizes = options.tokens, options.dim, options.vocabulary
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {name}, T={sizes[0]}, D={sizes[1]}, V={sizes[2]}")
    for key in options.dtypes:
        dtype = compute_dtype(key, device)
        logits = sizes[0] * sizes[2] * dtype.itemsize
        print(f"{key}: the logits and their gradient are {2 * logits / 2**20:.0f} MiB")
        data = inputs(*sizes, device, dtype)
        losses_by_name = implementations(device)
        times: dict[str, list[float]] = {name: [] for name in losses_by_name}
        for round_number in range(options.rounds + 1):
            for name, loss in losses_by_name.items():
                elapsed = run(loss, data)
                if round_number:  # round 0 warms up
                    times[name].append(elapsed)
        del data
        for name, measured in times.items():
            # On CPUs only a new process shows its own peak.
            context = multiprocessing.get_context("spawn")
            with nullcontext() if device.type == "cuda" else context.Pool(1) as pool:
                arguments = name, sizes, device, dtype
                peak = pool.apply(peak_bytes, arguments) if pool else peak_bytes(*arguments)
            ratio = statistics.median(mine / torchs for mine, torchs in zip(measured, times["torch"], strict=True))
            print(
                f"  {name:<18}{statistics.median(measured) * 1e3:9.1f} ms  {ratio:5.2f} x torch"
                f"{peak / 2**20:9.0f} MiB at most"
            )


if __name__ == "__main__":
    main()
