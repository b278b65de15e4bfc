"""Orders of scores that are equal by construction but not after rounding: the lower index and the earlier token win."""

import itertools
import math

import pytest
import torch

from moe.config import ModelConfig, RouterConfig
from moe.generation.sampling import Sampling, pick
from moe.init import init_parameters
from moe.model import ModelInputs, Transformer
from moe.routers import build_router
from moe.selection import best_of_sequence, first_equal_rows, tie_tolerance
from training.parity.config import CASES, SEED
from training.parity.trial import rows_of_step

COMPETING = {
    "expert_choice": {"kind": "expert_choice", "capacity_factor": 1.0},
    "prob": {"capacity_factor": 0.5, "drop_policy": "prob"},
}
EQUAL = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Hidden states whose elements differ by at most this are equal up to rounding."""


def taken(scores, capacity, dtype=torch.float64):
    """Positions that the only expert of the only sequence takes."""
    scores = torch.tensor(scores, dtype=dtype).view(1, -1, 1)
    return best_of_sequence(scores, capacity, tie_tolerance(dtype, dtype)).flatten().nonzero().flatten().tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("score", "next_score"), [(0.3, 0.31), (1e-9, 2e-9), (1 - 1e-5, 1 - 1e-6), (0.5, 0.51)])
def test_equal_scores_are_taken_by_position_for_every_capacity(dtype, score, next_score):
    """Nine scores in three groups. Rounding favours later members of a group."""
    torch.manual_seed(0)
    exact = [score, next_score, score / 2] * 3
    unit = torch.finfo(dtype).eps / 2
    rounded = [value * (1 + 2 * index * unit * (1 - value)) for index, value in enumerate(exact)]
    for capacity in range(1, 12):
        best = sorted(range(9), key=lambda index: (-exact[index], index))[:capacity]
        assert taken(rounded, capacity, dtype) == sorted(best), capacity


def test_saturated_missing_and_negative_scores():
    assert taken([1.0] * 5, 2) == taken([0.0] * 5, 2) == taken([math.nextafter(1, 0), 1, 1, 1], 2) == [0, 1]
    assert taken([5e-324, 1e-323, 0.0], 1) == [0]  # subnormal numbers have one or two digits
    assert taken([0.2, 0.2 * (1 + 1e-6), 0.1], 1) == [1]  # these are different
    assert taken([-math.inf, 0.5, -math.inf, 0.25], 1) == [1] and {1, 3} <= set(
        taken([-math.inf, 0.5, -math.inf, 0.25], 3)
    )
    assert taken([-2.0, -1.0, -1.0 + 1e-15, 3.0], 2) == [1, 3] and taken([7.0, 7.0 + 1e-15, 8.0], 2) == [0, 2]
    assert len(taken([math.nan, 0.5, math.nan, 0.5], 2)) <= 2 and taken([], 2) == []


def packed_copies(copies, length):
    tokens = torch.tensor([[1, 1, 9, 4, 2, 7][:length] * copies])
    return ModelInputs(
        tokens,
        torch.arange(length).repeat(copies).unsqueeze(0),
        torch.arange(copies).repeat_interleave(length).unsqueeze(0).int(),
    )


@pytest.mark.parametrize("dtype", EQUAL)
@pytest.mark.parametrize("kind", COMPETING)
def test_of_equal_tokens_an_expert_takes_the_earlier_one(kind, dtype):
    """In every layer: two tokens with equal inputs. An earlier layer may have separated copies of a token."""
    experts, copies, length = 6, 16, 6
    config = ModelConfig(
        dim=24, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, hidden_dim=36, vocab_size=30,
        num_experts=experts, top_k=2, init_std=0.3,
    )  # fmt: skip
    router = RouterConfig(balance_coef=0, allow_noncausal=True, **COMPETING[kind])
    model = Transformer(config, router, dtype).to(torch.promote_types(dtype, torch.float32))
    init_parameters(model, 0)
    found = []
    for layer in model.layers:
        layer.ffn.router.register_forward_hook(lambda _, inputs, result: found.append((inputs[0], result)))
    model(packed_copies(copies, length))
    for x, (routing, stats) in found:
        x = x[0].detach().double()
        equal = (x.unsqueeze(0) - x.unsqueeze(1)).abs().amax(-1).le(EQUAL[dtype]).triu(1)
        kept = torch.zeros(copies * length, experts + 1).scatter_(1, routing.experts_TK, 1.0)[:, :-1].bool()
        asked = torch.zeros(copies * length, experts + 1).scatter_(1, stats.experts_BSK[0], 1.0)[:, :-1].bool()
        asked = torch.ones_like(kept) if kind == "expert_choice" else asked
        later = ~kept.unsqueeze(1) & asked.unsqueeze(1) & kept.unsqueeze(0)
        assert equal.sum() > 100 and not (equal.unsqueeze(-1) & later).any()
        assert not kept.all(0).any()


def test_bf16_inputs_have_a_wider_tolerance():
    router = build_router(4, 3, 1, RouterConfig(kind="expert_choice", allow_noncausal=True, balance_coef=0.0))
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    x = torch.ones(1, 6, 4)
    x[:, 1::2] += 2**-7  # one bit of bf16

    def first_of_each(x):
        return [
            (router(x, None)[0].experts_TK == expert).any(1).nonzero()[:2].flatten().tolist() for expert in range(3)
        ]

    assert first_of_each(x.bfloat16()) == [[0, 1]] * 3 and first_of_each(x) != [[0, 1]] * 3


@pytest.mark.parametrize("kind", ["softmax_topk", "sigmoid_topk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("experts", "dim", "tokens", "top_k"), [(6, 24, 60, 1), (10, 64, 33, 3), (10, 512, 5, 5)])
def test_equal_router_rows_go_by_index(kind, dtype, experts, dim, tokens, top_k):
    """The second half of the experts are copies of the first. A matmul rounds its last columns in another way."""
    router = build_router(dim, experts, top_k, RouterConfig(kind=kind)).to(dtype)
    torch.manual_seed(0)
    torch.nn.init.normal_(router.weight)
    half = experts // 2
    with torch.no_grad():
        router.weight[half:] = router.weight[:half]
    x = torch.randn(1, tokens, dim, dtype=dtype, requires_grad=True)
    _, stats = router(x, None)
    for row in stats.experts_BSK[0].tolist():
        assert all(expert < half or expert - half in row[:place] for place, expert in enumerate(row))
    logits = router.compute_logits(x, None)
    assert torch.equal(logits[..., :half], logits[..., half:])
    got = torch.autograd.grad((logits * torch.arange(experts)).sum(), (router.weight, x))
    expected = torch.autograd.grad((x @ router.weight.T * torch.arange(experts)).sum(), (router.weight, x))
    for mine, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-4)


def test_first_equal_rows():
    assert first_equal_rows(torch.zeros(3, 2)).tolist() == [0, 0, 0]
    rows = torch.tensor([[1.0, 2.0], [1.0, 3.0], [1.0, 2.0], [4.0, 3.0], [1.0, 3.0]])
    assert first_equal_rows(rows).tolist() == [0, 1, 0, 3, 1]
    assert first_equal_rows(rows[[0, 3]]) is None


def test_a_nucleus_of_equal_probabilities_has_the_smallest_size():
    for size in range(2, 40):
        for kept in range(1, size):
            last = pick(torch.zeros(1, size), Sampling(1.0, top_p=kept / size), torch.tensor([1 - 1e-9]).double())
            assert int(last) == kept - 1


@pytest.mark.parametrize("name", ["expert_choice", "pooled"])
def test_the_parity_data_has_ten_thousand_equal_pairs(name):
    """Pairs of tokens whose equal scores compete for an expert, in the three steps of a parity run of a world of 2."""
    case, pairs = CASES[name], 0
    model = Transformer(case.model, case.router, torch.float64).double()
    init_parameters(model, SEED)
    results = []
    for layer in model.layers:
        layer.ffn.router.register_forward_hook(
            lambda router, inputs, result: results.append((router, inputs[0], result))
        )
    for step in range(3):
        rows = rows_of_step(step, 16)
        valid = rows["documents_BS"] >= 0
        model(ModelInputs(rows["tokens_BS"], rows["positions_BS"], rows["documents_BS"], valid))
        for router, x, (_, stats) in itertools.islice(results, 4 * step, None):
            p = (x @ router.weight.T).softmax(-1).detach()
            asked = (
                torch.ones_like(p) if name == "expert_choice" else torch.zeros_like(p).scatter(-1, stats.experts_BSK, 1)
            )
            asked = asked.bool() & valid.unsqueeze(-1)
            equal = (p.unsqueeze(1) - p.unsqueeze(2)).abs() <= 1e-11 * p.unsqueeze(1)
            pairs += int((equal & asked.unsqueeze(1) & asked.unsqueeze(2)).movedim(-1, 1).triu(1).sum())
    assert pairs >= 10_000, pairs
