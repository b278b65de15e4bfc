"""`config.json` of Hugging Face's Llama, Mistral and Mixtral, to and from Mixwright's configuration.

Reading accepts the old and the new spelling of each key. A key that is not known here raises an error, because its
value can change what the model computes. The families have different defaults for theta and epsilon, so writing always
gives both.
"""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import ModelError, require
from common.text import one_line, printable, shorten, show_value
from moe.config import ModelConfig, RouterConfig
from training.formats.foreign_tensors import Format

_READ = """
vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
hidden_act rms_norm_eps tie_word_embeddings sliding_window rope_theta rope_parameters rope_scaling num_local_experts
num_experts num_experts_per_tok
"""
_IGNORED = """
architectures model_type transformers_version torch_dtype dtype _name_or_path name_or_path _commit_hash
_attn_implementation _attn_implementation_autoset attn_implementation _flash_attn_2_enabled auto_map use_cache
cache_implementation initializer_range max_position_embeddings max_sequence_length pretraining_tp bos_token_id
eos_token_id pad_token_id sep_token_id cls_token_id decoder_start_token_id unk_token_id output_router_logits
router_aux_loss_coef router_jitter_noise attention_dropout output_attentions output_hidden_states
tie_last_hidden_states return_dict use_return_dict return_dict_in_generate torchscript use_bfloat16
gradient_checkpointing neftune_noise_alpha chunk_size_feed_forward is_decoder id2label label2id num_labels
problem_type task_specific_params tokenizer_class prefix unsloth_version unsloth_fixed is_llama_config
transformers.js_config max_window_layers finetuning_task pruned_heads tie_encoder_decoder cross_attention_hidden_size
max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
num_return_sequences output_scores forced_bos_token_id forced_eos_token_id remove_invalid_values
exponential_decay_length_penalty suppress_tokens begin_suppress_tokens encoder_repetition_penalty epsilon_cutoff
eta_cutoff assistant_confidence_threshold assistant_lookbehind num_assistant_tokens num_assistant_tokens_schedule
target_lookbehind tf_legacy_loss _experts_implementation experts_implementation
"""
READ_KEYS = frozenset(_READ.split())
"""Keys that `read_config` reads."""
IGNORED_KEYS = frozenset(_IGNORED.split())
"""Keys that do not change what a forward pass without dropout computes."""
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1, None),
    "layer_types": (None,),
    "is_causal": (True,),
    "rope_interleaved": (False, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
}
"""Keys that can change what is computed -> the values with which they do not."""

_BLOCK = {
    "embedding": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "layers.N.attention_norm.weight": "model.layers.{n}.input_layernorm.weight",
    "layers.N.attention.wq.weight": "model.layers.{n}.self_attn.q_proj.weight",
    "layers.N.attention.wk.weight": "model.layers.{n}.self_attn.k_proj.weight",
    "layers.N.attention.wv.weight": "model.layers.{n}.self_attn.v_proj.weight",
    "layers.N.attention.wo.weight": "model.layers.{n}.self_attn.o_proj.weight",
    "layers.N.ffn_norm.weight": "model.layers.{n}.post_attention_layernorm.weight",
    "layers.N.ffn.w_gate.weight": "model.layers.{n}.mlp.gate_proj.weight",
    "layers.N.ffn.w_up.weight": "model.layers.{n}.mlp.up_proj.weight",
    "layers.N.ffn.w_down.weight": "model.layers.{n}.mlp.down_proj.weight",
}
_COMMON = {"ignored": r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)", "tied_head": "lm_head.weight"}
PER_EXPERT = Format(
    _BLOCK
    | {
        "layers.N.ffn.router.weight": "model.layers.{n}.block_sparse_moe.gate.weight",
        "layers.N.ffn.experts.w_gate": "model.layers.{n}.block_sparse_moe.experts.{e}.w1.weight",
        "layers.N.ffn.experts.w_down": "model.layers.{n}.block_sparse_moe.experts.{e}.w2.weight",
        "layers.N.ffn.experts.w_up": "model.layers.{n}.block_sparse_moe.experts.{e}.w3.weight",
    },
    **_COMMON,  # type: ignore[arg-type]
)
"""One tensor per expert: the names in files since Mixtral's release. Export writes these names, because other readers,
such as vLLM, expect them."""
FUSED = Format(
    _BLOCK
    | {
        "layers.N.ffn.router.weight": "model.layers.{n}.mlp.gate.weight",
        "layers.N.ffn.experts.w_gate": "model.layers.{n}.mlp.experts.gate_up_proj",
        "layers.N.ffn.experts.w_up": "model.layers.{n}.mlp.experts.gate_up_proj",
        "layers.N.ffn.experts.w_down": "model.layers.{n}.mlp.experts.down_proj",
    },
    parts={"layers.N.ffn.experts.w_gate": (0, 2), "layers.N.ffn.experts.w_up": (1, 2)},
    **_COMMON,  # type: ignore[arg-type]
)
"""Experts stacked, with the gate's rows before the up projection's: the names in transformers 5's modules. Some files
have them too."""
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ACTIVATIONS: dict[str, str] = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}
"""Hugging Face's activation of the gate -> Mixwright's kind of feed-forward network."""


