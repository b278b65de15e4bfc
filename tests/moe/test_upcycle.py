"""Sparse upcycling: the MoE model computes what the dense model computes.

Shapes: B batch, S sequence, D model, F hidden width, E experts, K top-k.
"""

import pytest
import torch

from moe.config import ModelConfig, RouterConfig
from moe.init import init_parameters
from moe.model import ModelInputs, Transformer
from moe.upcycle import Upcycling, dense_name, expert_matrix, moe_config, router_config, router_matrix

DENSE = ModelConfig(
    dim=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=48, vocab_size=61, sliding_window=7
)
NAME = "layers.0.ffn.experts.w_up"


def variant(**changes):
    return ModelConfig(**(vars(DENSE) | changes))


def dense_model(config: ModelConfig, dtype: torch.dtype) -> Transformer:
    """Return a model with random weights of about the size of trained ones, so that its networks change the logits."""
    model = Transformer(config, RouterConfig(), dtype).to(dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return model


def upcycled(dense: Transformer, plan: Upcycling) -> Transformer:
    model = Transformer(moe_config(dense.config, plan), router_config(plan), dense.compute_dtype)
    weights, state = dense.state_dict(), {}
    for name, tensor in model.state_dict().items():
        origin = dense_name(name)
        if origin is None:
            bias = torch.zeros(tensor.shape)
            state[name] = bias if tensor.dim() == 1 else router_matrix(name, dense.config.dim, 1.0, plan)
        elif origin == name:
            state[name] = weights[name]
        else:
            state[name] = torch.stack([expert_matrix(weights[origin], name, e, plan) for e in range(plan.num_experts)])
    model.to(dense.compute_dtype).load_state_dict(state)
    return model


def forward(model: Transformer):
    tokens_BS = torch.randint(61, (3, 20), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(ModelInputs(tokens_BS, torch.arange(20).expand(3, 20)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize(
    ("plan", "changes"),
    [
        (Upcycling(8, 2), {}),
        (Upcycling(5, 3), {"ffn": "relu", "sliding_window": None}),
        (Upcycling(4, 4, router="sigmoid_topk"), {"ffn": "gelu"}),
        (Upcycling(8, 4, granularity=2, first_k_dense=1), {"ffn": "geglu", "qk_norm": "head", "attention_bias": "all"}),
        (Upcycling(12, 6, granularity=3, router="sigmoid_topk"), {"tie_embeddings": True}),
        (Upcycling(24, 16, granularity=8, moe_every=2), {"ffn": "relu"}),
        (Upcycling(4, 2, granularity=2), {}),
        (Upcycling(3, 3, granularity=3), {}),
    ],
)
def test_logits_are_equal_to_the_dense_model(dtype, tolerance, plan, changes):
    dense = dense_model(variant(**changes), dtype)
    expected = forward(dense).logits_BSV
    output = forward(upcycled(dense, plan))
    torch.testing.assert_close(output.logits_BSV, expected, atol=tolerance, rtol=tolerance)
    # Tokens must go to different experts. Otherwise the equality would prove little.
    copies, layers = plan.num_experts // plan.granularity, len(output.stats.counts_BE)
    if plan.top_k < plan.num_experts:
        assert len(output.stats.experts_BSK.flatten(0, 2).unique(dim=0)) > 1
    if dtype == torch.float64:
        copies_BSK = output.stats.experts_BSK.div(plan.granularity, rounding_mode="floor")
        slices_per_copy = torch.nn.functional.one_hot(copies_BSK, copies).sum(dim=-2)
        assert set(slices_per_copy.unique().tolist()) <= {0, plan.granularity}, "a token has a part of a copy"
    assert layers == sum(map(moe_config(dense.config, plan).is_moe_layer, range(3)))


def test_dense_layers_and_expert_widths():
    plan = Upcycling(8, 2, granularity=2, first_k_dense=1, moe_every=2)
    config = moe_config(DENSE, plan)
    assert [config.is_moe_layer(layer) for layer in range(3)] == [False, False, True]
    assert (config.hidden_dim, config.expert_width, config.expert_kind) == (48, 24, "swiglu")
    model = Transformer(config, router_config(plan), torch.float32)
    assert {name: dense_name(name) for name, _ in model.named_parameters() if ".ffn." in name} == {
        **{f"layers.{n}.ffn.{w}.weight": f"layers.{n}.ffn.{w}.weight" for n in (0, 1) for w in WEIGHTS},
        **{f"layers.2.ffn.experts.{w}": f"layers.2.ffn.{w}.weight" for w in WEIGHTS},
        "layers.2.ffn.router.weight": None,
    }


WEIGHTS = ("w_gate", "w_up", "w_down")


def test_noise_has_the_given_size_and_depends_on_seed_name_and_expert_only():
    generator = torch.Generator().manual_seed(1)
    dense_FD = torch.randn(600, 300, generator=generator) * 0.3 + 0.1
    plan = Upcycling(4, 2, noise=0.05)

    def noise(dense, name, expert, plan):
        clean = expert_matrix(dense, name, expert, Upcycling(plan.num_experts, plan.top_k, plan.granularity))
        return expert_matrix(dense, name, expert, plan) - clean

    first = noise(dense_FD, NAME, 0, plan)
    assert first.std() == pytest.approx(0.05 * 0.3, rel=0.02) and abs(first.mean()) < 1e-4
    others = [
        noise(dense_FD, NAME, 1, plan),
        noise(dense_FD, "layers.1.ffn.experts.w_up", 0, plan),
        noise(dense_FD, NAME, 0, Upcycling(4, 2, noise=0.05, seed=1)),
    ]
    for other in others:
        assert abs(torch.corrcoef(torch.stack((first.flatten(), other.flatten())))[0, 1]) < 0.02
    torch.testing.assert_close(noise(dense_FD, NAME, 0, Upcycling(64, 8, noise=0.05)), first)

    # The slices of `w_down` are multiplied by G, and so is their noise.
    down_DF, fine = dense_FD.T.contiguous(), Upcycling(8, 4, granularity=4, noise=0.05)
    name = "layers.0.ffn.experts.w_down"
    assert noise(down_DF, name, 5, fine).shape == (300, 150)
    assert noise(down_DF, name, 5, fine).std() == pytest.approx(4 * 0.05 * 0.3, rel=0.02)
    assert noise(dense_FD, NAME, 5, fine).std() == pytest.approx(0.05 * 0.3, rel=0.02)


def test_small_noise_changes_the_logits_little():
    dense = dense_model(DENSE, torch.float64)
    expected = forward(dense).logits_BSV
    errors = [
        (forward(upcycled(dense, Upcycling(8, 4, granularity=2, noise=noise))).logits_BSV - expected).abs().max()
        for noise in (1e-6, 1e-3)
    ]
    assert 0 < errors[0] < 1e-4 < errors[1]


def test_router_weights_are_those_of_a_new_model_and_equal_within_a_copy():
    plan = Upcycling(6, 2, seed=9)
    fresh = Transformer(moe_config(DENSE, plan), router_config(plan), torch.float32)
    init_parameters(fresh, 9)
    name = "layers.1.ffn.router.weight"
    assert torch.equal(router_matrix(name, 32, DENSE.init_std, plan), fresh.get_parameter(name))
    tied_ED = router_matrix(name, 32, DENSE.init_std, Upcycling(18, 6, granularity=3, seed=9))
    assert torch.equal(tied_ED[::3], fresh.get_parameter(name))
    assert torch.equal(tied_ED[1::3], tied_ED[::3]) and torch.equal(tied_ED[2::3], tied_ED[::3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 0}, "num_experts=0: expected an integer >= 2"),
        ({"top_k": 1}, "top_k=1: expected an integer >= 2 "),
        ({"top_k": 9}, "top_k=9: expected an integer from 2 to num_experts=8"),
        ({"granularity": 0}, "granularity=0: expected an integer >= 1"),
        ({"granularity": 3}, "granularity=3: expected a divisor of num_experts=8 and of top_k=2"),
        ({"granularity": 4}, "granularity=4: expected a divisor of num_experts=8 and of top_k=2"),
        ({"num_experts": 10, "top_k": 5, "granularity": 5}, "granularity=5: expected a divisor of hidden_dim=48, "),
        ({"noise": -0.1}, "noise=-0.1: expected a number >= 0"),
        ({"first_k_dense": 3}, "first_k_dense=3: expected an integer from 0 to 2"),
        ({"moe_every": 4}, "moe_every=4: expected at most 3"),
        ({"seed": -1}, "seed=-1: expected an integer from 0"),
    ],
)
def test_an_invalid_plan_is_an_error(changes, message):
    with pytest.raises(ValueError) as caught:
        moe_config(DENSE, Upcycling(**({"num_experts": 8, "top_k": 2} | changes)))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
