"""Stage `layer`: the speed of one MoE layer in bf16, beside its limits, a dense layer, other implementations.

Every implementation gets the same weights and the same input. The input is made such that the layer's own router
chooses the experts that a routing asks for, so that no implementation needs a switch for it:

- `balanced`: all experts have the same number of assignments up to one.
- `skewed`: the shares of `stage.zipf_shares`.

TFLOP/s count the experts' matmuls: 6·T·D·F·(k + shared experts) for the forward pass, and twice as much for the
backward pass. `x_dense` is the time of both passes relative to that of the dense SwiGLU, per FLOP. `memory_GB` is the
peak of both passes above weights and input. The backward time is the difference of two measured times.

Shapes: T tokens, D model, F expert width, E experts, K top-k, R = T·K routed rows.
"""

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.gpu_stages.stage import (
    Stage,
    balanced_experts,
    free_memory,
    relative_error,
    run_stage,
    skewed_logits,
    times_of,
)
from benchmarks.moe_layer import mixwright_layer, transformers_layer
from moe.feedforward import FeedForward, gated
from moe.kernels import eager_kernels
from moe.layer import MoELayer
from moe.token_context import TokenContext

Result = TypeVar("Result")
DTYPE = torch.bfloat16
ROUNDS, WARM_UP, LEAST_MS = 5, 2, 200.0
"""The least number of measured calls, the number of calls before, and the least time of the measured calls together."""
DENSE = "dense SwiGLU"
PARTS_OF = "Qwen3-30B-A3B"
"""The shape whose parts and GPU kernels are measured too."""
SONIC = "arXiv 2512.14080"


@dataclass(frozen=True)
class Published:
    """A figure of others on one H100, in TFLOP/s."""

    name: str
    source: str
    forward: float | None = None
    backward: float | None = None
    both: float | None = None


@dataclass(frozen=True)
class Shape:
    """The sizes of a layer, and what others have published for it."""

    name: str
    tokens: int
    dim: int
    hidden: int
    experts: int
    top_k: int
    shared: int = 0
    published: tuple[Published, ...] = ()

    def flops(self, width: int) -> float:
        """Return the FLOPs of the forward pass with `width` experts' matmuls per token."""
        return 6.0 * self.tokens * self.dim * self.hidden * width

    @property
    def width(self) -> int:
        """Experts that process a token."""
        return self.top_k + self.shared


SHAPES = (
    Shape(
        "Qwen3-30B-A3B", 32768, 2048, 768, 128, 8,
        published=(
            Published("torch grouped matmul", "VeOmni PR 460", forward=242),
            Published("Liger", "Liger PR 1294", forward=501, both=413),
        ),
    ),
    Shape("Mixtral-8x7B", 16384, 4096, 14336, 8, 2),
    Shape("64 x 1408 + 2 shared", 16384, 2048, 1408, 64, 6, shared=2),
    Shape(
        "128 x 256", 24576, 1536, 256, 128, 8,
        published=(
            Published("SonicMoE", SONIC, 361, 402),
            Published("ScatterMoE", SONIC, 203, 207),
            Published("MegaBlocks", SONIC, 143, 175),
            Published("Megatron", SONIC, 118, 131),
            Published("DeepGEMM + torch", SONIC, 150, 227),
        ),
    ),
)  # fmt: skip
TINY = (Shape("Qwen3-30B-A3B", 96, 64, 32, 8, 2), Shape("tiny + 1 shared", 64, 32, 64, 4, 2, shared=1))


