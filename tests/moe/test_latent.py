"""Multi-head latent attention: against a loop over queries, with the cache, and the keys that are refused."""

import dataclasses
import math

import pytest
import torch

from moe.attention.attention import AttentionCore
from moe.attention.cache import Cache
from moe.attention.latent import LatentAttention
from moe.config import AdapterConfig, ModelConfig, RopeScaling
from moe.token_context import TokenContext, rotary_frequencies, rotary_table
from tests.moe.test_attention import masked_reference
from tests.moe.test_cache import build, cached, pieces, whole

LATENT = {
    "num_kv_heads": 4, "kv_lora_rank": 9, "q_lora_rank": 7, "qk_nope_head_dim": 5, "qk_rope_head_dim": 4,
    "v_head_dim": 3, "head_dim": 9,
}  # fmt: skip
CONFIG = ModelConfig(dim=12, num_layers=1, num_heads=4, hidden_dim=8, vocab_size=9, **LATENT)


def normalized(x, weight, eps):
    return x / (x.square().mean() + eps).sqrt() * weight


YARN = RopeScaling("yarn", 4.0, 8, mscale=0.6, mscale_all_dim=0.7)


@pytest.mark.parametrize(("rank", "window", "scaling"), [(7, None, YARN), (None, 5, None)])
def test_attention_equals_a_loop_over_queries_and_keys(rank, window, scaling):
    """Every angle, key and value by itself, in float64. Documents are packed."""
    torch.manual_seed(3)
    config = dataclasses.replace(CONFIG, q_lora_rank=rank, sliding_window=window, rope_scaling=scaling)
    attention = LatentAttention(config, 0).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    documents = torch.tensor([[0] * 7 + [1] * 2 + [2] * 8])
    positions = torch.cat([torch.arange(n) for n in (7, 2, 8)])
    x = torch.randn(1, 17, 12, dtype=torch.float64)
    rotary = rotary_table(positions.unsqueeze(0), config.rotary_width, config.rope_theta, torch.float64, scaling)
    got = attention(x, TokenContext(rotary=rotary, documents_BS=documents))[0]

    frequencies = rotary_frequencies(4, config.rope_theta, scaling, torch.float64, x.device).tolist()
    factor = 1.0 if scaling is None else (0.06 * math.log(4) + 1) / (0.07 * math.log(4) + 1)
    sharpness = 1.0 if scaling is None else (0.07 * math.log(4) + 1) ** 2

    def turned(vector, position):
        out = vector.clone()
        for i, frequency in enumerate(frequencies):
            cos, sin = math.cos(position * frequency) * factor, math.sin(position * frequency) * factor
            out[i] = vector[i] * cos - vector[i + 2] * sin
            out[i + 2] = vector[i + 2] * cos + vector[i] * sin
        return out

    def query(i, head):
        if rank is None:
            q = attention.wq.weight @ x[0, i]
        else:
            down = normalized(attention.wq_down.weight @ x[0, i], attention.wq_down_norm.weight, config.norm_eps)
            q = attention.wq_up.weight @ down
        q = q[9 * head : 9 * head + 9]
        return torch.cat((q[:5], turned(q[5:], int(positions[i]))))

    def key_and_value(j, head):
        down = attention.wkv_down.weight @ x[0, j]
        latent = normalized(down[:9], attention.wkv_down_norm.weight, config.norm_eps)
        up = (attention.wkv_up.weight @ latent)[8 * head : 8 * head + 8]
        return torch.cat((up[:5], turned(down[9:], int(positions[j])))), up[5:]

    for i in range(17):
        seen = [j for j in range(i + 1) if documents[0, j] == documents[0, i] and (window is None or i - j < window)]
        heads = []
        for head in range(4):
            keys, values = zip(*(key_and_value(j, head) for j in seen), strict=True)
            scores = torch.stack([query(i, head) @ key for key in keys]) / 3 * sharpness
            heads.append(scores.softmax(0) @ torch.stack(values))
        torch.testing.assert_close(got[i], attention.wo.weight @ torch.cat(heads), rtol=0, atol=1e-10)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_the_core_takes_narrower_values_and_any_scale(window, packed):
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, heads, 13, width, dtype=torch.float64, requires_grad=True)
               for heads, width in ((4, 6), (2, 6), (2, 5)))  # fmt: skip
    documents = torch.randint(0, 2, (2, 13)).cumsum(1) if packed else torch.zeros(2, 13, dtype=torch.int64)
    expected = masked_reference(q * (0.3 * math.sqrt(6)), k, v, documents, window)
    got = AttentionCore(window, 0.3)(q, k, v, TokenContext(documents_BS=documents if packed else None))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    grad = torch.randn_like(got)
    for found, wanted in zip(*(torch.autograd.grad(y, (q, k, v), grad) for y in (got, expected)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("window", "chunk", "rank"),
    [
        (None, 1, 7),
        (5, 18, None),
        *(pytest.param(*given, marks=pytest.mark.slow) for given in ((5, 1, 7), (None, 18, None), (None, 4, 7))),
    ],
)
@torch.no_grad()
def test_logits_with_the_cache_equal_those_without(window, chunk, rank, monkeypatch):
    """Single tokens take the absorbed form but for the first, and a chunk of 18 computes keys and values."""
    model = build(window, rope_scaling=YARN if rank else None, **LATENT | {"q_lora_rank": rank})
    expanded = []
    expand = LatentAttention._expand
    monkeypatch.setattr(LatentAttention, "_expand", lambda *given: expanded.append(given[1].shape[2]) or expand(*given))
    tokens = torch.randint(0, 40, (2, 24), generator=torch.Generator().manual_seed(1))
    got = cached(model, tokens, [*pieces(18, chunk), *[1] * 6])
    assert expanded == {1: [1] * 3, 18: [18] * 3}.get(chunk, expanded)
    torch.testing.assert_close(got, whole(model, tokens), rtol=0, atol=1e-12)


@torch.no_grad()
def test_an_adapter_of_the_map_from_the_latent_is_not_left_out_with_the_cache():
    """Its product is not that of one matrix, so there is no absorbed form."""
    model = build(None, adapter=AdapterConfig("lora", rank=3, targets=("attention",)), **LATENT)
    for name, parameter in model.named_parameters():
        if name.endswith("adapter.b"):
            torch.nn.init.normal_(parameter, std=0.4)
    tokens = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(1))
    expected = whole(model, tokens)
    torch.testing.assert_close(cached(model, tokens, [4, *[1] * 5]), expected, rtol=0, atol=1e-12)
    for layer in model.layers:
        layer.attention.wkv_up.adapter = None
    assert (whole(model, tokens) - expected).abs().max() > 0.1


