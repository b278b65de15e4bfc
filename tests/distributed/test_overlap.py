"""`parallel.overlap`: the experts compute one half of the tokens while the rows of the other half are exchanged."""

import pytest
import torch

from benchmarks.overlap import Event, build_layer, traced
from moe.config import ModelConfig, RouterConfig
from moe.router import Routing
from moe.token_context import TokenContext
from parallel.expert import divide
from parallel.layout import Layout
from tests.distributed.harness import run_ranks

MODEL = ModelConfig(
    dim=6, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2, hidden_dim=10, num_experts=4, top_k=2,
    num_shared_experts=2, vocab_size=8,
)  # fmt: skip
CASES = {
    "dropless": (3, 5, RouterConfig(), False),
    "padded": (3, 5, RouterConfig(), True),
    "one token": (1, 1, RouterConfig(), False),  # which is the first half
    "capacity, whole sequences in each half": (2, 6, RouterConfig(capacity_factor=0.75), False),
    "capacity, half a sequence in each half": (1, 7, RouterConfig(capacity_factor=0.75), True),
    "expert choice": (4, 4, RouterConfig(kind="expert_choice", allow_noncausal=True, balance_coef=0.0), False),
}
"""Rows, tokens of a row, the router, and whether there is padding."""


def results_of(rank: int, case: str, layout: Layout, groups: dict) -> list[torch.Tensor]:
    """Return the output of a layer, and the gradients of its input and its weights."""
    rows, length, router, padded = CASES[case]
    layer = build_layer(MODEL, router, layout, groups, torch.float64)
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(rows, length, MODEL.dim, dtype=torch.float64, generator=generator).requires_grad_()
    valid = torch.rand(rows, length, generator=generator) < 0.6 if padded else None
    output, _ = layer(x, TokenContext(valid_BS=valid))
    weight = torch.randn(output.shape, dtype=torch.float64, generator=generator)
    return [output, *torch.autograd.grad(output, (x, *layer.parameters()), weight)]


def measure(rank: int, world: int) -> dict:
    groups: dict = {}
    layouts = [Layout(replicate=world, expert=world, overlap=overlap) for overlap in (False, True)]
    found: dict = {case: [results_of(rank, case, layout, groups) for layout in layouts] for case in CASES}
    x = torch.randn(2, 8, MODEL.dim)
    found["events"] = [
        [trace.events for trace, _ in traced(layer, x.clone().requires_grad_(), x)]
        for layer in (build_layer(MODEL, RouterConfig(), layout, groups, torch.float32) for layout in layouts)
    ]
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    return run_ranks(measure, 2)


@pytest.mark.parametrize("case", CASES)
def test_two_halves_equal_the_whole(ranks, case: str) -> None:
    for results in ranks:
        for whole, halves in zip(*results[case], strict=True):
            torch.testing.assert_close(halves, whole, rtol=1e-9, atol=1e-14)


def events(text: str) -> list[Event]:
    """Read `s0 w0 experts`: exchange 0 starts, it is waited for, the experts compute."""
    kinds = {"s": "start", "w": "wait"}
    return [Event(kinds[word[0]], int(word[1:])) if word[1:].isdigit() else Event(word) for word in text.split()]


def test_the_experts_compute_while_rows_travel(ranks) -> None:
    """Exchanges 0 and 1 bring the rows of the halves to the experts, 2 and 3 bring them back. In the backward pass,
    gradients travel the other way. Every rank starts all exchanges in the same order."""
    for results in ranks:
        whole, halves = results["events"]
        assert whole == [events("numbers s0 w0 experts s1 w1"), events("s1 w1 experts s0 w0")]
        assert halves == [
            events("numbers s0 s1 w0 experts s2 w1 experts s3 w2 w3"),
            events("s3 s2 w3 experts s1 w2 experts s0 w1 w0"),
        ]


def test_every_half_has_its_own_experts() -> None:
    experts_TK = torch.tensor([[0, 3], [2, 1], [3, 3], [0, 2], [1, 0]])
    routing = Routing(experts_TK, torch.ones(5, 2), num_experts=3, complete=False, capacity=4)
    divided = divide(routing, 2, sequences=1)
    assert divided.experts_TK.tolist() == [[0, 6], [2, 1], [6, 6], [3, 5], [4, 3]]
    assert (divided.num_experts, divided.capacity) == (6, None)
    assert divide(routing, 2, sequences=4).capacity == 2
    assert divide(routing, 1, sequences=1) is routing
