"""What ranks really send in a step is what the formulas of parallel/planning/traffic.py say."""

from argparse import Namespace

import pytest
import torch

from benchmarks.traffic import LENGTH, MODEL, WINDOW, Job, Measured, measure
from tests.distributed.harness import run_ranks

JOBS = [
    Job("even load", "expert=2"),
    Job("capacity", "expert=2"),
    Job("even load", "context=2"),
    Job("full attention", "context=2", zigzag=False),
    Job("dense, shared", "tensor=2"),
    Job("even load", "shard=2+expert=2"),
    Job("even load", "pipeline=2"),
]
OPTIONS = Namespace(rows=8, accumulation=2, dtype="fp32")


def measure_all(rank: int, world: int) -> list[tuple[list[Measured], dict[str, float]]]:
    made: dict = {}
    return [measure(job, torch.device("cpu"), OPTIONS, made) for job in JOBS]


@pytest.fixture(scope="module")
def measured() -> dict[Job, tuple[list[Measured], dict[str, float]]]:
    return dict(zip(JOBS, run_ranks(measure_all, 2)[0], strict=True))


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_ranks_send_what_the_formulas_say(measured, job: Job) -> None:
    """To the byte; counts and other bookkeeping at most as much."""
    of_ranks, expected = measured[job]
    for axis, formula in expected.items():
        sent = sum(rank.sent.get(axis, 0) for rank in of_ranks) / len(of_ranks)
        assert sent <= formula if axis == "bookkeeping" else sent == formula, axis
    assert {axis for rank in of_ranks for axis in rank.sent} <= expected.keys()


def test_nothing_is_sent_that_is_not_counted(measured) -> None:
    """The kernel sees processes write a little more (headers, and what the harness's debug mode checks)."""
    for job in (Job("even load", "expert=2"), Job("even load", "context=2"), Job("even load", "pipeline=2")):
        for rank in measured[job][0]:
            counted = sum(rank.sent.values())
            if rank.written:  # Linux
                assert counted < rank.written < 1.1 * counted, job


def test_expert_parallelism_sends_k_t_d(measured) -> None:
    """k·T·D·(1 - 1/N) numbers out of a rank and as many back, forward and backward, a layer and micro-batch."""
    of_ranks, _ = measured[Job("even load", "expert=2")]
    tokens = 8 // 2 // 2 * LENGTH
    layers_and_micro_batches = MODEL.num_layers * 2
    for rank in of_ranks:
        assert rank.sent["expert"] == 4 * (MODEL.top_k * tokens * MODEL.dim // 2) * 4 * layers_and_micro_batches


def test_a_window_bounds_what_context_ranks_send(measured) -> None:
    """Of S = 8·W places, rank 0 hands on W - 1 instead of S/2; rank 1 their gradients."""
    halo, whole = (
        [rank.sent["context"] for rank in measured[job][0]]
        for job in (Job("even load", "context=2"), Job("full attention", "context=2", zigzag=False))
    )
    a_place = 4 * 2 * MODEL.num_kv_heads * MODEL.head_dim * 4 * MODEL.num_layers * 2
    assert halo == [(WINDOW - 1) * a_place] * 2
    assert whole == [LENGTH // 2 * a_place] * 2