def detect_format(names: Iterable[str]) -> Format:
    """Return the format, `FUSED` or `PER_EXPERT`, that a file with these tensor names has."""
    return FUSED if any(name.endswith(".mlp.experts.gate_up_proj") for name in names) else PER_EXPERT


@dataclass(frozen=True)
class Family:
    """One architecture, and its defaults (those of transformers 5) for keys that a file does not have."""

    architecture: str
    rope_theta: float
    norm_eps: float
    num_kv_heads: int | None
    """None: the number of query heads. A file whose value is null means that number in every family."""
    window: int | None
    windowed: bool
    """Whether the architecture has the key `sliding_window`."""
    moe: bool


FAMILIES = {
    "llama": Family("LlamaForCausalLM", 1e4, 1e-6, None, None, windowed=False, moe=False),
    "mistral": Family("MistralForCausalLM", 1e4, 1e-6, 8, 4096, windowed=True, moe=False),
    "mixtral": Family("MixtralForCausalLM", 1e6, 1e-5, 8, None, windowed=True, moe=True),
}


def read_config(raw: Mapping[str, Any], file: Path) -> tuple[ModelConfig, RouterConfig]:
    """Convert `config.json` to Mixwright's configuration.

    Args:
        raw: the parsed content of the file.
        file: its path, for messages.

    Raises:
        ModelError: the architecture is unknown, or Mixwright cannot compute the model.
    """
    model_type = raw.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    architectures = raw.get("architectures")
    if family is None or architectures not in (None, [], [family.architecture]):
        wrong = f"model_type={_shown(model_type)}" if family is None else f"architectures={_shown(architectures)}"
        raise ModelError(f"{file}: {wrong}: expected one of {', '.join(f.architecture for f in FAMILIES.values())}")
    fields = Fields(raw, file)
    _check_keys(fields, family)
    activation = raw.get("hidden_act", "silu")
    known = isinstance(activation, str) and activation in ACTIVATIONS
    fields.expect(known, "hidden_act", activation, f"one of {', '.join(ACTIVATIONS)}")
    heads = fields.integer("num_attention_heads")
    dim = fields.integer("hidden_size")
    experts: dict[str, Any] = _read_experts(fields) if family.moe else {}
    try:
        model = ModelConfig(
            dim=dim,
            num_layers=fields.integer("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=fields.integer_or_null("num_key_value_heads", family.num_kv_heads) or heads,
            head_dim=fields.integer_or_null("head_dim") or dim // heads,
            hidden_dim=fields.integer("intermediate_size"),
            ffn=ACTIVATIONS[activation],
            vocab_size=fields.integer("vocab_size"),
            sliding_window=fields.integer_or_null("sliding_window", family.window),
            rope_theta=_rope_theta(fields, family),
            norm_eps=fields.number("rms_norm_eps", family.norm_eps),
            tie_embeddings=fields.flag("tie_word_embeddings", False),
            **experts,
        )
    except ModelError:
        raise
    except ValueError as error:
        raise ModelError(f"{file}: as Mixwright's configuration: {error}") from error
    return model, RouterConfig(normalize=True) if family.moe else RouterConfig()


def write_config(model: ModelConfig, router: RouterConfig, dtype: str, positions: int) -> dict[str, Any]:
    """Return the `config.json` of the family that computes what the model computes.

    Args:
        dtype: dtype of the weights, as torch names it, e.g. `bfloat16`.
        positions: `max_position_embeddings`. Servers read this limit. The weights have none.

    Raises:
        ModelError: no family computes the model. The message starts with the key that none supports.
    """
    window = check_exportable(model, router)
    # transformers rejects a Llama whose number of heads does not divide its width. A Mistral without a window is the
    # same network.
    llama = window is None and model.dim % model.num_heads == 0
    name = "mixtral" if model.is_moe else "llama" if llama else "mistral"
    family = FAMILIES[name]
    kind = model.expert_kind if model.is_moe else model.ffn
    raw: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": name,
        "vocab_size": model.vocab_size,
        "hidden_size": model.dim,
        "intermediate_size": model.expert_width,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": {"swiglu": "silu", "geglu": "gelu"}[kind],
        "max_position_embeddings": positions,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_eps,
        # Both spellings, because transformers before version 5 and vLLM read the old one.
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "tie_word_embeddings": model.tie_embeddings,
        "attention_dropout": 0.0,
        "use_cache": True,
        "torch_dtype": dtype,
        "dtype": dtype,
    }
    raw |= {"sliding_window": window} if family.windowed else {}
    if family.moe:
        raw |= {"num_local_experts": model.num_experts, "num_experts_per_tok": model.top_k}
        raw |= {"output_router_logits": False, "router_jitter_noise": 0.0}
    return raw | ({"attention_bias": False, "mlp_bias": False} if name == "llama" else {})


