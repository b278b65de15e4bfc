"""Keys of config.json and params.json with unusual values: the logits are transformers', or the file is refused.

For each key that transformers or an older file has, and each value, transformers builds the model of the changed file
with the same weights. Mixwright must compute the same logits, or raise an error of one line.
"""

import itertools
import json
import random
from collections import Counter

import pytest
import torch

from common.errors import ModelError
from moe.model import Transformer
from tests.foreign import load_model, logits_of, random_tokens, reference_model
from training.formats import huggingface as hf
from training.formats import mistral
from training.formats.families import FAMILIES

CASES = {
    "llama": "llama-gqa-tied",
    "mistral": "mistral-window",
    "mixtral": "mixtral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "olmoe": "olmoe",
    "qwen2_moe": "qwen2-moe",
    "qwen3_moe": "qwen3-moe",
}
QUICK = ("llama", "mistral", "mixtral", "qwen3_moe")
"""Families of the quick tests. The slow tests take all."""
VALUES = (True, False, None, 0, 1, 2, -1, 0.5, "x", "", [], {}, ["x"], {"a": 1})
ROPE = (
    {"rope_type": "linear", "factor": 4.0},
    {"type": "linear", "factor": 4.0, "rope_theta": 1e4},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 8},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
    {"rope_type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [2.0, 3.0], "factor": 4.0},
    {"rope_type": "default"},
    {"rope_type": "default", "rope_theta": 5e5},
    {"rope_theta": 50.0},
    {"rope_theta": None},
    {"rope_type": None, "rope_theta": 50.0},
    {"rope_type": "default", "type": "linear"},
    {"rope_type": "linear", "type": "default", "factor": 2.0},
    {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 50.0},
    {"rope_theta": 50.0, "factor": None},
    {"full_attention": {"rope_theta": 50.0}, "sliding_attention": {"rope_theta": 60.0}},
    {},
    None,
)
MORE_VALUES = {
    "rope_parameters": ROPE,
    "rope_scaling": ROPE,
    "rope_theta": (50.0, 100, "50"),
    "sliding_window": (4, 5, 1000, 4.0, [4, None]),
    "hidden_act": ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "SiLU"),
    "head_dim": (4, 8),
    "num_attention_heads": (6, 3),
    "num_key_value_heads": (6, 3),
    "num_local_experts": (4, 8),
    "num_experts": (4, 8),
    "use_sliding_window": (True, False, None),
    "max_window_layers": (0, 1, 2),
    "mlp_only_layers": ([0], [1], [0, 1], [-1], [7], [0.5]),
    "decoder_sparse_step": (1, 2, 3),
    "norm_topk_prob": (True, False),
    "shared_expert_intermediate_size": (7, 8),
    "qkv_bias": (True, False),
    "clip_qkv": (None, 8.0),
    "layer_types": (
        [["x"]],
        ["full_attention"] * 2,
        ["sliding_attention"] * 2,
        ["full_attention", "sliding_attention"],
    ),
    "per_layer_config": ({"0": {"rms_norm_eps": 0.1}}, {"1": {"sliding_window": 3}}),
    "quantization_config": ({"quant_method": "fp8"},),
    "architectures": (["LlamaForCausalLM"], ["MixtralForCausalLM"], ["LlamaModel"]),
}
_OTHER_KEYS = """
rope_scaling rope_theta torch_dtype num_experts num_local_experts num_experts_per_tok partial_rotary_factor layer_types
mlp_layer_types use_sliding_window max_window_layers attention_bias mlp_bias quantization_config is_causal is_decoder
add_cross_attention tie_encoder_decoder pruned_heads use_bfloat16 torchscript output_attentions cache_implementation
attention_chunk_size per_layer_config text_config transformers_weights fusion_config num_labels tie_last_hidden_states
logit_scale final_logit_softcapping attn_logit_softcapping residual_multiplier qk_norm clip_qkv norm_topk_prob
num_shared_experts first_k_dense_replace scoring_func mlp_only_layers decoder_sparse_step max_window_layers qkv_bias
moe_intermediate_size shared_expert_intermediate_size routed_scaling_factor n_group
rope_interleaved hidden_activation temperature
original_max_position_embeddings max_length sliding_window output_router_logits router_jitter_noise pretraining_tp
"""
OTHER_KEYS = _OTHER_KEYS.split()
"""Keys of other versions and architectures, and keys that transformers reads from any configuration."""


