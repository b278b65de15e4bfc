"""Stage `calibrate`: the rates that this device reaches, by size, and a file of them for estimates.

Besides its table, the stage writes `<out>/hardware.json` (benchmarks/README.md describes the fields). A matmul of m x k
by k x n has 2·m·k·n FLOPs. A copy is counted with the bytes that it reads and those that it writes, and so are
`index_select` and elementwise operations. Sizes that fit into the cache (50 MB on an H100) measure the cache.

Matrices are in bf16, or in fp32 if the device does not multiply bf16, as `train.precision=auto` computes. On a CPU,
sizes are smaller.

Under torchrun, the stage also measures collectives of all ranks. Every rank measures its own device, and rank 0 writes
the file.

Shapes: S tokens of a row, C head dim, T tokens, D model, R rows.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu_stages.stage import Stage, free_memory, milliseconds, run_stage, synchronize
from common.text import to_json
from parallel.collectives import all_gather_dim, reduce_scatter_dim
from parallel.mesh import close_process_group, init_process_group
from parallel.startup.launch import World, world_from_env
from parallel.startup.rendezvous import open_store
from training.device import compute_dtype

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
"""(S, C) of causal attention. There are 16,384 tokens (on a CPU 2,048) and 2,048 / C heads."""
COPIES_MB = (1, 16, 64, 256, 1024, 4096)
HOST_MB = (1, 16, 256)
GATHERS = ((16384, 4096, 2), (32768, 2048, 8))
"""(T, D, copies of each row) of `index_select`."""
ELEMENTWISE_MB = (16, 256, 1024)
OPTIMIZER_WEIGHTS = 200_000_000
COLLECTIVE_MB = (1, 16, 64, 256)
"""Megabytes that each rank holds before or after a collective: the larger of the two."""
COLLECTIVES = ("all_gather", "reduce_scatter", "all_to_all")
TINY = 16
"""With `size=tiny`, numbers above this one are replaced by it."""
CPU_SIZE, CPU_ROWS, CPU_ELEMENTS = 1024, 8192, 32_000_000
"""On a CPU, dimensions of matrices are at most the first, rows of grouped matmuls and of `index_select` at most the
second, and elements of other tensors at most the third."""
TIMEOUT_S = 60.0
"""Seconds that a collective may take."""

RATES = (
    ("matmul", "tflops", 1e12),
    ("grouped_matmul", "forward_tflops", 1e12),
    ("grouped_matmul", "backward_tflops", 1e12),
    ("attention", "forward_tflops", 1e12),
    ("attention", "backward_tflops", 1e12),
    ("wide_matmul", "tflops", 1e12),
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

    def __init__(self, stage: Stage, world: World) -> None:
        self.stage, self.world = stage, world
        self.dtype = compute_dtype("auto", stage.device)
        self.kinds: dict[str, list[dict[str, Any]]] = {}

    @property
    def on_cpu(self) -> bool:
        """Whether the device is a CPU."""
        return self.stage.device.type == "cpu"

    def sizes(self, shapes: Iterable[tuple[int, ...]], of_cpu: int = CPU_SIZE) -> list[tuple[int, ...]]:
        """Return the shapes to measure. On a CPU no size is above `of_cpu`, and in a tiny run none above `TINY`."""
        limit = TINY if self.stage.tiny else of_cpu if self.on_cpu else None
        shapes = (shape if limit is None else tuple(min(size, limit) for size in shape) for shape in shapes)
        return list(dict.fromkeys(shapes))

    def elements(self, megabytes: Iterable[int]) -> list[int]:
        """Return the numbers of 16-bit numbers in tensors of these sizes."""
        return [number for (number,) in self.sizes(((size * 500_000,) for size in megabytes), CPU_ELEMENTS)]

    def random(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return normal numbers, by default of the type that is measured. (Zeros would make matmuls faster than real
        data.)"""
        return torch.randn(size, device=self.stage.device, dtype=dtype or self.dtype)

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
        return rates | self.links()

    def links(self) -> dict[str, float]:
        """Return bytes/s of the largest and seconds of the smallest collectives, each in the mean over the kinds.

        The names are those of a node, or of the network if the ranks are on several nodes. Empty if at most one size
        was measured.
        """
        rows = [self.kinds.get(kind, []) for kind in COLLECTIVES]
        if min(map(len, rows)) < 2:
            return {}
        name = "link" if self.world.local_world_size == self.world.world_size else "network"
        rate = len(rows) / sum(1 / kind[-1]["GB_per_s"] for kind in rows)
        latency_ms = sum(kind[0]["ms"] for kind in rows) / len(rows)
        return {name: rate * 1e9, f"{name}_latency_s": latency_ms / 1e3}


def collectives(rates: Rates) -> None:
    """Collectives of all ranks, from one number for each rank. A rank sends (n - 1)/n of the larger tensor."""
    device, ranks = rates.stage.device, rates.world.world_size
    init_process_group(open_store(rates.world, TIMEOUT_S), rates.world.rank, ranks, device, TIMEOUT_S)
    for number in (1, *rates.elements(COLLECTIVE_MB)):
        part = max(1, number // ranks)
        whole, received = rates.random(part * ranks), rates.random(part * ranks)
        calls: dict[str, Callable[[], Any]] = {
            "all_gather": partial(all_gather_dim, whole[:part], 0, dist.group.WORLD),
            "reduce_scatter": partial(reduce_scatter_dim, whole, 0, dist.group.WORLD),
            "all_to_all": partial(dist.all_to_all_single, received, whole),
        }
        for kind in COLLECTIVES:
            ms = wall_milliseconds(calls[kind], device)
            sent = (ranks - 1) * part * whole.element_size()
            rates.add(kind, {"MB": part * ranks * whole.element_size() / 1e6, "ms": ms, "GB_per_s": sent / ms / 1e6})
    close_process_group()


def wall_milliseconds(call: Callable[[], Any], device: torch.device, rounds: int = 10) -> float:
    """Return the median time of a collective by the clock on the wall, which all ranks begin together."""
    times = []
    for _ in range(rounds + 2):
        dist.barrier()
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[2:])


