"""Time and memory of windowed attention from 1k to 32k tokens, forward and backward.

    python benchmarks/attention.py                     # the device and dtype that train.py would choose
    python benchmarks/attention.py --window 1024 --rounds 5

The time per token should not depend on the length, and the memory should be linear in it.

The input is one row with one document, and only the attention core is measured, without projections. In each round,
every implementation runs once at every length, in one process. The fastest round counts, because other work on the
machine can only add time. With one CPU thread (`OMP_NUM_THREADS=1`), the CPU time of the process is measured, which
other work disturbs least. Memory is the largest number of bytes that exist at once in the tensors that forward and
backward create, without the inputs, and on CPUs without the memory that a kernel allocates internally. Implementations
that need a mask of S x S run up to `--full-up-to` tokens.
"""

import argparse
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if __name__ == "__main__":
    # This checkout's modules come first, whatever copy is installed and whatever the current directory is.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moe.attention.attention import AttentionCore
from moe.token_context import TokenContext
from training.device import compute_dtype, pick_device

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
REPEATED = 8192
"""Tokens per length and round. Short rows run several times: in the first run, the CPU's caches contain the data of
another row."""
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class AllocatedBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators have created and that still exist.

    Attributes:
        now: bytes that exist now.
        peak: the largest value of `now`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in before | self._seen:
                self._track(x.untyped_storage())
        return out

    def _track(self, storage: Any) -> None:
        key, size = storage.data_ptr(), storage.nbytes()
        if size == 0:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def subtract() -> None:
            self._seen.discard(key)
            self.now -= size

        weakref.finalize(storage, subtract)


def implementations(window: int, device: torch.device) -> dict[str, tuple[Attend, bool]]:
    """Name -> (function of q, k, v; whether its time grows with S x S)."""
    windowed, full = AttentionCore(window), AttentionCore(None)

    def transformers_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        module = torch.nn.Module()
        module.num_key_value_groups = q.shape[1] // k.shape[1]  # type: ignore[assignment]
        position = torch.arange(q.shape[2], device=device)
        mask = (position <= position.unsqueeze(1)) & (position > position.unsqueeze(1) - window)
        return sdpa_attention_forward(module, q, k, v, mask[None, None], is_causal=False)[0].transpose(1, 2)

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        position = torch.arange(q.shape[2], device=device)
        mask = (position <= position.unsqueeze(1)) & (position > position.unsqueeze(1) - window)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return {
        f"Mixwright, W={window}": (lambda q, k, v: windowed(q, k, v, TokenContext()), False),
        "full causal SDPA": (lambda q, k, v: full(q, k, v, TokenContext()), True),
        f"SDPA, mask of W={window}": (masked, True),
        f"transformers' sdpa, W={window}": (transformers_sdpa, True),
    }


def measure(attend: Attend, inputs: list[Tensor], grad: Tensor) -> float:
    """Return the seconds of one forward and backward pass."""
    clock = time.process_time if not grad.is_cuda and torch.get_num_threads() == 1 else time.perf_counter
    if grad.is_cuda:
        torch.cuda.synchronize()
    start = clock()
    torch.autograd.grad(attend(*inputs), inputs, grad)
    if grad.is_cuda:
        torch.cuda.synchronize()
    return clock() - start


def peak_bytes(attend: Attend, inputs: list[Tensor], grad: Tensor) -> int:
    """Return the most memory that one forward and backward pass uses besides its inputs."""
    if grad.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(attend(*inputs), inputs, grad)
        return torch.cuda.max_memory_allocated() - before
    with AllocatedBytes() as allocated:
        out = attend(*inputs)
        torch.autograd.grad(out, inputs, grad)
    return allocated.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--full-up-to", type=int, default=8192)
    options = parser.parse_args()
    device = pick_device("auto", 0, 1)
    dtype = compute_dtype(options.dtype, device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    heads, groups, channels = options.heads, options.kv_heads, options.head_dim
    print(f"torch {torch.__version__}, {name}, {dtype}, {heads} heads on {groups}, head_dim {channels}\n")
    calls = implementations(options.window, device)
    data = {}
    for length in LENGTHS:
        shapes = [(1, h, length, channels) for h in (heads, groups, groups)]
        inputs = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]
        data[length] = inputs, torch.randn(shapes[0], device=device, dtype=dtype)
    pairs = [
        (title, length)
        for length in LENGTHS
        for title, (_, needs_square) in calls.items()
        if not needs_square or length <= options.full_up_to
    ]
    fastest = dict.fromkeys(pairs, float("inf"))
    for _ in range(options.rounds):
        for title, length in pairs:
            for _ in range(max(1, REPEATED // length)):
                fastest[title, length] = min(fastest[title, length], measure(calls[title][0], *data[length]))
    show(list(calls), fastest, {(t, length): peak_bytes(calls[t][0], *data[length]) for t, length in pairs})


def show(titles: list[str], seconds: dict[tuple[str, int], float], peaks: dict[tuple[str, int], int]) -> None:
    """Print the table, and how much the time per token of the first implementation varies with the length."""
    print("| tokens | " + " | ".join(f"{title}: µs/token | MB" for title in titles) + " |")
    print("|---" * (1 + 2 * len(titles)) + "|")
    for length in LENGTHS:
        cells = [
            f"{seconds[title, length] / length * 1e6:.1f} | {peaks[title, length] / 1e6:.1f}"
            if (title, length) in seconds
            else "- | -"
            for title in titles
        ]
        print(f"| {length:,} | {' | '.join(cells)} |")
    per_token = [seconds[titles[0], length] / length for length in LENGTHS]
    print(f"\n{titles[0]}: slowest / fastest time per token = {max(per_token) / min(per_token):.3f}")


if __name__ == "__main__":
    main()
