"""Sigmoid, groups, expert choice, drop policies, jitter and the selection bias, each against loops or a reference."""

import math

import pytest
import torch

from moe.config import RouterConfig
from moe.noise import noise_keys, uniform
from moe.router import Router, update_routers
from moe.routers import build_router


def build(dim, experts, top_k, **config):
    router = build_router(dim, experts, top_k, RouterConfig(**config)).double()
    torch.nn.init.normal_(router.weight)
    if config.get("kind") == "sigmoid_topk":
        torch.nn.init.normal_(router.bias, std=0.3)
    return router


def sigmoid_loop(router, x, groups, best_groups, normalize, scale):
    """DeepSeek-V3, one token at a time: returns experts and weights."""
    s = [1 / (1 + math.exp(-v)) for v in (router.weight @ x).tolist()]
    ranked = [a + b for a, b in zip(s, router.bias.tolist(), strict=True)]
    experts = range(len(s))
    if groups:
        size = len(s) // groups
        score = [sum(sorted(ranked[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
        allowed = sorted(range(groups), key=lambda g: -score[g])[:best_groups]
        experts = [e for e in experts if e // size in allowed]
    best = sorted(experts, key=lambda e: -ranked[e])[: router.top_k]
    total = sum(s[e] for e in best) if normalize else 1.0
    return best, [s[e] / total * scale for e in best], s


@pytest.mark.parametrize(
    ("experts", "top_k", "groups", "best_groups"), [(8, 3, None, None), (8, 3, 4, 2), (12, 4, 2, 1), (6, 6, None, None)]
)
@pytest.mark.parametrize("normalize", [True, False])
def test_sigmoid_topk_equals_a_loop(experts, top_k, groups, best_groups, normalize):
    torch.manual_seed(experts)
    router = build(
        6,
        experts,
        top_k,
        kind="sigmoid_topk",
        normalize=normalize,
        scale=2.5,
        num_groups=groups,
        topk_groups=best_groups,
    )
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    valid = torch.tensor([[True] * 4, [True, True, False, False]])
    routing, stats = router(x, valid)
    prob_sum = torch.zeros(2, experts, dtype=torch.float64)
    for b in range(2):
        for s in range(4 if b == 0 else 2):
            best, weights, scores = sigmoid_loop(router, x[b, s], groups, best_groups, normalize, 2.5)
            assert routing.experts_TK[b * 4 + s].tolist() == best
            assert routing.weights_TK[b * 4 + s].tolist() == pytest.approx(weights, rel=1e-12)
            prob_sum[b] += torch.tensor(scores, dtype=torch.float64) / sum(scores)
    torch.testing.assert_close(stats.prob_sum_BE.detach(), prob_sum)


@pytest.mark.parametrize("normalize", [True, False])
def test_sigmoid_gradient_does_not_see_the_bias(normalize):
    router = build(5, 6, 2, kind="sigmoid_topk", normalize=normalize)
    x = torch.randn(1, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: router(x, None)[0].weights_TK, (x,))
    scores = (x[0] @ router.weight.T).sigmoid()
    routing, _ = router(x, None)
    expected = scores.gather(1, routing.experts_TK)
    torch.testing.assert_close(routing.weights_TK, expected / expected.sum(1, keepdim=True) if normalize else expected)


@pytest.mark.parametrize(("groups", "best_groups"), [(4, 1), (4, 2), (2, 2), (8, 3)])
def test_softmax_in_groups_equals_a_loop(groups, best_groups):
    torch.manual_seed(groups)
    router = build(6, 8, 2 if groups < 8 else 3, num_groups=groups, topk_groups=best_groups, normalize=False)
    x = torch.randn(1, 7, 6, dtype=torch.float64)
    routing, _ = router(x, None)
    size = 8 // groups
    for s in range(7):
        p = (router.weight @ x[0, s]).softmax(0).tolist()
        allowed = sorted(range(groups), key=lambda g: -max(p[g * size : (g + 1) * size]))[:best_groups]
        best = sorted((e for e in range(8) if e // size in allowed), key=lambda e: -p[e])[: router.top_k]
        assert routing.experts_TK[s].tolist() == best
        assert routing.weights_TK[s].tolist() == pytest.approx([p[e] for e in best], rel=1e-12)


def test_sigmoid_routing_equals_transformers_deepseek_v3():
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = DeepseekV3Config(
        hidden_size=16, moe_intermediate_size=8, n_routed_experts=16, n_shared_experts=1, num_experts_per_tok=4,
        n_group=4, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5, experts_implementation="eager",
    )  # fmt: skip
    theirs = DeepseekV3MoE(config)
    torch.manual_seed(0)
    for tensor in (*theirs.parameters(), theirs.gate.e_score_correction_bias):
        torch.nn.init.normal_(tensor, std=0.5)
    router = build_router(16, 16, 4, RouterConfig(kind="sigmoid_topk", scale=2.5, num_groups=4, topk_groups=2))
    with torch.no_grad():
        router.weight.copy_(theirs.gate.weight)
        router.bias.copy_(theirs.gate.e_score_correction_bias)
    x = torch.randn(2, 33, 16)
    routing, _ = router(x, None)
    _, weights, experts = theirs.gate(x)
    mine = torch.zeros(66, 16).scatter(1, routing.experts_TK, routing.weights_TK)
    torch.testing.assert_close(mine, torch.zeros(66, 16).scatter(1, experts, weights), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("factor", "top_k"), [(None, 2), (0.5, 2), (2.0, 1), (9.0, 2)])
def test_expert_choice_equals_a_loop(factor, top_k):
    torch.manual_seed(1)
    router = build(5, 4, top_k, kind="expert_choice", balance_coef=0.0, allow_noncausal=True, capacity_factor=factor)
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    valid = torch.tensor([[True] * 6, [True, True, True, False, False, False]])
    routing, stats = router(x, valid)
    capacity = math.ceil((factor or 1.0) * top_k * 6 / 4)
    for b in range(2):
        tokens = [s for s in range(6) if valid[b, s]]
        p = (x[b] @ router.weight.T).softmax(-1)
        taken = {s: set() for s in range(6)}
        for e in range(4):
            for s in sorted(tokens, key=lambda s: -p[s, e].item())[:capacity]:
                taken[s].add(e)
        assert stats.counts_BE[b].tolist() == [min(capacity, len(tokens))] * 4
        for s in range(6):
            pairs = zip(routing.experts_TK[b * 6 + s].tolist(), routing.weights_TK[b * 6 + s].tolist(), strict=True)
            got = {e: w for e, w in pairs if e < 4}
            assert set(got) == taken[s]
            assert all(got[e] == pytest.approx(p[s, e].item(), rel=1e-12) for e in got)


@pytest.mark.parametrize(
    "config",
    [
        {"kind": "expert_choice", "balance_coef": 0.0, "allow_noncausal": True},
        {"capacity_factor": 0.5, "drop_policy": "prob", "allow_noncausal": True},
    ],
)
def test_what_needs_allow_noncausal_does_leak_the_future(config):
    """Another last token changes what an earlier one computes (the default policies: tests/moe/test_router.py)."""
    torch.manual_seed(0)
    router = build(4, 4, 2, **config)
    x = torch.randn(1, 10, 4, dtype=torch.float64)
    before = _weights(router, x)
    x[0, 9] = torch.randn(4, dtype=torch.float64) * 5
    assert not torch.equal(before[:9], _weights(router, x)[:9])


def _weights(router, x):
    routing, _ = router(x, None)
    dense = torch.zeros(routing.experts_TK.shape[0], routing.num_experts + 1, dtype=torch.float64)
    return dense.scatter_add(1, routing.experts_TK, routing.weights_TK.detach())[:, :-1]


def test_drop_policy_prob_keeps_the_most_probable():
    torch.manual_seed(3)
    router = build(4, 3, 2, capacity_factor=0.5, drop_policy="prob", allow_noncausal=True, normalize=False)
    x = torch.randn(1, 9, 4, dtype=torch.float64)
    routing, stats = router(x, None)
    p = (x[0] @ router.weight.T).softmax(-1)
    chosen = p.topk(2).indices
    capacity = math.ceil(0.5 * 2 * 9 / 3)
    for e in range(3):
        assigned = [s for s in range(9) if e in chosen[s]]
        kept = sorted(sorted(assigned, key=lambda s: -p[s, e].item())[:capacity])
        assert [s for s in range(9) if e in routing.experts_TK[s].tolist()] == kept
    assert stats.kept_BE.tolist() == [torch.bincount(routing.experts_TK.flatten(), minlength=4)[:3].tolist()]
    assert stats.kept_BE.sum() < stats.counts_BE.sum() == 18


def test_jitter_scales_the_input_in_training_only_and_depends_on_the_token_only():
    router = build(8, 4, 2, jitter=0.2)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    keys = noise_keys(5, torch.arange(6).view(2, 3))
    draws = uniform(keys, router.layer, 8, torch.float64)
    _, stats = router(x, None, keys)
    logits = (x * (0.8 + 0.4 * draws)) @ router.weight.T
    torch.testing.assert_close(stats.z_sum_B, logits.logsumexp(-1).square().sum(1))
    alone, _ = router(x[1:], None, keys[1:])
    torch.testing.assert_close(alone.weights_TK, router(x, None, keys)[0].weights_TK[3:], rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match=r"router.jitter=0.2: expected noise keys"):
        router(x, None)
    router.eval()
    torch.testing.assert_close(router(x, None)[1].z_sum_B, (x @ router.weight.T).logsumexp(-1).square().sum(1))


def test_noise_is_uniform_and_its_streams_are_unrelated():
    keys = noise_keys(0, torch.arange(4000).view(1, -1))
    u = uniform(keys, 0, 16, torch.float64).flatten()
    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u, 50, 0, 1)
    assert ((counts - 1280).square() / 1280).sum() < 100  # chi², 49 degrees of freedom: beyond 100 once in 30,000
    for other in (
        uniform(noise_keys(1, torch.arange(4000).view(1, -1)), 0, 16, torch.float64),
        uniform(keys, 1, 16, torch.float64),
    ):
        assert abs(torch.corrcoef(torch.stack((u, other.flatten())))[0, 1]) < 0.02
    shifted = torch.stack((u[:-1], u[1:])), torch.stack((u[:-16], u[16:]))
    assert all(abs(torch.corrcoef(pair)[0, 1]) < 0.02 for pair in shifted)


def test_the_bias_moves_by_the_sign_of_what_is_missing():
    router = build(4, 4, 2, kind="sigmoid_topk", bias_update_rate=0.1)
    router.bias.zero_()
    routers, counts_LE = torch.nn.ModuleList([router]), torch.tensor([[5, 1, 3, 3]])
    update_routers(routers, counts_LE, torch.tensor(True))
    torch.testing.assert_close(router.bias, torch.tensor([-0.1, 0.1, 0.0, 0.0]).double())
    update_routers(routers, counts_LE, torch.tensor(False))  # the gradient norm was not finite
    torch.testing.assert_close(router.bias, torch.tensor([-0.1, 0.1, 0.0, 0.0]).double())


def test_loss_free_balancing_balances():
    torch.manual_seed(0)
    router = build(8, 8, 2, kind="sigmoid_topk", bias_update_rate=0.01)
    router.bias.zero_()
    x = torch.randn(1, 2048, 8, dtype=torch.float64) + 0.5
    first = None
    for _ in range(300):
        counts = router(x, None)[1].counts_BE
        first = counts if first is None else first
        update_routers(torch.nn.ModuleList([router]), counts, torch.tensor(True))
    assert first.max() / first.double().mean() > 1.5
    assert counts.max() / counts.double().mean() < 1.1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"kind": "expert_choice", "balance_coef": 0.0},
            "kind=expert_choice: expected a causal router, or router.allow",
        ),
        ({"kind": "expert_choice", "allow_noncausal": True}, "balance_coef=0.01: expected 0 with"),
        ({"drop_policy": "prob", "capacity_factor": 1.0}, "drop_policy=prob: expected position, or"),
        ({"drop_policy": "prob", "allow_noncausal": True}, "drop_policy=prob: expected a router.capacity_factor"),
        ({"bias_update_rate": 0.1}, "bias_update_rate=0.1: expected 0 with router.kind=softmax_topk"),
        ({"num_groups": 4}, "topk_groups=null: expected an integer from 1 to num_groups=4"),
        ({"topk_groups": 2}, "topk_groups=2: expected null without router.num_groups"),
        ({"num_groups": 4, "topk_groups": 5}, "topk_groups=5: expected an integer from 1 to num_groups=4"),
        ({"jitter": 1.0}, r"jitter=1.0: expected a number in \[0, 1\)"),
        (
            {"layer_reduction": "hf_pooled", "balance_scope": "sequence"},
            "layer_reduction=hf_pooled: expected mean or sum",
        ),
    ],
)
def test_combinations_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        RouterConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "experts", "top_k", "message"),
    [
        ({"normalize": True}, 8, 1, "normalize=true: expected auto or false with model.top_k=1"),
        (
            {"kind": "sigmoid_topk", "normalize": True},
            8,
            1,
            "normalize=true: expected auto or false with model.top_k=1",
        ),
        ({"num_groups": 3, "topk_groups": 1}, 8, 2, "num_groups=3: expected a divisor of model.num_experts=8"),
        ({"num_groups": 4, "topk_groups": 1}, 8, 3, "topk_groups=1: expected at least 2"),
        ({"kind": "sigmoid_topk", "num_groups": 8, "topk_groups": 8}, 8, 3, "num_groups=8: expected at most 4"),
    ],
)
def test_what_router_and_model_know_together(fields, experts, top_k, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        RouterConfig(**fields).check(experts, top_k)


class TakesTheLeastProbable(Router):
    """A plugin's router, whose choice is not that of the most probable experts."""

    def rank_experts(self, logits_BSE, scores_BSE):
        return -scores_BSE


SIZES = [(6, 2), (6, 6), (1, 1), (32, 3), (8, 7)]
FIGURES_OF = [
    *((kind, *sizes) for kind in ("softmax", "fp32", "sigmoid", "expert_choice", "plugin") for sizes in SIZES),
    *((kind, *sizes) for kind in ("groups", "sigmoid_groups") for sizes in ((6, 2), (32, 3), (8, 4))),
]


@pytest.mark.parametrize("scale", [1.0, 300.0])
@pytest.mark.parametrize(("kind", "experts", "top_k"), FIGURES_OF)
def test_figures_of_tokens_equal_a_loop_in_float64(kind, experts, top_k, scale):
    """With a scale of 300 many probabilities are 0, as after a collapse. One row has one token, another has none."""
    torch.manual_seed(experts)
    options = {"kind": "sigmoid_topk"} if kind.startswith("sigmoid") else {}
    if kind.endswith("groups"):
        options |= {"num_groups": 2, "topk_groups": 1}
    if kind == "expert_choice":
        options = {"kind": kind, "allow_noncausal": True, "balance_coef": 0.0}
    router = build(7, experts, top_k, **options, normalize=False)
    if kind == "plugin":
        router = TakesTheLeastProbable(7, experts, top_k, RouterConfig()).double()
        torch.nn.init.normal_(router.weight)
    x = scale * torch.randn(3, 5, 7, dtype=torch.float64)
    valid = torch.arange(5) < torch.tensor([[5], [1], [0]])
    if kind == "fp32":
        router, x = router.float(), x.float()
    with torch.no_grad():
        stats = router(x, valid)[1]
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for b, s in valid.nonzero().tolist():
        logits = (router.weight.double() @ x[b, s].double()).tolist()
        if kind.startswith("sigmoid"):
            terms = [1 / (1 + math.exp(-max(v, -700.0))) for v in logits]
        else:
            terms = [math.exp(v - max(logits)) for v in logits]
        probs = [term / sum(terms) for term in terms]
        best = sorted(probs, reverse=True)
        entropy = sum(-p * math.log(p) for p in probs if p) / math.log(experts) if experts > 1 else 1.0
        margin = best[top_k - 1] - best[top_k] if top_k < experts else 0.0
        expected[b] += torch.tensor([entropy, margin, max(logits) - min(logits)], dtype=torch.float64)
    digits = {"rtol": 1e-6, "atol": 1e-4 if scale > 1 else 1e-6} if kind == "fp32" else {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(stats.figures_BM.double(), expected, **digits)
