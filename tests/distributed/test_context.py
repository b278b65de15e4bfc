"""A row cut over ranks gives what a single process gives, and only what is needed travels."""

import gc
import weakref
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from moe.attention.attention import AttentionCore, GroupedQueryAttention
from moe.config import ModelConfig, RouterConfig
from moe.routers import build_router
from moe.token_context import TokenContext
from parallel import context
from parallel.context import (
    ContextCore,
    GatheredRows,
    ZigzagCore,
    install_rows,
    piece_order,
    rows_to_each,
    shard_attention,
)
from parallel.layout import Layout
from tests.distributed.harness import run_ranks

BATCH, LENGTH = 2, 6
"""Rows, and places of a row on one rank."""
EXACT = {"rtol": 0, "atol": 1e-12}
ROUTERS = [
    {"capacity_factor": 0.5},
    {"capacity_factor": 0.7, "kind": "sigmoid_topk"},
    {"capacity_factor": 0.5, "drop_policy": "prob", "allow_noncausal": True},
    {"kind": "expert_choice", "allow_noncausal": True, "balance_coef": 0.0, "capacity_factor": 0.6},
    {},
]


def windows(ranks):
    """1, 2, inside a part, a part and what is around it, over several neighbours, all, more than all, none."""
    whole = ranks * LENGTH
    return [1, 2, 4, LENGTH, LENGTH + 1, LENGTH + 2, 2 * LENGTH + 3, whole + 1, 5 * whole, None]


def documents_of(batch, places):
    documents = (torch.rand(batch, places) < 0.15).cumsum(1).int()
    documents[-1, places - 8 :] = -1
    return documents


