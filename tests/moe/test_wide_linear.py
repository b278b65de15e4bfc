"""The linear map of routers against float64, with its kernels (in Triton's interpreter without a GPU) and without."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import moe.kernels
from moe.config import RouterConfig
from moe.linear import wide_linear
from moe.noise import noise_keys, uniform
from moe.routers import build_router

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def kernels(monkeypatch):
    """The kernels, used wherever the model would use them on a GPU. In Triton's interpreter bf16 numbers are bits."""
    module = pytest.importorskip("moe.kernels.wide_linear")
    monkeypatch.setattr(moe.kernels, "_devices", {DEVICE})
    if DEVICE == "cpu":
        from triton.runtime import interpreter

        def dot(_, a, b, total, *options):
            a, b = ((x.data.astype(np.uint32) << 16).view(np.float32) for x in (a, b))
            # One product after another: like tensor cores, and unlike numpy's matmul, it treats all columns alike.
            result = sum((a[:, k, None] * b[k] for k in range(len(b))), total.data)
            return interpreter.TensorHandle(result, total.dtype.scalar)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    return module


def error(found, exact):
    """The norm of the error relative to that of the exact result."""
    return float(((found.double() - exact).norm() / exact.norm()).detach())


def results(function, x, weight, grad):
    """The logits and the gradients of the tokens and of the weight."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    logits = function(x, weight)
    return logits, *torch.autograd.grad(logits, (x, weight), grad.to(logits.dtype))


SCALES = {
    "random": lambda weight: weight,
    "rows and columns of any size": lambda weight: (
        weight * 10.0 ** torch.randint(-15, 15, (len(weight), 1)) * 10.0 ** torch.randint(-3, 3, weight.shape[1:])
    ),
    "subnormal": lambda weight: torch.where(torch.rand_like(weight) < 0.5, weight * 1e-38, weight),
    "zeros": lambda weight: torch.where(torch.rand_like(weight) < 0.9, 0.0, weight),
    "constant sign": lambda weight: weight.abs(),
}


SIZES = [(1, 1, 1), (70, 77, 9), (40, 4096, 8), (130, 64, 130), (2100, 24, 4)]


@pytest.mark.parametrize(
    ("scale", "tokens", "dim", "experts"),
    [*(("random", *size) for size in SIZES), *((scale, 70, 77, 9) for scale in SCALES if scale != "random")],
)
def test_the_kernels_have_the_precision_of_fp32(kernels, scale, tokens, dim, experts):
    torch.manual_seed(0)
    x, grad = torch.randn(tokens, dim).bfloat16(), torch.randn(tokens, experts)
    weight = SCALES[scale](torch.randn(experts, dim))
    exact = results(F.linear, x.double(), weight.double(), grad)
    x, weight, grad = (tensor.to(DEVICE) for tensor in (x, weight, grad))
    found = [tensor.cpu() for tensor in results(wide_linear, x, weight, grad)]
    assert [tensor.dtype for tensor in found] == [torch.float32, torch.bfloat16, torch.float32]
    exact_logits, exact_x, exact_weight = exact
    for mine, wanted in zip(found[0].T, exact_logits.T, strict=True):  # the rows of the weight have any size
        lost = 2**-133 * x.double().cpu().norm() * dim**0.5  # digits that no bf16 number has
        assert (mine.detach() - wanted).norm() <= 1e-6 * wanted.norm() + lost
    assert error(found[2], exact_weight) <= 1e-6
    # As exact as a bf16 number can be: half of a unit of the last digit, and the parts that are left out.
    products = grad.abs().double().cpu() @ weight.abs().double().cpu()
    assert ((found[1].double() - exact_x).abs() <= 2**-7.99 * exact_x.abs() + 2**-14 * products + 2**-129).all()


def test_three_parts_are_the_number(kernels):
    torch.manual_seed(1)
    special = [0.0, -0.0, 1.0, 2**-126, 3.402e38, -3.4e38, 1 + 2**-23]
    x = torch.cat((torch.randn(999) * 10.0 ** torch.randint(-30, 38, (999,)), torch.tensor(special)))
    parts = kernels.split(x.to(DEVICE)).cpu()
    assert parts.dtype == torch.bfloat16 and parts.double().sum(dim=0).equal(x.double())
    small = torch.tensor([1e-45, 1e-40, -3e-39, 2**-126 * (1 + 2**-20)])  # bf16 has no digits below 2^-133
    assert (kernels.split(small.to(DEVICE)).cpu().double().sum(dim=0) - small.double()).abs().max() < 2**-133
    infinite = torch.tensor([math.inf, -math.inf, math.nan, -math.nan])
    nan = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32)  # its upper half is that of infinity
    parts = kernels.split(torch.cat((infinite, nan)).to(DEVICE)).cpu().float()
    torch.testing.assert_close(parts[0], torch.cat((infinite, nan)), equal_nan=True)
    assert not parts[1:].any()


def test_infinite_weights_reach_their_logits_only(kernels):
    weight = torch.ones(4, 24)
    weight[1, 3], weight[2, 5], weight[3, 7] = math.inf, -math.inf, math.nan
    x = torch.ones(5, 24)
    x[4, 0] = math.inf
    found = wide_linear(x.bfloat16().to(DEVICE), weight.to(DEVICE)).cpu()
    expected = torch.tensor([24.0, math.inf, -math.inf, math.nan])
    torch.testing.assert_close(found[:4], expected.expand(4, 4), equal_nan=True)
    assert not found[4].isfinite().any()


def test_equal_rows_and_equal_tokens_have_equal_logits(kernels):
    torch.manual_seed(2)
    weight, x = torch.randn(5, 77, device=DEVICE).repeat(4, 1), torch.randn(3, 77, device=DEVICE).bfloat16()
    found = wide_linear(x.repeat(50, 1), weight)
    assert found.view(50, 3, 4, 5).eq(found[:3, :5].view(1, 3, 1, 5)).all()
    router = build_router(77, 20, 7, RouterConfig()).to(DEVICE)
    router.weight.data = weight
    routing, _ = router(x.unsqueeze(0), None)
    exact = (x.double() @ weight.double()[:5].T).sort(dim=-1, descending=True).indices
    assert routing.experts_TK.tolist() == [[b, b + 5, b + 10, b + 15, s, s + 5, s + 10] for b, s, *_ in exact.tolist()]


def test_no_copy_of_the_tokens_is_stored(kernels):
    stored = []
    x, weight = torch.randn(2, 5, 24, device=DEVICE).bfloat16(), torch.randn(4, 24, device=DEVICE, requires_grad=True)
    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: stored.append(tensor) or tensor, lambda tensor: tensor
    ):
        logits = wide_linear(x, weight)
    assert logits.shape == (2, 5, 4) and logits.dtype == torch.float32
    assert sorted(tensor.data_ptr() for tensor in stored) == sorted((x.data_ptr(), weight.data_ptr()))
    assert [grad.shape for grad in torch.autograd.grad(logits.sum(), (x, weight))] == [x.shape, weight.shape]
    frozen = wide_linear(x, weight.detach())
    assert torch.autograd.grad(frozen.sum(), x)[0].dtype == torch.bfloat16
    assert wide_linear(x[:0], weight).shape == (0, 5, 4)


def test_operators_are_as_torch_expects(kernels):
    x, weight = torch.randn(2, 3, 8, device=DEVICE).bfloat16().requires_grad_(), torch.randn(4, 8, device=DEVICE)
    grad = torch.randn(2, 3, 4, device=DEVICE)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for operator, inputs in (
        (kernels.wide_linear, (x, weight.clone().requires_grad_())),
        (kernels.wide_linear_grad_input, (grad, weight)),
        (kernels.wide_linear_grad_weight, (grad, x.detach())),
    ):
        torch.library.opcheck(operator, inputs, test_utils=checks)


def test_torch_compile_keeps_them_in_one_graph(kernels):
    torch.manual_seed(3)
    router = build_router(24, 6, 2, RouterConfig()).to(DEVICE)
    torch.nn.init.normal_(router.weight)
    x = torch.randn(1, 9, 24, device=DEVICE).bfloat16().requires_grad_()
    outcomes = []
    for function in (router, torch.compile(router, backend="aot_eager", fullgraph=True)):
        routing, stats = function(x, None)
        total = routing.weights_TK[:, 0].sum() + stats.z_sum_B.sum()
        outcomes.append((routing.experts_TK, total, *torch.autograd.grad(total, (x, router.weight))))
    for mine, reference in zip(*outcomes, strict=True):
        torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize("jitter", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_without_kernels_the_numbers_are_those_of_a_matmul_of_wide_tokens(dtype, jitter):
    """Bit for bit: the tokens are cast once, and then multiplied."""
    torch.manual_seed(4)
    wide = torch.promote_types(dtype, torch.float32)
    router = build_router(77, 9, 3, RouterConfig(jitter=jitter)).to(wide)
    torch.nn.init.normal_(router.weight)
    keys = noise_keys(0, torch.arange(10).view(2, 5))
    factor = 1 - jitter + 2 * jitter * uniform(keys, router.layer, 77, wide) if jitter else 1.0

    def old(x, weight):
        return F.linear(x.to(wide) * factor if jitter else x.to(wide), weight)

    x, grad = torch.randn(2, 5, 77).to(dtype), torch.randn(2, 5, 9, dtype=wide)
    leaves = [(x.clone().requires_grad_(), router.weight), (x.clone().requires_grad_(), router.weight)]
    found, expected = router.compute_logits(leaves[0][0], keys), old(*leaves[1])
    assert found.dtype == wide and found.equal(expected)
    gradients, references = (torch.autograd.grad(y, of, grad) for y, of in zip((found, expected), leaves, strict=True))
    for one, other in zip(gradients, references, strict=True):
        assert one.dtype == other.dtype and one.equal(other)
