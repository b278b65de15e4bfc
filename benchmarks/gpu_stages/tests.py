"""Stage `tests`: kernels, models and optimizer steps on the device against the same in fp64 on the CPU.

The error of a tensor is the norm of its difference from the reference, relative to the norm of the reference. Inputs
are rounded to the dtype under test before the reference sees them.
"""

import itertools
import math
import os
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for the checks with run.deterministic

import torch
from torch import Tensor, nn

from benchmarks.gpu_stages.stage import Comparison, Stage, one_process, run_stage, with_compile
from data.batch import IGNORE, Batch
from moe.attention.attention import AttentionCore
from moe.attention.varlen import segments_of
from moe.config import ModelConfig, RouterConfig
from moe.dispatch import LocalDispatcher
from moe.experts import KERNELS, Experts, loop_kernel
from moe.feedforward import FeedForward
from moe.generation.generate import generate
from moe.generation.sampling import Sampling
from moe.init import init_parameters
from moe.linear import Linear, RMSNorm, linear, wide_linear
from moe.losses import auxiliary_losses, linear_cross_entropy, softmax_statistics, write_logit_gradient
from moe.model import Transformer
from moe.noise import noise_keys
from moe.packed import multiply_packed_experts, pack, unpack
from moe.quantization import Packing
from moe.router import Routing
from moe.routers import build_router
from moe.token_context import TokenContext, apply_rotary, rotary_table
from parallel.mesh import Mesh
from training.build import build_engine, build_parts
from training.checkpoint.checkpoint import load, save
from training.config import OptimConfig
from training.device import compute_dtype, make_deterministic
from training.engine import NativeEngine
from training.parity.config import ONE_PROCESS, Case, configuration
from training.step import evaluate, move_to_device, train_step

CPU = torch.device("cpu")
NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16"}
BOUND = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 1e-2}
"""Largest error of one kernel and of its gradients."""

SMALL = ModelConfig(
    dim=128, num_layers=3, num_heads=4, num_kv_heads=4, head_dim=64, hidden_dim=256, num_experts=8, top_k=2,
    vocab_size=320, init_std=0.08,
)  # fmt: skip
CASES = {
    "mixtral": Case(SMALL, RouterConfig(balance_coef=0.05, z_coef=0.01)),
    "deepseek": Case(
        replace(SMALL, top_k=3, expert_hidden_dim=72, num_shared_experts=2, first_k_dense=1, num_heads=2,
                num_kv_heads=2),
        RouterConfig(kind="sigmoid_topk", scale=2.5, num_groups=4, topk_groups=2, bias_update_rate=0.01,
                     balance_scope="sequence"),
    ),
    "switch": Case(
        replace(SMALL, top_k=1, ffn="geglu", expert_ffn="gelu", tie_embeddings=True, moe_every=2, num_layers=2),
        RouterConfig(jitter=0.1, capacity_factor=1.25, layer_reduction="sum"),
    ),
    "unaligned": Case(
        replace(SMALL, expert_hidden_dim=52, vocab_size=323, expert_ffn="gelu"),
        RouterConfig(capacity_factor=0.75, drop_policy="prob", allow_noncausal=True),
    ),
    "all experts": Case(replace(SMALL, num_experts=4, top_k=4, num_kv_heads=1), RouterConfig()),
    "expert choice": Case(SMALL, RouterConfig(kind="expert_choice", allow_noncausal=True, balance_coef=0.0)),
    "window": Case(replace(SMALL, sliding_window=(24, None, 24), num_kv_heads=2), RouterConfig()),
    "latent": Case(
        replace(SMALL, sliding_window=(24, None, 24), kv_lora_rank=48, q_lora_rank=64, qk_nope_head_dim=32,
                qk_rope_head_dim=32, v_head_dim=48),
        RouterConfig(),
    ),
}  # fmt: skip


def main(stage: Stage) -> None:
    device = stage.device
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # beyond the limit, kernels run unfused in silence
    low, models = (torch.bfloat16, torch.float32), ("mixtral", "latent", "deepseek", "switch", "unaligned")
    with one_process(device) as mesh:
        checks: list[tuple[str, Callable[[], Any]]] = [
            ("dispatch", partial(check_dispatch, stage, low)),
            ("experts", partial(check_experts, stage, low)),
            ("quantised weights", partial(check_quantised, stage, low)),
            ("losses", partial(check_losses, stage, low)),
            ("routers", partial(check_routers, stage)),
            ("router logits bf16", partial(check_wide_linear, stage)),
            ("norm, linear, rotary", partial(check_small_modules, stage, low)),
            ("attention bf16", partial(check_attention, stage, low[:1], (True, False), (None, 100))),
            ("model fp32", partial(check_model, stage, mesh, torch.float32, models)),
            ("model bf16", partial(check_model, stage, mesh, torch.bfloat16, ("all experts", *models[:3]))),
            ("host syncs", partial(check_syncs, stage, mesh)),
            ("steps", partial(check_steps, stage, mesh)),
            ("same bits", partial(check_determinism, stage, mesh)),
            ("resume", partial(check_resume, stage, mesh)),
            ("run.deterministic", partial(check_deterministic_mode, stage, mesh)),
            ("kernels", partial(check_triton, stage, low)),
            ("optimizer", partial(check_optimizer, stage, mesh)),
            ("generation", partial(check_generation, stage)),
            ("evaluation", partial(check_evaluation, stage, mesh)),
            ("experts without rows", partial(check_no_rows, stage, low)),
            ("model expert choice", partial(check_model, stage, mesh, torch.float32, ("expert choice",))),
            ("model window bf16", partial(check_model, stage, mesh, torch.bfloat16, ("window",))),
            ("attention fp64", partial(check_attention, stage, (torch.float64,), (True, False), (None, 100))),
            ("attention flex", partial(check_flex, stage, torch.bfloat16)),
            ("attention fp32", partial(check_flex, stage, torch.float32)),
            ("model window fp32", partial(check_model, stage, mesh, torch.float32, ("window",))),
        ]  # fmt: skip
        stage.run_checks(checks)


