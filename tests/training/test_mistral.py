"""Mistral's own format, compared with a forward pass that is written here and shares no code with Mixwright."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.foreign import MISTRAL_CASES, load_model, logits_of, random_tokens, save_reference
from training.formats.export import export_model
from training.formats.reader import open_model


def load_all(directory):
    return {name: x for file in directory.glob("*.safetensors") for name, x in load_file(file).items()}


def mistral_forward(directory, tokens_S):
    """Return the logits [S, V] of a model in Mistral's format. Neighbouring rows of wq and wk are complex numbers."""
    params, w = json.loads((directory / "params.json").read_text()), load_all(directory)
    length, channels, groups = len(tokens_S), params["head_dim"], params["n_heads"] // params["n_kv_heads"]
    frequencies = params["rope_theta"] ** -(torch.arange(0, channels, 2) / channels)
    rotation = torch.polar(torch.ones(()), torch.outer(torch.arange(length), frequencies))
    distance = torch.arange(length).unsqueeze(1) - torch.arange(length)
    visible = (distance >= 0) & (distance < params.get("sliding_window", length))

    def norm(x, weight):
        return x * (x.square().mean(-1, keepdim=True) + params["norm_eps"]).rsqrt() * weight

    def rotated(x):  # [S, heads, C]
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * rotation.unsqueeze(1)).flatten(-2)

    def swiglu(x, prefix):
        gate, up = (x @ w[f"{prefix}.w{i}.weight"].T for i in (1, 3))
        return (torch.nn.functional.silu(gate) * up) @ w[f"{prefix}.w2.weight"].T

    h = w["tok_embeddings.weight"][tokens_S]
    for n in range(params["n_layers"]):
        layer = f"layers.{n}"
        x = norm(h, w[f"{layer}.attention_norm.weight"])
        q, k, v = (
            (x @ w[f"{layer}.attention.w{name}.weight"].T).view(length, -1, channels) for name in ("q", "k", "v")
        )
        q, k, v = rotated(q), rotated(k).repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = torch.einsum("qhc,khc->hqk", q, k) / channels**0.5
        mixed = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        mixed = torch.einsum("hqk,khc->qhc", mixed, v).flatten(1)
        h = h + mixed @ w[f"{layer}.attention.wo.weight"].T
        x = norm(h, w[f"{layer}.ffn_norm.weight"])
        if "moe" not in params:
            h = h + swiglu(x, f"{layer}.feed_forward")
            continue
        best, chosen = (x @ w[f"{layer}.feed_forward.gate.weight"].T).topk(params["moe"]["num_experts_per_tok"])
        experts = f"{layer}.feed_forward.experts"
        rows = []
        for t in range(length):
            weighted = zip(best[t].softmax(-1), chosen[t].tolist(), strict=True)
            rows.append(sum(p * swiglu(x[t], f"{experts}.{e}") for p, e in weighted))
        h = h + torch.stack(rows)
    head = w.get("output.weight", w["tok_embeddings.weight"])
    return norm(h, w["norm.weight"]) @ head.T


@pytest.mark.parametrize("case", MISTRAL_CASES)
def test_an_exported_model_has_the_logits_of_the_independent_forward_pass(case, tmp_path):
    reference = save_reference(case, tmp_path / "reference")
    reader = open_model(tmp_path / "reference")
    export_model(reader, tmp_path / "mistral", form="mistral", dtype="fp32", shard_bytes=15_000, positions=64)
    tokens = random_tokens(11, rows=1)
    expected = reference(tokens).logits
    torch.testing.assert_close(mistral_forward(tmp_path / "mistral", tokens[0]), expected[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(logits_of(load_model(tmp_path / "mistral"), tokens), expected, rtol=0, atol=1e-5)
    wq = load_all(tmp_path / "mistral")["layers.0.attention.wq.weight"]
    assert not torch.equal(wq, load_all(tmp_path / "reference")["model.layers.0.self_attn.q_proj.weight"])
