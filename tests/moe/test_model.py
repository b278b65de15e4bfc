"""The whole model against transformers' Mixtral and Mistral, published sizes and initial weights."""

import dataclasses

import pytest
import torch

from moe.config import ModelConfig, RouterConfig
from moe.flops import count_parameters, training_flops_per_token
from moe.init import fill_rows, init_parameters
from moe.model import Transformer

SMALL = ModelConfig(
    dim=24, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=4, hidden_dim=20, num_experts=4, top_k=2, vocab_size=50
)


def build(config=SMALL, dtype=torch.float64, seed=0, **router):
    model = Transformer(config, RouterConfig(**router), dtype).to(dtype)
    init_parameters(model, seed)
    return model


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_and_gradients_equal_transformers(window, dense, tied):
    import transformers

    config = dataclasses.replace(SMALL, sliding_window=window, tie_embeddings=tied, init_std=0.3)
    if dense:
        config = dataclasses.replace(config, num_experts=None, top_k=None)
    mine = build(config)
    common = {
        "vocab_size": 50, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 4, "sliding_window": window, "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}, "tie_word_embeddings": tied,
        "attn_implementation": "eager", "experts_implementation": "eager",
    }  # fmt: skip
    if dense:
        theirs = transformers.MistralForCausalLM(transformers.MistralConfig(**common)).double()
    else:
        theirs = transformers.MixtralForCausalLM(
            transformers.MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **common)
        ).double()
    # Our tensor -> theirs; fused gate and up projections are cut in two.
    pairs = [(mine.embedding, theirs.model.embed_tokens.weight), (mine.norm.weight, theirs.model.norm.weight)]
    pairs += [] if tied else [(mine.head.weight, theirs.lm_head.weight)]
    for a, b in zip(mine.layers, theirs.model.layers, strict=True):
        pairs += [(getattr(a.attention, f"w{n}").weight, getattr(b.self_attn, f"{n}_proj").weight) for n in "qkvo"]
        pairs += [
            (a.attention_norm.weight, b.input_layernorm.weight),
            (a.ffn_norm.weight, b.post_attention_layernorm.weight),
        ]
        if dense:
            pairs += [
                (getattr(a.ffn, f"w_{n}").weight, getattr(b.mlp, f"{n}_proj").weight) for n in ("gate", "up", "down")
            ]
        else:
            pairs += [(a.ffn.router.weight, b.mlp.gate.weight), (a.ffn.experts.w_down, b.mlp.experts.down_proj)]
            pairs += [(a.ffn.experts.w_gate, b.mlp.experts.gate_up_proj[:, :20])]
            pairs += [(a.ffn.experts.w_up, b.mlp.experts.gate_up_proj[:, 20:])]
    with torch.no_grad():
        for ours, other in pairs:
            other.copy_(ours)
    tokens = torch.randint(0, 50, (2, 13))
    logits = mine(tokens, torch.arange(13).expand(2, -1)).logits_BSV
    expected = theirs(tokens).logits
    # transformers takes rotary angles and router probabilities in fp32: that is the difference left.
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)
    weight = torch.randn_like(logits)
    (logits * weight).sum().backward()
    (expected * weight).sum().backward()
    for name in ("wq", "wo"):
        got = getattr(mine.layers[0].attention, name).weight.grad
        want = getattr(theirs.model.layers[0].self_attn, f"{name[1]}_proj").weight.grad
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mine.embedding.grad, theirs.model.embed_tokens.weight.grad, rtol=1e-4, atol=1e-4)
    if not dense:
        torch.testing.assert_close(
            mine.layers[1].ffn.experts.w_down.grad,
            theirs.model.layers[1].mlp.experts.down_proj.grad,
            rtol=1e-4,
            atol=1e-4,
        )


def test_packed_documents_do_not_see_each_other():
    model = build(dataclasses.replace(SMALL, sliding_window=4))
    first, second = torch.randint(0, 50, (1, 7)), torch.randint(0, 50, (1, 6))
    packed = model(
        torch.cat((first, second), 1),
        torch.cat((torch.arange(7), torch.arange(6))).unsqueeze(0),
        torch.tensor([[0] * 7 + [1] * 6]),
    ).logits_BSV
    apart = [model(x, torch.arange(x.shape[1]).unsqueeze(0)).logits_BSV for x in (first, second)]
    torch.testing.assert_close(packed, torch.cat(apart, 1), rtol=0, atol=1e-12)


def test_active_parameters_and_flops_by_hand():
    with torch.device("meta"):
        model = Transformer(SMALL, RouterConfig(), torch.float32)
    attention = 24 * 24 * 2 + 24 * 8 * 2
    router, expert, norms = 24 * 4, 3 * 24 * 20, 2 * 24
    total = 2 * (attention + router + 4 * expert + norms) + 2 * 50 * 24 + 24
    active = total - 2 * 2 * expert
    assert count_parameters(model) == (total, active, 2 * 4 * expert)
    matmul = active - 5 * 24 - 50 * 24
    assert training_flops_per_token(model, 8) == 6 * matmul + 12 * 2 * 24 * (8 * 9 / 2) / 8


def test_initial_weights_have_the_documented_scale_and_depend_on_identity_only():
    config = dataclasses.replace(SMALL, dim=64, num_experts=4, hidden_dim=128)
    model, again, other = build(config), build(config), build(config, seed=1)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(model.embedding, other.embedding)
    layer = model.layers[1]
    assert layer.attention.wq.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert layer.ffn.experts.w_up.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.ffn.experts.w_down.std().item() == pytest.approx(0.02 / 2, rel=0.05)
    assert layer.attention_norm.weight.eq(1).all()
    distinct = {tuple(w[0, :4].tolist()) for w in layer.ffn.experts.w_up} | {
        tuple(layer.ffn.experts.w_gate[0, 0, :4].tolist())
    }
    assert len(distinct) == 5


def test_a_part_of_a_matrix_is_drawn_as_within_the_whole():
    whole, part = torch.empty(700, 3), torch.empty(300, 3)
    fill_rows(whole, "name", 0.5)
    fill_rows(part, "name", 0.5, first_row=201)
    assert torch.equal(part, whole[201:501])
