"""The parts of a model that released families use, against transformers' models with the same random weights."""

import re

import pytest
import torch
from torch.nn import functional as F

from common.errors import ConfigError
from common.strict import from_dict, to_dict
from moe.config import ModelConfig, RopeScaling, RouterConfig
from moe.model import ModelInputs, Transformer

VOCAB = 37
NAMES = {
    "model.embed_tokens.weight": "embedding",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn": "attention",
    "q_proj": "wq",
    "k_proj": "wk",
    "v_proj": "wv",
    "o_proj": "wo",
    "mlp.gate.": "ffn.router.",
    "shared_expert.": "shared.",
    "shared_expert_gate": "shared_gate",
    "mlp.": "ffn.",
    "model.layers": "layers",
    "down_proj": "w_down",
    "gate_proj": "w_gate",
    "up_proj": "w_up",
}
"""Parts of names in transformers -> in Mixwright, in the order in which they are replaced."""
COMMON = {
    "vocab_size": VOCAB, "num_hidden_layers": 2, "attn_implementation": "eager", "experts_implementation": "eager",
    "pad_token_id": None,  # With one, the embedding of that id has no gradient.
}  # fmt: skip
FAMILIES = {
    "olmoe": (
        "Olmoe",
        {
            "hidden_size": 20, "intermediate_size": 7, "num_attention_heads": 5, "num_key_value_heads": 5,
            "num_experts": 6, "num_experts_per_tok": 3, "rms_norm_eps": 1e-5,
        },
        ModelConfig(
            dim=20, num_layers=2, num_heads=5, num_kv_heads=5, head_dim=4, hidden_dim=7, num_experts=6, top_k=3,
            vocab_size=VOCAB, rope_theta=1e4, norm_eps=1e-5, qk_norm="width",
        ),
        RouterConfig(normalize=False),
    ),
    "olmoe-grouped-biases-yarn": (
        "Olmoe",
        {
            "hidden_size": 24, "intermediate_size": 9, "num_attention_heads": 6, "num_key_value_heads": 2,
            "num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": True, "attention_bias": True,
            "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "beta_fast": 4.0,
                                "original_max_position_embeddings": 16},
        },
        ModelConfig(
            dim=24, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=4, hidden_dim=9, num_experts=5, top_k=2,
            vocab_size=VOCAB, rope_theta=1e4, norm_eps=1e-5, qk_norm="width", attention_bias="all",
            rope_scaling=RopeScaling("yarn", 4.0, original_positions=16, beta_fast=4.0),
        ),
        RouterConfig(normalize=True),
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "hidden_size": 24, "intermediate_size": 19, "moe_intermediate_size": 7, "num_attention_heads": 6,
            "num_key_value_heads": 3, "num_experts": 6, "num_experts_per_tok": 3, "shared_expert_intermediate_size": 17,
            "mlp_only_layers": [0],
        },
        ModelConfig(
            dim=24, num_layers=2, num_heads=6, num_kv_heads=3, head_dim=4, hidden_dim=19, expert_hidden_dim=7,
            num_experts=6, top_k=3, first_k_dense=1, num_shared_experts=1, shared_hidden_dim=17, shared_gate=True,
            vocab_size=VOCAB, rope_theta=1e4, norm_eps=1e-6, attention_bias="qkv",
        ),
        RouterConfig(normalize=False),
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "hidden_size": 22, "intermediate_size": 19, "moe_intermediate_size": 7, "num_attention_heads": 6,
            "num_key_value_heads": 2, "head_dim": 6, "num_experts": 6, "num_experts_per_tok": 3,
            "norm_topk_prob": True, "decoder_sparse_step": 2,
        },
        ModelConfig(
            dim=22, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=6, hidden_dim=19, expert_hidden_dim=7,
            num_experts=6, top_k=3, moe_every=2, vocab_size=VOCAB, rope_theta=1e4, norm_eps=1e-6, qk_norm="head",
        ),
        RouterConfig(normalize=True),
    ),
}  # fmt: skip
"""Family -> (prefix of transformers' classes, its configuration, ours)."""


def ours_of(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def both_models(family: str):
    """Return transformers' model and ours, in fp32 with the same weights, which are large enough that each matters."""
    transformers = pytest.importorskip("transformers")
    prefix, changes, model, router = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(**COMMON | changes)
    theirs = getattr(transformers, f"{prefix}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            norm = float(name.endswith("norm.weight"))
            parameter.copy_(norm + 0.25 * torch.randn(parameter.shape, generator=generator))
    ours = Transformer(model, router, torch.float32)
    state = {name: value for name, value in translated(theirs.state_dict()).items() if not name.endswith("inv_freq")}
    ours.load_state_dict(state)
    return theirs, ours


def translated(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors of transformers' model under our names. The gate's rows are above those of the up projection."""
    result = {}
    for name, value in tensors.items():
        if name.endswith("gate_up_proj"):
            for part, half in zip(("w_gate", "w_up"), value.chunk(2, dim=1), strict=True):
                result[ours_of(name.replace("gate_up_proj", part))] = half
        else:
            result[ours_of(name)] = value
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_equal_those_of_transformers(family):
    theirs, ours = both_models(family)
    tokens_BS = torch.randint(0, VOCAB, (2, 41), generator=torch.Generator().manual_seed(1))
    expected = theirs(input_ids=tokens_BS).logits
    found = ours(ModelInputs(tokens_BS, torch.arange(41).expand(2, 41))).logits_BSV
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for logits in (expected, found):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten()).backward()
    gradients = translated({name: parameter.grad for name, parameter in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        error = (parameter.grad - gradients.pop(name)).abs().max() / parameter.grad.abs().max()
        assert parameter.grad.abs().max() > 0 and error < 1e-4, (name, error)
    assert not gradients


DENSE = ModelConfig(dim=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, hidden_dim=12)
MOE = to_dict(DENSE) | {"num_experts": 4, "top_k": 2, "num_shared_experts": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_norm": "heads"}, "qk_norm=heads: expected one of head, width or null"),
        ({"attention_bias": "k"}, "attention_bias=k: expected one of qkv, all or null"),
        ({"shared_gate": True}, "shared_gate=true: expected false in a dense model"),
        ({"shared_hidden_dim": 8}, "shared_hidden_dim=8: expected null in a dense model"),
        (MOE | {"shared_hidden_dim": 0}, "shared_hidden_dim=0: expected an integer >= 1, or null"),
        (MOE | {"shared_hidden_dim": 8, "num_shared_experts": 2}, "num_shared_experts=2: expected 1 with shared_"),
        (MOE | {"shared_gate": True, "num_shared_experts": 0}, "shared_gate=true: expected false with num_shared"),
    ],
)
def test_what_the_configuration_refuses(changes, message):
    with pytest.raises(ConfigError, match=f"^model.{re.escape(message)}"):
        from_dict(ModelConfig, to_dict(DENSE) | changes, "model")