class Weights:
    """Random weights of a layer, bf16, which all implementations use."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.empty(size, dtype=DTYPE, device=device).normal_(std=0.02, generator=generator)

        experts, hidden, dim = shape.experts, shape.hidden, shape.dim
        self.router_ED = normal(experts, dim)
        self.gate_EFD, self.up_EFD = normal(experts, hidden, dim), normal(experts, hidden, dim)
        self.down_EDF = normal(experts, dim, hidden)
        wide = shape.shared * hidden
        self.shared = (normal(wide, dim), normal(wide, dim), normal(dim, wide)) if wide else None


@dataclass
class Implementation:
    """A way to compute the layer, or a part of its work."""

    call: Callable[[Tensor], Tensor]
    """Maps [B, S, D] to [B, S, D]."""
    parameters: list[Tensor]
    flops: float
    """FLOPs of the forward pass."""


def input_with_logits(logits_TE: Tensor, weights: Weights, seq_len: int) -> Tensor:
    """Return a random input [T/S, S, D], bf16, whose router logits are about the given ones up to a constant per token.

    The input is the one closest to a normal one that has these logits.
    """
    router_ED = weights.router_ED.double().cpu()
    inverse_ED = torch.linalg.solve(router_ED @ router_ED.T, router_ED).float().to(weights.router_ED.device)
    wanted_TE = (logits_TE - logits_TE.mean(dim=1, keepdim=True)).to(inverse_ED.device)
    generator = torch.Generator(inverse_ED.device).manual_seed(1)
    x_TD = torch.empty(len(logits_TE), inverse_ED.shape[1], device=inverse_ED.device).normal_(generator=generator)
    x_TD += (wanted_TE - x_TD @ weights.router_ED.float().T) @ inverse_ED
    return x_TD.to(DTYPE).unflatten(0, (-1, seq_len)).requires_grad_()


def inputs(shape: Shape, weights: Weights, seq_len: int) -> dict[str, Tensor]:
    """Return the input of every routing."""
    balanced_TK = balanced_experts(shape.tokens, shape.top_k, shape.experts)
    noise_TE = torch.randn(shape.tokens, shape.experts, generator=torch.Generator().manual_seed(2)).clamp(-1, 1)
    # The chosen experts are ahead by at least 4, so that rounding does not change the choice.
    balanced_TE = noise_TE.scatter(1, balanced_TK, noise_TE.gather(1, balanced_TK) + 6)
    logits = {"balanced": balanced_TE, "skewed": skewed_logits(shape.tokens, shape.experts)}
    return {routing: input_with_logits(logits_TE, weights, seq_len) for routing, logits_TE in logits.items()}


def rows_per_expert(x_BSD: Tensor, weights: Weights, top_k: int) -> Tensor:
    """Return the number of assignments of each expert, int64 [E]."""
    logits_TE = x_BSD.detach().flatten(0, 1).float() @ weights.router_ED.float().T
    return torch.bincount(logits_TE.topk(top_k, dim=1).indices.flatten(), minlength=len(weights.router_ED))


def layer_with(shape: Shape, weights: Weights, dtype: torch.dtype) -> MoELayer:
    """Return Mixwright's layer with weights of `dtype`."""
    with torch.device("meta"):
        layer = mixwright_layer(shape.dim, shape.experts, shape.hidden, shape.top_k, shared=shape.shared)
    layer = layer.to(dtype).to_empty(device=weights.router_ED.device)
    values = {
        "router.weight": weights.router_ED,
        "experts.w_gate": weights.gate_EFD,
        "experts.w_up": weights.up_EFD,
        "experts.w_down": weights.down_EDF,
    }
    if weights.shared:
        names = (f"shared.w_{name}.weight" for name in ("gate", "up", "down"))
        values |= dict(zip(names, weights.shared, strict=True))
    layer.load_state_dict(values)
    return layer


def without_kernels(call: Callable[..., Result]) -> Callable[..., Result]:
    """Return `call` without Mixwright's kernels for GPUs: torch's operators instead."""

    def eager(*arguments: Any) -> Result:
        with eager_kernels():
            return call(*arguments)

    return eager


def mixwright(
    shape: Shape, weights: Weights, dtype: torch.dtype, compiled: bool = False, kernels: bool = True
) -> Implementation:
    layer = layer_with(shape, weights, dtype)
    # Without a GPU, compiling takes long and needs a C++ compiler.
    backend = "inductor" if weights.router_ED.is_cuda else "aot_eager"
    module = torch.compile(layer, backend=backend, dynamic=False) if compiled else layer

    def call(x_BSD: Tensor) -> Tensor:
        y_BSD: Tensor = module(x_BSD, TokenContext())[0]
        return y_BSD

    if not kernels:
        call = without_kernels(call)

    return Implementation(call, list(layer.parameters()), shape.flops(shape.width))


def with_shared(shape: Shape, weights: Weights, call: Callable[[Tensor], Tensor], own: list[Tensor]) -> Implementation:
    """Add the shared experts to an implementation that has none."""
    if weights.shared is None:
        return Implementation(call, own, shape.flops(shape.width))
    gate, up, down = shared = [weight.clone().requires_grad_() for weight in weights.shared]

    def both(x_BSD: Tensor) -> Tensor:
        return call(x_BSD) + F.linear(F.silu(F.linear(x_BSD, gate)) * F.linear(x_BSD, up), down)

    return Implementation(both, own + shared, shape.flops(shape.width))


