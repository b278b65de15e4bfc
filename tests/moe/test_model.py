"""The whole model: packed documents, sizes, initial weights. (Against transformers: test_hf.py.)"""

import dataclasses

import pytest
import torch

from moe.accounting.flops import count_parameters, training_flops_per_token
from moe.config import ModelConfig, RouterConfig
from moe.init import init_parameters
from moe.model import ModelInputs, Transformer
from moe.noise import fill_rows

SMALL = ModelConfig(
    dim=24, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=4, hidden_dim=20, num_experts=4, top_k=2, vocab_size=50
)


def build(config=SMALL, dtype=torch.float64, seed=0, **router):
    model = Transformer(config, RouterConfig(**router), dtype).to(dtype)
    init_parameters(model, seed)
    return model


def test_packed_documents_do_not_see_each_other():
    model = build(dataclasses.replace(SMALL, sliding_window=4))
    first, second = torch.randint(0, 50, (1, 7)), torch.randint(0, 50, (1, 6))
    packed = model(
        ModelInputs(
            torch.cat((first, second), 1),
            torch.cat((torch.arange(7), torch.arange(6))).unsqueeze(0),
            torch.tensor([[0] * 7 + [1] * 6]),
        )
    ).logits_BSV
    apart = [model(ModelInputs(x, torch.arange(x.shape[1]).unsqueeze(0))).logits_BSV for x in (first, second)]
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
    attention = build(dataclasses.replace(config, qk_norm="head", attention_bias="all")).layers[1].attention
    assert attention.q_norm.weight.eq(1).all() and attention.wk.bias.eq(0).all() and attention.wo.bias.eq(0).all()
    distinct = {tuple(w[0, :4].tolist()) for w in layer.ffn.experts.w_up} | {
        tuple(layer.ffn.experts.w_gate[0, 0, :4].tolist())
    }
    assert len(distinct) == 5


@pytest.mark.parametrize("threads", [1, 3])
def test_initial_weights_are_drawn_part_by_part_with_any_number_of_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = build(dataclasses.replace(SMALL, hidden_dim=600, vocab_size=300), dtype=torch.float32, seed=5)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    expected = torch.empty(300, 24)
    fill_rows(expected, "5/embedding", 0.02)
    assert torch.equal(model.embedding, expected)
    expected = torch.empty(600, 24)
    for expert, weight in enumerate(model.layers[1].ffn.experts.w_up):
        fill_rows(expected, f"5/layers.1.ffn.experts.w_up/{expert}", 0.02)
        assert torch.equal(weight, expected)


def test_a_part_of_a_matrix_is_drawn_as_within_the_whole():
    whole, part = torch.empty(700, 3), torch.empty(300, 3)
    fill_rows(whole, "name", 0.5)
    fill_rows(part, "name", 0.5, first_row=201)
    assert torch.equal(part, whole[201:501])
