"""DeepSeekMoE from its released files, which transformers reads only with remote code, compared with a loop in fp64."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import ModelError
from moe.generation.generate import generate
from tests.foreign import VOCAB, assert_trains_as, load_model, random_tokens
from training.formats import huggingface as hf
from training.formats.export import export_model, import_model
from training.formats.huggingface import FAMILIES
from training.formats.reader import open_model

CONFIG = {
    "architectures": ["DeepseekForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 20,
    "initializer_range": 0.02,
    "intermediate_size": 27,
    "max_position_embeddings": 64,
    "model_type": "deepseek",
    "moe_intermediate_size": 7,
    "moe_layer_freq": 1,
    "n_routed_experts": 9,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 5,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 5,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0",
    "use_cache": True,
    "vocab_size": VOCAB,
}
"""The keys of the released `config.json`, with odd sizes."""
CHANGES = [
    {},
    pytest.param({"norm_topk_prob": True, "num_key_value_heads": 1}, marks=pytest.mark.slow),
    pytest.param({"n_shared_experts": None, "first_k_dense_replace": 0}, marks=pytest.mark.slow),
]


def released_tensors(config):
    """Return random weights under the names of the released files."""
    dim, heads, width = config["hidden_size"], config["num_attention_heads"], config["moe_intermediate_size"]
    head_dim = dim // heads
    shapes = {"model.embed_tokens": (VOCAB, dim), "model.norm": (dim,), "lm_head": (VOCAB, dim)}

    def add_network(name, hidden):
        shapes.update({f"{name}.{part}_proj": (hidden, dim) for part in ("gate", "up")})
        shapes[f"{name}.down_proj"] = (dim, hidden)

    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.{norm}_layernorm": (dim,) for norm in ("input", "post_attention")}
        shapes |= {f"{block}.self_attn.{part}_proj": (dim, dim) for part in "qo"}
        shapes |= {f"{block}.self_attn.{part}_proj": (config["num_key_value_heads"] * head_dim, dim) for part in "kv"}
        if layer < config["first_k_dense_replace"]:
            add_network(f"{block}.mlp", config["intermediate_size"])
            continue
        shapes[f"{block}.mlp.gate"] = (config["n_routed_experts"], dim)
        for expert in range(config["n_routed_experts"]):
            add_network(f"{block}.mlp.experts.{expert}", width)
        if config["n_shared_experts"]:
            add_network(f"{block}.mlp.shared_experts", config["n_shared_experts"] * width)
    generator = torch.Generator().manual_seed(0)
    return {
        f"{name}.weight": torch.randn(shape, generator=generator) * (0.2 if len(shape) == 1 else 0.25)
        + (len(shape) == 1)
        for name, shape in shapes.items()
    }


def write_released(directory, changes, parts=1):
    """Write a directory as it is released, in one file or in several, and return its configuration and tensors."""
    config = CONFIG | changes
    tensors = released_tensors(config)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    names = (
        [f"model-{i + 1:05}-of-{parts:05}.safetensors" for i in range(parts)] if parts > 1 else ["model.safetensors"]
    )
    for i, file in enumerate(names):
        save_file(dict(list(tensors.items())[i::parts]), directory / file)
    if parts > 1:
        places = {name: names[i % parts] for i, name in enumerate(tensors)}
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return config, tensors


def loop_logits(config, weights, tokens):
    """Compute the logits [B, S, V] one token and one expert at a time, from the weights under their released names."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    width = config["hidden_size"] // heads

    def norm(x, name):
        return x / (x.square().mean() + config["rms_norm_eps"]).sqrt() * weights[f"{name}.weight"]

    def network(x, name):
        gate, up = (weights[f"{name}.{part}_proj.weight"] @ x for part in ("gate", "up"))
        return weights[f"{name}.down_proj.weight"] @ (gate / (1 + (-gate).exp()) * up)

    def rotate(x, position):
        frequencies = config["rope_theta"] ** (-torch.arange(0, width, 2, dtype=x.dtype) / width)
        turned = torch.complex(*x.chunk(2)) * torch.polar(torch.ones_like(frequencies), position * frequencies)
        return torch.cat((turned.real, turned.imag))

    def project(x, name, position):
        parts = (weights[f"{name}.weight"] @ x).split(width)
        return [rotate(part, position) for part in parts] if position is not None else list(parts)

    def experts(x, name):
        probs = (weights[f"{name}.gate.weight"] @ x).softmax(dim=0)
        chosen = sorted(range(len(probs)), key=lambda e: -probs[e].item())[: config["num_experts_per_tok"]]
        total = sum(probs[e] for e in chosen) if config["norm_topk_prob"] else 1
        y = sum(probs[e] / total * network(x, f"{name}.experts.{e}") for e in chosen)
        return y + network(x, f"{name}.shared_experts") if config["n_shared_experts"] else y

    def row_logits(row):
        xs = [weights["model.embed_tokens.weight"][token] for token in row]
        for layer in range(config["num_hidden_layers"]):
            block = f"model.layers.{layer}"
            normed = [norm(x, f"{block}.input_layernorm") for x in xs]
            q, k, v = (
                [project(x, f"{block}.self_attn.{part}_proj", i if part != "v" else None) for i, x in enumerate(normed)]
                for part in "qkv"
            )
            for i in range(len(xs)):
                out = []
                for head in range(heads):
                    group = head * groups // heads
                    scores = torch.stack([q[i][head] @ k[j][group] for j in range(i + 1)]) / width**0.5
                    out.append(sum(p * v[j][group] for j, p in enumerate(scores.softmax(dim=0))))
                xs[i] = xs[i] + weights[f"{block}.self_attn.o_proj.weight"] @ torch.cat(out)
            for i, x in enumerate(xs):
                normed_x = norm(x, f"{block}.post_attention_layernorm")
                dense = layer < config["first_k_dense_replace"]
                xs[i] = x + (network if dense else experts)(normed_x, f"{block}.mlp")
        return torch.stack([weights["lm_head.weight"] @ norm(x, "model.norm") for x in xs])

    return torch.stack([row_logits(row) for row in tokens.tolist()])


