"""Router, capacity and statistics against loops written from the definitions."""

import math

import pytest
import torch

from common.errors import ConfigError
from moe.config import RouterConfig
from moe.recompute import recomputed
from moe.router import Router
from moe.routers import build_router
from moe.selection import expert_capacity, top_k_stable, within_capacity


def build(dim, experts, top_k, **config):
    router = build_router(dim, experts, top_k, RouterConfig(**config)).double()
    torch.nn.init.normal_(router.weight)
    return router


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (4, 1), (4, 2), (4, 4), (9, 5)])
@pytest.mark.parametrize("normalize", ["auto", False])
def test_routing_equals_a_loop(experts, top_k, normalize):
    torch.manual_seed(experts * 10 + top_k)
    router = build(6, experts, top_k, normalize=normalize)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    valid = torch.ones(2, 5, dtype=torch.bool)
    valid[1, 3:] = False
    routing, stats = router(x, valid)
    counts = [[0] * experts for _ in range(2)]
    for b in range(2):
        prob_sum, z_sum = torch.zeros(experts, dtype=torch.float64), 0.0
        for s in range(5):
            row = routing.experts_TK[b * 5 + s].tolist()
            if not valid[b, s]:
                assert row == [experts] * top_k and routing.weights_TK[b * 5 + s].eq(0).all()
                continue
            logits = (router.weight @ x[b, s]).tolist()
            total = sum(math.exp(v) for v in logits)
            probs = [math.exp(v) / total for v in logits]
            best = sorted(range(experts), key=lambda e: -probs[e])[:top_k]
            assert row == best
            scale = sum(probs[e] for e in best) if normalize == "auto" and top_k > 1 else 1.0
            torch.testing.assert_close(
                routing.weights_TK[b * 5 + s].detach(), torch.tensor([probs[e] / scale for e in best]).double()
            )
            for e in best:
                counts[b][e] += 1
            prob_sum += torch.tensor(probs, dtype=torch.float64)
            z_sum += math.log(total) ** 2
        torch.testing.assert_close(stats.prob_sum_BE[b].detach(), prob_sum)
        assert stats.z_sum_B[b].item() == pytest.approx(z_sum, rel=1e-12)
    assert stats.counts_BE.tolist() == counts
    assert stats.tokens_B.tolist() == [5, 3]
    assert stats.kept_BE.tolist() == counts


def test_normalised_weights_are_the_softmax_over_the_selected_logits():
    router = build(6, 8, 3)
    x = torch.randn(1, 4, 6, dtype=torch.float64)
    routing, _ = router(x, None)
    logits = x[0] @ router.weight.T
    torch.testing.assert_close(routing.weights_TK, logits.topk(3).values.softmax(-1))


def test_ties_go_to_the_lower_index():
    scores = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]])
    assert top_k_stable(scores, 2).tolist() == [[1, 2]]


@pytest.mark.parametrize(("experts", "k"), [(9, 2), (64, 6)])
def test_top_k_of_many_experts_is_that_of_a_stable_sort(experts, k):
    """Drawn from few numbers, so that many scores are equal; some are NaN, infinite or -0."""
    torch.manual_seed(0)
    scores = torch.randint(0, 4 * experts, (2, 200, experts)).float()
    for number, special in enumerate((math.nan, math.inf, -math.inf, -0.0)):
        scores[scores == number + 1] = special
    assert top_k_stable(scores, k).equal(scores.sort(dim=-1, descending=True, stable=True).indices[..., :k])


def test_a_recomputed_choice_among_many_experts_is_the_stored_one():
    chosen = []

    def choose(scores):
        """Take the two largest scores, and in a second pass the two smallest."""
        chosen.append(top_k_stable(scores.detach() * (1 - 2 * len(chosen)), 2))
        return scores.square().gather(-1, chosen[-1])

    recomputed(choose, torch.randn(4, 16, requires_grad=True)).sum().backward()
    assert chosen[0].equal(chosen[1])


