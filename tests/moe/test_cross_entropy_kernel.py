"""The kernels of the cross-entropy against float64: on a GPU if there is one, else under Triton's interpreter."""

import pytest
import torch

import moe.kernels
from moe.kernels import DTYPES
from moe.losses import IGNORE, linear_cross_entropy, softmax_statistics, write_logit_gradient

pytest.importorskip("triton")
kernel = pytest.importorskip("moe.kernels.cross_entropy")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = DTYPES if DEVICE == "cuda" else DTYPES[1:]  # the interpreter has no bf16 arithmetic
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 6e-4, torch.float32: 2e-6}
"""Relative errors of a gradient; statistics are computed in fp32 from the same logits."""
BLOCK = 16


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Make rows of 37 logits take three blocks, the last of which is not full."""
    monkeypatch.setitem(kernel.STATISTICS, "BLOCK", BLOCK)
    monkeypatch.setitem(kernel.GRADIENT, "BLOCK", BLOCK)


def drawn(rows, width, dtype, scale=3.0, ignored=0.3):
    torch.manual_seed(rows * width)
    logits = (scale * torch.randn(rows, width, device=DEVICE)).to(dtype)
    labels = torch.randint(0, width, (rows,), device=DEVICE)
    return logits, labels.masked_fill(torch.rand(rows, device=DEVICE) < ignored, IGNORE)


CASES = {
    "some ignored": {},
    "all ignored": {"ignored": 1.1},
    "one row": {"rows": 1, "ignored": 0.0},
    "no row": {"rows": 0},
    "one block": {"width": BLOCK},
    "one entry": {"width": 1},
    "large logits": {"scale": 2e4},
    "masked entries": {},
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", CASES)
def test_statistics_and_gradient_equal_float64(name, dtype):
    logits, labels = drawn(**{"rows": 9, "width": 37, "dtype": dtype, **CASES[name]})
    if name == "masked entries":  # a whole block, so that there is no largest logit at first
        logits[:, : BLOCK + 1] = -torch.inf
        labels = labels.clamp(min=BLOCK + 1)
    factors = (labels != IGNORE) * 0.3
    exact = logits.double()
    expected_stats = softmax_statistics(exact, labels, 0)
    stats = kernel.softmax_statistics(logits, labels, 0)
    torch.testing.assert_close(stats.double(), expected_stats, rtol=2e-6, atol=0)
    write_logit_gradient(exact, labels, 0, expected_stats, factors.double(), 0)
    kernel.write_logit_gradient(logits, labels, 0, stats, factors, 0)
    torch.testing.assert_close(logits.double(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 1e-2)
    assert not logits[labels == IGNORE].any()


def test_a_rank_with_a_part_of_the_vocabulary():
    """Labels of other ranks and ignored labels have no logit here; a rank without entries has no logit at all."""
    logits, labels = drawn(9, 37, torch.float32)
    parts = [
        kernel.softmax_statistics(logits[:, a:b].contiguous(), labels, a) for a, b in ((0, 20), (20, 37), (37, 37))
    ]
    for part, (first, width) in zip(parts, ((0, 20), (20, 17), (37, 0)), strict=True):
        here = (labels >= first) & (labels < first + width)
        label = logits.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)
        assert torch.equal(part[2], label.where(here, 0))
    assert parts[2][0].isneginf().all() and not parts[2][1].any()
    whole = kernel.softmax_statistics(logits, labels, 0)
    factors = (labels != IGNORE).float()
    second, expected = logits[:, 20:].contiguous(), logits.clone()
    kernel.write_logit_gradient(second, labels, 20, whole, factors, 0)
    kernel.write_logit_gradient(expected, labels, 0, whole, factors, 0)
    assert torch.equal(second, expected[:, 20:])


def test_bf16_gradients_of_labels_are_rounded_in_turn_as_in_eager_code():
    logits = torch.zeros(512, 3, dtype=torch.bfloat16, device=DEVICE)
    labels = torch.zeros(512, dtype=torch.long, device=DEVICE)
    factors = torch.full((512,), 1 / 1237, device=DEVICE)
    stats = softmax_statistics(logits, labels, 0)
    expected = logits.clone()
    write_logit_gradient(expected, labels, 0, stats, factors, 1000)
    kernel.write_logit_gradient(logits, labels, 0, stats, factors, 1000)
    assert torch.equal(logits[:, 0], expected[:, 0])
    assert len(expected[:, 0].unique()) == 2
    assert abs(expected[:, 0].double().mean().item() * 1237 * 1.5 + 1) < 1e-5


def test_the_loss_uses_them_and_is_the_same_on_every_run(monkeypatch):
    x, weight = torch.randn(2, 9, 8, device=DEVICE), torch.randn(37, 8, device=DEVICE)
    labels = drawn(18, 37, torch.float32)[1].view(2, 9)

    def results():
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
        loss = linear_cross_entropy(*leaves, labels, 0.1)
        return (*loss, *torch.autograd.grad(loss.total, leaves))

    monkeypatch.setattr(moe.kernels, "_devices", set())
    eager = results()
    monkeypatch.setattr(moe.kernels, "_devices", {DEVICE})
    called = []
    for name in ("softmax_statistics", "write_logit_gradient"):
        operator = getattr(kernel, name)
        monkeypatch.setattr(kernel, name, lambda *a, _f=operator, _n=name: called.append(_n) or _f(*a))
    runs = [results() for _ in range(2)]
    assert called == 2 * ["softmax_statistics", "write_logit_gradient"]
    for first, second, want in zip(*runs, eager, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, want, rtol=1e-5, atol=1e-6)


def test_operators_are_as_torch_expects():
    logits, labels = drawn(3, 5, torch.float32)
    stats, factors = softmax_statistics(logits, labels, 0), torch.ones(3, device=DEVICE)
    torch.library.opcheck(kernel.softmax_statistics, (logits, labels, 0))
    torch.library.opcheck(kernel.write_logit_gradient, (logits, labels, 0, stats, factors, 0))
