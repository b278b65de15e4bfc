"""Stage `calibrate`: the rates that this device reaches, by size, and a file of them for estimates.

Besides its table, the stage writes `<out>/hardware.json` (benchmarks/README.md describes the fields). A matmul of m x k
by k x n has 2·m·k·n FLOPs. A copy is counted with the bytes that it reads and those that it writes, and so are
`index_select` and elementwise operations. Sizes that fit into the cache (50 MB on an H100) measure the cache.

Shapes: S tokens of a row, C head dim, T tokens, D model, R rows.
"""

import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu_stages.stage import Stage, free_memory, milliseconds, run_stage
from common.text import to_json

DTYPE = torch.bfloat16
SQUARES = (1024, 2048, 4096, 8192)
MATMULS = (
    (16384, 4096, 28672),  # both experts of Mixtral's tokens, up
    (16384, 28672, 4096),  # the same, down
    (16384, 2048, 2048),  # a projection of attention
    (16384, 2048, 50304),  # a head
)
"""(m, k, n) of matmuls of models."""
GROUPED = ((8, 4096, 14336), (64, 2048, 1408), (128, 2048, 768))
"""(experts, k, n) of grouped matmuls."""
ROWS_PER_EXPERT = (32, 128, 512, 2048, 4096)
ATTENTION = ((1024, 128), (4096, 128), (4096, 64), (16384, 128))
"""(S, C) of causal attention. There are 16,384 tokens and 2,048 / C heads."""
COPIES_MB = (1, 16, 64, 256, 1024, 4096)
HOST_MB = (1, 16, 256)
GATHERS = ((16384, 4096, 2), (32768, 2048, 8))
"""(T, D, copies of each row) of `index_select`."""
ELEMENTWISE_MB = (16, 256, 1024)
OPTIMIZER_WEIGHTS = 200_000_000
TINY = 16
"""With `size=tiny`, numbers above this one are replaced by it."""

RATES = (
    ("matmul", "tflops", 1e12),
    ("grouped_matmul", "forward_tflops", 1e12),
    ("grouped_matmul", "backward_tflops", 1e12),
    ("attention", "forward_tflops", 1e12),
    ("attention", "backward_tflops", 1e12),
    ("copy", "GB_per_s", 1e9),
    ("index_select", "GB_per_s", 1e9),
    ("elementwise", "GB_per_s", 1e9),
    ("adamw", "GB_per_s", 1e9),
    ("host_to_device", "pinned_GB_per_s", 1e9),
    ("host_to_device", "pageable_GB_per_s", 1e9),
    ("launch", "operators_per_s", 1.0),
)
"""Kind, column and unit of every rate in the hardware file."""


class Rates:
    """The rows of the stage, by kind, which also become the hardware file."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.kinds: dict[str, list[dict[str, Any]]] = {}

    def sizes(self, shapes: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Return the shapes to measure. In a tiny run, no size is above `TINY`."""
        if not self.stage.tiny:
            return list(shapes)
        return list(dict.fromkeys(tuple(min(size, TINY) for size in shape) for shape in shapes))

    def random(self, *size: int) -> Tensor:
        """Return normal numbers. (Zeros would make matmuls faster than real data.)"""
        return torch.randn(size, device=self.stage.device, dtype=DTYPE)

    def measure(self, kind: str, columns: dict[str, Any], call: Callable[[], Any], **work: float) -> None:
        """Add a row for `call`.

        Args:
            columns: what identifies the row.
            work: `tflops` and `GB_per_s`: the FLOPs and bytes of one call. The row has the rates instead.
        """
        ms = milliseconds(call, self.stage.device, rounds=10, warm_up=3)
        scale = {"tflops": 1e-9, "GB_per_s": 1e-6}
        self.add(kind, columns | {"ms": ms} | {name: amount / ms * scale[name] for name, amount in work.items()})

    def measure_both(
        self,
        kind: str,
        columns: dict[str, Any],
        forward: Callable[[], Tensor],
        leaves: list[Tensor],
        flops: float,
        backward_ratio: float,
    ) -> None:
        """Add a row for the forward and the backward pass. The backward time is a difference of two times.

        Args:
            leaves: what the gradient is computed for.
            flops: those of the forward pass.
            backward_ratio: FLOPs of the backward pass relative to the forward pass.
        """
        grad, device = torch.randn_like(forward()), self.stage.device
        forward_ms = milliseconds(forward, device, rounds=5, warm_up=2)
        both_ms = milliseconds(lambda: torch.autograd.grad(forward(), leaves, grad), device, rounds=5, warm_up=2)
        backward_ms = both_ms - forward_ms
        times = {"forward_ms": forward_ms, "backward_ms": backward_ms, "forward_tflops": flops / forward_ms / 1e9}
        # Noise can make the difference of two short times negative.
        backward_tflops = backward_ratio * flops / backward_ms / 1e9 if backward_ms > 0 else None
        self.add(kind, columns | times | {"backward_tflops": backward_tflops})

    def add(self, kind: str, row: dict[str, Any]) -> None:
        """Add a row."""
        self.kinds.setdefault(kind, []).append(row)
        self.stage.row(kind=kind, **row)
        self.write()

    def write(self) -> None:
        """Write the hardware file, whole or not at all."""
        path = self.stage.out.parent / "hardware.json"
        text = to_json({"about": self.stage.about, "rates": self.summary(), "measured": self.kinds}, indent=1)
        path.with_suffix(".part").write_text(text + "\n", encoding="utf-8")
        os.replace(path.with_suffix(".part"), path)

    def summary(self) -> dict[str, float]:
        """Return the rates that an estimate of a step needs, in FLOP/s and bytes/s.

        For matmuls and attention this is the best of the sizes, and for all others that of the largest size, because
        smaller ones can fit into the cache.
        """
        rates = {}
        for kind, column, unit in RATES:
            values = [row[column] for row in self.kinds.get(kind, []) if row.get(column)]
            if values:
                name = kind if column in ("tflops", "GB_per_s", "operators_per_s") else f"{kind}_{column.split('_')[0]}"
                rates[name] = (values[-1] if "GB" in column else max(values)) * unit
        return rates


