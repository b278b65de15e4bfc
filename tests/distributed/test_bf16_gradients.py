"""Projections of bf16 gradients, as in tests/moe/test_bf16_gradients.py, for the functions of several ranks."""

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from moe.attention.attention import AttentionCore
from moe.losses import IGNORE, linear_cross_entropy
from moe.token_context import TokenContext
from parallel.collectives import all_gather_rows, all_to_all_rows, gather_dim, reduce_scatter_rows, scatter_dim
from parallel.context import ContextCore
from parallel.expert import _Permute
from parallel.pipeline import _CarryLoss
from parallel.tensor import vocabulary_part
from tests.distributed.harness import run_ranks
from tests.moe.test_bf16_gradients import LABELS, assert_projects_to_one, head_inputs


def cross_entropy(rank, world, group):
    """The gradients of a sharded head are those of the shards; those of the hidden states are summed over ranks."""
    vocabulary = vocabulary_part(group, 100)
    for skill in (0.0, 8.0):
        x, weight, labels = head_inputs(skill)
        exact = [leaf.double().requires_grad_() for leaf in (x, weight)]
        logits = (exact[0] @ exact[1].T)[0]
        total = F.cross_entropy(logits, labels[0], ignore_index=IGNORE, reduction="sum")
        expected = torch.autograd.grad(total, exact)
        for count in LABELS:
            leaves = x.clone().requires_grad_(), weight.chunk(world)[rank].clone().requires_grad_()
            got = linear_cross_entropy(*leaves, labels, 1 / count, vocabulary)
            grad_x, grad_weight = torch.autograd.grad(got.total, leaves)
            grad_x = grad_x.double()
            dist.all_reduce(grad_x, group=group)
            assert_projects_to_one(grad_x, expected[0] / count, 5e-4)
            assert_projects_to_one(grad_weight, expected[1].chunk(world)[rank] / count, 5e-4)


def fetched_keys(rank, world, group):
    q, k, v, grad = (torch.randn(1, 2, 256, 16).bfloat16() for _ in range(4))
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    reference = F.scaled_dot_product_attention(*exact, is_causal=True)
    expected = torch.autograd.grad(reference, exact, grad.double())
    local = [x.chunk(world, 2)[rank].clone().requires_grad_() for x in (q, k, v)]
    out = ContextCore(AttentionCore(None), group)(*local, TokenContext())
    for mine, whole in zip(torch.autograd.grad(out, local, grad.chunk(world, 2)[rank]), expected, strict=True):
        assert_projects_to_one(mine, whole.chunk(world, 2)[rank], 5e-4)


def collectives(rank, world, group):
    """Sums and exchanges of gradients that all ranks draw: the exact sum is known."""
    whole = torch.randn(world, 64, 128).bfloat16()
    grads = torch.randn(world, 64, 128).bfloat16()
    order = torch.randperm(64)
    half = [32] * world
    cases = {
        "gather": (lambda x: gather_dim(x.chunk(world)[rank], 0, group), lambda g: g.sum(0).chunk(world)[rank], 32),
        "scatter": (lambda x: scatter_dim(x, 0, group), lambda g: torch.cat([g[p, :32] for p in range(world)]), 64),
        "rows": (lambda x: all_to_all_rows(x, half, half, group),
                 lambda g: torch.cat([g[p].chunk(world)[rank] for p in range(world)]), 64),
        "gather rows": (lambda x: all_gather_rows(x.chunk(world)[rank], half, group),
                        lambda g: g.sum(0).chunk(world)[rank], 32),
        "reduce rows": (lambda x: reduce_scatter_rows(x, half, group), lambda g: torch.cat(list(g[:, :32])), 64),
        "permute": (lambda x: _Permute.apply(x, order, order.argsort()), lambda g: g[rank][order.argsort()], 64),
        "carry": (lambda x: _CarryLoss.apply(x, x.float().sum() * 0), lambda g: g[rank], 64),
    }  # fmt: skip
    for name, (function, expected, rows) in cases.items():
        x = whole[rank].clone().requires_grad_()
        y = function(x)
        (gradient,) = torch.autograd.grad(y, x, grads[rank][: len(y)])
        gradient = gradient.chunk(world)[rank] if rows == 32 else gradient
        assert_projects_to_one(gradient, expected(grads.double()), 2e-4), name


def everything(rank, world):
    torch.manual_seed(0)
    group = dist.group.WORLD
    cross_entropy(rank, world, group)
    fetched_keys(rank, world, group)
    collectives(rank, world, group)


@pytest.mark.slow
def test_bf16_gradients_of_two_ranks_have_no_systematic_error():
    run_ranks(everything, 2)
