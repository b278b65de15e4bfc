"""Each loss term against its definition in float64."""

import pytest
import torch

from common.errors import ConfigError
from moe import losses
from moe.config import RouterConfig
from moe.losses import IGNORE, Reductions, auxiliary_losses, token_nats
from moe.router import Router, RouterStats
from moe.routers import build_router


def layer_stats(layers, batch, length, experts, top_k, seed=0, valid=None):
    """Stacked statistics of random routers, with the logits and choices they came from."""
    torch.manual_seed(seed)
    collected, logits, chosen = [], [], []
    for _ in range(layers):
        router = build_router(5, experts, top_k, RouterConfig()).double()
        torch.nn.init.normal_(router.weight)
        x = torch.randn(batch, length, 5, dtype=torch.float64)
        _, stats = router(x, valid)
        collected.append(stats)
        logits.append(x @ router.weight.T)
        chosen.append(stats.experts_BSK)
    return RouterStats(*(torch.stack(f) for f in zip(*collected, strict=True))), logits, chosen


def balance_of(probs, chosen, experts):
    """E · Σ f·P over a set of tokens: probs [N, E], chosen [N, K]."""
    counts = torch.bincount(chosen.flatten(), minlength=experts).double()
    return experts * (counts / counts.sum() * probs.mean(0)).sum()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("scope", ["global", "sequence", "rank"])
