"""Time and memory of windowed attention from 1k to 32k tokens, and the kernels for packed documents on a GPU.

    python benchmarks/attention.py                     # the device and dtype that train.py would choose
    python benchmarks/attention.py --window 1024 --rounds 5
    python benchmarks/attention.py --packed            # documents and windows, by kernel

The time per token should not depend on the length, and the memory should be linear in it.

The input is one row with one document, and only the attention core is measured, without projections. In each round,
every implementation runs once at every length, in one process. The fastest round counts, because other work on the
machine can only add time. With one CPU thread (`OMP_NUM_THREADS=1`), the CPU time of the process is measured, which
other work disturbs least. Memory is the largest number of bytes that exist at once in the tensors that forward and
backward create, without the inputs, and on CPUs without the memory that a kernel allocates internally. Implementations
that need a mask of S x S run up to `--full-up-to` tokens.

With `--packed`, rows of one document and rows of about ten documents are measured, with and without a window, with
every kernel that can compute them. Times are medians on the device's clock. TFLOP/s count 4·H·C FLOPs of the forward
pass and 10·H·C of the backward pass for each pair of a query and a key that it attends to: an implementation that
computes hidden pairs gets no credit for them.
"""

import argparse
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if __name__ == "__main__":
    # This checkout's modules come first, whatever copy is installed and whatever the current directory is.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_stages.stage import milliseconds
from moe.attention.attention import AttentionCore
from moe.attention.flex import flex
from moe.attention.varlen import segments_of, varlen
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

    @cache
    def context(length: int) -> TokenContext:
        return TokenContext(segments=segments_of(torch.zeros(1, length), device))

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
        f"Mixwright, W={window}": (lambda q, k, v: windowed(q, k, v, context(q.shape[2])), False),
        "full causal SDPA": (lambda q, k, v: full(q, k, v, TokenContext()), True),
        f"SDPA, mask of W={window}": (masked, True),
        f"transformers' sdpa, W={window}": (transformers_sdpa, True),
    }


def kernels(documents_BS: Tensor, window: int | None, device: torch.device) -> dict[str, Attend]:
    """Return the implementations that compute attention within the documents and the window, by name."""
    one_document = not documents_BS.any()
    segments = segments_of(documents_BS, device)
    context = TokenContext(documents_BS=None if one_document else documents_BS.to(device), segments=segments)

    def expanded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return varlen(q, k, v, segments, window)

    def fused(backend: SDPBackend) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

        return attend

    found: dict[str, Attend] = {"Mixwright's choice": lambda q, k, v: AttentionCore(window)(q, k, v, context)}
    if device.type == "cuda":
        found["FlashAttention 2, segments"] = lambda q, k, v: varlen(q, k, v, segments, window)
        found["the same, deterministic"] = found["FlashAttention 2, segments"]
        found["the same, keys and values expanded"] = expanded
        found["flex"] = lambda q, k, v: flex(q, k, v, context, window)
        if one_document and window is None:
            found["SDPA, FlashAttention 2"] = fused(SDPBackend.FLASH_ATTENTION)
            found["SDPA, cuDNN"] = fused(SDPBackend.CUDNN_ATTENTION)
    return found


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Let torch choose deterministic kernels within the context."""
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def attended_pairs(documents_BS: Tensor, window: int | None) -> int:
    """Return the number of pairs of a query and a key that it attends to."""
    sizes = segments_of(documents_BS, "cpu").offsets.diff().tolist()
    return sum(sum(min(place + 1, window or place + 1) for place in range(size)) for size in sizes)


def compare_kernels(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    """Print the time and the rate of every kernel for rows of one document and of about ten."""
    rows, length, heads, groups = options.rows, options.length, options.heads, options.kv_heads
    generator = torch.Generator().manual_seed(0)
    packed_BS = (torch.rand(rows, length, generator=generator) < 9 / length).cumsum(1)
    shapes = [(rows, length, h, options.head_dim) for h in (heads, groups, groups)]
    # Projections have the heads last.
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True).transpose(1, 2) for shape in shapes)
    grad = torch.randn_like(q)
    print("| rows | kernel | forward ms | TFLOP/s | both ms | TFLOP/s |\n|---|---|---|---|---|---|")
    for title, documents_BS in (("one document", torch.zeros_like(packed_BS)), ("packed", packed_BS)):
        for window in (None, options.window):
            flops = 4e-9 * heads * options.head_dim * attended_pairs(documents_BS, window)
            for name, attend in kernels(documents_BS, window, device).items():

                def both(attend: Attend = attend) -> None:
                    torch.autograd.grad(attend(q, k, v), (q, k, v), grad)

                try:
                    with deterministic("deterministic" in name):
                        with torch.no_grad():
                            forward = milliseconds(lambda attend=attend: attend(q, k, v), device, options.rounds)
                        whole = milliseconds(both, device, options.rounds)
                except RuntimeError as error:
                    print(f"| {title}, {window=} | {name} | {str(error).splitlines()[0]} | | | |")
                    continue
                times = f"{forward:.3f} | {flops / forward:.0f} | {whole:.3f} | {3.5 * flops / whole:.0f}"
                print(f"| {title}, {window=} | {name} | {times} |", flush=True)


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
    parser.add_argument("--heads", type=int, help="default: 8, with --packed 16")
    parser.add_argument("--kv-heads", type=int, help="default: 2, with --packed 4")
    parser.add_argument("--head-dim", type=int, help="default: 64, with --packed 128")
    parser.add_argument("--dtype", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--full-up-to", type=int, default=8192)
    parser.add_argument("--packed", action="store_true", help="compare the kernels for packed documents")
    parser.add_argument("--rows", type=int, default=4, help="with --packed")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row, with --packed")
    options = parser.parse_args()
    options.heads = options.heads or (16 if options.packed else 8)
    options.kv_heads = options.kv_heads or (4 if options.packed else 2)
    options.head_dim = options.head_dim or (128 if options.packed else 64)
    device = pick_device("auto", 0, 1)
    dtype = compute_dtype(options.dtype, device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    heads, groups, channels = options.heads, options.kv_heads, options.head_dim
    print(f"torch {torch.__version__}, {name}, {dtype}, {heads} heads on {groups}, head_dim {channels}\n")
    if options.packed:
        compare_kernels(options, device, dtype)
        return
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