def transformers_block(shape: Shape, weights: Weights) -> Implementation:
    with torch.device("meta"):
        block: Any = transformers_layer(shape.dim, shape.experts, shape.hidden, shape.top_k, "grouped_mm")
    block = block.to(DTYPE).to_empty(device=weights.router_ED.device)
    with torch.no_grad():
        block.gate.weight.copy_(weights.router_ED)
        block.experts.gate_up_proj.copy_(torch.cat((weights.gate_EFD, weights.up_EFD), dim=1))
        block.experts.down_proj.copy_(weights.down_EDF)

    def call(x_BSD: Tensor) -> Tensor:
        y = block(x_BSD)
        return y[0] if isinstance(y, tuple) else y

    return with_shared(shape, weights, call, list(block.parameters()))


def plain_loop(shape: Shape, weights: Weights) -> Implementation:
    parameters = [
        weight.clone().requires_grad_()
        for weight in (weights.router_ED, weights.gate_EFD, weights.up_EFD, weights.down_EDF)
    ]
    router_ED, *stacked = parameters

    def call(x_BSD: Tensor) -> Tensor:
        x_TD = x_BSD.flatten(0, 1)
        probs_TE = F.linear(x_TD, router_ED).softmax(dim=-1, dtype=torch.float32)
        weights_TK, experts_TK = probs_TE.topk(shape.top_k, dim=-1)
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        y_TD = torch.zeros_like(x_TD)
        for expert, (gate, up, down) in enumerate(zip(*(weight.unbind() for weight in stacked), strict=True)):
            tokens, choices = (experts_TK == expert).nonzero(as_tuple=True)
            rows = x_TD[tokens]
            y = F.linear(F.silu(F.linear(rows, gate)) * F.linear(rows, up), down)
            y_TD.index_add_(0, tokens, y * weights_TK[tokens, choices, None].to(y.dtype))
        return y_TD.view_as(x_BSD)

    return with_shared(shape, weights, call, parameters)


def dense_swiglu(shape: Shape, device: torch.device) -> Implementation:
    with device:
        layer = FeedForward(shape.dim, shape.width * shape.hidden, "swiglu").to(DTYPE)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    return Implementation(layer, list(layer.parameters()), shape.flops(shape.width))


class Times(NamedTuple):
    """The times of a layer."""

    forward_ms: float
    both_ms: float
    """Of the forward and the backward pass. Both are medians."""
    spread: float
    """The longest time of a call relative to the shortest one, of the forward pass or of both, the larger."""
    memory_GB: float | None
    """The peak of both passes."""


def time_passes(stage: Stage, forward: Callable[[], Any], leaves: Sequence[Tensor], grads: Sequence[Tensor]) -> Times:
    """Measure the forward pass and both passes.

    Args:
        forward: returns as many tensors as `grads` has, or a tensor.
        leaves: what the gradient is computed for.
    """

    def both() -> None:
        torch.autograd.grad(forward(), leaves, grads if len(grads) > 1 else grads[0], allow_unused=True)

    cuda = stage.device.type == "cuda"
    forward_times = times_of(forward, stage.device, ROUNDS, WARM_UP, LEAST_MS)
    before = 0
    if cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    both_times = times_of(both, stage.device, ROUNDS, WARM_UP, LEAST_MS)
    spread = max(max(times) / min(times) for times in (forward_times, both_times))
    memory = (torch.cuda.max_memory_allocated() - before) / 1e9 if cuda else None
    return Times(statistics.median(forward_times), statistics.median(both_times), spread, memory)


