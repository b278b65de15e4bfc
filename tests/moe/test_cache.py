"""With the cache, the logits of every token equal those of one forward pass over the whole sequence."""

import dataclasses

import pytest
import torch

from moe.attention.cache import Cache
from moe.config import ModelConfig, RopeScaling, RouterConfig
from moe.init import init_parameters
from moe.model import ModelInputs, Transformer

SMALL = ModelConfig(
    dim=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4, hidden_dim=12, num_experts=4, top_k=2,
    vocab_size=40, init_std=0.4,
)  # fmt: skip
LENGTH = 30


def build(window, dtype=torch.float64, **changes):
    config = dataclasses.replace(SMALL, sliding_window=window, **changes)
    model = Transformer(config, RouterConfig(), dtype).to(dtype)
    init_parameters(model, 0)
    return model.eval()


def whole(model, tokens):
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return model(ModelInputs(tokens, positions)).logits_BSV


def cached(model, tokens, chunks, cache=None):
    """Logits of `tokens`, fed in chunks of the lengths `chunks`."""
    assert sum(chunks) == tokens.shape[1]
    cache = cache or Cache(model.config, len(tokens), max_len=tokens.shape[1], dtype=model.compute_dtype)
    parts = [
        model(ModelInputs(piece, cache.next_positions(piece.shape[1])), cache=cache).logits_BSV
        for piece in tokens.split(chunks, 1)
    ]
    return torch.cat(parts, 1)


