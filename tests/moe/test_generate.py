"""Generation with the cache equals a loop that runs the whole sequence again for every token."""

import dataclasses

import pytest
import torch

from moe.config import ModelConfig, RouterConfig
from moe.generation.generate import generate
from moe.generation.sampling import Sampling, pick
from moe.init import init_parameters
from moe.model import ModelInputs, Transformer

SMALL = ModelConfig(
    dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, hidden_dim=12, num_experts=4, top_k=2,
    vocab_size=40, init_std=0.4,
)  # fmt: skip
PROMPTS = [[1, 2, 3], [7], [5, 6, 7, 8, 9, 10, 11, 12, 13], [3, 3]]


def build(window=None, **router):
    model = Transformer(dataclasses.replace(SMALL, sliding_window=window), RouterConfig(**router), torch.float64)
    model = model.double()
    init_parameters(model, 0)
    return model


@torch.no_grad()
def greedy_loop(model, prompt, max_tokens):
    tokens = list(prompt)
    for _ in range(max_tokens):
        positions = torch.arange(len(tokens)).unsqueeze(0)
        tokens.append(int(model(ModelInputs(torch.tensor([tokens]), positions)).logits_BSV[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("window", [None, 1, 4, (3, None)])
@pytest.mark.parametrize("chunk", [1, 3, 512])
def test_greedy_equals_full_recomputation_for_every_prompt_of_a_batch(window, chunk):
    model = build(window)
    got = generate(model, PROMPTS, max_tokens=20, prefill_chunk=chunk)
    assert got == [greedy_loop(model, prompt, 20) for prompt in PROMPTS]


def test_a_row_ends_by_itself_and_the_others_go_on():
    model = build(4)
    whole = generate(model, PROMPTS, max_tokens=12)
    seen: list[tuple[int, int]] = []

    def on_token(row, token):
        seen.append((row, token))
        return row == 1 and len([r for r, _ in seen if r == 1]) == 5

    stop = whole[2][3]
    got = generate(model, PROMPTS, max_tokens=12, stop={stop}, on_token=on_token)
    for row, tokens in enumerate(got):
        until = whole[row][: whole[row].index(stop)] if stop in whole[row] else whole[row]
        assert tokens == (until[:5] if row == 1 else until)
        assert [token for r, token in seen if r == row] == tokens
    assert generate(model, PROMPTS[:1], max_tokens=0) == [[]]


def test_drawn_text_depends_on_seed_and_row_not_on_the_rest_of_the_batch():
    model = build(4)
    sampling = Sampling(temperature=1.0, top_k=30, top_p=0.95, seed=3)
    together = generate(model, PROMPTS, max_tokens=10, sampling=sampling)
    assert generate(model, PROMPTS[:1], max_tokens=10, sampling=sampling) == together[:1]
    assert generate(model, [PROMPTS[3], [9], *PROMPTS[2:]], max_tokens=10, sampling=sampling)[2:] == together[2:]
    same = generate(model, [[1], [1]], max_tokens=10, sampling=sampling)
    assert same[0] != same[1]
    other = dataclasses.replace(sampling, seed=4)
    assert generate(model, PROMPTS, max_tokens=10, sampling=other) != together


@pytest.mark.parametrize(
    "router",
    [
        {"capacity_factor": 0.1},
        {"jitter": 0.9},
        {"kind": "expert_choice", "allow_noncausal": True, "balance_coef": 0.0},
    ],
)
def test_generation_is_dropless_causal_and_without_noise_and_leaves_the_routers_as_they_were(router):
    model, plain = build(**router).train(), build(normalize=router.get("kind") is None)
    assert generate(model, PROMPTS, max_tokens=6) == generate(plain, PROMPTS, max_tokens=6)
    after = model.layers[0].ffn.router
    assert after.capacity_factor == router.get("capacity_factor") and not after.generating
    assert model.training and after.training


def distribution(logits, sampling, draws=20_000):
    """Probability of each token, measured at evenly spaced quantiles."""
    quantiles = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    chosen = pick(logits.expand(draws, -1), sampling, quantiles)
    return torch.bincount(chosen, minlength=logits.shape[-1]) / draws


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(1.0), [0, 1, 2, 3, 4]),
        (Sampling(0.5), [0, 1, 2, 3, 4]),
        (Sampling(2.0, top_k=2), [1, 3]),
        (Sampling(1.0, top_k=9), [0, 1, 2, 3, 4]),
        (Sampling(1.0, top_p=0.39), [3]),
        (Sampling(1.0, top_p=0.41), [1, 3]),
        (Sampling(1.0, top_p=1e-9), [3]),
        (Sampling(1.0, top_k=3, top_p=0.8), [1, 3]),  # the first two are 82 % of 0.4 + 0.3 + 0.15
        (Sampling(1e-300), [3]),
    ],
)
def test_temperature_top_k_and_nucleus_by_hand(sampling, kept):
    probs = torch.tensor([0.1, 0.3, 0.05, 0.4, 0.15], dtype=torch.float64)
    expected = torch.zeros(5, dtype=torch.float64)
    expected[kept] = probs[kept] ** (1 / sampling.temperature) if len(kept) > 1 else 1.0
    got = distribution(probs.log(), sampling)
    torch.testing.assert_close(got.double(), expected / expected.sum(), rtol=0, atol=1e-3)


def test_equal_logits_go_by_index_and_no_draw_leaves_the_vocabulary():
    flat = torch.zeros(1, 4)
    draws = [0.0, 0.24, 0.26, 0.51, 0.76, 1 - 2**-53]
    got = [int(pick(flat, Sampling(1.0), torch.tensor([u], dtype=torch.float64))) for u in draws]
    assert got == [0, 0, 1, 2, 3, 3]
    assert int(pick(flat, Sampling(1.0, top_k=2), torch.tensor([1 - 2**-53], dtype=torch.float64))) == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"top_p": 1.5}, r"top_p=1.5: expected a number in \(0, 1\]"),
        ({"top_p": 0.0}, r"top_p=0.0: expected a number in \(0, 1\]"),
        ({"top_k": 0}, "top_k=0: expected an integer >= 1"),
        ({"temperature": -0.1}, "temperature=-0.1: expected a number >= 0"),
        ({"seed": -1}, "seed=-1: expected an integer from 0"),
    ],
)
def test_sampling_validates_itself(arguments, line):
    with pytest.raises(ValueError, match=f"^{line}"):
        Sampling(**arguments)


def test_bad_prompts():
    model = build()
    for prompts, line in (
        ([], r"prompts=\[\]: expected at least one prompt"),
        ([[1], []], r"prompts\[1\]=\[\]: expected at least one token"),
        ([[1], [40]], r"prompts\[1\]: expected token ids from 0 to 39, found 40"),
    ):
        with pytest.raises(ValueError, match=f"^{line}"):
            generate(model, prompts, max_tokens=1)
