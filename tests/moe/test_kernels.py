"""The Triton kernels against float64: on a GPU if there is one, else under Triton's interpreter (tests/conftest.py)."""

import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch.nn import functional as F

import moe.kernels
from moe.config import ModelConfig, RouterConfig
from moe.dispatch import LocalDispatcher, LocalPlan, _Combine, _Scatter, group_by_expert
from moe.kernels import DTYPES, eager_kernels, use_kernels
from moe.layer import MoELayer
from moe.recompute import set_recompute
from moe.router import Routing
from moe.selection import top_k_stable
from moe.token_context import TokenContext

pytest.importorskip("triton")
combine, group, join, swiglu, top_k = (
    pytest.importorskip(f"moe.kernels.{name}") for name in ("combine", "group", "join", "swiglu", "top_k")
)

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = DTYPES if DEVICE == "cuda" else DTYPES[1:]  # the interpreter has no bf16 arithmetic
TOLERANCE = {torch.bfloat16: 1.2e-2, torch.float16: 2e-3, torch.float32: 2e-6}


@pytest.fixture
def kernels(monkeypatch):
    """Use the kernels in this test wherever the model would use them on a GPU."""
    monkeypatch.setattr(moe.kernels, "_devices", {DEVICE})


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype).requires_grad_()


def assert_same(function, specification, inputs, dtype):
    """Compare the results and gradients of two functions of `inputs`; the specification computes in float64."""
    wide = [x.detach().double().requires_grad_() for x in inputs]
    got, want = function(*inputs), specification(*wide)
    assert got.dtype == dtype and got.shape == want.shape
    grad = torch.randn_like(got)
    for mine, exact in zip(
        (got, *torch.autograd.grad(got, inputs, grad)),
        (want, *torch.autograd.grad(want, wide, grad.double())),
        strict=True,
    ):
        scale = max(exact.abs().max().item(), 1) if exact.numel() else 1
        torch.testing.assert_close(mine.double(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (5, 24), (17, 130), (2, 3, 160)])
def test_swiglu(dtype, shape):
    torch.manual_seed(0)
    gate, up = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype)
    assert_same(swiglu.swiglu, lambda g, u: F.silu(g) * u, (gate, up), dtype)
    if len(shape) == 2:
        joined = torch.cat((gate, up), 1).detach().requires_grad_()
        assert_same(swiglu.swiglu_joined, lambda x: F.silu(x.chunk(2, 1)[0]) * x.chunk(2, 1)[1], (joined,), dtype)


def test_swiglu_at_the_ends_of_the_range():
    gate = torch.tensor([[-200.0, -90, -0.0, 0, 90, 200]], device=DEVICE, requires_grad=True)
    up = torch.full_like(gate, 2.0, requires_grad=True)
    assert_same(swiglu.swiglu, lambda g, u: F.silu(g) * u, (gate, up), torch.float32)


def plan_of(tokens, top_k, num_experts, kept, capacity=None):
    """Return the plan of random routing, in which a share `kept` of the assignments is dispatched."""
    experts_TK = torch.rand(tokens, num_experts).argsort(1)[:, :top_k]
    experts_TK = experts_TK.where(torch.rand(tokens, top_k) < kept, num_experts).to(DEVICE)
    routing = Routing(experts_TK, torch.rand(tokens, top_k), num_experts, complete=kept >= 1, capacity=capacity)
    with eager_kernels():
        _, _, plan = LocalDispatcher().dispatch(torch.zeros(tokens, 1, device=DEVICE), routing, capacity is not None)
    return plan