class Fuzz:
    """The model of one family, and its logits in transformers and in Mixwright after a change of its configuration."""

    def __init__(self, family, directory):
        reference = reference_model(CASES[family])
        reference.save_pretrained(directory)
        self.family, self.weights, self.tokens = family, reference.state_dict(), random_tokens(12)
        self.plain = json.loads((directory / "config.json").read_text())
        self.fields = list(type(reference.config).__dataclass_fields__)
        self.ours = load_model(directory)
        self.cache = {}

    def changes(self):
        """Return the changed keys of each case. A value that is `...` means that the key is deleted."""
        keys = dict.fromkeys([*self.plain, *self.fields, *OTHER_KEYS])
        changes = [{key: value} for key in keys for value in (*MORE_VALUES.get(key, ()), *VALUES)]
        changes += [{key: ...} for key in self.plain]
        changes += [{"rope_parameters": a, "rope_scaling": b} for a in ROPE[::2] for b in ROPE]
        changes += [{key: a, "rope_theta": 77.0} for a in ROPE for key in ("rope_parameters", "rope_scaling")]
        changes += [{"rope_parameters": ..., "rope_scaling": a, "rope_theta": 77.0} for a in ROPE]
        changes += [{"num_local_experts": a, "num_experts": b} for a in (4, 5, None, ...) for b in (4, 5, None)]
        return changes

    def outcome(self, change):
        """Return what happens to the configuration with this change. Fails if the logits are not transformers'."""
        raw = {key: value for key, value in (self.plain | change).items() if value is not ...}
        try:
            configs = hf.read_config(raw, "config.json")
        except ModelError as error:
            assert str(error).isprintable(), change
            return "refused"
        theirs = self.reference_logits(raw)
        if theirs is None:
            return "refused by transformers only"
        logits = self.our_logits(*configs)
        if logits is None:
            return "other tensors"
        torch.testing.assert_close(logits, theirs, rtol=0, atol=1e-4, msg=lambda text: f"{change}: {text}")
        return "equal"

    def reference_logits(self, raw):
        import transformers

        try:
            config = transformers.AutoConfig.for_model(**raw)
            eager = {"experts_implementation": "eager"} if FAMILIES[self.family].moe else {}
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation="eager", **eager
            )
            model.load_state_dict(self.weights)
            with torch.no_grad():
                return model.eval()(self.tokens).logits
        except Exception:  # transformers raises exceptions of many types.
            return None

    def our_logits(self, config, router):
        if (config, router) not in self.cache:
            model = Transformer(config, router, torch.float32)
            try:
                model.load_state_dict(self.ours.state_dict())
            except RuntimeError:  # Other names or shapes: the reader refuses such a directory.
                return None
            with torch.no_grad():
                self.cache[config, router] = logits_of(model, self.tokens)
        return self.cache[config, router]


def run_fuzz(family, directory, number):
    fuzz = Fuzz(family, directory)
    changes = fuzz.changes()
    chosen = changes if number is None else random.Random(0).sample(changes, number)
    return Counter(fuzz.outcome(change) for change in chosen)


@pytest.mark.parametrize("family", QUICK)
def test_some_changed_configurations_are_computed_as_in_transformers_or_refused(family, tmp_path):
    counts = run_fuzz(family, tmp_path, 60)
    assert min(counts["equal"], counts["refused"]) > 10, counts


@pytest.mark.slow
@pytest.mark.parametrize("family", CASES)
def test_all_changed_configurations_are_computed_as_in_transformers_or_refused(family, tmp_path):
    counts = run_fuzz(family, tmp_path, None)
    assert sum(counts.values()) > 1500 and min(counts["equal"], counts["refused"]) > 300, counts


@pytest.mark.parametrize("family", CASES)
def test_every_key_that_transformers_saves_is_accepted(family, tmp_path):
    import transformers

    fuzz = Fuzz(family, tmp_path)
    full = transformers.AutoConfig.for_model(**fuzz.plain).to_dict() | {"architectures": fuzz.plain["architectures"]}
    assert len(full) > len(fuzz.plain)
    assert fuzz.outcome(json.loads(json.dumps(full, default=str))) == "equal"


PARAMS = {"dim": 8, "n_layers": 2, "head_dim": 4, "hidden_dim": 12, "n_heads": 2, "n_kv_heads": 1, "norm_eps": 1e-5,
          "vocab_size": 9}  # fmt: skip
_MISTRAL_KEYS = """
yarn llama_4_scaling quantization lora vision_encoder multimodal causal attn_bias ffn_bias use_biases _sliding_window
q_lora_rank qk_nope_head_dim activation rope_scaling moe sliding_window softcap model_type qk_norm
"""
MISTRAL_KEYS = _MISTRAL_KEYS.split()


def test_a_key_of_params_json_is_read_or_refused():
    plain = mistral.read_params(PARAMS, "params.json")
    for key, value in itertools.product(MISTRAL_KEYS, [*VALUES, [4, None], {"factor": 2.0}]):
        try:
            read = mistral.read_params(PARAMS | {key: value}, "params.json")
        except ModelError as error:
            assert str(error).startswith(f"params.json: {key}") and str(error).isprintable(), (key, value)
        else:
            assert (value is None and read == plain) or (key == "sliding_window" and read[0].sliding_window == value)