def test_capacity_drops_later_tokens_and_is_counted_per_sequence():
    # Two sequences of four tokens, two experts, k=1: C = ceil(1.0 * 1 * 4 / 2) = 2.
    experts = torch.tensor([[[0], [0], [1], [0]], [[0], [0], [0], [0]]])
    taken = torch.ones_like(experts)
    taken[1, 0] = 0  # padding takes no place
    kept = taken * within_capacity(experts, taken, torch.zeros(2, 2, dtype=torch.int64), 2)
    assert kept.squeeze(-1).tolist() == [[1, 1, 1, 0], [0, 1, 1, 0]]


def test_dropped_assignments_have_no_weight_and_are_counted():
    router = build(4, 2, 1, capacity_factor=0.5)
    with torch.no_grad():
        router.weight.copy_(torch.stack((torch.ones(4), -torch.ones(4))))
    routing, stats = router(torch.ones(1, 8, 4, dtype=torch.float64), None)
    assert routing.experts_TK.flatten().tolist() == [0, 0, 2, 2, 2, 2, 2, 2]
    assert routing.weights_TK[2:].eq(0).all() and routing.weights_TK[:2].gt(0).all()
    assert stats.kept_BE.tolist() == [[2, 0]] and stats.counts_BE.tolist() == [[8, 0]]


def test_capacity_is_of_the_factor_as_it_is_written():
    for factor, top_k, seq_len, experts, capacity in ((1.1, 1, 3200, 16, 220), (1.25, 2, 6, 4, 4), (2, 1, 1, 8, 1)):
        assert expert_capacity(factor, top_k, seq_len, experts) == capacity


def test_a_later_token_changes_nothing_before_it_under_capacity():
    router = build(4, 4, 2, capacity_factor=0.5)
    x = torch.randn(1, 10, 4, dtype=torch.float64)
    before = router(x, None)[0]
    x[0, 7:] = torch.randn(3, 4, dtype=torch.float64)
    after = router(x, None)[0]
    assert torch.equal(before.experts_TK[:7], after.experts_TK[:7])


def test_router_computes_in_fp32_under_bf16():
    router = build_router(8, 4, 2, RouterConfig())
    torch.nn.init.normal_(router.weight)
    x = torch.randn(1, 3, 8).bfloat16()
    routing, _ = router(x, None)
    assert routing.weights_TK.dtype == torch.float32
    exact = (x.double()[0] @ router.weight.double().T).topk(2).values.softmax(-1)
    torch.testing.assert_close(routing.weights_TK.double(), exact, rtol=1e-5, atol=1e-6)


class OneExpertTooFew(Router):
    def choose_experts(self, *arguments):
        experts_BSK, taken_BSK = super().choose_experts(*arguments)
        return experts_BSK[..., :-1], taken_BSK


class UndeclaredColumn(Router):
    def compute_extra(self, decision):
        return decision.logits_BSE.new_zeros(decision.logits_BSE.shape[0], 1)


class NamesOfNoColumn(Router):
    TELEMETRY = ("a",)


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        (OneExpertTooFew, r"one shape \[B, S, K\], found \[2, 5, 1\], \[2, 5, 2\], \[2, 5, 1\]$"),
        (UndeclaredColumn, r"compute_extra to return \[2, 0\].*TELEMETRY=\[\]; found \[2, 1\]$"),
        (NamesOfNoColumn, r"compute_extra to return \[2, 0\].*TELEMETRY=\['a'\]; found \[2, 0\]$"),
    ],
)
def test_tensors_of_a_wrong_shape_are_refused(kind, found):
    router = kind(6, 4, 2, RouterConfig())
    torch.nn.init.normal_(router.weight)
    with pytest.raises(ConfigError, match=rf"^router.kind=softmax_topk: expected .*{found}"):
        router(torch.randn(2, 5, 6), None)


def test_parameters_of_any_shape_get_initial_values():
    router = Router(6, 4, 2, RouterConfig())
    bias_E, cube = torch.zeros(4), torch.zeros(2, 3, 5)
    for tensor in (bias_E, cube):
        router.init_parameter("x", tensor, "0/x", 0.5)
        assert tensor.ne(0).all() and tensor.unique().numel() == tensor.numel()
