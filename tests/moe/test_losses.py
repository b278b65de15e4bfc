"""Each loss term against its definition in float64."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common.errors import ConfigError
from moe import losses
from moe.config import RouterConfig
from moe.figures import LAYER_FIGURES
from moe.losses import IGNORE, Reductions, auxiliary_losses, linear_cross_entropy
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
        kept_BE=counts,
        tokens_B=torch.tensor([[tokens]]),
        experts_BSK=torch.zeros(1, 1, tokens, top_k, dtype=torch.int64),
        weights_BSK=torch.zeros(1, 1, tokens, top_k),
        margin_BS=torch.zeros(1, 1, tokens),
        figures_BM=torch.zeros(1, 1, 3),
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
        kept_BE=counts,
        tokens_B=torch.tensor([[8]]),
        experts_BSK=counts.new_zeros(1, 1, 8, 1),
        weights_BSK=probs.new_zeros(1, 1, 8, 1),
        margin_BS=probs.new_zeros(1, 1, 8),
        figures_BM=probs.new_zeros(1, 1, 3),
        extra_BX=probs.new_zeros(1, 1, 0),
    )
    auxiliary_losses(stats, RouterConfig()).balance_sum.backward()
    assert probs.grad.flatten().tolist() == [3.0, 0.0, 0.0]


def test_global_scope_uses_the_counts_of_all_ranks():
    stats, logits, chosen = layer_stats(1, 2, 6, 4, 2)
    other, _, other_chosen = layer_stats(1, 2, 6, 4, 2, seed=1)
    local, remote = (
        torch.cat((*(counts.sum(1).flatten() for counts in (one.counts_BE, one.kept_BE)), torch.tensor([12, 2])))
        for one in (stats, other)
    )

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
        kept_BE=counts,
        tokens_B=torch.full((layers, 1), tokens),
        experts_BSK=torch.zeros(layers, 1, tokens, 2, dtype=torch.int64),
        weights_BSK=torch.zeros(layers, 1, 1, 1),
        margin_BS=torch.zeros(layers, 1, 1),
        figures_BM=torch.zeros(layers, 1, 3),
        extra_BX=torch.zeros(layers, 1, 0),
    )
    pooled = auxiliary_losses(stats, RouterConfig(layer_reduction="hf_pooled")).balance_sum / tokens
    assert pooled.item() == pytest.approx(2)
    assert (auxiliary_losses(stats, RouterConfig()).balance_sum / tokens).item() == pytest.approx(experts / 2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
@pytest.mark.parametrize(("rows", "elements"), [(1, 10), (10, 3 * 7), (10, 1), (10, 1000)])
def test_linear_cross_entropy_equals_torch_on_all_logits(monkeypatch, rows, elements, ignored, dtype, tolerance):
    """In chunks of three rows, of one row, and of all; `factor` is part of both gradients."""
    monkeypatch.setitem(losses.CHUNK_ELEMENTS, "cpu", elements)
    monkeypatch.setitem(losses.EAGER_ELEMENTS, "cpu", 14)
    torch.manual_seed(0)
    x, weight = torch.randn(2, rows, 5, dtype=dtype), 3 * torch.randn(7, 5, dtype=dtype)
    labels = torch.randint(0, 7, (2, rows))
    labels[{"none": slice(0), "some": 0, "all": slice(None)}[ignored]] = IGNORE
    leaves = x.requires_grad_(), weight.requires_grad_()
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    nats = torch.nn.functional.cross_entropy(
        (exact[0] @ exact[1].T).flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none"
    )
    got = linear_cross_entropy(*leaves, labels, 0.3)
    expected = [nats.view(2, rows), 0.3 * nats.sum(), *torch.autograd.grad(0.6 * nats.sum(), exact)]
    results = [got.nats_BS, got.total, *torch.autograd.grad(2 * got.total, leaves)]
    for mine, reference in zip(results, expected, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), reference, rtol=0, atol=tolerance)
    assert not got.nats_BS.requires_grad


def test_large_logits_and_confident_tokens_keep_their_digits():
    """The nats of a confident token are small; logits of 1e4 neither overflow nor cost digits."""
    x = torch.tensor([[[1e4, 1e4 - 12.0], [-1e4, 1e4]]])
    labels = torch.tensor([[0, 0]])
    nats = linear_cross_entropy(x, torch.eye(2), labels).nats_BS
    torch.testing.assert_close(nats, torch.tensor([[math.log1p(math.exp(-12)), 2e4]]), rtol=1e-2, atol=0)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_only_the_gradients_that_are_needed_are_computed(frozen, monkeypatch):
    x, weight = torch.randn(1, 4, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    labels = torch.randint(0, 7, (1, 4))
    expected = torch.autograd.grad(linear_cross_entropy(x, weight, labels).total, (x, weight))
    (x if frozen == "x" else weight).requires_grad_(False)
    if frozen == "weight":
        monkeypatch.setattr(losses, "_add_product", None)
    trained, gradient = (weight, expected[1]) if frozen == "x" else (x, expected[0])
    assert torch.equal(torch.autograd.grad(linear_cross_entropy(x, weight, labels).total, trained)[0], gradient)
    monkeypatch.setattr(losses, "write_logit_gradient", None)
    with torch.no_grad():
        assert not linear_cross_entropy(x, weight, labels).total.requires_grad


def test_the_gradients_can_be_taken_once():
    x, weight, labels = torch.randn(1, 4, 5, requires_grad=True), torch.randn(7, 5), torch.zeros(1, 4, dtype=torch.long)
    total = linear_cross_entropy(x, weight, labels).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"^linear_cross_entropy: expected one backward pass, found a second$"):
        total.backward()


def test_memory_is_that_of_one_chunk_of_logits(monkeypatch):
    """The largest tensor is a chunk of 32 of the 512 rows of logits, or the gradient of the weight."""
    monkeypatch.setitem(losses.CHUNK_ELEMENTS, "cpu", 2**18)
    monkeypatch.setitem(losses.EAGER_ELEMENTS, "cpu", 2**17)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            sizes.extend(t.untyped_storage().nbytes() for t in (result,) if isinstance(t, torch.Tensor))
            return result

    x, weight = torch.randn(1, 512, 8, requires_grad=True), torch.randn(8192, 8, requires_grad=True)
    labels = torch.randint(0, 8192, (1, 512))
    with Sizes():
        linear_cross_entropy(x, weight, labels).total.backward()
    assert max(sizes) <= 32 * 8192 * 4


def test_a_router_that_returns_one_loss_for_all_layers_is_refused(monkeypatch):
    stats, *_ = layer_stats(2, 2, 6, 4, 2)
    stats = stats._replace(extra_BX=torch.ones(2, 2, 3, dtype=torch.float64))
    monkeypatch.setattr(Router, "auxiliary_loss", lambda config, extra_LX, tokens: extra_LX.sum())
    with pytest.raises(ConfigError, match=r"^router.kind=softmax_topk: expected auxiliary_loss .* \[2\], found \[\]$"):
        auxiliary_losses(stats, RouterConfig())


@pytest.mark.parametrize("scope", ["global", "sequence", "rank"])
def test_the_figures_of_each_layer_follow_the_definition(scope):
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[1, 4:] = False
    stats, logits, chosen = layer_stats(3, 2, 6, 4, 2, valid=valid)
    reduction = "sum" if scope == "sequence" else "hf_pooled"  # It does not change them.
    aux = auxiliary_losses(stats, RouterConfig(balance_scope=scope, layer_reduction=reduction))
    figures = dict(zip(LAYER_FIGURES, (aux.figures_LM / valid.sum()).t(), strict=True))
    for layer, (x, c) in enumerate(zip(logits, chosen, strict=True)):
        probs = x.softmax(-1)
        parts = [valid[b] for b in (0, 1)] if scope == "sequence" else [valid]
        of_sequence = [(probs[b], c[b]) for b in (0, 1)] if scope == "sequence" else [(probs, c)]
        balance = [balance_of(p[v], e[v], 4) for (p, e), v in zip(of_sequence, parts, strict=True)]
        best = probs[valid].sort(dim=-1, descending=True).values
        expected = {
            "balance_loss": torch.stack(balance).mean(),
            "z_loss": x.logsumexp(-1)[valid].square().mean(),
            "entropy": -(probs * probs.log()).sum(-1)[valid].mean() / math.log(4),
            "margin": (best[:, 1] - best[:, 2]).mean(),
            "logit_range": (x.amax(-1) - x.amin(-1))[valid].mean(),
        }
        for name, value in expected.items():
            torch.testing.assert_close(figures[name][layer], value.detach(), msg=name)
