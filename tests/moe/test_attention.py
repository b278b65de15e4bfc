"""Attention against a float64 mask, and RoPE against its definition."""

import math

import pytest
import torch

from moe.attention import AttentionCore
from moe.rope import apply_rotary, rotary_table


def masked_reference(q, k, v, documents, window):
    """Every query against every key in float64, one softmax over an explicit mask."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    i, j = torch.arange(q.shape[2]).unsqueeze(1), torch.arange(q.shape[2]).unsqueeze(0)
    mask = (j <= i) & (j > i - (window or q.shape[2]))
    mask = mask & (documents.unsqueeze(2) == documents.unsqueeze(1)).unsqueeze(1)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize(
    ("length", "window"), [(1, 4), (7, 4), (8, 4), (9, 4), (16, 1), (13, 13), (13, 64), (12, None), (33, 5)]
)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_core_equals_the_mask_forward_and_backward(length, window, kv_heads):
    torch.manual_seed(length)
    q, k, v = (torch.randn(3, h, length, 6, dtype=torch.float64, requires_grad=True) for h in (4, kv_heads, kv_heads))
    documents = torch.randint(0, 2, (3, length)).cumsum(1)
    documents[2, length // 2 :] = -1  # padding attends to padding, and nobody looks at it
    grad = torch.randn(3, 4, length, 6, dtype=torch.float64)
    expected = masked_reference(q, k, v, documents, window)
    expected_grads = torch.autograd.grad(expected, (q, k, v), grad)
    got = AttentionCore(window)(q, k, v, documents)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    for mine, reference in zip(torch.autograd.grad(got, (q, k, v), grad), expected_grads, strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [None, 4])
def test_bf16_on_cpus_goes_another_way_to_the_same_place(window):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, 13, 8).bfloat16().requires_grad_() for h in (4, 2, 2))
    documents = torch.randint(0, 2, (2, 13)).cumsum(1)
    grad = torch.randn(2, 4, 13, 8)
    got = AttentionCore(window)(q, k, v, documents)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = masked_reference(*wide, documents, window)
    torch.testing.assert_close(got.double(), expected, rtol=0.02, atol=0.02)
    grads = torch.autograd.grad(got, (q, k, v), grad.bfloat16())
    for mine, reference in zip(grads, torch.autograd.grad(expected, wide, grad.double()), strict=True):
        torch.testing.assert_close(mine.double(), reference, rtol=0.05, atol=0.05)


def test_a_row_of_one_document_needs_no_document_ids():
    q, k, v = (torch.randn(2, 2, 11, 4, dtype=torch.float64) for _ in range(3))
    for window in (None, 4):
        core = AttentionCore(window)
        torch.testing.assert_close(core(q, k, v, None), core(q, k, v, torch.zeros(2, 11, dtype=torch.int32)))


def test_window_memory_grows_with_the_window_not_the_sequence():
    """The largest tensor the core makes at S=4096, W=64 is far below S·S."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    x = torch.randn(1, 1, 4096, 8)
    with Watch():
        AttentionCore(64)(x, x, x, torch.zeros(1, 4096, dtype=torch.int32))
    assert largest <= 4096 * 64 * 2


def test_rotary_turns_pairs_by_position_times_frequency():
    positions = torch.tensor([[0, 1, 5]])
    x = torch.randn(1, 1, 3, 4, dtype=torch.float64)
    turned = apply_rotary(x, rotary_table(positions, 4, 100.0, torch.float64))
    for s, position in enumerate([0, 1, 5]):
        for pair, frequency in enumerate([1.0, 0.1]):
            angle = position * frequency
            a, b = x[0, 0, s, pair], x[0, 0, s, pair + 2]
            torch.testing.assert_close(turned[0, 0, s, pair], a * math.cos(angle) - b * math.sin(angle))
            torch.testing.assert_close(turned[0, 0, s, pair + 2], b * math.cos(angle) + a * math.sin(angle))