def pieces(total, size):
    return [size] * (total // size) + ([total % size] if total % size else [])


@pytest.mark.parametrize(
    "window",
    [None, 1, 5, (4, None, 4), *(pytest.param(window, marks=pytest.mark.slow) for window in (2, 7, 64, (None, 3, 6)))],
)
@pytest.mark.parametrize("chunk", [1, 3, "W", "W+1", "4W", LENGTH])
@torch.no_grad()
def test_logits_of_every_step_equal_the_uncached(window, chunk):
    model = build(window)
    reach = window if isinstance(window, int) else 5
    size = {"W": reach, "W+1": reach + 1, "4W": 4 * reach}.get(chunk, chunk)
    tokens = torch.randint(0, 40, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    # After some chunks, token by token, far past the window.
    chunks = [*pieces(12, size), *[1] * (LENGTH - 12)]
    torch.testing.assert_close(cached(model, tokens, chunks), whole(model, tokens), rtol=0, atol=1e-12)
    torch.testing.assert_close(cached(model, tokens, pieces(LENGTH, size)), whole(model, tokens), rtol=0, atol=1e-12)


PARTS = {
    "norm of each head, biases": {"qk_norm": "head", "attention_bias": "all"},
    "norm of all heads": {"qk_norm": "width", "attention_bias": "qkv"},
    "gate of the shared experts": {"num_shared_experts": 1, "shared_hidden_dim": 7, "shared_gate": True},
    "yarn": {"rotary_dim": 2, "rope_scaling": RopeScaling("yarn", 4.0, 8)},
}
"""Parts that only some families have."""


@pytest.mark.parametrize("part", PARTS)
@torch.no_grad()
def test_every_part_works_with_the_cache(part):
    model = build((5, None, 5), **PARTS[part])
    tokens = torch.randint(0, 40, (2, LENGTH))
    expected = whole(model, tokens)
    torch.testing.assert_close(cached(model, tokens, [9, 2, *[1] * 10, 9]), expected, rtol=0, atol=1e-12)
    assert not torch.allclose(whole(build((5, None, 5)), tokens), expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("kv_heads", [1, 4])
@torch.no_grad()
def test_other_precisions_and_grouped_heads(dtype, tolerance, kv_heads):
    model = build((5, None, 5), dtype, num_kv_heads=kv_heads, init_std=0.2, num_experts=None, top_k=None)
    tokens = torch.randint(0, 40, (3, LENGTH))
    got = cached(model, tokens, [9, 2, *[1] * 10, 9])
    torch.testing.assert_close(got, whole(model, tokens), rtol=0, atol=tolerance)


@pytest.mark.parametrize("window", [None, 1, 5, (4, None, 4)])
@torch.no_grad()
def test_rows_of_different_lengths(window):
    """Every row gets a different number of tokens each time, sometimes none, and attends to its own past only."""
    model = build(window)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 40, (4, LENGTH), generator=generator)
    expected = whole(model, tokens)
    cache = Cache(model.config, 4, max_len=LENGTH, dtype=torch.float64)
    lengths = [0] * 4
    for widest in (6, 1, 13, 1, 1, 3, 1, 12, LENGTH):
        counts = [
            min(int(torch.randint(0, widest + 1, (), generator=generator)), LENGTH - length) for length in lengths
        ]
        counts[int(torch.randint(0, 4, (), generator=generator))] = 0
        chunk = torch.full((4, max(1, *counts)), 39)
        valid = torch.arange(chunk.shape[1]) < torch.tensor(counts).unsqueeze(1)
        for row, count in enumerate(counts):
            chunk[row, :count] = tokens[row, lengths[row] : lengths[row] + count]
        logits = model(ModelInputs(chunk, cache.next_positions(chunk.shape[1]), valid_BS=valid), cache=cache).logits_BSV
        assert logits.isfinite().all()
        for row, count in enumerate(counts):
            torch.testing.assert_close(
                logits[row, :count], expected[row, lengths[row] : lengths[row] + count], rtol=0, atol=1e-12
            )
            lengths[row] += count
        assert cache.lengths_B.tolist() == lengths
    assert max(lengths) > 20


@torch.no_grad()
def test_memory_is_that_of_the_window_and_never_moves():
    model = build((4, 7, 4))
    cache = Cache(model.config, 2, dtype=torch.float64)
    assert [layer.buffers[0].shape[2] for layer in cache.layers] == [4, 7, 4]
    size, addresses = cache.nbytes, [layer.buffers[0].data_ptr() for layer in cache.layers]
    assert size == 2 * (4 + 7 + 4) * 2 * 2 * 4 * 8  # keys and values, entries, rows, heads, channels, bytes
    cached(model, torch.randint(0, 40, (2, 60)), [50, *[1] * 10], cache)
    assert (cache.nbytes, [layer.buffers[0].data_ptr() for layer in cache.layers]) == (size, addresses)
    assert cache.lengths_B.tolist() == [60, 60]  # counted once per forward pass, not once per layer


@torch.no_grad()
def test_what_does_not_fit_is_refused_and_nothing_is_written():
    model = build((4, None, 4))
    with pytest.raises(ValueError, match=r"^max_len=None: expected an integer >= 1, because layer 1 has no window"):
        Cache(model.config, 1, dtype=torch.float64)
    cache = Cache(model.config, 2, max_len=6, dtype=torch.float64)
    tokens = torch.randint(0, 40, (2, 8))
    cached(model, tokens[:, :4], [4], cache)
    before = [layer.buffers[0].clone() for layer in cache.layers]
    with pytest.raises(ValueError, match=r"^max_len=6: expected at least 7, the tokens of the longest row"):
        model(ModelInputs(tokens[:, 4:7], cache.next_positions(3)), cache=cache)
    with pytest.raises(ValueError, match=r"^positions_BS: expected each row to continue at its length, \[4, 4\]"):
        model(ModelInputs(tokens[:, 4:5], torch.tensor([[4], [3]])), cache=cache)
    with pytest.raises(ValueError, match="padding only after the tokens"):
        model(
            ModelInputs(tokens[:, 4:6], cache.next_positions(2), valid_BS=torch.tensor([[True, True], [False, True]])),
            cache=cache,
        )
    assert all(torch.equal(layer.buffers[0], old) for layer, old in zip(cache.layers, before, strict=True))
    torch.testing.assert_close(
        model(ModelInputs(tokens[:, 4:6], cache.next_positions(2)), cache=cache).logits_BSV,
        whole(model, tokens[:, :6])[:, 4:],
        rtol=0,
        atol=1e-12,
    )