def matmuls(rates: Rates) -> None:
    for m, k, n in rates.sizes((*((size, size, size) for size in SQUARES), *MATMULS)):
        a, b = rates.random(m, k), rates.random(n, k)
        rates.measure("matmul", {"m": m, "k": k, "n": n}, partial(F.linear, a, b), tflops=2 * m * k * n)


def wide_matmuls(rates: Rates) -> None:
    """In fp32, without TF32, which is the default of torch."""
    for (size,) in rates.sizes((size,) for size in SQUARES):
        a, b = (rates.random(size, size, dtype=torch.float32) for _ in range(2))
        rates.measure("wide_matmul", {"m": size, "k": size, "n": size}, partial(F.linear, a, b), tflops=2 * size**3)


def grouped_matmuls(rates: Rates) -> None:
    """Each size with the same number of rows for every expert."""
    for experts, k, n in rates.sizes(GROUPED):
        weight = rates.random(experts, n, k).requires_grad_()
        for (rows,) in rates.sizes((number,) for number in ROWS_PER_EXPERT):
            if rates.on_cpu and experts * rows > CPU_ROWS:
                continue
            x = rates.random(experts * rows, k).requires_grad_()
            ends = torch.arange(1, experts + 1, device=rates.stage.device, dtype=torch.int32) * rows
            row = {"experts": experts, "rows_per_expert": rows, "k": k, "n": n}
            call = partial(F.grouped_mm, x, weight.transpose(1, 2), offs=ends)
            rates.measure_both("grouped_matmul", row, call, [x, weight], 2 * experts * rows * k * n, 2)


def attention(rates: Rates) -> None:
    """SDPA with a causal mask: 4·C FLOPs for each of the S·(S + 1)/2 pairs, and 2.5 times as many for the backward."""
    for S, C in rates.sizes(ATTENTION):
        batch, heads = (1, 2) if rates.stage.tiny else ((2048 if rates.on_cpu else 16384) // S, 2048 // C)
        q, k, v = (rates.random(batch, heads, S, C).requires_grad_() for _ in range(3))
        call = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)
        row = {"S": S, "C": C, "batch": batch, "heads": heads}
        rates.measure_both("attention", row, call, [q, k, v], 2 * C * S * (S + 1) * batch * heads, 2.5)


def copies(rates: Rates) -> None:
    for elements in rates.elements(COPIES_MB):
        source, target = rates.random(elements), rates.random(elements)
        rates.measure("copy", {"MB": source.nbytes / 1e6}, partial(target.copy_, source), GB_per_s=2 * source.nbytes)


def host_to_device(rates: Rates) -> None:
    for elements in rates.elements(HOST_MB):
        target = rates.random(elements)
        row = {"MB": target.nbytes / 1e6}
        pageable = target.cpu().clone()
        hosts = {"pageable": pageable}
        if rates.stage.device.type == "cuda":
            hosts["pinned"] = pageable.pin_memory()
        for name, host in hosts.items():
            ms = milliseconds(partial(target.copy_, host, non_blocking=True), rates.stage.device, 5, 2)
            row[f"{name}_GB_per_s"] = target.nbytes / ms / 1e6
        rates.add("host_to_device", row)


def gathers(rates: Rates) -> None:
    for T, D, number in rates.sizes(GATHERS, CPU_ROWS):
        x_TD = rates.random(T, D)
        rows_R = torch.randperm(T * number, device=rates.stage.device) // number
        moved = 2 * x_TD.element_size() * T * number * D + 8 * T * number
        row = {"T": T, "D": D, "copies": number}
        rates.measure("index_select", row, partial(x_TD.index_select, 0, rows_R), GB_per_s=moved)


def elementwise(rates: Rates) -> None:
    """A product of two tensors: two reads and a write."""
    for elements in rates.elements(ELEMENTWISE_MB):
        a, b = rates.random(elements), rates.random(elements)
        rates.measure("elementwise", {"MB": a.nbytes / 1e6}, partial(torch.mul, a, b), GB_per_s=3 * a.nbytes)


def adamw(rates: Rates) -> None:
    """Fused AdamW in fp32. It reads weights, gradients and two moments, and writes all but the gradients."""
    ((number,),) = rates.sizes([(OPTIMIZER_WEIGHTS,)], CPU_ELEMENTS)
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
    world = world_from_env()
    rates = Rates(stage, world)
    stage.about |= {"dtype": str(rates.dtype).removeprefix("torch."), "ranks": world.world_size}
    if world.world_size > 1:
        # First and in any case, so that all ranks take part.
        stage.attempt("collectives", partial(collectives, rates))
    parts = (
        matmuls,
        grouped_matmuls,
        copies,
        attention,
        adamw,
        gathers,
        elementwise,
        launches,
        host_to_device,
        wide_matmuls,
    )
    for part in parts:
        if stage.fits(part.__name__, 2):
            stage.attempt(part.__name__, partial(part, rates))
            free_memory()


if __name__ == "__main__":
    raise SystemExit(run_stage(main))
