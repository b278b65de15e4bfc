"""The bytes that ranks send in a step are those of the formulas in parallel/planning/traffic.py."""

from argparse import Namespace

import pytest
import torch

from benchmarks.traffic import LENGTH, MODEL, WINDOW, Job, Measured, measure
from tests.distributed.harness import run_ranks

JOBS = [
    Job("even load", "expert=2"),
    Job("capacity", "expert=2"),
    Job("even load", "expert=2+overlap=true"),
    Job("even load", "context=2"),
    Job("full attention", "context=2", zigzag=False),
    Job("dense, shared", "tensor=2"),
    Job("multi-query", "tensor=2"),
    Job("latent", "tensor=2"),
    Job("latent", "context=2"),
    Job("norm of all heads", "tensor=2+recompute=full"),
    Job("even load", "shard=2+expert=2"),
    Job("even load", "pipeline=2"),
]
OPTIONS = Namespace(rows=8, accumulation=2, dtype="fp32")


def measure_all(rank: int, world: int) -> list[tuple[list[Measured], dict[str, float]]]:
    groups: dict = {}
    return [measure(job, torch.device("cpu"), OPTIONS, groups) for job in JOBS]


@pytest.fixture(scope="module")
def measured() -> dict[Job, tuple[list[Measured], dict[str, float]]]:
    return dict(zip(JOBS, run_ranks(measure_all, 2)[0], strict=True))


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_ranks_send_what_the_formulas_say(measured, job: Job) -> None:
    """To the byte. The formula for counts and other bookkeeping is an upper bound."""
    by_rank, expected = measured[job]
    for axis, formula in expected.items():
        sent = sum(rank.sent.get(axis, 0) for rank in by_rank) / len(by_rank)
        assert sent <= formula if axis == "bookkeeping" else sent == formula, axis
    assert {axis for rank in by_rank for axis in rank.sent} <= expected.keys()


def test_nothing_is_sent_that_is_not_counted(measured) -> None:
    """The kernel sees processes write a little more: headers."""
    for job in (Job("even load", "expert=2"), Job("even load", "context=2"), Job("even load", "pipeline=2")):
        for rank in measured[job][0]:
            counted = sum(rank.sent.values())
            if rank.written:  # Linux
                assert counted < rank.written < 1.1 * counted, job


def test_expert_parallelism_sends_k_t_d(measured) -> None:
    """A rank sends k·T·D·(1 - 1/N) numbers to other ranks and as many back, forward and backward, for every layer and
    micro-batch."""
    by_rank, _ = measured[Job("even load", "expert=2")]
    tokens = 8 // 2 // 2 * LENGTH
    layers_and_micro_batches = MODEL.num_layers * 2
    for rank in by_rank:
        assert rank.sent["expert"] == 4 * (MODEL.top_k * tokens * MODEL.dim // 2) * 4 * layers_and_micro_batches


def test_a_window_bounds_what_context_ranks_send(measured) -> None:
    """Of S = 8·W positions, rank 0 sends W - 1 instead of S/2, and rank 1 sends their gradients back."""
    halo, whole = (
        [rank.sent["context"] for rank in measured[job][0]]
        for job in (Job("even load", "context=2"), Job("full attention", "context=2", zigzag=False))
    )
    per_position = 4 * 2 * MODEL.num_kv_heads * MODEL.head_dim * 4 * MODEL.num_layers * 2
    assert halo == [(WINDOW - 1) * per_position] * 2
    assert whole == [LENGTH // 2 * per_position] * 2
