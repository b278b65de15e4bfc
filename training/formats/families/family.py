"""The base class of the families, and the keys and tensor names that they have in common.

To add a family, write a subclass in a module of this package, add an instance of it to `FAMILIES`, a case to
`tests/foreign.py`, and a row to docs/formats.md.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from common.errors import ModelError
from common.text import show_value
from moe.config import ModelConfig, RouterConfig
from training.formats.families import fp8, rotary
from training.formats.families.experts import FUSED, FUSED_PARTS
from training.formats.fields import Fields
from training.formats.foreign_tensors import Format
from training.formats.meaning import expect_key

_READ = """
vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
hidden_act rms_norm_eps tie_word_embeddings sliding_window
"""
READ_KEYS = frozenset(_READ.split()) | frozenset(rotary.KEYS) | {fp8.KEY}
"""Keys that every family reads. A family also reads those in its `DEFAULTS`."""
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
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "layer_types": (None,),
    "is_causal": (True,),
    "rope_interleaved": (False, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
}
ACTIVATIONS: dict[str, str] = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}
"""Hugging Face's activation of the gate -> Mixwright's kind of feed-forward network."""

BLOCK = {
    "embedding": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "layers.N.attention_norm.weight": "model.layers.{n}.input_layernorm.weight",
    "layers.N.attention.wq.weight": "model.layers.{n}.self_attn.q_proj.weight",
    "layers.N.attention.wk.weight": "model.layers.{n}.self_attn.k_proj.weight",
    "layers.N.attention.wv.weight": "model.layers.{n}.self_attn.v_proj.weight",
    "layers.N.attention.wo.weight": "model.layers.{n}.self_attn.o_proj.weight",
    "layers.N.attention.wq.bias": "model.layers.{n}.self_attn.q_proj.bias",
    "layers.N.attention.wk.bias": "model.layers.{n}.self_attn.k_proj.bias",
    "layers.N.attention.wv.bias": "model.layers.{n}.self_attn.v_proj.bias",
    "layers.N.attention.wo.bias": "model.layers.{n}.self_attn.o_proj.bias",
    "layers.N.attention.q_norm.weight": "model.layers.{n}.self_attn.q_norm.weight",
    "layers.N.attention.k_norm.weight": "model.layers.{n}.self_attn.k_norm.weight",
    "layers.N.ffn_norm.weight": "model.layers.{n}.post_attention_layernorm.weight",
    "layers.N.ffn.w_gate.weight": "model.layers.{n}.mlp.gate_proj.weight",
    "layers.N.ffn.w_up.weight": "model.layers.{n}.mlp.up_proj.weight",
    "layers.N.ffn.w_down.weight": "model.layers.{n}.mlp.down_proj.weight",
}
"""Mixwright's name of a tensor -> its name in most families (`training.formats.foreign_tensors.Format.names`)."""
_IGNORED_TENSORS = r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)"