# Kernels


def random_tensors(seed: int, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Return normal random tensors on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def compared(function: Callable[..., Any], inputs: Sequence[Tensor], device: torch.device, names: str) -> Iterator[Any]:
    """Yield the outputs and gradients of `function` on the device beside those in fp64 on the CPU."""
    dtype = next(x.dtype for x in inputs if x.is_floating_point())
    leaves = [x.to(device).detach() for x in inputs]
    wanted = [x.requires_grad_() for x in leaves if x.is_floating_point()]
    wide = [x.to(CPU, torch.float64 if x.is_floating_point() else None).detach() for x in inputs]
    wide_wanted = [x.requires_grad_() for x in wide if x.is_floating_point()]
    output, expected = function(*leaves), function(*wide)
    (grad,) = random_tensors(7, dtype, tuple(expected.shape))
    found = [output, *torch.autograd.grad(output, wanted, grad.to(output))]
    reference = [expected, *torch.autograd.grad(expected, wide_wanted, grad.double())]
    yield from zip(("output", *names.split()), found, reference, strict=True)


def check_experts(stage: Stage, dtypes: Sequence[torch.dtype]) -> None:
    comparison = Comparison(stage, "experts: kernels x rows x widths")
    rows = {
        "uneven": (37, 0, 128, 1, 0, 200, 64, 0),
        "one row": (0, 0, 0, 1, 0, 0, 0, 0),
        "one expert": (0, 0, 0, 0, 0, 0, 0, 300),
        "even": (32,) * 8,
    }
    for dtype, kernel, kind, width in itertools.product(dtypes, KERNELS, ("swiglu", "relu"), (160, 52)):
        if kernel == "grouped" and width % 8:
            continue
        for label, counts in rows.items():
            name = f"{NAMES[dtype]} {kernel} {kind} {width} {label}"
            comparison.case(name, BOUND[dtype], partial(_experts, stage.device, dtype, kernel, kind, width, counts))
    comparison.finish()


def check_no_rows(stage: Stage, dtypes: Sequence[torch.dtype]) -> None:
    comparison = Comparison(stage, "experts without any row")
    for dtype, kernel in itertools.product(dtypes, KERNELS):
        pairs = partial(_experts, stage.device, dtype, kernel, "swiglu", 160, (0,) * 8)
        comparison.case(f"{NAMES[dtype]} {kernel}", BOUND[dtype], pairs)
    comparison.finish()


def _experts(
    device: torch.device, dtype: torch.dtype, kernel: str, kind: str, width: int, counts: Sequence[int]
) -> Iterator[Any]:
    experts = Experts(len(counts), 128, width, kind, kernel)
    reference = Experts(len(counts), 128, width, kind, "loop").double()
    shapes = [tuple(weight.shape) for weight in experts.parameters()]
    x, *weights = random_tensors(1, dtype, (sum(counts), 128), *shapes)
    for module in (experts, reference):
        for parameter, weight in zip(module.parameters(), weights, strict=True):
            parameter.data = (weight.to(parameter.dtype) * 128**-0.5).to(dtype).to(parameter.dtype)
    experts.to(device)
    wide = x.double().requires_grad_()
    x = x.to(device).requires_grad_()
    output = experts.apply_to(x, torch.tensor(counts, device=device))
    expected = reference.apply_to(wide, torch.tensor(counts))
    (grad,) = random_tensors(2, dtype, tuple(expected.shape))
    found = torch.autograd.grad(output, [x, *experts.parameters()], grad.to(output))
    wanted = torch.autograd.grad(expected, [wide, *reference.parameters()], grad.double())
    names = ("rows", *(name for name, _ in reference.named_parameters()))
    yield "output", output, expected
    yield from zip(names, found, wanted, strict=True)


def check_quantised(stage: Stage, dtypes: Sequence[torch.dtype]) -> None:
    """Bytes of matrices, products and gradients. The package bitsandbytes is needed."""
    comparison = Comparison(stage, "quantised weights: kinds x shapes")
    shapes, scales = ((256, 320), (130, 77)), (True, False)
    for dtype, kind, shape, double in itertools.product(dtypes, ("nf4", "int8"), shapes, scales):
        packing = Packing(kind, *shape, 64, double)
        pairs = partial(_quantised, stage.device, dtype, packing)
        comparison.case(f"{NAMES[dtype]} {kind} {shape} {double}", BOUND[dtype], pairs)
    comparison.finish()


def _quantised(device: torch.device, dtype: torch.dtype, packing: Packing) -> Iterator[Any]:
    counts_e = torch.tensor([5, 0, 40])
    stacked, rows = random_tensors(1, dtype, (3, packing.rows, packing.columns), (45, packing.columns))
    packed = torch.stack([pack(weight, packing) for weight in stacked])
    wide = torch.stack([unpack(row, packing, torch.float64) for row in packed])
    for weight, reference in zip(stacked, wide, strict=True):  # A GPU can round a scale in another way.
        on_device = pack(weight.to(device), packing)
        yield "quantised there", unpack(on_device, packing, torch.float32).double(), reference
    for row, reference in zip(packed.to(device), wide, strict=True):
        yield "dequantised there", unpack(row, packing, dtype), reference
    x = rows.to(device).requires_grad_()
    y = multiply_packed_experts(x, packed.to(device), counts_e.to(device), packing)
    wide_x = rows.double().requires_grad_()
    expected = loop_kernel(wide_x, wide, counts_e)
    (grad,) = random_tensors(2, dtype, tuple(expected.shape))
    yield "output", y, expected
    yield "rows", *torch.autograd.grad(y, x, grad.to(y)), *torch.autograd.grad(expected, wide_x, grad.double())


def check_dispatch(stage: Stage, dtypes: Sequence[torch.dtype]) -> None:
    comparison = Comparison(stage, "dispatch, combine: sizes x drops x static")
    sizes = ((257, 2, 128), (130, 7, 13), (1, 1, 13), (40, 8, 2048))
    """Tokens, top-k, width. Triton compiles the kernels for each of them."""
    for dtype, (tokens, top_k, dim), dropped, static in itertools.product(dtypes, sizes, (False, True), (False, True)):
        name = f"{NAMES[dtype]} T={tokens} k={top_k} D={dim}{' drops' * dropped}{' static' * static}"
        pairs = partial(_dispatch, stage.device, dtype, tokens, top_k, dim, dropped, static)
        comparison.case(name, BOUND[dtype], pairs)
    comparison.finish()


def _dispatch(
    device: torch.device, dtype: torch.dtype, tokens: int, top_k: int, dim: int, dropped: bool, static: bool
) -> Iterator[Any]:
    """The output is a sum over k of weight times factor of the expert times token, which needs no dispatch."""
    generator = torch.Generator().manual_seed(tokens)
    experts_TK = torch.rand(tokens, 8, generator=generator).argsort(dim=1)[:, :top_k]
    weights_TK = torch.rand(tokens, top_k, generator=generator)
    if dropped:
        gone = torch.rand(tokens, top_k, generator=generator) < 0.3
        experts_TK, weights_TK = experts_TK.masked_fill(gone, 8), weights_TK.masked_fill(gone, 0.0)
    x_TD, factor_E1, grad_TD = random_tensors(3, dtype, (tokens, dim), (8, 1), (tokens, dim))
    factor_E1 = factor_E1.to(torch.promote_types(dtype, torch.float32))
    capacity = int(experts_TK.flatten().bincount(minlength=9)[:8].max()) + 2
    leaves = [x.to(device).requires_grad_() for x in (x_TD, weights_TK, factor_E1)]
    routing = Routing(experts_TK.to(device), leaves[1], 8, complete=not dropped, capacity=capacity)
    dispatcher = LocalDispatcher()
    rows, counts, plan = dispatcher.dispatch(leaves[0], routing, static)
    # The check's own product is rounded once, and the gradient of a factor is added up in at least fp32.
    factor = leaves[2].repeat_interleave(counts, dim=0)
    output = dispatcher.combine((rows * factor).to(dtype), routing, plan)
    found = [output, *torch.autograd.grad(output, leaves, grad_TD.to(device))]
    wide = [x.double().requires_grad_() for x in (x_TD, weights_TK, factor_E1)]
    share_T1 = (wide[1] * torch.cat((wide[2], wide[2].new_zeros(1, 1)))[experts_TK].squeeze(-1)).sum(1, keepdim=True)
    expected = share_T1 * wide[0]
    reference = [expected, *torch.autograd.grad(expected, wide, grad_TD.double())]
    if dropped:  # the weight of a dropped assignment has no gradient
        reference[2] = reference[2].masked_fill(experts_TK == 8, 0.0)
    yield from zip(("output", "tokens", "weights", "factors"), found, reference, strict=True)


def check_triton(stage: Stage, dtypes: Sequence[torch.dtype]) -> None:
    """The Triton kernels by themselves, with shapes and values that models rarely have."""
    if stage.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return
    from moe.kernels import group, swiglu, top_k

    comparison = Comparison(stage, "Triton: SwiGLU, top-k, sort by expert")
    device = stage.device

    def activated(gate: Tensor, up: Tensor) -> Tensor:
        if gate.dtype == torch.float64:
            return nn.functional.silu(gate) * up
        return swiglu.swiglu(gate, up)

    def activated_joined(joined: Tensor) -> Tensor:
        if joined.dtype == torch.float64:
            gate, up = joined.chunk(2, dim=-1)
            return nn.functional.silu(gate) * up
        return swiglu.swiglu_joined(joined)

    for dtype, (rows, width) in itertools.product(dtypes, ((1, 1), (300, 1408), (17, 131))):
        shape, name = (rows, width), f"{NAMES[dtype]} SwiGLU {rows}x{width}"
        inputs = random_tensors(11, dtype, shape, shape)
        comparison.case(name, BOUND[dtype], partial(compared, activated, inputs, device, "gate up"))
        inputs = random_tensors(11, dtype, (rows, 2 * width))
        comparison.case(f"{name} joined", BOUND[dtype], partial(compared, activated_joined, inputs, device, "joined"))

    def chosen(scores: Tensor, k: int) -> Iterator[Any]:
        expected = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
        yield "indices", top_k.top_k(scores.to(device), k), expected

    generator = torch.Generator().manual_seed(0)
    for experts, k in ((1, 1), (8, 2), (8, 8), (64, 6), (130, 8), (256, 8), (1024, 32)):
        if stage.tiny and experts > 200:
            continue
        for label in ("random", "ties", "special"):
            scores = torch.randn(3, 37, experts, generator=generator)
            scores = scores.round() if label == "ties" else scores
            if label == "special":
                values = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40])
                scores = values[torch.randint(0, 6, scores.shape, generator=generator)]
            for dtype in dtypes:
                name = f"{NAMES[dtype]} top-{k} of {experts} {label}"
                comparison.case(name, 0.0, partial(chosen, scores.to(dtype), k))

    def sorted_by_expert(assigned: Tensor, experts: int) -> Iterator[Any]:
        order, slots, counts = group.group_by_expert(assigned.to(device), experts)
        expected = assigned.argsort(stable=True)
        yield "order", order, expected
        yield "slots", slots, expected.argsort()
        yield "counts", counts, assigned.bincount(minlength=experts + 1)[:experts]

    for assignments, experts in ((1, 1), (63, 8), (64, 8), (65, 64), (500, 64), (98_304, 256)):
        if stage.tiny and assignments > 1000:
            continue
        assigned = torch.randint(0, experts + 1, (assignments,), generator=generator)
        comparison.case(f"sort {assignments} by {experts}", 0.0, partial(sorted_by_expert, assigned, experts))
    comparison.finish()