PLANS = {
    "full": lambda: plan_of(7, 2, 5, 1),
    "all experts": lambda: plan_of(4, 6, 6, 1),
    "more than one chunk": lambda: plan_of(3, 11, 16, 0.8),
    "padding": lambda: plan_of(9, 3, 4, 0.6),
    "capacity": lambda: plan_of(9, 3, 4, 0.6, capacity=9),
    "no row": lambda: plan_of(5, 2, 4, 0),
    "one token": lambda: plan_of(1, 1, 4, 1),
    "no token": lambda: plan_of(0, 2, 4, 1),
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", PLANS)
def test_dispatch_and_combine(dtype, name):
    torch.manual_seed(1)
    plan: LocalPlan = PLANS[name]()
    (tokens, k), rows, dim = plan.slots_TK.shape, len(plan.tokens_R), 21
    x, y, weights = draw(tokens, dim, dtype=dtype), draw(rows, dim, dtype=dtype), draw(tokens, k)
    assert_same(
        lambda x: combine.scatter_rows(x, plan.slots_TK, rows, plan.dense),
        lambda x: _Scatter.apply(x, plan), (x,), dtype,
    )  # fmt: skip
    assert_same(
        lambda y, w: combine.combine_rows(y, plan.slots_TK, w, plan.dense),
        lambda y, w: _Combine.apply(y, w, plan), (y, weights), dtype,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("experts", "k"), [(1, 1), (3, 3), (8, 2), (70, 6), (300, 1)])
def test_top_k(dtype, experts, k):
    torch.manual_seed(2)
    scores = torch.randn(3, 13, experts, device=DEVICE).round(decimals=1).to(dtype)
    scores[0, :4] = 0.0
    scores[0, 1, ::2] = -0.0
    scores[0, 2, ::3] = 1e-40
    scores[1, :5, : max(1, experts // 2)] = -torch.inf
    scores[2, 0, -1], scores[2, 1], scores[2, 2, 0] = torch.nan, -torch.nan, torch.inf
    with eager_kernels():
        assert top_k.top_k(scores, k).equal(top_k_stable(scores, k))
    assert top_k.top_k(scores[:0], k).shape == (0, 13, k)


@pytest.mark.parametrize(("assignments", "experts"), [(0, 4), (1, 1), (64, 3), (333, 8), (200, 300)])
def test_group_by_expert(assignments, experts):
    torch.manual_seed(3)
    chosen = torch.randint(0, experts + 1, (assignments,), device=DEVICE)
    chosen[: assignments // 2] = 0
    for mine, reference in zip(
        group.group_by_expert(chosen, experts), group_by_expert(chosen, experts, kernel=False), strict=True
    ):
        assert mine.dtype == reference.dtype and mine.equal(reference)


OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
"""The check that traces each operator takes seconds; the slow test below compiles them."""


def test_operators_are_as_torch_expects():
    """Their fake results have the right form, nothing is mutated, and the gradients are registered."""
    torch.manual_seed(4)
    plan = plan_of(4, 2, 3, 0.7)
    gate_up, x, y, weights = draw(4, 4), draw(4, 4), draw(len(plan.tokens_R), 4), draw(4, 2)
    slots = plan.slots_TK
    for operator, inputs in (
        (swiglu.swiglu, (x, gate_up)),
        (swiglu.swiglu_joined, (gate_up,)),
        (join.join, (gate_up[None], gate_up[None], torch.float16)),
        (combine.scatter_rows, (x, slots, len(y), False)),
        (combine.combine_rows, (y, slots, weights, False)),
        (top_k.top_k, (x.detach(), 2)),
        (group.group_by_expert, (slots.flatten(), len(y))),
    ):
        torch.library.opcheck(operator, inputs, test_utils=OPCHECKS)


def layer_of(**config):
    sizes = {"dim": 24, "num_heads": 1, "num_kv_heads": 1, "head_dim": 2, "hidden_dim": 20, "num_experts": 6}
    layer = MoELayer(ModelConfig(num_layers=1, top_k=3, **{**sizes, **config}), RouterConfig(), 0).to(DEVICE)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("kind", ["swiglu", "geglu"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_layer_uses_them_and_computes_the_same(kernels, monkeypatch, kind, padded):
    torch.manual_seed(5)
    layer = layer_of(num_shared_experts=1, expert_ffn=kind)
    x = draw(2, 9, 24)
    context = TokenContext(valid_BS=torch.rand(2, 9, device=DEVICE) < 0.7 if padded else None)
    assert use_kernels(x) and not use_kernels(x.double())
    called = []
    for module, name in ((combine, "scatter_rows"), (combine, "combine_rows"), (top_k, "top_k"), (swiglu, "swiglu"),
                         (group, "group_by_expert")):  # fmt: skip
        operator = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _f=operator, _n=name: called.append(_n) or _f(*a))
    results = []
    for _ in range(2):
        out, _ = layer(x, context)
        results.append((out, *torch.autograd.grad(out, (x, *layer.parameters()), torch.ones_like(out))))
    expected = {"top_k", "group_by_expert", "scatter_rows", "combine_rows", *(["swiglu"] if kind == "swiglu" else [])}
    assert set(called) == expected
    with eager_kernels():
        called.clear()
        out, _ = layer(x, context)
        assert not called and not use_kernels(x)
    exact = (out, *torch.autograd.grad(out, (x, *layer.parameters()), torch.ones_like(out)))
    for first, second, want in zip(*results, exact, strict=True):
        assert first.equal(second)
        torch.testing.assert_close(first, want, rtol=2e-5, atol=2e-5 * want.abs().max().item())


def test_experts_of_fp32_weights_multiply_once_for_gate_and_up(kernels):
    torch.manual_seed(6)
    experts = layer_of().experts.half()
    rows, counts = draw(11, 24, dtype=torch.float16), torch.tensor([3, 0, 7, 0, 0, 1], device=DEVICE)
    want = experts.apply_to(rows, counts)
    experts.float()
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(parameter.half())
    calls = []
    kernel = experts.kernel
    experts.kernel = lambda *arguments: calls.append(arguments[1].shape) or kernel(*arguments)
    got = experts.apply_to(rows, counts)
    assert calls == [(6, 40, 24), (6, 24, 20)]
    torch.testing.assert_close(got, want, rtol=5e-3, atol=5e-3 * want.abs().max().item())
    weights, grad = (experts.w_gate, experts.w_up, experts.w_down), torch.randn_like(got)
    mine = torch.autograd.grad(got, (rows, *weights), grad)
    with eager_kernels():
        reference = torch.autograd.grad(experts.apply_to(rows, counts), (rows, *weights), grad)
    for first, second in zip(mine, reference, strict=True):
        assert first.dtype == second.dtype
        torch.testing.assert_close(first, second, rtol=1e-2, atol=5e-3 * second.abs().max().item())
    experts.w_gate.requires_grad_(False)
    experts.apply_to(rows, counts).sum().backward()
    assert experts.w_gate.grad is None and experts.w_up.grad is not None


class Chooser(torch.nn.Module):
    """Takes the two largest scores, and in a second pass the two smallest."""

    RECOMPUTE: ClassVar[dict[str, str]] = {"full": "forward"}

    def __init__(self):
        super().__init__()
        self.chosen = []

    def forward(self, x):
        self.chosen.append(top_k_stable(x.detach() * (1 - 2 * len(self.chosen)), 2))
        return x.square().gather(-1, self.chosen[-1])


def test_a_recomputed_layer_takes_the_stored_choice(kernels):
    torch.manual_seed(7)
    module, scores = Chooser(), draw(4, 8)
    set_recompute(module, "full")
    module(scores).sum().backward()
    first, second = module.chosen
    assert first.equal(second) and first.equal(top_k_stable(scores.detach(), 2))


class Routed(torch.nn.Module):
    """Top-k, dispatch, experts and combine."""

    def __init__(self):
        super().__init__()
        self.experts, self.dispatcher = layer_of(expert_kernel="grouped", hidden_dim=16).experts, LocalDispatcher()

    def forward(self, x, scores):
        weights, experts = scores, top_k_stable(scores.detach(), 2)
        routing = Routing(experts, weights.gather(-1, experts), scores.shape[-1], complete=True)
        rows, counts, plan = self.dispatcher.dispatch(x, routing)
        return self.dispatcher.combine(self.experts.apply_to(rows, counts), routing, plan)


@pytest.mark.slow
def test_torch_compile_keeps_them_in_one_graph(kernels):
    torch.manual_seed(8)
    routed = Routed()
    x, scores = draw(9, 24, dtype=torch.bfloat16), draw(9, 6)
    operators = set()

    def backend(graph, inputs):
        operators.update(str(node.target) for node in graph.graph.nodes if "mixwright" in str(node.target))
        return graph

    results = []
    for function in (routed, torch.compile(routed, backend=backend, fullgraph=True)):
        out = function(x, scores)
        results.append((out, *torch.autograd.grad(out, (x, scores, *routed.parameters()), torch.ones_like(out))))
    names = "combine_rows group_by_expert join scatter_rows swiglu_joined top_k"
    assert operators == {f"mixwright.{name}.default" for name in names.split()}
    assert all(mine.equal(reference) for mine, reference in zip(*results, strict=True))


@pytest.mark.slow
def test_no_kernel_spills_registers_on_an_h100():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "benchmarks" / "kernel_resources.py")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