def attention_on(rank, ranks):
    """Compares every case with the whole row, which every rank draws from the same seed."""
    group = dist.group.WORLD
    whole, exchange = ranks * LENGTH, context.all_to_all_rows
    own = slice(rank * LENGTH, (rank + 1) * LENGTH)
    reports = []
    for batch, packed, window in [(b, p, w) for b, p in ((BATCH, True), (1, False)) for w in windows(ranks)]:
        torch.manual_seed(0)
        q, k, v = (torch.randn(batch, h, whole, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
        documents = documents_of(batch, whole) if packed else None
        grad = torch.randn_like(q)
        core = AttentionCore(window)
        expected = core(q, k, v, TokenContext(documents_BS=documents))
        expected_grads = torch.autograd.grad(expected, (q, k, v), grad)

        local = [x.detach()[:, :, own].requires_grad_() for x in (q, k, v)]
        mine = TokenContext(documents_BS=None if documents is None else documents[:, own].clone())
        received = []

        def counted(rows, send, receive, group, received=received):
            assert len(rows) == sum(send)
            received.append(sum(receive))
            return exchange(rows, send, receive, group)

        with mock.patch.object(context, "all_to_all_rows", counted):
            sharded = ContextCore(core, group)
            got = sharded(*local, mine)
            again = sharded(*local, mine)
            grads = torch.autograd.grad(got, local, grad[:, :, own])
        torch.testing.assert_close(got, expected[:, :, own], **EXACT)
        assert torch.equal(again, got)
        for part, reference in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(part, reference[:, :, own], **EXACT)
        reports.append((packed, window, received))
    return reports


def module_on(rank, ranks):
    """bf16 gradients of a place that several ranks use are added up in fp32, and the same on every run."""
    group = dist.group.WORLD
    torch.manual_seed(rank)
    local = [torch.randn(1, h, LENGTH, 8).bfloat16().requires_grad_() for h in (4, 2, 2)]
    tokens = TokenContext(documents_BS=torch.zeros(1, LENGTH, dtype=torch.int32))
    core = ContextCore(AttentionCore(None), group)
    runs = [torch.autograd.grad(core(*local, tokens).float().square().sum(), local) for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
    (with_halo,) = tokens._shared.values()  # fetched once for all three calls
    fetched = weakref.ref(with_halo)
    del tokens, with_halo
    gc.collect()
    assert fetched() is None  # what was fetched lives as long as the context

    config = ModelConfig(
        dim=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, hidden_dim=8, vocab_size=9, sliding_window=5,
        num_experts=None, top_k=None,
    )  # fmt: skip
    model = torch.nn.ModuleList([GroupedQueryAttention(config, 0), build_router(4, 4, 2, RouterConfig())])
    before = list(model.state_dict())
    shard_attention(model, group)
    install_rows(model, group, Layout(context=group.size()))
    assert list(model.state_dict()) == before
    return repr(model)


def routers_on(rank, ranks):
    group = dist.group.WORLD
    own = slice(rank * LENGTH, (rank + 1) * LENGTH)
    gathered = []
    for config in ROUTERS:
        torch.manual_seed(1)
        router = build_router(5, 4, 2, RouterConfig(**config)).double()
        torch.nn.init.normal_(router.weight)
        x = torch.randn(3, ranks * LENGTH, 5, dtype=torch.float64)
        x[0] = x[0, 0]  # ties
        valid = torch.rand(3, ranks * LENGTH) < 0.8
        expected, whole = router(x, valid)
        router.rows = GatheredRows(group, piece_order(Layout(context=group.size())))
        with mock.patch.object(context, "all_gather_dim", wraps=context.all_gather_dim) as gather:
            got, stats = router(x[:, own], valid[:, own])
        gathered.append([call.args[0].nbytes for call in gather.call_args_list])
        experts, weights = (y.view(3, -1, y.shape[-1])[:, own].flatten(0, 1) for y in expected[:2])
        used = got.experts_TK.shape[1]
        assert torch.equal(got.experts_TK, experts[:, :used]) and experts[:, used:].eq(4).all()
        torch.testing.assert_close(got.weights_TK, weights[:, :used], **EXACT)
        for name in ("counts_BE", "prob_sum_BE", "z_sum_B", "kept_BE", "tokens_B", "figures_BM"):
            total = getattr(stats, name).detach().clone()
            dist.all_reduce(total)
            torch.testing.assert_close(total, getattr(whole, name).detach(), **EXACT)
        assert torch.equal(stats.experts_BSK, whole.experts_BSK[:, own])
    return gathered


def zigzag_on(rank, ranks):
    """Two pieces a rank: attention without a window, with and without documents, and routers, against the whole row."""
    group, layout = dist.group.WORLD, Layout(context=ranks, zigzag=True)
    own = torch.cat([torch.arange(2 * ranks * 3).chunk(2 * ranks)[piece] for piece in piece_order(layout)[rank]])
    torch.manual_seed(2)
    length = 2 * ranks * 3
    q, k, v = (torch.randn(2, heads, length, 4, dtype=torch.float64) for heads in (4, 2, 2))
    documents = (torch.arange(length) >= torch.tensor([[length // 2], [5]])).int()
    for packed in (None, documents):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        expected = AttentionCore(None)(*leaves, TokenContext(documents_BS=packed))
        parts = [x[:, :, own].clone().requires_grad_() for x in (q, k, v)]
        got = ZigzagCore(AttentionCore(None), group)(
            *parts, TokenContext(documents_BS=None if packed is None else packed[:, own])
        )
        torch.testing.assert_close(got, expected[:, :, own], **EXACT)
        weights = torch.randn_like(expected)
        (expected * weights).sum().backward()
        (got * weights[:, :, own]).sum().backward()
        for part, leaf in zip(parts, leaves, strict=True):
            torch.testing.assert_close(part.grad, leaf.grad[:, :, own], **EXACT)
    for config in ROUTERS:
        router = build_router(5, 4, 2, RouterConfig(**config)).double()
        torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(1))
        x = torch.randn(3, length, 5, dtype=torch.float64)
        expected, _ = router(x, None)
        router.rows = GatheredRows(group, piece_order(layout))
        got, _ = router(x[:, own], None)
        used = got.experts_TK.shape[1]
        assert torch.equal(got.experts_TK, expected.experts_TK.view(3, length, -1)[:, own].flatten(0, 1)[:, :used])


def everything_on(rank, ranks):
    zigzag_on(rank, ranks)
    return attention_on(rank, ranks), module_on(rank, ranks), routers_on(rank, ranks)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def world(request):
    return run_ranks(everything_on, request.param)


def test_attention_equals_the_whole_row_and_only_the_halo_travels(world):
    """The ranks have compared the numbers; here: what they received."""
    for rank, (reports, _, _) in enumerate(world):
        for packed, window, received in reports:
            if window == 1:
                assert received == []
                continue
            halo = rank * LENGTH if window is None else min(window - 1, rank * LENGTH)
            # Keys with values; documents, once for both calls; the second call; the way back.
            assert received[: 2 + packed] == [halo] * (2 + packed)
            assert received[2 + packed :] == [seen_by_later(window, rank, len(world))]


def seen_by_later(window, rank, ranks):
    """Places of `rank`, counted once for every later rank that sees them, one place at a time."""
    return sum(
        window is None or other * LENGTH - place < window
        for place in range(rank * LENGTH, (rank + 1) * LENGTH)
        for other in range(rank + 1, ranks)
    )


def test_routers_decide_over_whole_sequences_and_gather_no_more_than_that_takes(world):
    for _, _, (position, sigmoid, prob, choice, dropless) in world:
        assert position == sigmoid == [3 * 4 * 8]  # counts
        assert prob == [3 * LENGTH * 2 * 8] * 2  # scores and numbers of the chosen
        assert choice == [3 * LENGTH * 4 * 8, 3 * LENGTH]  # all scores, and which are tokens
        assert dropless == []


def test_print_tells_what_is_installed(world):
    for rank, (_, printed, _) in enumerate(world):
        assert f"window=5, halo of the last 4 positions before, rank {rank} of {len(world)}" in printed
        assert f"(rows): GatheredRows(all-gather over {len(world)} ranks)" in printed
    assert "LocalRows()" in repr(build_router(4, 4, 2, RouterConfig()))


def test_rows_to_each():
    assert rows_to_each(reach=10, length=4, source=0, ranks=5) == [0, 4, 4, 2, 0]
    assert rows_to_each(reach=10, length=4, source=2, ranks=5) == [0, 0, 0, 4, 4]
    assert rows_to_each(reach=3, length=4, source=1, ranks=3) == [0, 0, 3]