class Loop:
    """The loop as a model: called with tokens, it returns an object with `logits`."""

    def __init__(self, config, tensors):
        self.config = config
        self.weights = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}

    def __call__(self, tokens):
        # Experts without tokens get a gradient of zero, because AdamW's weight decay passes over a weight without one.
        zero = sum(weight.sum() for weight in self.weights.values()) * 0
        return SimpleNamespace(logits=loop_logits(self.config, self.weights, tokens) + zero)

    def named_parameters(self):
        return self.weights.items()

    def parameters(self):
        return self.weights.values()


@pytest.mark.parametrize("changes", CHANGES)
def test_logits_gradients_and_ten_steps_equal_a_loop_in_fp64(changes, tmp_path):
    loop = Loop(*write_released(tmp_path / "released", changes))
    assert_trains_as(loop, load_model(tmp_path / "released"), FAMILIES["deepseek"].per_expert, length=6)


def test_generated_tokens_are_those_of_the_loop(tmp_path):
    config, tensors = write_released(tmp_path / "released", {"num_key_value_heads": 1})
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    prompt = random_tokens(5, rows=1)[0].tolist()
    expected = list(prompt)
    for _ in range(8):
        expected.append(int(loop_logits(config, weights, torch.tensor([expected]))[0, -1].argmax()))
    assert generate(load_model(tmp_path / "released"), [prompt], max_tokens=8) == [expected[5:]]