def test_the_cache_stores_one_latent_and_one_rotary_part_per_token():
    model = build(None, **LATENT)
    cache = Cache(model.config, 2, max_len=11, dtype=torch.float64)
    assert [[tuple(buffer.shape) for buffer in layer.buffers] for layer in cache.layers] == [[(2, 1, 11, 13)]] * 3
    assert cache.nbytes == 3 * 2 * 11 * (9 + 4) * 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_lora_rank": None}, "q_lora_rank=7: expected null without kv_lora_rank"),
        ({"kv_lora_rank": 0}, "kv_lora_rank=0: expected an integer >= 1"),
        ({"v_head_dim": None}, "v_head_dim=null: expected an integer >= 1 with latent attention"),
        ({"v_head_dim": 10}, "v_head_dim=10: expected an integer from 1 to head_dim=9"),
        ({"head_dim": 8}, "head_dim=8: expected 9, qk_nope_head_dim + qk_rope_head_dim"),
        ({"num_kv_heads": 2}, "num_kv_heads=2: expected num_heads=4 with latent attention"),
        ({"q_lora_rank": 0}, "q_lora_rank=0: expected an integer >= 1, or null"),
        ({"qk_rope_head_dim": 3, "head_dim": 8}, "qk_rope_head_dim=3: expected an even number"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(ValueError) as error:
        dataclasses.replace(CONFIG, **changes)
    assert str(error.value).startswith(message)