def matmuls(rates: Rates) -> None:
    for m, k, n in rates.sizes((*((size, size, size) for size in SQUARES), *MATMULS)):
        a, b = rates.random(m, k), rates.random(n, k)
        rates.measure("matmul", {"m": m, "k": k, "n": n}, lambda a=a, b=b: F.linear(a, b), tflops=2 * m * k * n)


def grouped_matmuls(rates: Rates) -> None:
    """Each size with the same number of rows for every expert."""
    for experts, k, n in rates.sizes(GROUPED):
        weight = rates.random(experts, n, k).requires_grad_()
        for (rows,) in rates.sizes((number,) for number in ROWS_PER_EXPERT):
            x = rates.random(experts * rows, k).requires_grad_()
            ends = torch.arange(1, experts + 1, device=rates.stage.device, dtype=torch.int32) * rows
            row = {"experts": experts, "rows_per_expert": rows, "k": k, "n": n}
            call = partial(F.grouped_mm, x, weight.transpose(1, 2), offs=ends)
            rates.measure_both("grouped_matmul", row, call, [x, weight], 2 * experts * rows * k * n, 2)


def attention(rates: Rates) -> None:
    """SDPA with a causal mask: 4·C FLOPs for each of the S·(S + 1)/2 pairs, and 2.5 times as many for the backward."""
    for S, C in rates.sizes(ATTENTION):
        batch, heads = (1, 2) if rates.stage.tiny else (16384 // S, 2048 // C)
        q, k, v = (rates.random(batch, heads, S, C).requires_grad_() for _ in range(3))
        call = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)
        row = {"S": S, "C": C, "batch": batch, "heads": heads}
        rates.measure_both("attention", row, call, [q, k, v], 2 * C * S * (S + 1) * batch * heads, 2.5)


def copies(rates: Rates) -> None:
    for (elements,) in rates.sizes((megabytes * 500_000,) for megabytes in COPIES_MB):
        source, target = rates.random(elements), rates.random(elements)
        rates.measure("copy", {"MB": elements * 2 / 1e6}, partial(target.copy_, source), GB_per_s=2 * 2 * elements)


def host_to_device(rates: Rates) -> None:
    for (elements,) in rates.sizes((megabytes * 500_000,) for megabytes in HOST_MB):
        target, row = rates.random(elements), {"MB": elements * 2 / 1e6}
        pageable = target.cpu().clone()
        hosts = {"pageable": pageable}
        if rates.stage.device.type == "cuda":
            hosts["pinned"] = pageable.pin_memory()
        for name, host in hosts.items():
            ms = milliseconds(partial(target.copy_, host, non_blocking=True), rates.stage.device, 5, 2)
            row[f"{name}_GB_per_s"] = 2 * elements / ms / 1e6
        rates.add("host_to_device", row)


def gathers(rates: Rates) -> None:
    for T, D, number in rates.sizes(GATHERS):
        x_TD = rates.random(T, D)
        rows_R = torch.randperm(T * number, device=rates.stage.device) // number
        moved = 2 * 2 * T * number * D + 8 * T * number
        row = {"T": T, "D": D, "copies": number}
        rates.measure("index_select", row, partial(x_TD.index_select, 0, rows_R), GB_per_s=moved)


def elementwise(rates: Rates) -> None:
    """A product of two tensors: two reads and a write."""
    for (elements,) in rates.sizes((megabytes * 500_000,) for megabytes in ELEMENTWISE_MB):
        a, b = rates.random(elements), rates.random(elements)
        rates.measure("elementwise", {"MB": elements * 2 / 1e6}, partial(torch.mul, a, b), GB_per_s=3 * 2 * elements)


def adamw(rates: Rates) -> None:
    """Fused AdamW in fp32. It reads weights, gradients and two moments, and writes all but the gradients."""
    ((number,),) = rates.sizes([(OPTIMIZER_WEIGHTS,)])
    weight = torch.randn(number, device=rates.stage.device, requires_grad=True)
    weight.grad = torch.randn_like(weight)
    step = torch.optim.AdamW([weight], fused=True).step
    rates.measure("adamw", {"weights": number}, step, GB_per_s=7 * 4 * number)


def launches(rates: Rates) -> None:
    """Operators on one number. Their rate is that at which the host launches kernels."""
    x, number = rates.random(1), 10 if rates.stage.tiny else 500

    def call() -> None:
        for _ in range(number):
            x.mul_(1)

    rates.add("launch", {"operators_per_s": number * 1e3 / milliseconds(call, rates.stage.device, 5, 1)})


def main(stage: Stage) -> None:
    rates = Rates(stage)
    for part in (matmuls, grouped_matmuls, copies, attention, adamw, gathers, elementwise, launches, host_to_device):
        if stage.fits(part.__name__, 2):
            stage.attempt(part.__name__, partial(part, rates))
            free_memory()


if __name__ == "__main__":
    raise SystemExit(run_stage(main))