def check_exportable(model: ModelConfig, router: RouterConfig) -> int | None:
    """Check that Llama, Mistral or Mixtral computes what the model computes, and return the window of all layers.

    `router.capacity_factor` and `router.jitter` are not checked, because generation uses neither of them.

    Raises:
        ModelError: none of them does. The message starts with the key.
    """
    windows = {model.window(layer) for layer in range(model.num_layers)}
    _expect(len(windows) == 1, "model.sliding_window", "one window for all layers", list(windows))
    kinds = ("swiglu", "geglu")
    if not model.is_moe:
        _expect(model.ffn in kinds, "model.ffn", "swiglu or geglu", model.ffn)
        return windows.pop()
    assert model.top_k is not None
    kind = "model.ffn" if model.expert_ffn is None else "model.expert_ffn"
    conditions = (
        (model.expert_kind in kinds, kind, "swiglu or geglu", model.expert_kind),
        (model.num_shared_experts == 0, "model.num_shared_experts", "0", model.num_shared_experts),
        (model.first_k_dense == 0, "model.first_k_dense", "0", model.first_k_dense),
        (model.moe_every == 1, "model.moe_every", "1", model.moe_every),
        (router.kind == "softmax_topk", "router.kind", "softmax_topk", router.kind),
        (model.top_k > 1, "model.top_k", "at least 2 (Mixtral renormalises the weights)", model.top_k),
        (router.normalizes(model.top_k), "router.normalize", "true", router.normalize),
        (router.scale == 1, "router.scale", "1", router.scale),
        # A token that can use all groups is not limited by them.
        (router.num_groups == router.topk_groups, "router.num_groups", "null", router.num_groups),
    )
    for condition in conditions:
        _expect(*condition)
    return windows.pop()