def test_import_and_export_keep_every_bit_and_every_key_that_has_a_meaning(tmp_path):
    config, tensors = write_released(tmp_path / "released", {"torch_dtype": "float32"}, parts=3)
    reader = open_model(tmp_path / "released")
    assert (reader.model.num_experts, reader.model.top_k, reader.model.num_shared_experts) == (9, 4, 2)
    assert (reader.model.first_k_dense, reader.model.moe_every, reader.router.normalize) == (1, 1, False)
    import_model(reader, tmp_path / "imported", "fp32", 4_000)
    for shard_bytes in (10**9, 5_000):
        out = tmp_path / f"exported-{shard_bytes}"
        export_model(
            open_model(tmp_path / "imported"), out, form="hf", dtype="fp32", shard_bytes=shard_bytes, positions=64
        )
        files = sorted(out.glob("*.safetensors"))
        assert (len(files) > 3) == (shard_bytes < 10**9)
        exported = {name: tensor for file in files for name, tensor in load_file(file).items()}
        assert exported.keys() == tensors.keys()
        assert all(torch.equal(exported[name], tensors[name]) for name in tensors)
        raw = json.loads((out / "config.json").read_text())
        training_only = {"aux_loss_alpha", "seq_aux", "auto_map", "transformers_version", "pretraining_tp"}
        kept = config.keys() - training_only - {"bos_token_id", "eos_token_id", "rope_scaling", "attention_bias"}
        assert {key: raw[key] for key in kept} == {key: config[key] for key in kept}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scoring_func": "sigmoid"}, "c: scoring_func=sigmoid: expected softmax"),
        ({"norm_topk_prob": None}, "c: norm_topk_prob=null: expected true or false"),
        ({"n_routed_experts": None}, "c: n_routed_experts=null: expected an integer >= 1"),
        ({"num_experts_per_tok": 1, "norm_topk_prob": True}, "c: num_experts_per_tok=1: expected at least 2"),
        ({"moe_layer_freq": 2, "first_k_dense_replace": 0}, "c: moe_layer_freq=2: expected that, after"),
        ({"moe_layer_freq": 2**40, "num_hidden_layers": 2**41}, "c: num_hidden_layers=2199023255552: expected at most"),
        ({"first_k_dense_replace": 3}, "c: moe_layer_freq=1: expected that, after"),
        ({"first_k_dense_replace": -1}, "c: first_k_dense_replace=-1: expected an integer >= 0"),
        ({"head_dim": 8}, "c: head_dim=8: expected 4, or no such key"),
        ({"attention_bias": True}, "c: attention_bias=true: expected false"),
        ({"routed_scaling_factor": 2.0}, "c: routed_scaling_factor=2.0: expected a known key"),
        ({"topk_method": "group_limited_greedy"}, "c: topk_method=group_limited_greedy: expected a known key"),
        ({"sliding_window": 4}, "c: sliding_window=4: expected null in a DeepseekForCausalLM"),
        ({"model_type": "deepseek_next"}, "c: model_type=deepseek_next: expected one of Llama"),
    ],
)
def test_a_key_that_changes_what_is_computed_is_an_error_that_names_it(changes, message):
    with pytest.raises(ModelError) as caught:
        hf.read_config(CONFIG | {"num_hidden_layers": 3} | changes, "c")
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_the_layers_of_moe_layer_freq():
    # Layers 2, 4 and 6 of 7 are MoE layers: of those after the first, every second one.
    changes = {"first_k_dense_replace": 1, "moe_layer_freq": 2, "num_hidden_layers": 7}
    model, router = hf.read_config(CONFIG | changes, "c")
    assert [layer for layer in range(7) if model.is_moe_layer(layer)] == [2, 4, 6]
    raw = hf.write_config(model, router, "float32", 64)
    assert hf.read_config(raw, "c") == (model, router)
    with pytest.raises(ModelError, match=r"^model.moe_every=2: expected 1, or a divisor of 3, the number of the first"):
        hf.write_config(dataclasses.replace(model, first_k_dense=2), router, "float32", 64)


def test_remote_code_is_refused_if_the_family_is_not_known():
    raw = CONFIG | {"model_type": "other", "architectures": ["OtherForCausalLM"]}
    with pytest.raises(ModelError, match=r"^c: model_type=other: expected one of .*; the code that auto_map names is"):
        hf.read_config(raw, "c")