class Table:
    """The rows of one shape."""

    def __init__(self, stage: Stage, shape: Shape) -> None:
        self.stage, self.shape = stage, shape
        self.dense_s_per_flop: float | None = None

    def add(self, routing: str, name: str, flops: float, times: Times) -> None:
        """Add the times of both passes. `flops` are those of the forward pass."""
        forward_ms, both_ms, spread, memory = times
        if name == DENSE:
            self.dense_s_per_flop = both_ms / flops
        self.stage.row(
            shape=self.shape.name,
            routing=routing,
            implementation=name,
            forward_ms=forward_ms,
            backward_ms=both_ms - forward_ms,
            forward_tflops=flops / forward_ms / 1e9,
            # Noise can make the difference of two short times negative.
            backward_tflops=2 * flops / (both_ms - forward_ms) / 1e9 if both_ms > forward_ms else None,
            both_tflops=3 * flops / both_ms / 1e9,
            x_dense=both_ms / flops / self.dense_s_per_flop if self.dense_s_per_flop else None,
            memory_GB=memory,
            spread=spread,
            source="measured",
        )

    def add_published(self) -> None:
        """Add the figures of others, below the measured ones."""
        for figure in self.shape.published:
            self.stage.row(
                shape=self.shape.name,
                routing=None,
                implementation=figure.name,
                forward_ms=None,
                backward_ms=None,
                forward_tflops=figure.forward,
                backward_tflops=figure.backward,
                both_tflops=figure.both,
                x_dense=None,
                memory_GB=None,
                spread=None,
                source=figure.source,
            )


def measure_dense(table: Table, name: str) -> Implementation:
    """Measure the dense layer, whose time does not depend on the routing."""
    stage, shape = table.stage, table.shape
    x_TD = torch.randn(shape.tokens, shape.dim, device=stage.device, dtype=DTYPE, requires_grad=True)
    dense = dense_swiglu(shape, stage.device)
    times = time_passes(stage, lambda: dense.call(x_TD), [x_TD, *dense.parameters], [torch.randn_like(x_TD)])
    table.add("any", name, dense.flops, times)
    return dense


def measure_dense_matmuls(table: Table, dense: Implementation) -> None:
    """Measure the dense layer's matmuls alone: three forward and six backward."""
    stage, shape = table.stage, table.shape
    x_TD = torch.randn(shape.tokens, shape.dim, device=stage.device, dtype=DTYPE, requires_grad=True)
    gate, up, down = dense.parameters
    x2_TD = x_TD.detach().clone().requires_grad_()  # so that autograd does not add two gradients

    def matmuls() -> list[Tensor]:
        return [F.linear(F.linear(x_TD, gate), down), F.linear(x2_TD, up)]

    grads = [torch.randn_like(out) for out in matmuls()]
    times = time_passes(stage, matmuls, [x_TD, x2_TD, gate, up, down], grads)
    table.add("any", "dense matmuls alone", dense.flops, times)


def measure_grouped(table: Table, weights: Weights, xs: dict[str, Tensor]) -> None:
    """The grouped matmuls alone: three forward and six backward, on given rows."""
    stage, shape = table.stage, table.shape
    stacked = [weight.clone().requires_grad_() for weight in (weights.gate_EFD, weights.up_EFD, weights.down_EDF)]
    gate, up, down = (weight.transpose(1, 2) for weight in stacked)
    rows_RD = torch.randn(shape.tokens * shape.top_k, shape.dim, device=stage.device, dtype=DTYPE, requires_grad=True)
    rows2_RD = rows_RD.detach().clone().requires_grad_()
    for routing, x_BSD in xs.items():
        offsets = rows_per_expert(x_BSD, weights, shape.top_k).cumsum(0, dtype=torch.int32)

        def matmuls(offsets: Tensor = offsets) -> list[Tensor]:
            hidden_RF = F.grouped_mm(rows_RD, gate, offs=offsets)
            return [F.grouped_mm(hidden_RF, down, offs=offsets), F.grouped_mm(rows2_RD, up, offs=offsets)]

        grads = [torch.randn_like(out) for out in matmuls()]
        times = time_passes(stage, matmuls, [rows_RD, rows2_RD, *stacked], grads)
        table.add(routing, "grouped matmuls alone", shape.flops(shape.top_k), times)


def builders(shape: Shape, weights: Weights) -> Iterator[tuple[str, Callable[[], Implementation]]]:
    """Yield the implementations of the whole layer, the most important first."""
    yield "Mixwright, bf16 weights", lambda: mixwright(shape, weights, DTYPE)
    yield "Mixwright, fp32 weights", lambda: mixwright(shape, weights, torch.float32)
    yield "transformers, grouped_mm", lambda: transformers_block(shape, weights)
    yield (
        "Mixwright, fp32 weights, no kernels",
        lambda: mixwright(shape, weights, torch.float32, kernels=False),
    )
    yield "plain loop over experts", lambda: plain_loop(shape, weights)