class Fields:
    """The values of a JSON object, with a check of their types.

    Every method raises ModelError if the value has another type than the method returns.

    Args:
        raw: the JSON object.
        file: its path, for messages.
    """

    def __init__(self, raw: Mapping[str, Any], file: Path) -> None:
        self.raw, self.file = raw, file

    def integer(self, key: str, default: int | None = None) -> int:
        """Return the positive integer at `key`, or `default` if the key is missing. Null is an error.

        Without a default, a missing key is an error.
        """
        value = self.raw.get(key, default)
        self.expect(type(value) is int and 1 <= value < 2**48, key, value, "an integer >= 1")
        return value

    def integer_or_null(self, key: str, default: int | None = None) -> int | None:
        """Return the positive integer at `key`, None if it is null, or `default` if the key is missing."""
        return None if self.raw.get(key, default) is None else self.integer(key, default)

    def number(self, key: str, default: float | None = None) -> float:
        """Return the positive number at `key`. The default is used as in `integer`."""
        value = self.raw.get(key, default)
        holds = type(value) in (int, float) and 0 < value <= sys.float_info.max
        self.expect(holds, key, value, "a number > 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Return the boolean at `key`, or `default` if the key is missing. Null is an error."""
        value = self.raw.get(key, default)
        self.expect(isinstance(value, bool), key, value, "true or false")
        return bool(value)

    def expect(self, holds: object, key: str, value: Any, expected: str) -> None:
        """Raise ModelError for the key, unless `holds`."""
        require(holds, ModelError, f"{self.file}: {_shown(key)}={_shown(value)}: expected {expected}")


def _check_keys(fields: Fields, family: Family) -> None:
    """Check that the family's network, with the keys that `read_config` reads, computes what the file describes."""
    raw = fields.raw
    for key, value in raw.items():
        neutral = NEUTRAL_VALUES.get(key, (value,))
        fields.expect(value in neutral, key, value, _shown(neutral[0]))
        # False and empty values can turn off what is on by default. Only null says that a key is not given.
        known = value is None or key in READ_KEYS | IGNORED_KEYS | NEUTRAL_VALUES.keys() | {"use_sliding_window"}
        fields.expect(known, key, value, "a known key; this one can change what the model computes")
    window = raw.get("sliding_window", family.window)
    fields.expect(family.windowed or window is None, "sliding_window", window, f"null in a {family.architecture}")
    # transformers ignores this key in these families, and vLLM does not.
    used = raw.get("use_sliding_window")
    fields.expect(used in (None, True) or (used is False and window is None), "use_sliding_window", used, "true")


def _read_experts(fields: Fields) -> dict[str, int]:
    """Return `num_experts` and `top_k`. transformers takes `num_experts` in place of `num_local_experts`."""
    experts = fields.integer("num_local_experts", 8)
    alias = fields.integer("num_experts", experts)
    same = alias == experts or "num_local_experts" not in fields.raw
    fields.expect(same, "num_experts", alias, f"{experts}, as num_local_experts")
    top_k = fields.integer("num_experts_per_tok", 2)
    fields.expect(top_k > 1, "num_experts_per_tok", top_k, "at least 2 (weights are renormalised to sum 1)")
    return {"num_experts": alias, "top_k": top_k}


def _rope_theta(fields: Fields, family: Family) -> float:
    """Return theta, from `rope_parameters` (transformers 5) or `rope_theta` (earlier versions).

    As in transformers, `rope_scaling` can have the content of `rope_parameters`, and is then used in its place.
    """
    nested: Mapping[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        value = fields.raw.get(key)
        if value is None:
            continue
        fields.expect(isinstance(value, Mapping), key, value, "an object")
        kind = value.get("rope_type", value.get("type", "default"))
        given = {name for name, entry in value.items() if entry is not None}
        unscaled = kind == "default" and given <= {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        fields.expect(unscaled, key, dict(value), "rope_type default, without scaling")
        fields.expect(value.get("partial_rotary_factor") in (None, 1), key, dict(value), "partial_rotary_factor 1")
        nested = value or nested
    where = Fields(nested, fields.file) if "rope_theta" in nested else fields
    return where.number("rope_theta", family.rope_theta)


def _expect(holds: bool, key: str, expected: str, value: object) -> None:
    """Raise ModelError for the key of Mixwright's configuration, unless `holds`."""
    require(holds, ModelError, f"{key}={_shown(value)}: expected {expected}, as in Llama, Mistral and Mixtral")


def _shown(value: object) -> str:
    """Return a value from a file as text for a message: one line of at most 80 characters."""
    return shorten(printable(one_line(show_value(value))), 80)
