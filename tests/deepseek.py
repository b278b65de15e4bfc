"""DeepSeekMoE as it is released, with random weights, and its forward pass as a loop in fp64."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file

from tests.foreign import VOCAB

CONFIG: dict[str, Any] = {
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


def released_tensors(config: dict[str, Any]) -> dict[str, torch.Tensor]:
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
    if config["attention_bias"]:
        projections = [(name, shape) for name, shape in shapes.items() if ".self_attn." in name]
        shapes |= {f"{name}.bias": shape[:1] for name, shape in projections}
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        drawn = torch.randn(shape, generator=generator)
        is_norm = len(shape) == 1 and not name.endswith(".bias")
        tensors[name if name.endswith(".bias") else f"{name}.weight"] = 1 + 0.2 * drawn if is_norm else 0.25 * drawn
    return tensors


def write_released(
    directory: Path, changes: dict[str, Any], parts: int = 1
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
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


def loop_logits(config: dict[str, Any], weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Compute the logits [B, S, V] one token and one expert at a time, from the weights under their released names."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    width = config["hidden_size"] // heads

    def norm(x, name):
        return x / (x.square().mean() + config["rms_norm_eps"]).sqrt() * weights[f"{name}.weight"]

    def network(x, name):
        gate, up = (weights[f"{name}.{part}_proj.weight"] @ x for part in ("gate", "up"))
        return weights[f"{name}.down_proj.weight"] @ (gate / (1 + (-gate).exp()) * up)

    def rotate(x, position):
        factor = (config.get("rope_scaling") or {"factor": 1})["factor"]
        frequencies = config["rope_theta"] ** (-torch.arange(0, width, 2, dtype=x.dtype) / width) / factor
        turned = torch.complex(*x.chunk(2)) * torch.polar(torch.ones_like(frequencies), position * frequencies)
        return torch.cat((turned.real, turned.imag))

    def project(x, name, position):
        parts = (weights[f"{name}.weight"] @ x + weights.get(f"{name}.bias", 0)).split(width)
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
                o_proj = f"{block}.self_attn.o_proj"
                xs[i] = xs[i] + weights[f"{o_proj}.weight"] @ torch.cat(out) + weights.get(f"{o_proj}.bias", 0)
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