def check_losses(stage: Stage, dtypes: Sequence[torch.dtype]) -> None:
    comparison = Comparison(stage, "cross-entropy: shapes x labels")
    for dtype, (batch, length, vocab), labelled in itertools.product(
        dtypes, ((2, 150, 1003), (1, 1, 7), (2, 70, 50_304)), ("all", "some", "none")
    ):
        name = f"{NAMES[dtype]} {batch}x{length}x{vocab} {labelled} labels"
        comparison.case(name, BOUND[dtype], partial(_losses, stage.device, dtype, batch, length, vocab, labelled))
    comparison.finish()


def _losses(
    device: torch.device, dtype: torch.dtype, batch: int, length: int, vocab: int, labelled: str
) -> Iterator[Any]:
    generator = torch.Generator().manual_seed(vocab)
    labels = torch.randint(0, vocab, (batch, length), generator=generator)
    ignored = torch.rand(labels.shape, generator=generator) < {"all": 0.0, "some": 0.4, "none": 1.1}[labelled]
    labels = labels.masked_fill(ignored, IGNORE)
    (logits,) = random_tensors(4, dtype, (batch, length, vocab))
    logits = logits * 3
    wide = logits.double().clone().requires_grad_()
    nats = nn.functional.cross_entropy(wide.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none")
    count = max(1, int((~ignored).sum()))
    (expected,) = torch.autograd.grad(nats.sum() / count, wide)
    gradient, labels = logits.flatten(0, 1).to(device), labels.flatten().to(device)
    stats = softmax_statistics(gradient, labels, 0)
    largest, total, label = stats
    yield "nats", (total.log() - (label - largest)) * (labels != IGNORE), nats
    write_logit_gradient(gradient, labels, 0, stats, (labels != IGNORE).to(stats.dtype) / count, 0)
    yield "gradient", gradient.view_as(logits), expected
    if vocab > 10_000:
        return  # the exact gradients of the head take seconds on a CPU
    x, weight = (tensor / 4 for tensor in random_tensors(5, dtype, (batch, length, 24), (vocab, 24)))
    leaves = [tensor.to(device).requires_grad_() for tensor in (x, weight)]
    wide_leaves = [tensor.double().requires_grad_() for tensor in (x, weight)]
    found = linear_cross_entropy(*leaves, labels.view(batch, length), 1 / count).total
    wide_logits = nn.functional.linear(*wide_leaves).flatten(0, 1)
    exact = nn.functional.cross_entropy(wide_logits, labels.cpu(), ignore_index=IGNORE, reduction="sum") / count
    yield "loss", found, exact
    gradients = (torch.autograd.grad(total, tensors) for total, tensors in ((found, leaves), (exact, wide_leaves)))
    yield from zip(("gradient of x", "gradient of the head"), *gradients, strict=True)


def check_small_modules(stage: Stage, dtypes: Sequence[torch.dtype]) -> None:
    comparison = Comparison(stage, "RMSNorm, Linear, feed-forward, rotary")
    for dtype, dim in itertools.product(dtypes, (128, 77, 2048)):
        modules: dict[str, Callable[[], nn.Module]] = {
            "RMSNorm": partial(RMSNorm, dim, 1e-5),
            "Linear": partial(Linear, dim, 96),
            "FeedForward": partial(FeedForward, dim, 104, "swiglu"),
        }
        for name, build in modules.items():
            pairs = partial(_module, stage.device, dtype, build, dim)
            comparison.case(f"{NAMES[dtype]} {name} {dim}", BOUND[dtype], pairs)
        comparison.case(f"{NAMES[dtype]} rotary", max(BOUND[dtype], 1e-4), partial(_rotary, stage.device, dtype))
    comparison.finish()


def _module(device: torch.device, dtype: torch.dtype, build: Callable[[], nn.Module], dim: int) -> Iterator[Any]:
    module, reference = build(), build().double()
    names = [name for name, _ in module.named_parameters()]
    shapes = [tuple(weight.shape) for weight in module.parameters()]
    x, *weights = random_tensors(5, dtype, (3, 50, dim), *shapes)
    weights = [weight * dim**-0.5 if weight.dim() > 1 else weight for weight in weights]
    for one in (module, reference):
        for parameter, weight in zip(one.parameters(), weights, strict=True):
            parameter.data = weight.to(parameter.dtype)
    module.to(device)
    wide, x = x.double().requires_grad_(), x.to(device).requires_grad_()
    output, expected = module(x), reference(wide)
    (grad,) = random_tensors(6, dtype, tuple(expected.shape))
    found = torch.autograd.grad(output, [x, *module.parameters()], grad.to(output))
    wanted = torch.autograd.grad(expected, [wide, *reference.parameters()], grad.double())
    yield "output", output, expected
    yield from zip(("input", *names), found, wanted, strict=True)


def _rotary(device: torch.device, dtype: torch.dtype) -> Iterator[Any]:
    positions = torch.tensor([[0, 1, 2, 500, 4095], [0, 1, 0, 1, 100_000]])

    def rotate(x: Tensor) -> Tensor:
        return apply_rotary(x, rotary_table(positions.to(x.device), 64, 1e6, x.dtype))

    # An angle of 100,000 has an error of 0.004 in fp32.
    x = random_tensors(8, dtype, (2, 3, 5, 64))
    for part, found, expected in compared(rotate, x, device, "input"):
        yield part, found[:1], expected[:1]


SIZES = ((500, 500, 8, 2, 64), (256, 256, 4, 4, 128), (1, 1, 8, 2, 64), (131, 131, 4, 1, 64), (300, 500, 8, 2, 64))
"""Queries, keys, heads, key/value heads, and the width of a head."""


def check_flex(stage: Stage, dtype: torch.dtype) -> None:
    """Attention of a part of a row by flex_attention. One case, because each one is compiled for about 12 seconds."""
    if stage.fits(f"attention {NAMES[dtype]}, flex_attention", 15):
        check_attention(stage, (dtype,), (True,), (100,), SIZES[-1:], segmented=False)


def check_attention(
    stage: Stage,
    dtypes: Sequence[torch.dtype],
    packings: Sequence[bool],
    windows: Sequence[int | None],
    sizes: Sequence[tuple[int, ...]] = SIZES,
    segmented: bool = True,
) -> None:
    """Compare attention for every combination.

    Args:
        sizes: as in `SIZES`.
        segmented: whether the host knows where documents begin, as in training on one context rank.
    """
    kinds = ("packed and whole rows" if True in packings else "whole rows") + ", no segments" * (not segmented)
    comparison = Comparison(stage, f"attention {'/'.join(NAMES[dtype] for dtype in dtypes)}, {kinds}")
    for dtype, packed, window, size in itertools.product(dtypes, packings, windows, sizes):
        queries, keys, heads, groups, width = size
        # Context parallelism alone has parts of rows, whose segments no host knows.
        part_fits = (packed or window is not None) and not (segmented and dtype == torch.bfloat16)
        if queries < keys and not part_fits:
            continue
        name = f"{NAMES[dtype]} {'packed' if packed else 'whole'} window={window} {queries}/{keys} H={heads}/{groups}"
        shapes = [(2, heads, queries, width), (2, groups, keys, width), (2, groups, keys, width)]
        bound = 1e-4 if dtype == torch.float32 else BOUND[dtype]
        comparison.case(name, bound, partial(_attention, stage.device, dtype, shapes, packed, window, segmented))
    comparison.finish()


def _attention(
    device: torch.device,
    dtype: torch.dtype,
    shapes: Sequence[tuple[int, ...]],
    packed: bool,
    window: int | None,
    segmented: bool,
) -> Iterator[Any]:
    keys, queries = shapes[1][2], shapes[0][2]
    documents = (torch.rand(2, keys, generator=torch.Generator().manual_seed(1)) < 0.01).cumsum(1).int()
    documents[1, keys - keys // 5 :] = -1
    documents = documents if packed else torch.zeros_like(documents)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.dtype == torch.float64 and q.device == CPU:
            return _attend_by_mask(q, k, v, documents, window)
        segments = segments_of(documents, q.device) if segmented and queries == keys else None
        context = TokenContext(documents_BS=documents.to(q.device) if packed else None, segments=segments)
        return AttentionCore(window)(q, k, v, context)

    valid = (documents[:, keys - queries :] >= 0).view(2, 1, queries, 1)
    (mask,) = (valid.to(dtype),)
    inputs = random_tensors(9, dtype, *shapes)
    yield from compared(lambda q, k, v: attend(q, k, v) * mask.to(q), inputs, device, "q k v")


def _attend_by_mask(q: Tensor, k: Tensor, v: Tensor, documents: Tensor, window: int | None) -> Tensor:
    ratio, keys = q.shape[1] // k.shape[1], k.shape[2]
    k, v = k.repeat_interleave(ratio, dim=1), v.repeat_interleave(ratio, dim=1)
    place, other = torch.arange(keys - q.shape[2], keys).unsqueeze(1), torch.arange(keys)
    mask = (other <= place) & (other > place - (window or keys))
    mask = mask & (documents[:, keys - q.shape[2] :].unsqueeze(2) == documents.unsqueeze(1)).unsqueeze(1)
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1) @ v


def check_routers(stage: Stage) -> None:
    comparison = Comparison(stage, "routers: kinds x padding")
    kinds = {
        "softmax": (2, RouterConfig()),
        "k = E": (8, RouterConfig()),
        "switch": (1, RouterConfig(jitter=0.1, capacity_factor=1.0)),
        "capacity": (2, RouterConfig(capacity_factor=0.75)),
        "by probability": (2, RouterConfig(capacity_factor=0.75, drop_policy="prob", allow_noncausal=True)),
        "sigmoid": (3, RouterConfig(kind="sigmoid_topk", scale=2.5, num_groups=4, topk_groups=2)),
        "groups": (2, RouterConfig(num_groups=4, topk_groups=2)),
        "expert choice": (2, RouterConfig(kind="expert_choice", allow_noncausal=True, balance_coef=0.0)),
    }
    for (name, (top_k, config)), padded in itertools.product(kinds.items(), (False, True)):
        pairs = partial(_router, stage.device, top_k, config, padded)
        comparison.case(f"{name}{' padded' * padded}", 1e-4, pairs)
    comparison.finish()


def _router(device: torch.device, top_k: int, config: RouterConfig, padded: bool) -> Iterator[Any]:
    x, weight = random_tensors(10, torch.float32, (3, 64, 96), (8, 96))
    valid = torch.arange(64) < torch.tensor([[64], [40], [0]]) if padded else None
    keys = noise_keys(3, torch.arange(3 * 64).view(3, 64))
    results = []
    for place, dtype in ((device, torch.float32), (CPU, torch.float64)):
        router = build_router(96, 8, top_k, config).to(place, dtype)
        router.weight.data = (weight * 96**-0.5).to(place, dtype)
        for buffer in router.buffers():
            buffer.copy_(torch.linspace(-0.1, 0.1, 8))
        leaf = x.to(place, dtype).requires_grad_()
        routing, stats = router(leaf, None if valid is None else valid.to(place), keys.to(place))
        weights = routing.weights_TK
        factor = torch.linspace(1, 2, weights.numel(), dtype=torch.float64).view(weights.shape).to(weights)
        total = (weights * factor).sum() + stats.prob_sum_BE[:, 0].sum() + stats.z_sum_B.sum()
        grads = torch.autograd.grad(total, (leaf, router.weight))
        kept = routing.experts_TK if valid is None else routing.experts_TK[valid.flatten().to(place)]
        counted = (stats.counts_BE, stats.kept_BE, stats.tokens_B)
        results.append((kept, weights, *counted, stats.prob_sum_BE, stats.z_sum_B, *grads))
    names = ("experts", "weights", "counts", "kept", "tokens", "probabilities", "z", "input", "weight gradient")
    yield from zip(names, *results, strict=True)


def check_wide_linear(stage: Stage) -> None:
    """Logits of bf16 tokens, and gradients. That of the tokens has the precision of bf16, the others that of fp32."""
    comparison = Comparison(stage, "router logits of bf16 tokens: sizes")
    sizes = ((1, 64, 8), (70, 77, 9), (300, 1536, 128), (4096, 2048, 128), (4500, 4096, 8), (200, 512, 260))
    for tokens, dim, experts in sizes[:3] if stage.tiny else sizes:
        found, reference = _wide_linear(stage.device, tokens, dim, experts)
        for name, bound in (("logits", 1e-6), ("tokens", BOUND[torch.bfloat16]), ("weight", 1e-6)):
            label = f"{name} T={tokens} D={dim} E={experts}"
            comparison.case(label, bound, partial(iter, [(name, found[name], reference[name])]))
    comparison.finish()


def _wide_linear(device: torch.device, tokens: int, dim: int, experts: int) -> Iterator[dict[str, Tensor]]:
    (x,) = random_tensors(12, torch.bfloat16, (tokens, dim))
    weight, grad = random_tensors(13, torch.float32, (experts, dim), (tokens, experts))
    for place, dtype in ((device, None), (CPU, torch.float64)):
        leaves = [tensor.to(place, dtype).requires_grad_() for tensor in (x, weight)]
        logits = wide_linear(*leaves)
        gradients = torch.autograd.grad(logits, leaves, grad.to(logits))
        yield dict(zip(("logits", "tokens", "weight"), (logits, *gradients), strict=True))


# Models


def small_inputs(vocab: int, rows: int = 2, length: int = 64, *, packed: bool, padded: bool) -> Batch:
    """Return random rows, packed documents and padding included if wanted."""
    generator = torch.Generator().manual_seed(rows)
    tokens = torch.randint(0, vocab, (rows, length), generator=generator)
    labels = torch.randint(0, vocab, (rows, length), generator=generator)
    starts = (torch.rand(rows, length, generator=generator) < 0.05) & packed
    place = torch.arange(length).expand(rows, -1)
    positions = place - place.where(starts, 0).cummax(dim=1).values
    documents = starts.int().cumsum(dim=1).int()
    documents -= documents[:, :1]
    if padded:
        outside = place >= torch.tensor([length - 31, length, length, 7])[torch.arange(rows) % 4].unsqueeze(1)
        tokens, positions = tokens.masked_fill(outside, 0), positions.masked_fill(outside, 0)
        labels, documents = labels.masked_fill(outside, IGNORE), documents.masked_fill(outside, -1)
    domains = torch.zeros(rows, length, dtype=torch.uint8)
    numbers = torch.arange(rows * length).view(rows, length)
    return Batch(tokens, labels, positions, documents, domains, numbers)


def check_model(stage: Stage, mesh: Mesh, dtype: torch.dtype, names: Sequence[str]) -> None:
    comparison = Comparison(stage, f"model {NAMES[dtype]}: forward and gradients")
    for name, (packed, padded) in itertools.product(names, ((False, False), (True, True))):
        if packed and dtype == torch.float32 and name != "window" and stage.device.type == "cuda":
            continue  # packed rows in fp32 compile kernels, which takes long: "window" alone has them
        discrete = dtype == torch.bfloat16 and name != "all experts"
        bound = 1.0 if discrete else 2e-4 if dtype == torch.float32 else 3e-2
        pairs = partial(_model, mesh, dtype, CASES[name], packed, padded, discrete)
        comparison.case(f"{name}{' packed padded' * packed}", bound, pairs)
    comparison.finish()


def _model(mesh: Mesh, dtype: torch.dtype, case: Case, packed: bool, padded: bool, discrete: bool) -> Iterator[Any]:
    """With `discrete`, rounding to bf16 changes which experts some tokens take. The error is then that of the device
    divided by three times that of the CPU in the same dtype."""
    batch = small_inputs(case.model.vocab_size or 0, packed=packed, padded=padded)
    cpu = replace(mesh, device=CPU)
    found = _model_tensors(mesh, dtype, case, batch)
    expected = _model_tensors(cpu, torch.float64, case, batch)
    if not discrete:
        yield from ((name, found[name], expected[name]) for name in expected)
        return
    on_cpu = _model_tensors(cpu, dtype, case, batch)
    for name, exact in expected.items():
        scale = 3 * (on_cpu[name].double() - exact).norm() + 1e-2 * exact.norm()
        ratio = (found[name].double().cpu() - exact).norm() / scale.clamp(min=1e-300)
        yield name, ratio + 1, torch.ones(())


def _model_tensors(mesh: Mesh, dtype: torch.dtype, case: Case, batch: Batch) -> dict[str, Tensor]:
    model = Transformer(case.model, case.router, dtype)
    init_parameters(model, 0)
    model.to(mesh.device, torch.promote_types(dtype, torch.float32)).train()
    inputs, on_device = move_to_device(batch, mesh, seed=0)
    tensors = {}

    def predict(x_BSD: Tensor, weight_VD: Tensor) -> Tensor:
        tensors["logits"] = linear(x_BSD.detach(), weight_VD.detach())[on_device.documents_BS >= 0]
        result, tensors["nats"] = linear_cross_entropy(x_BSD, weight_VD, on_device.labels_BS, 1 / batch.num_labels)
        return result

    output = model(inputs, predict=predict)
    aux = auxiliary_losses(output.stats, case.router)
    loss = output.result + (0.05 * aux.balance_sum + 0.01 * aux.z_sum) / batch.num_valid
    loss.backward()
    return (
        tensors
        | {"loss": loss.detach()}
        | {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    )


# Optimizer steps


class Training:
    """An engine with its batches."""

    def __init__(self, mesh: Mesh, case: Case, precision: str, *, packed: bool, padded: bool, seed: int = 3) -> None:
        config = configuration(case, ONE_PROCESS, rows=4, precision=precision)  # type: ignore[arg-type]
        config = with_compile(config, False)
        parts = build_parts(config, case.model, mesh, compute_dtype(precision, mesh.device), seed)
        self.engine, self.router = build_engine(config, parts, mesh), case.router
        self.batches = [small_inputs(case.model.vocab_size or 0, rows, packed=packed, padded=padded) for rows in (2, 4)]

    def step(self) -> Any:
        return train_step(self.engine, self.batches, self.router, 5e-3)

    def tensors(self) -> dict[str, Tensor]:
        shards = self.engine.tensors().items()
        return {name: getattr(tensor, "local", tensor).detach().cpu().clone() for name, tensor in shards}


def check_syncs(stage: Stage, mesh: Mesh) -> None:
    """One row per kind of batch: the lines at which the host waits for the device in a warm step."""
    kinds = {
        "plain": (CASES["mixtral"], False, False),
        "padded": (CASES["mixtral"], False, True),
        "capacity": (Case(SMALL, RouterConfig(capacity_factor=1.0)), False, False),
        "packed": (CASES["mixtral"], True, False),
        "sigmoid": (CASES["deepseek"], False, False),
    }
    for name, (case, packed, padded) in kinds.items():
        try:
            training = Training(mesh, case, "fp32" if stage.tiny else "bf16", packed=packed, padded=padded)
            training.step()
            training.step()
            sites = synchronizing_lines(training.step, stage.device)
        except Exception as error:
            stage.check(f"host syncs of a {name} step", False, f"{type(error).__name__}: {error}"[:200])
            continue
        shown = ", ".join(f"{site} x{number}" for site, number in sites.most_common(12))
        stage.check(f"host syncs of a {name} step", not sites, f"{sum(sites.values())}: {shown}")


def synchronizing_lines(action: Callable[[], Any], device: torch.device) -> Counter[str]:
    """Return where `action` makes the host wait for the device, with the numbers of times."""
    sites: Counter[str] = Counter()
    root = str(Path(__file__).resolve().parents[2])

    def note(message: Warning | str, *_: Any) -> None:
        if "called a synchronizing" not in str(message):
            return
        frames = [f for f in traceback.extract_stack() if f.filename.startswith(root) and f.filename != __file__]
        sites[f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"] += 1

    if device.type != "cuda":
        action()
        return sites
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            action()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sites


def check_steps(stage: Stage, mesh: Mesh) -> None:
    """Three steps on the device against fp64 on the CPU. With padding in fp32, attention compiles kernels."""
    comparison = Comparison(stage, "3 steps against fp64 on the CPU")
    cpu = replace(mesh, device=CPU)
    for precision, name in itertools.product(("fp64", "fp32", "bf16"), ("mixtral", "deepseek", "switch")):
        bound = {"fp64": 1e-9, "fp32": 1e-4, "bf16": 5e-2}[precision]

        def pairs(precision: str = precision, name: str = name) -> Iterator[Any]:
            found, expected = (
                [training.step() for _ in range(3)]
                for training in (
                    Training(mesh, CASES[name], precision, packed=False, padded=precision != "fp32"),
                    Training(cpu, CASES[name], "fp64", packed=False, padded=precision != "fp32"),
                )
            )
            for number, (one, other) in enumerate(zip(found, expected, strict=True)):
                for figure in ("loss", "ce", "balance", "z", "grad_norm"):
                    values = (getattr(one, figure), getattr(other, figure))
                    yield f"{figure} {number}", *(torch.tensor(value, dtype=torch.float64) for value in values)
                if precision != "bf16":
                    yield f"counts {number}", one.counts_LE, other.counts_LE

        comparison.case(f"{precision} {name}", bound, pairs)
    comparison.finish()


def different(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    return [name for name in one.keys() | other.keys() if not torch.equal(one[name], other[name])]


def _repeats(precision: str) -> bool:
    """Return whether the backward pass of attention has the same bits in every run."""
    return precision == "fp32" or torch.are_deterministic_algorithms_enabled()


def check_determinism(stage: Stage, mesh: Mesh, label: str = "two runs of 3 steps have the same bits") -> None:
    failures, cases = [], 0
    for name, precision, packed in (
        ("mixtral", "bf16", False), ("deepseek", "bf16", False), ("switch", "bf16", False), ("mixtral", "bf16", True),
        ("unaligned", "fp32", False), ("expert choice", "bf16", False),
    ):  # fmt: skip
        if not _repeats(precision):
            continue
        cases += 1
        try:
            runs = []
            for _ in range(2):
                training = Training(mesh, CASES[name], precision, packed=packed, padded=precision != "fp32")
                losses = [training.step().loss for _ in range(3)]
                runs.append(training.tensors() | {"losses": torch.tensor(losses)})
            changed = different(*runs)
            if changed:
                failures.append(f"{name} {precision}: {len(changed)} tensors differ, {', '.join(changed[:3])}")
        except Exception as error:
            failures.append(f"{name} {precision}: {type(error).__name__}: {str(error).splitlines()[0]}"[:160])
    stage.check(label, not failures, f"{cases - len(failures)}/{cases}: {'; '.join(failures)}")


def check_resume(stage: Stage, mesh: Mesh, label: str = "") -> None:
    """A run that is saved after two steps and loaded into a new engine goes on as one that was not interrupted."""
    for precision in filter(_repeats, ("bf16", "fp32")):
        whole = Training(mesh, CASES["deepseek"], precision, packed=False, padded=precision == "bf16")
        for _ in range(2):
            whole.step()
        with tempfile.TemporaryDirectory() as directory:
            saved = save(Path(directory), 2, whole.engine.tensors(), {}, keep=2)
            resumed = Training(mesh, CASES["deepseek"], precision, packed=False, padded=precision == "bf16", seed=9)
            tensors = resumed.engine.tensors()
            load(saved, tensors)
            resumed.engine.finish_loading(tensors, whole.engine.updates)
        losses = [[training.step().loss for _ in range(2)] for training in (whole, resumed)]
        changed = different(whole.tensors(), resumed.tensors())
        passed = not changed and losses[0] == losses[1]
        stage.check(f"resume {precision}: same bits{label}", passed, ", ".join(changed[:4]))


def check_optimizer(stage: Stage, mesh: Mesh) -> None:
    """AdamW with clipping against its formula in fp64, and a gradient that is not finite."""
    training = Training(mesh, CASES["mixtral"], "fp32", packed=False, padded=False)
    engine = training.engine
    assert isinstance(engine, NativeEngine)
    optim = OptimConfig(lr=5e-3, max_grad_norm=0.5)
    weights = {name: parameter.detach().double().cpu() for name, parameter in engine.parameters.items()}
    moments = {name: (torch.zeros_like(weight), torch.zeros_like(weight)) for name, weight in weights.items()}
    comparison = Comparison(stage, "AdamW with clipping against its formula")

    def pairs() -> Iterator[Any]:
        for step, scale in ((1, 1.0), (2, 1e-4)):  # the second norm is below the limit
            shapes = [tuple(weight.shape) for weight in weights.values()]
            grads = dict(zip(weights, random_tensors(step, torch.float32, *shapes), strict=True))
            for name, parameter in engine.parameters.items():
                parameter.grad = grads[name].to(stage.device) * scale
            norm = math.sqrt(sum((grad.double() * scale).square().sum().item() for grad in grads.values()))
            factor = min(1.0, 0.5 / norm)
            yield f"norm {step}", torch.tensor(float(engine.step(5e-3))), torch.tensor(norm)
            for name, weight in weights.items():
                grad = grads[name].double() * scale * factor
                mean, square = moments[name]
                mean.lerp_(grad, 1 - optim.beta1)
                square.lerp_(grad.square(), 1 - optim.beta2)
                decay = optim.weight_decay if weight.dim() > 1 else 0.0
                weight.mul_(1 - 5e-3 * decay)
                root = (square / (1 - optim.beta2**step)).sqrt() + optim.eps
                weight.addcdiv_(mean / (1 - optim.beta1**step), root, value=-5e-3)
                yield f"{name} {step}", engine.parameters[name], weight

    comparison.case("fp32", 1e-5, pairs)
    comparison.finish()
    training.step()
    before = training.tensors()
    for value in (math.inf, math.nan):
        for parameter in engine.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        next(iter(engine.parameters.values())).grad.view(-1)[3] = value  # type: ignore[union-attr]
        norm = float(engine.step(5e-3))
        changed = different(before, training.tensors())
        stage.check(
            f"a gradient of {value} changes nothing", not changed and not math.isfinite(norm), ", ".join(changed[:4])
        )
    finite = training.step().loss
    stage.check("the step after it is finite", math.isfinite(finite), f"loss {finite:.4f}")


# Generation and evaluation


def check_generation(stage: Stage) -> None:
    prompts = [[1, 2, 3], list(range(5, 45)), [7]]
    failures = []
    for name in ("mixtral", "window", "latent", "deepseek", "expert choice"):
        case, texts = CASES[name], []
        for device in (stage.device, CPU):
            model = Transformer(case.model, case.router, torch.float32)
            init_parameters(model, 1)
            texts.append(generate(model.to(device), prompts, max_tokens=24, prefill_chunk=16))
        if texts[0] != texts[1]:
            failures.append(name)
    stage.check("greedy text in fp32 is the CPU's", not failures, ", ".join(failures))
    model = Transformer(SMALL, RouterConfig(), torch.bfloat16)
    init_parameters(model, 1)
    model.to(stage.device)
    sampling = Sampling(temperature=0.8, top_k=50, top_p=0.9, seed=1)
    texts = [generate(model, prompts, max_tokens=24, sampling=sampling) for _ in range(2)]
    stage.check("sampled text in bf16 repeats", texts[0] == texts[1] and len(texts[0][0]) == 24)


def check_evaluation(stage: Stage, mesh: Mesh) -> None:
    comparison = Comparison(stage, "evaluation against fp64 on the CPU")

    def pairs(name: str) -> Iterator[Any]:
        results = []
        for place in (mesh, replace(mesh, device=CPU)):
            training = Training(place, CASES[name], "fp64", packed=False, padded=True)
            sizes = torch.arange(CASES[name].model.vocab_size or 0, device=place.device) % 5 + 1
            results.append(evaluate(training.engine, training.batches, ("one",), sizes, torch.zeros_like(sizes)))
        found, expected = results
        yield "loss", torch.tensor(found.loss).double(), torch.tensor(expected.loss).double()
        yield "bits", torch.tensor(found.bits_per_byte["one"]), torch.tensor(expected.bits_per_byte["one"])
        yield "load", found.load_GLE, expected.load_GLE

    for name in ("mixtral", "switch", "expert choice"):
        comparison.case(name, 1e-9, partial(pairs, name))
    comparison.finish()


def check_deterministic_mode(stage: Stage, mesh: Mesh) -> None:
    make_deterministic()
    try:
        stage.attempt("run.deterministic", partial(check_determinism, stage, mesh, "the same, run.deterministic"))
        stage.attempt("resume", partial(check_resume, stage, mesh, ", run.deterministic"))
        stage.attempt("generation", partial(check_generation, stage))
    finally:
        torch.use_deterministic_algorithms(False)


if __name__ == "__main__":
    raise SystemExit(run_stage(main))
