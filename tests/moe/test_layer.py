"""The MoE layer: dispatch, experts and combine against a loop over tokens in float64."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe.config import ModelConfig, RouterConfig
from moe.dispatch import LocalDispatcher
from moe.expert_loop import aligned_counts
from moe.experts import Experts, grouped_kernel, loop_kernel
from moe.layer import MoELayer
from moe.router import Routing
from moe.token_context import TokenContext

DIM, HIDDEN = 6, 5


def build(experts, top_k, expert_ffn=None, num_shared_experts=0, **router):
    config = ModelConfig(
        dim=DIM,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=2,
        hidden_dim=HIDDEN,
        num_experts=experts,
        top_k=top_k,
        expert_ffn=expert_ffn,
        num_shared_experts=num_shared_experts,
    )
    layer = MoELayer(config, RouterConfig(**router), 0).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def network(kind, gate, up, down, x):
    """One expert, written out."""
    gelu = lambda v: 0.5 * v * (1 + torch.erf(v / math.sqrt(2)))  # noqa: E731
    if kind == "swiglu":
        return down @ (gate @ x / (1 + torch.exp(-(gate @ x))) * (up @ x))
    if kind == "geglu":
        return down @ (gelu(gate @ x) * (up @ x))
    return down @ (gelu(up @ x) if kind == "gelu" else (up @ x).clamp(min=0))


def loop_over_tokens(layer, x, valid):
    """Each token through its experts, one after the other."""
    routing, _ = layer.router(x, valid)
    out = []
    for token, experts, weights in zip(x.flatten(0, 1), routing.experts_TK.tolist(), routing.weights_TK, strict=True):
        total = token * 0
        for expert, weight in zip(experts, weights, strict=True):
            if expert < routing.num_experts:
                w = layer.experts
                gate = w.w_gate[expert] if hasattr(w, "w_gate") else None
                total = total + weight * network(w.kind, gate, w.w_up[expert], w.w_down[expert], token)
        if layer.shared is not None:
            s = layer.shared
            for part in range(s.w_up.weight.shape[0] // HIDDEN):
                rows = slice(part * HIDDEN, (part + 1) * HIDDEN)
                gate = s.w_gate.weight[rows] if hasattr(s, "w_gate") else None
                total = total + network(s.kind, gate, s.w_up.weight[rows], s.w_down.weight[:, rows], token)
        out.append(total)
    return torch.stack(out).view_as(x)


@pytest.mark.parametrize(
    ("batch", "length", "experts", "top_k", "router"),
    [
        (2, 7, 4, 2, {}),
        (1, 1, 8, 2, {}),  # one token: six experts get none
        (1, 5, 3, 3, {}),  # top_k = num_experts
        (3, 4, 1, 1, {}),
        (2, 9, 4, 2, {"capacity_factor": 0.5}),
        (2, 6, 4, 1, {"normalize": False}),
        (2, 6, 4, 2, {"expert_ffn": "geglu", "num_shared_experts": 2}),
        (1, 6, 4, 2, {"expert_ffn": "relu", "num_shared_experts": 1}),
        (1, 6, 4, 2, {"expert_ffn": "gelu"}),
        (2, 7, 5, 2, {"kind": "sigmoid_topk", "scale": 2.5}),
        (2, 7, 5, 2, {"kind": "expert_choice", "balance_coef": 0.0, "allow_noncausal": True}),
    ],
)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("count_rows", [True, False])
def test_layer_equals_a_loop_over_tokens(batch, length, experts, top_k, router, padded, count_rows):
    torch.manual_seed(length)
    layer = build(experts, top_k, **router)
    layer.dispatcher.dispatch = partial(layer.dispatcher.dispatch, count_rows=count_rows)
    x = torch.randn(batch, length, DIM, dtype=torch.float64, requires_grad=True)
    valid = torch.rand(batch, length) < 0.7 if padded else None
    grad = torch.randn_like(x)
    parameters = (x, *layer.parameters())
    out, _ = layer(x, TokenContext(valid_BS=valid))
    expected = loop_over_tokens(layer, x, valid)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-11)
    mine = torch.autograd.grad(out, parameters, grad, allow_unused=True)
    reference = torch.autograd.grad(expected, parameters, grad, allow_unused=True)
    for got, want in zip(mine, reference, strict=True):
        torch.testing.assert_close(got, torch.zeros_like(got) if want is None else want, rtol=0, atol=1e-10)


def test_every_token_padded_keeps_the_graph_whole():
    layer = build(4, 2)
    out, stats = layer(
        torch.randn(1, 3, DIM, dtype=torch.float64), TokenContext(valid_BS=torch.zeros(1, 3, dtype=torch.bool))
    )
    (out.sum() + stats.prob_sum_BE.sum()).backward()
    assert out.eq(0).all() and layer.experts.w_gate.grad.eq(0).all()


def test_dispatch_by_hand():
    routing = Routing(torch.tensor([[1, 0], [3, 1], [1, 3]]), torch.tensor([[0.5, 0.5]] * 3), 3, False)
    x = torch.tensor([[10.0], [20.0], [30.0]])
    rows, counts, plan = LocalDispatcher().dispatch(x, routing)
    assert rows.flatten().tolist() == [10, 10, 20, 30] and counts.tolist() == [1, 3, 0]
    weighted = routing._replace(weights_TK=torch.tensor([[1.0, 2], [0, 3], [4, 0]]))
    assert LocalDispatcher().combine(rows, weighted, plan).flatten().tolist() == [30, 60, 120]


@pytest.mark.parametrize(("capacity", "rows"), [(None, 6), (1, 3)])
def test_dispatch_with_empty_rows_by_hand(capacity, rows):
    """Where the number of rows is not read, the last expert gets the empty ones, which are zeros."""
    routing = Routing(
        torch.tensor([[1, 0], [3, 3], [3, 3]]), torch.tensor([[2.0, 1], [0, 0], [0, 0]]), 3, False, capacity
    )
    x = torch.tensor([[10.0], [20.0], [30.0]])
    found, counts, plan = LocalDispatcher().dispatch(x, routing, count_rows=False)
    assert found.flatten().tolist() == [10, 10] + [0] * (rows - 2) and counts.tolist() == [1, 1, rows - 2]
    assert LocalDispatcher().combine(found + 1, routing, plan).flatten().tolist() == [33, 0, 0]


def test_layer_gradient_is_right_numerically():
    layer = build(3, 2)
    x = torch.randn(1, 4, DIM, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x, TokenContext())[0], (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_kernel_equals_the_loop(dtype):
    torch.manual_seed(0)
    rows, weight = torch.randn(40, 16).to(dtype), torch.randn(5, 24, 16).to(dtype)
    counts = torch.tensor([7, 0, 20, 13, 0])
    rows.requires_grad_(), weight.requires_grad_()
    grad = torch.randn(40, 24).to(dtype)
    tolerance = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    outs = [kernel(rows, weight, counts) for kernel in (grouped_kernel, loop_kernel)]
    torch.testing.assert_close(*outs, **tolerance)
    grads = [torch.autograd.grad(out, (rows, weight), grad) for out in outs]
    for mine, reference in zip(*grads, strict=True):
        torch.testing.assert_close(mine, reference, **tolerance)


def test_print_names_the_installed_kernel_and_dispatcher():
    text = repr(build(4, 2))
    assert "experts 0-3" in text and "kernel=auto" in text and "all experts on this device" in text
    assert isinstance(build(4, 2).experts, Experts)


@pytest.mark.parametrize(
    ("dtype", "frozen"), [(torch.float64, ()), (torch.float32, ("w_up",)), (torch.bfloat16, ("w_gate", "w_down"))]
)
def test_swiglu_on_a_cpu_equals_the_reference(dtype, frozen):
    """Experts without rows get zeros as gradients; the weights are cast to the dtype of the rows."""
    torch.manual_seed(0)
    auto, reference = (Experts(5, 16, 24, "swiglu", kernel) for kernel in ("auto", "loop"))
    for mine, other in zip(auto.parameters(), reference.parameters(), strict=True):
        torch.nn.init.normal_(mine)
        other.data.copy_(mine.data)
    counts, grad = torch.tensor([0, 7, 0, 20, 13]), torch.randn(40, 16, dtype=dtype)
    results = []
    for experts in (auto, reference):
        torch.manual_seed(1)
        experts.double() if dtype == torch.float64 else experts
        for name in frozen:
            getattr(experts, name).requires_grad_(False)
        rows = torch.randn(40, 16, dtype=dtype).requires_grad_()
        out = experts.apply_to(rows, counts)
        out.backward(grad)
        results.append([out, rows.grad, *(weight.grad for weight in experts.parameters())])
    assert "SwiGLULoop" in results[0][0].grad_fn.name() and "Cat" in results[1][0].grad_fn.name()
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, **({"rtol": 0.02, "atol": 2.0} if dtype == torch.bfloat16 else {}))
    assert all(getattr(auto, name).grad is None for name in frozen)


def test_aligned_numbers_of_rows_are_few_and_little_more():
    counts = torch.arange(5000)
    aligned = aligned_counts(counts)
    assert (aligned >= counts).all() and (aligned % 16 == 0).all()
    assert (aligned <= counts + torch.maximum(torch.tensor(15), counts // 16)).all()
    assert len(aligned[counts <= 4096].unique()) <= 1 + 4096 // 64 + 16


@pytest.mark.parametrize("kept", [1.0, 0.6, 0.0])
def test_aligned_dispatch_adds_empty_rows(kept):
    """Every assignment has its token in its expert's rows, other rows are zeros, and sums are the same bit for bit."""
    torch.manual_seed(0)
    tokens, top_k, experts = 70, 3, 9
    experts_TK = torch.rand(tokens, experts - 1).argsort(1)[:, :top_k]  # the last expert has no token
    experts_TK = experts_TK.where(torch.rand(tokens, top_k) < kept, experts)
    routing = Routing(experts_TK, torch.rand(tokens, top_k), experts, complete=kept == 1)
    dispatcher, x, grad = LocalDispatcher(), torch.randn(tokens, 24).bfloat16(), torch.randn(tokens, 24).bfloat16()
    results = {}
    for align in (False, True):
        leaf, weights = x.clone().requires_grad_(), routing.weights_TK.clone().requires_grad_()
        rows, counts, plan = dispatcher.dispatch(leaf, routing, align=align)
        assert len(rows) == counts.sum()
        out = dispatcher.combine(3 * rows, routing._replace(weights_TK=weights), plan)
        results[align] = (out, *torch.autograd.grad(out, (leaf, weights), grad))
        starts = counts.cumsum(0) - counts
        for token in range(tokens):
            for expert, slot in zip(experts_TK[token].tolist(), plan.slots_TK[token].tolist(), strict=True):
                if expert < experts:
                    assert starts[expert] <= slot < starts[expert] + counts[expert] and rows[slot].equal(x[token])
        used = torch.zeros(len(rows), dtype=torch.bool).index_fill_(0, plan.slots_TK[experts_TK < experts], True)
        assert not rows[~used].any() and (used.all() or align)
        if align:
            assert counts.equal(aligned_counts(counts)) and plan.dense == bool(used.all())
    assert all(a.equal(b) for a, b in zip(results[False], results[True], strict=True))


def test_routings_share_the_shapes_of_bf16_matmuls():
    """oneDNN compiles a kernel for each shape, which takes longer than the matmul."""
    torch.manual_seed(0)
    layer, found = build(experts=16, top_k=2).bfloat16(), set()

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
                found.add(tuple(x.shape for x in args if isinstance(x, Tensor)))
            return function(*args, **(kwargs or {}))

    with Shapes():
        for _ in range(8):
            y, _ = layer(torch.randn(1, 1024, DIM).bfloat16().requires_grad_(), TokenContext())
            y.sum().backward()
    numbers = len({shapes[0][0] for shapes in found if shapes[0][1] == DIM})
    assert numbers < 25 and len(found) < 8 * numbers  # 16 experts in 8 batches have about 100 numbers of rows