def test_balance_and_z_follow_the_definition(scope, reduction):
    layers, batch, length, experts, top_k = 3, 2, 6, 4, 2
    valid = torch.ones(batch, length, dtype=torch.bool)
    valid[1, 4:] = False
    stats, logits, chosen = layer_stats(layers, batch, length, experts, top_k, valid=valid)
    aux = auxiliary_losses(stats, RouterConfig(balance_scope=scope, layer_reduction=reduction))
    balance, z = [], []
    for x, c in zip(logits, chosen, strict=True):
        probs = x.softmax(-1)
        if scope == "sequence":
            balance.append(
                torch.stack([balance_of(probs[b][valid[b]], c[b][valid[b]], experts) for b in (0, 1)]).mean()
            )
        else:
            balance.append(balance_of(probs[valid], c[valid], experts))
        z.append(x.logsumexp(-1)[valid].square().mean())
    combine = torch.mean if reduction == "mean" else torch.sum
    tokens = int(valid.sum())
    torch.testing.assert_close(aux.balance_sum.detach() / tokens, combine(torch.stack(balance)).detach())
    torch.testing.assert_close(aux.z_sum.detach() / tokens, combine(torch.stack(z)).detach())


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_balance_is_one_at_balance_for_every_k(top_k):
    experts, tokens = 4, 8
    counts = torch.full((1, 1, experts), tokens * top_k // experts)
    stats = RouterStats(
        counts_BE=counts,
        prob_sum_BE=torch.full((1, 1, experts), tokens / experts, dtype=torch.float64),
        z_sum_B=torch.zeros(1, 1, dtype=torch.float64),
        dropped_B=torch.zeros(1, 1, dtype=torch.int64),
        tokens_B=torch.tensor([[tokens]]),
        experts_BSK=torch.zeros(1, 1, tokens, top_k, dtype=torch.int64),
        extra_BX=torch.zeros(1, 1, 0),
    )
    for scope in ("global", "sequence", "rank"):
        assert auxiliary_losses(stats, RouterConfig(balance_scope=scope)).balance_sum.item() == tokens


def test_balance_gradient_pushes_down_the_overloaded_expert_only_through_probabilities():
    probs = torch.tensor([[[6.0, 1.0, 1.0]]], dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([[[8, 0, 0]]])
    stats = RouterStats(
        counts_BE=counts,
        prob_sum_BE=probs,
        z_sum_B=probs.new_zeros(1, 1),
        dropped_B=counts.new_zeros(1, 1),
        tokens_B=torch.tensor([[8]]),
        experts_BSK=counts.new_zeros(1, 1, 8, 1),
        extra_BX=probs.new_zeros(1, 1, 0),
    )
    auxiliary_losses(stats, RouterConfig()).balance_sum.backward()
    assert probs.grad.flatten().tolist() == [3.0, 0.0, 0.0]


def test_global_scope_uses_the_counts_of_all_ranks():
    stats, logits, chosen = layer_stats(1, 2, 6, 4, 2)
    other, _, other_chosen = layer_stats(1, 2, 6, 4, 2, seed=1)
    local = torch.cat((stats.counts_BE.sum(1).flatten(), torch.tensor([0, 12, 2])))
    remote = torch.cat((other.counts_BE.sum(1).flatten(), torch.tensor([0, 12, 2])))

    def reduce(counts):
        assert torch.equal(counts, local)
        return counts + remote

    aux = auxiliary_losses(stats, RouterConfig(), Reductions(counts=reduce))
    both = torch.bincount(torch.cat((chosen[0].flatten(), other_chosen[0].flatten())), minlength=4).double()
    expected = 4 * (both / both.sum() * logits[0].softmax(-1).sum((0, 1))).sum()
    torch.testing.assert_close(aux.balance_sum.detach(), expected.detach())
    assert torch.equal(aux.counts_LE[0], both.long())


def test_hf_pooled_equals_transformers_loss_and_gradient():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    torch.manual_seed(0)
    routers = [build_router(5, 4, 2, RouterConfig()) for _ in range(3)]
    weights = [torch.nn.init.normal_(router.weight) for router in routers]
    inputs = [torch.randn(2, 6, 5) for _ in routers]
    collected = [router(x, None)[1] for router, x in zip(routers, inputs, strict=True)]
    stats = RouterStats(*(torch.stack(f) for f in zip(*collected, strict=True)))
    mine = auxiliary_losses(stats, RouterConfig(layer_reduction="hf_pooled")).balance_sum / 12
    gates = tuple(x.flatten(0, 1) @ weight.T for x, weight in zip(inputs, weights, strict=True))
    expected = load_balancing_loss_func(gates, 4, 2)
    torch.testing.assert_close(mine, expected.double(), rtol=1e-6, atol=0)
    grads = torch.autograd.grad(mine, weights), torch.autograd.grad(expected, weights)
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


def test_hf_pooled_is_blind_to_layers_that_overload_different_experts():
    """Layer l sends everything to experts 2l and 2l + 1: pooled it reads k, as at balance; per layer it is E / k."""
    layers, experts, tokens = 4, 8, 16
    counts = torch.zeros(layers, 1, experts, dtype=torch.int64)
    for layer in range(layers):
        counts[layer, 0, 2 * layer : 2 * layer + 2] = tokens
    stats = RouterStats(
        counts_BE=counts,
        prob_sum_BE=counts.double() / 2,
        z_sum_B=torch.zeros(layers, 1, dtype=torch.float64),
        dropped_B=torch.zeros(layers, 1, dtype=torch.int64),
        tokens_B=torch.full((layers, 1), tokens),
        experts_BSK=torch.zeros(layers, 1, tokens, 2, dtype=torch.int64),
        extra_BX=torch.zeros(layers, 1, 0),
    )
    pooled = auxiliary_losses(stats, RouterConfig(layer_reduction="hf_pooled")).balance_sum / tokens
    assert pooled.item() == pytest.approx(2)
    assert (auxiliary_losses(stats, RouterConfig()).balance_sum / tokens).item() == pytest.approx(experts / 2)


def test_cross_entropy_in_chunks_equals_torch_with_its_gradient(monkeypatch):
    monkeypatch.setitem(losses.CHUNK_ELEMENTS, "cpu", 3 * 7)  # chunks of three rows of four
    logits = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 7, (2, 5))
    labels[0, 1] = labels[1, 4] = IGNORE
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    nats, got = token_nats(logits, labels)
    torch.testing.assert_close(got, expected)
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    torch.testing.assert_close(nats, each.detach().view(2, 5))
    torch.testing.assert_close(
        torch.autograd.grad(0.3 * got, logits)[0], torch.autograd.grad(0.3 * expected, logits)[0], rtol=0, atol=1e-14
    )


def test_cross_entropy_sums_over_labels_only():
    logits = torch.randn(2, 3, 7, dtype=torch.float64)
    labels = torch.tensor([[1, IGNORE, 6], [IGNORE, IGNORE, 0]])
    log_p = logits.log_softmax(-1)
    expected = -(log_p[0, 0, 1] + log_p[0, 2, 6] + log_p[1, 2, 0])
    torch.testing.assert_close(token_nats(logits, labels).sum, expected)
    assert token_nats(logits, torch.full((2, 3), IGNORE)).sum.item() == 0


def test_a_router_that_returns_one_loss_for_all_layers_is_refused(monkeypatch):
    stats, *_ = layer_stats(2, 2, 6, 4, 2)
    stats = stats._replace(extra_BX=torch.ones(2, 2, 3, dtype=torch.float64))
    monkeypatch.setattr(Router, "auxiliary_loss", lambda config, extra_LX, tokens: extra_LX.sum())
    with pytest.raises(ConfigError, match=r"^router.kind=softmax_topk: expected auxiliary_loss .* \[2\], found \[\]$"):
        auxiliary_losses(stats, RouterConfig())