class Family:
    """One architecture: its keys in `config.json` to and from Mixwright's configuration, and the names of its tensors.

    The base class describes a dense model. The methods of a subclass extend those of this class.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    """The class in transformers, or in the model's remote code."""
    moe: ClassVar[bool] = False
    latent: ClassVar[bool] = False
    """Whether attention is multi-head latent attention."""
    windowed: ClassVar[bool] = False
    """Whether the key `sliding_window` has the window of every layer. Without it, the window must be null."""
    DEFAULTS: ClassVar[dict[str, Any]] = {"hidden_act": "silu", "tie_word_embeddings": False, "rope_theta": 1e4}
    """Key -> the value of a missing key, as in transformers 5, for the keys that have one."""
    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = NEUTRAL_VALUES
    """Keys that can change what is computed -> the values with which they do not. A key in `DEFAULTS` is read."""
    IGNORED: ClassVar[frozenset[str]] = frozenset(_IGNORED.split())
    """Keys that do not change what a forward pass without dropout computes."""
    any_head_dim: ClassVar[bool] = True
    """Whether a head can have another width than hidden_size / num_attention_heads."""
    qk_norm: ClassVar[str | None] = None
    """As `ModelConfig.qk_norm`."""
    BIASES: ClassVar[dict[str, str]] = {}
    """Key that turns biases on -> the value of `ModelConfig.attention_bias`."""
    SCALINGS: ClassVar[tuple[str, ...]] = rotary.KINDS
    """Kinds of scaling of the rotary embedding that the architecture has."""
    NAMES: ClassVar[dict[str, str]] = BLOCK
    """Names of the tensors, with one tensor per expert. Export writes these names, because other readers, such as vLLM,
    expect them."""

    def read(self, raw: Mapping[str, Any], file: Path) -> tuple[ModelConfig, RouterConfig]:
        """Convert `config.json` to Mixwright's configuration.

        Args:
            raw: the parsed content of the file.
            file: its path, for messages.

        Raises:
            ModelError: Mixwright cannot compute the model.
        """
        fields = Fields(raw, file, self.DEFAULTS)
        self.check_keys(fields)
        fp8.read_block(fields)
        keys = self.read_model(fields)
        try:
            return ModelConfig(**keys), self.read_router(fields)
        except ModelError:
            raise
        except ValueError as error:
            raise ModelError(f"{file}: as Mixwright's configuration: {error}") from error

    def check_keys(self, fields: Fields) -> None:
        """Check that the network, with the keys that the family reads, computes what the file describes.

        Raises:
            ModelError: a key has a value that changes what is computed, or is not known.
        """
        raw = fields.raw
        read = READ_KEYS | self.DEFAULTS.keys()
        for key, value in raw.items():
            neutral = (value,) if key in read else self.NEUTRAL.get(key, (value,))
            fields.expect(value in neutral, key, value, show_value(neutral[0]))
            # False and empty values can turn off what is on by default. Only null says that a key is not given.
            known = value is None or key in read | self.IGNORED | self.NEUTRAL.keys() | {"use_sliding_window"}
            fields.expect(known, key, value, "a known key; this one can change what the model computes")
        self.check_window(fields)

    def check_window(self, fields: Fields) -> None:
        """Check the keys about windows.

        Raises:
            ModelError: the window is not one that `read_window` reads.
        """
        window = fields.get("sliding_window")
        fields.expect(self.windowed or window is None, "sliding_window", window, f"null in a {self.architecture}")
        # transformers ignores this key in Llama, Mistral and Mixtral, and vLLM does not.
        used = fields.get("use_sliding_window")
        fields.expect(used in (None, True) or (used is False and window is None), "use_sliding_window", used, "true")

    def read_model(self, fields: Fields) -> dict[str, Any]:
        """Return the keys of `ModelConfig`."""
        activation = fields.get("hidden_act")
        known = isinstance(activation, str) and activation in ACTIVATIONS
        fields.expect(known, "hidden_act", activation, f"one of {', '.join(ACTIVATIONS)}")
        heads = fields.integer("num_attention_heads")
        dim = fields.integer("hidden_size")
        head_dim = fields.integer_or_null("head_dim") or dim // heads
        other = f"{dim // heads}, hidden_size / num_attention_heads"
        fields.expect(self.any_head_dim or head_dim == dim // heads, "head_dim", head_dim, other)
        return {
            "dim": dim,
            "num_layers": fields.integer("num_hidden_layers"),
            "num_heads": heads,
            "num_kv_heads": fields.integer_or_null("num_key_value_heads") or heads,
            "head_dim": head_dim,
            "hidden_dim": fields.integer("intermediate_size"),
            "ffn": ACTIVATIONS[activation],
            "vocab_size": fields.integer("vocab_size"),
            "sliding_window": self.read_window(fields),
            "qk_norm": self.qk_norm,
            "attention_bias": self.read_bias(fields),
            "norm_eps": fields.number("rms_norm_eps"),
            "tie_embeddings": fields.flag("tie_word_embeddings"),
        } | rotary.read_rotary(fields, self.SCALINGS)

    def read_window(self, fields: Fields) -> int | None:
        """Return the window of every layer, or None."""
        return fields.integer_or_null("sliding_window")

    def read_bias(self, fields: Fields) -> str | None:
        """Return the `attention_bias` of the model."""
        given = (kind for key, kind in self.BIASES.items() if fields.get(key) is not None and fields.flag(key))
        return next(given, None)

    def read_router(self, fields: Fields) -> RouterConfig:
        """Return the router's configuration."""
        return RouterConfig()

    def write(self, model: ModelConfig, router: RouterConfig) -> dict[str, Any]:
        """Return the keys of `config.json` that describe the model as well as this family can.

        Read again, they give a model with the same meaning (`training.formats.meaning`) only if the family computes it.

        Raises:
            ModelError: a key has a value for which the family has no word. The message starts with the key.
        """
        key = "model.ffn" if model.expert_ffn is None else "model.expert_ffn"
        kind = model.expert_kind if model.is_moe else model.ffn
        activation = {"swiglu": "silu", "geglu": "gelu"}.get(kind)
        expect_key(activation is not None, key, kind, "swiglu or geglu", self.architecture)
        raw = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": model.vocab_size,
            "hidden_size": model.dim,
            "intermediate_size": model.hidden_dim,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_heads,
            "num_key_value_heads": model.num_kv_heads,
            "hidden_act": activation,
            "initializer_range": model.init_std,
            "rms_norm_eps": model.norm_eps,
            "tie_word_embeddings": model.tie_embeddings,
            "attention_dropout": 0.0,
            "use_cache": True,
        }
        raw |= {"head_dim": model.head_dim} if self.any_head_dim else {}
        raw |= rotary.write_rotary(model)
        raw |= {key: model.attention_bias == kind for key, kind in self.BIASES.items()}
        if self.windowed:
            windows = {model.window(layer) for layer in range(model.num_layers)}
            one = "one window for all layers"
            expect_key(len(windows) == 1, "model.sliding_window", model.sliding_window, one, self.architecture)
            raw["sliding_window"] = model.window(0)
        return raw

    @property
    def per_expert(self) -> Format:
        """The tensor names of files with one tensor per expert."""
        return Format(self.NAMES, ignored=_IGNORED_TENSORS, tied_head=BLOCK["head.weight"])

    @property
    def fused(self) -> Format:
        """The tensor names of files with stacked experts."""
        return self.per_expert._replace(names=self.NAMES | FUSED, parts=FUSED_PARTS)

    def format_of(self, names: Iterable[str], raw: Mapping[str, Any]) -> Format:
        """Return the format that a file with these tensor names has.

        Args:
            raw: the parsed `config.json`, which `read` accepts.
        """
        is_fused = self.moe and any(name.endswith(".mlp.experts.gate_up_proj") for name in names)
        return self.fused if is_fused else self.per_expert