def measure(table: Table, name: str, built: Implementation, xs: dict[str, Tensor]) -> None:
    """Measure one implementation of the whole layer with every routing."""
    for routing, x_BSD in xs.items():
        leaves, grads = [x_BSD, *built.parameters], [torch.randn_like(x_BSD)]
        times = time_passes(table.stage, lambda x=x_BSD: built.call(x), leaves, grads)  # type: ignore[misc]
        table.add(routing, name, built.flops, times)


def measure_shape(stage: Stage, shape: Shape) -> None:
    """Measure everything but the compiled layer for one shape."""
    table = Table(stage, shape)
    stage.attempt(f"{shape.name}: dense", lambda: measure_dense_matmuls(table, measure_dense(table, DENSE)))
    free_memory()
    weights = Weights(shape, stage.device)
    xs = inputs(shape, weights, sequence_length(shape))
    stage.attempt(f"{shape.name}: grouped", lambda: measure_grouped(table, weights, xs))
    free_memory()
    reference_BSD: Tensor | None = None
    for name, build in builders(shape, weights):
        if not stage.fits(f"{shape.name}: {name}", 5):
            break
        built = stage.attempt(f"{shape.name}: {name}", build)
        if built is None:
            continue
        stage.attempt(f"{shape.name}: {name}", lambda built=built, name=name: measure(table, name, built, xs))
        with torch.no_grad():
            y_BSD = stage.attempt(f"{shape.name}: {name}", lambda built=built: built.call(xs["balanced"])[:, :64])
        if reference_BSD is None:
            reference_BSD = y_BSD
        elif y_BSD is not None:
            error = relative_error(y_BSD, reference_BSD)
            stage.check(f"{shape.name}: {name} computes the same", error < 2e-2, f"relative difference {error:.1e}")
        del built, y_BSD
        free_memory()
    stage.attempt(f"{shape.name}: dense", lambda: measure_dense(table, f"{DENSE}, again"))
    table.add_published()
    for routing, x_BSD in xs.items():
        counts_E = rows_per_expert(x_BSD, weights, shape.top_k).double()
        stage.row(
            shape=shape.name,
            routing=routing,
            T=shape.tokens,
            D=shape.dim,
            F=shape.hidden,
            E=shape.experts,
            k=shape.top_k,
            shared=shape.shared,
            fullest_over_mean=(counts_E.max() / counts_E.mean()).item(),
            rows_of_emptiest=int(counts_E.min()),
        )


def sequence_length(shape: Shape) -> int:
    """Return S, the tokens of a row of the input."""
    return min(4096, shape.tokens)


def measure_parts(stage: Stage, shape: Shape) -> None:
    """Measure the parts of Mixwright's layer, with fp32 weights and skewed routing."""
    weights = Weights(shape, stage.device)
    x_BSD = inputs(shape, weights, sequence_length(shape))["skewed"]
    layer = layer_with(shape, weights, torch.float32)
    del weights
    experts, dispatcher = layer.experts, layer.dispatcher
    x_TD = x_BSD.detach().flatten(0, 1).requires_grad_()
    with torch.no_grad():
        routing, _ = layer.router(x_BSD, None, None)
        rows_RD, counts_E, plan = dispatcher.dispatch(x_TD, routing)
        gate_RF = experts.kernel(rows_RD, experts.w_gate.to(DTYPE), counts_E)
    up_RF, y_RD = gate_RF.clone().requires_grad_(), rows_RD.clone().requires_grad_()
    gate_RF.requires_grad_(), rows_RD.requires_grad_()
    routing = routing._replace(weights_TK=routing.weights_TK.detach().requires_grad_())

    def matmuls(x_RI: Tensor, *stacked: Tensor) -> list[Tensor]:
        return [experts.kernel(x_RI, weight.to(DTYPE), counts_E) for weight in stacked]

    parts: dict[str, tuple[Callable[[], Any], list[Tensor]]] = {
        "whole layer": (lambda: layer(x_BSD, TokenContext())[0], [x_BSD, *layer.parameters()]),
        "router": (lambda: layer.router(x_BSD, None, None)[0].weights_TK, [x_BSD, layer.router.weight]),
        "dispatch": (lambda: dispatcher.dispatch(x_TD, routing)[0], [x_TD]),
        "experts": (lambda: experts.apply_to(rows_RD, counts_E), [rows_RD, *experts.parameters()]),
        "experts: gate and up, with the cast": (
            lambda: matmuls(rows_RD, experts.w_gate, experts.w_up),
            [rows_RD, experts.w_gate, experts.w_up],
        ),
        "experts: SwiGLU": (lambda: gated(F.silu, gate_RF, up_RF), [gate_RF, up_RF]),
        "experts: down, with the cast": (lambda: matmuls(gate_RF, experts.w_down)[0], [gate_RF, experts.w_down]),
        "combine": (lambda: dispatcher.combine(y_RD, routing, plan), [y_RD, routing.weights_TK]),
    }

    def measure_part(name: str, kernels: bool, forward: Callable[[], Any], leaves: list[Tensor]) -> None:
        forward = forward if kernels else without_kernels(forward)
        outs = forward()
        grads = [torch.randn_like(out) for out in (outs if isinstance(outs, list) else [outs])]
        del outs
        forward_ms, both_ms, spread, _ = time_passes(stage, forward, leaves, grads)
        stage.row(
            shape=shape.name,
            part=name,
            kernels=kernels,
            forward_ms=forward_ms,
            backward_ms=both_ms - forward_ms,
            both_ms=both_ms,
            spread=spread,
        )

    for name, (forward, leaves) in parts.items():
        for kernels in (True, False):
            action = partial(measure_part, name, kernels, forward, leaves)
            stage.attempt(f"part: {name}", action)
    if stage.fits("kernels of the layer", 10):
        stage.attempt("kernels of the layer", lambda: list_kernels(stage, shape, layer, x_BSD))


