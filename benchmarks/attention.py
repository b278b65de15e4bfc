"""Windowed attention from 1k to 32k tokens, forward and backward: is its time per token flat, its memory linear?

    python benchmarks/attention.py                     # the device and dtype that train.py would choose
    python benchmarks/attention.py --window 1024 --rounds 5

One row of one document, attention alone (no projections). Lengths and contestants take turns, round after round, in one
process, and the fastest round counts, because other work on the machine only ever adds time. With one CPU thread
(`OMP_NUM_THREADS=1`) time is the process's own, which others disturb least. Memory is counted, not sampled: the most
bytes alive at once, beside the inputs, in the tensors that forward and backward make (on CPUs without what a kernel
allocates inside). Whoever needs S x S stops at `--full-up-to`.
"""

import argparse
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe.attention.attention import AttentionCore
from moe.token_context import TokenContext
from training.device import compute_dtype, pick_device

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
REPEATED = 8192
"""Tokens a round: short rows come several times, because the first time their caches are those of the row before."""
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Alive(TorchDispatchMode):
    """Bytes of the storages that operators made and that still exist."""

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

        def gone() -> None:
            self._seen.discard(key)
            self.now -= size

        weakref.finalize(storage, gone)


def contestants(window: int, device: torch.device) -> dict[str, tuple[Attend, bool]]:
    """Name -> (function of q, k, v; whether it needs S x S in time)."""
    ours, whole = AttentionCore(window), AttentionCore(None)

    def transformers_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        module = torch.nn.Module()
        module.num_key_value_groups = q.shape[1] // k.shape[1]  # type: ignore[assignment]
        place = torch.arange(q.shape[2], device=device)
        mask = (place <= place.unsqueeze(1)) & (place > place.unsqueeze(1) - window)
        return sdpa_attention_forward(module, q, k, v, mask[None, None], is_causal=False)[0].transpose(1, 2)

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        place = torch.arange(q.shape[2], device=device)
        mask = (place <= place.unsqueeze(1)) & (place > place.unsqueeze(1) - window)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return {
        f"ours, W={window}": (lambda q, k, v: ours(q, k, v, TokenContext()), False),
        "full causal SDPA": (lambda q, k, v: whole(q, k, v, TokenContext()), True),
        f"SDPA, mask of W={window}": (masked, True),
        f"transformers' sdpa, W={window}": (transformers_sdpa, True),
    }


def measure(attend: Attend, inputs: list[Tensor], grad: Tensor) -> float:
    """Seconds of forward and backward."""
    clock = time.process_time if not grad.is_cuda and torch.get_num_threads() == 1 else time.perf_counter
    if grad.is_cuda:
        torch.cuda.synchronize()
    began = clock()
    torch.autograd.grad(attend(*inputs), inputs, grad)
    if grad.is_cuda:
        torch.cuda.synchronize()
    return clock() - began


def peak_bytes(attend: Attend, inputs: list[Tensor], grad: Tensor) -> int:
    if grad.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(attend(*inputs), inputs, grad)
        return torch.cuda.max_memory_allocated() - before
    with Alive() as alive:
        out = attend(*inputs)
        torch.autograd.grad(out, inputs, grad)
    return alive.peak


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
    calls = contestants(options.window, device)
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
    """The table, and whether the first contestant is flat."""
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
    flat = [seconds[titles[0], length] / length for length in LENGTHS]
    print(f"\n{titles[0]}: slowest / fastest time per token = {max(flat) / min(flat):.3f}")


if __name__ == "__main__":
    main()
