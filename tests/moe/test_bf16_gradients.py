"""The gradients of every custom backward pass in bf16 have no systematic error: projections, not elements.

The projection <g, r> / <r, r> of a gradient g on the exact one r is 1 if rounding errors cancel out. A factor that is
rounded to bf16 changes it by up to 0.004. The
functions of several ranks are in `tests/distributed/test_bf16_gradients.py`.
"""

import pytest
import torch
from torch.nn import functional as F

from moe import losses
from moe.attention.window import windowed_attention
from moe.dispatch import LocalDispatcher
from moe.losses import IGNORE, linear_cross_entropy
from moe.router import Routing

LABELS = (1000, 1237, 1285, 1793, 2047, 5555, 9973)
"""Numbers M of label tokens. bf16(1/M) differs from 1/M by up to 0.4 %."""


def assert_projects_to_one(gradient, exact, tolerance=1e-4):
    exact = exact.double()
    projection = ((gradient.double() * exact).sum() / exact.square().sum()).item()
    assert abs(projection - 1) < tolerance, projection


def head_inputs(skill: float, rows: int = 8192, width: int = 64, entries: int = 100):
    """Hidden states and a head of a new model, whose probabilities are all nearly 1/V, or of one with some skill."""
    torch.manual_seed(0)
    labels = torch.randint(0, entries, (1, rows))
    weight = torch.randn(entries, width) / width**0.5
    x = 0.02 * torch.randn(1, rows, width) + skill * torch.rand(1, rows, 1) * weight[labels]
    labels[0, ::9] = IGNORE
    return x.bfloat16(), weight.bfloat16(), labels


@pytest.mark.parametrize("skill", [0.0, 8.0])
def test_cross_entropy(skill, monkeypatch):
    """With an fp32 weight and with a bf16 weight, in four chunks."""
    monkeypatch.setitem(losses.CHUNK_ELEMENTS, "cpu", 2048 * 100)
    x, weight, labels = head_inputs(skill)
    exact = [leaf.double().requires_grad_() for leaf in (x, weight)]
    logits = (exact[0] @ exact[1].T)[0]
    total = F.cross_entropy(logits, labels[0], ignore_index=IGNORE, reduction="sum")
    expected = torch.autograd.grad(total, (*exact, logits))
    for count in LABELS:
        for dtype in (torch.float32, torch.bfloat16):
            leaves = x.clone().requires_grad_(), weight.to(dtype, copy=True).requires_grad_()
            got = torch.autograd.grad(linear_cross_entropy(*leaves, labels, 1 / count).total, leaves)
            for gradient, reference in zip(got, expected, strict=False):
                assert_projects_to_one(gradient, reference / count, 4e-4)  # the logits are rounded to bf16, too
        stats = losses.softmax_statistics(logits.bfloat16(), labels[0], 0)
        gradient = logits.bfloat16()
        losses.write_logit_gradient(gradient, labels[0], 0, stats, (labels[0] != IGNORE) / count, 0)
        assert_projects_to_one(gradient, expected[2] / count)


@pytest.mark.parametrize("top_k", [2, 3, 7])
def test_combine_with_the_same_weights_for_all_tokens(top_k):
    torch.manual_seed(0)
    tokens, experts = 512, 8
    experts_TK = torch.rand(tokens, experts).argsort(1)[:, :top_k]
    weights_TK = torch.full((tokens, top_k), 1 / top_k, requires_grad=True)
    routing = Routing(experts_TK, weights_TK, experts, complete=True)
    dispatcher = LocalDispatcher()
    x = torch.randn(tokens, 64).bfloat16().requires_grad_()
    rows, _, plan = dispatcher.dispatch(x, routing)
    scale = torch.randn(len(rows), 1).bfloat16()
    y = dispatcher.combine(rows * scale, routing, plan)
    grad = torch.randn_like(y)
    got = (y, *torch.autograd.grad(y, (x, weights_TK), grad))
    by_assignment = torch.zeros(tokens * top_k, 1).double()
    by_assignment[plan.assignments_R] = scale.double()
    factors_TK = by_assignment.view(tokens, top_k)
    exact_x = x.detach().double()
    exact = (
        exact_x * (factors_TK / top_k).sum(1, keepdim=True),
        grad.double() * (factors_TK / top_k).sum(1, keepdim=True),
        factors_TK * (exact_x * grad.double()).sum(1, keepdim=True),
    )
    for mine, reference in zip(got, exact, strict=True):
        assert_projects_to_one(mine, reference, 2e-4)


@pytest.mark.parametrize("window", [5, 32])
def test_windowed_attention(window):
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(2, 4, 512, 32).bfloat16() for _ in range(4))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    place = torch.arange(512)
    hidden = (place > place.unsqueeze(1)) | (place <= place.unsqueeze(1) - window)
    scores = (exact[0] @ exact[1].transpose(-1, -2) / 32**0.5).masked_fill(hidden, -torch.inf)
    got = torch.autograd.grad(windowed_attention(*leaves, None, window), leaves, grad)
    for mine, reference in zip(
        got, torch.autograd.grad(scores.softmax(-1) @ exact[2], exact, grad.double()), strict=True
    ):
        assert_projects_to_one(mine, reference, 3e-4)