def list_kernels(stage: Stage, shape: Shape, layer: MoELayer, x_BSD: Tensor, count: int = 20) -> None:
    """Add the GPU kernels of both passes that take the longest (on CPUs: the operators)."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    grad_BSD, steps = torch.randn_like(x_BSD), 3
    activity = ProfilerActivity.CUDA if stage.device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        for _ in range(steps):
            y_BSD = layer(x_BSD, TokenContext())[0]
            torch.autograd.grad(y_BSD, [x_BSD, *layer.parameters()], grad_BSD, allow_unused=True)
        if stage.device.type == "cuda":
            torch.cuda.synchronize()
    # With a GPU, the events of the host have the time of the kernels that they launch: those would count twice.
    wanted = DeviceType.CUDA if stage.device.type == "cuda" else DeviceType.CPU
    times = {}
    for event in profiler.key_averages():
        if event.device_type == wanted:
            time_us = event.self_device_time_total if wanted == DeviceType.CUDA else event.self_cpu_time_total
            times[event.key] = (time_us, event.count)
    total = sum(time_us for time_us, _ in times.values())
    for name, (time_us, calls) in itertools.islice(sorted(times.items(), key=lambda item: -item[1][0]), count):
        stage.row(
            shape=shape.name, kernel=name[:400], calls=calls / steps, ms=time_us / steps / 1e3, share=time_us / total
        )


def measure_compiled(stage: Stage, shape: Shape) -> None:
    """Measure the compiled layer."""
    torch.compiler.reset()  # so that the shapes before do not count towards the limit of recompilations
    dense = next((row for row in stage.rows if is_dense(row, shape)), None)
    table = Table(stage, shape)
    if dense:
        both_ms = dense["forward_ms"] + dense["backward_ms"]
        table.dense_s_per_flop = both_ms / shape.flops(shape.width)
    weights = Weights(shape, stage.device)
    xs = inputs(shape, weights, sequence_length(shape))
    built = mixwright(shape, weights, torch.float32, compiled=True)
    del weights
    measure(table, "Mixwright, fp32, compiled", built, xs)


def is_dense(row: dict[str, Any], shape: Shape) -> bool:
    return row.get("shape") == shape.name and row.get("implementation") == DENSE


def main(stage: Stage) -> None:
    shapes = TINY if stage.tiny else SHAPES
    for shape in shapes:
        if stage.fits(shape.name, 10):
            stage.attempt(shape.name, lambda shape=shape: measure_shape(stage, shape))
            free_memory()
    for shape in shapes:
        if shape.name == PARTS_OF and stage.fits("parts", 10):
            stage.attempt("parts", lambda shape=shape: measure_parts(stage, shape))
            free_memory()
    for shape in shapes:
        if stage.fits(f"{shape.name}: compiled", 30):
            stage.attempt(f"{shape.name}: compiled", lambda shape=shape: measure_compiled(stage, shape))
            free_memory()


if __name__ == "__main__":
    raise SystemExit(run_stage(main))
