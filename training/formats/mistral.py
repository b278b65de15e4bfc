"""Mistral's own format: `params.json` and `consolidated*.safetensors` (github.com/mistralai/mistral-inference).

It differs from Hugging Face's format in names, and in the order of the rows of wq and wk: the two rows of a rotary pair
are neighbours.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import ModelError
from moe.config import ModelConfig, RouterConfig
from training.formats.fields import Fields
from training.formats.foreign_tensors import Format
from training.formats.meaning import differences, expect_key

CONFIG = "params.json"
INDEX = "consolidated.safetensors.index.json"
SINGLE = "consolidated.safetensors"
NAME = "format=mistral"
"""How messages name the format."""

_READ = """
dim n_layers head_dim hidden_dim n_heads n_kv_heads norm_eps vocab_size rope_theta sliding_window moe tied_embeddings
"""
_IGNORED = "max_batch_size max_seq_len max_position_embeddings dtype"
KNOWN_KEYS = frozenset(f"{_READ} {_IGNORED}".split())
NEUTRAL_VALUES = {"model_type": "transformer", "activation": "silu"}
"""Keys that can change what is computed -> the value with which they do not."""

FORMAT = Format(
    {
        "embedding": "tok_embeddings.weight",
        "norm.weight": "norm.weight",
        "head.weight": "output.weight",
        "layers.N.attention_norm.weight": "layers.{n}.attention_norm.weight",
        "layers.N.attention.wq.weight": "layers.{n}.attention.wq.weight",
        "layers.N.attention.wk.weight": "layers.{n}.attention.wk.weight",
        "layers.N.attention.wv.weight": "layers.{n}.attention.wv.weight",
        "layers.N.attention.wo.weight": "layers.{n}.attention.wo.weight",
        "layers.N.ffn_norm.weight": "layers.{n}.ffn_norm.weight",
        "layers.N.ffn.w_gate.weight": "layers.{n}.feed_forward.w1.weight",
        "layers.N.ffn.w_down.weight": "layers.{n}.feed_forward.w2.weight",
        "layers.N.ffn.w_up.weight": "layers.{n}.feed_forward.w3.weight",
        "layers.N.ffn.router.weight": "layers.{n}.feed_forward.gate.weight",
        "layers.N.ffn.experts.w_gate": "layers.{n}.feed_forward.experts.{e}.w1.weight",
        "layers.N.ffn.experts.w_down": "layers.{n}.feed_forward.experts.{e}.w2.weight",
        "layers.N.ffn.experts.w_up": "layers.{n}.feed_forward.experts.{e}.w3.weight",
    },
    interleaved=frozenset({"layers.N.attention.wq.weight", "layers.N.attention.wk.weight"}),
    tied_head="output.weight",
)


def read_params(raw: Mapping[str, Any], file: Path) -> tuple[ModelConfig, RouterConfig]:
    """Convert `params.json` to Mixwright's configuration.

    Args:
        raw: the parsed content of the file.
        file: its path, for messages.

    Raises:
        ModelError: Mixwright cannot compute the model.
    """
    raw = {key: value for key, value in raw.items() if value is not None}  # Null says that a key is not given.
    # The defaults of mistral-inference at the time when files without theta were published.
    fields = Fields(raw, file, {"rope_theta": 1e4 if "sliding_window" in raw else 1e6, "tied_embeddings": False})
    for key, value in raw.items():
        neutral = NEUTRAL_VALUES.get(key, value)
        fields.expect(value == neutral, key, value, neutral)
        known = key in KNOWN_KEYS | NEUTRAL_VALUES.keys()
        fields.expect(known, key, value, "a key of Mistral's or Mixtral's params.json")
    moe: dict[str, Any] = {}
    if "moe" in raw:
        fields.expect(isinstance(raw["moe"], Mapping), "moe", raw["moe"], "an object")
        inner = Fields({f"moe.{key}": value for key, value in raw["moe"].items()}, file)
        moe = {"num_experts": inner.integer("moe.num_experts"), "top_k": inner.integer("moe.num_experts_per_tok")}
        for key in inner.raw.keys() - {"moe.num_experts", "moe.num_experts_per_tok"}:
            inner.expect(False, key, inner.raw[key], "num_experts and num_experts_per_tok only")
        top_k = moe["top_k"]
        inner.expect(top_k > 1, "moe.num_experts_per_tok", top_k, "at least 2 (weights are renormalised to sum 1)")
    try:
        model = ModelConfig(
            dim=fields.integer("dim"),
            num_layers=fields.integer("n_layers"),
            num_heads=fields.integer("n_heads"),
            num_kv_heads=fields.integer("n_kv_heads"),
            head_dim=fields.integer("head_dim"),
            hidden_dim=fields.integer("hidden_dim"),
            vocab_size=fields.integer("vocab_size"),
            sliding_window=fields.integer_or_null("sliding_window"),
            rope_theta=fields.number("rope_theta"),
            norm_eps=fields.number("norm_eps"),
            tie_embeddings=fields.flag("tied_embeddings"),
            **moe,
        )
    except ModelError:
        raise
    except ValueError as error:
        raise ModelError(f"{file}: as Mixwright's configuration: {error}") from error
    return model, RouterConfig(normalize=True) if moe else RouterConfig()


def write_params(model: ModelConfig, router: RouterConfig) -> dict[str, Any]:
    """Return the `params.json` of the model.

    Raises:
        ModelError: the format cannot describe the model. The message starts with the key that it does not support.
    """
    key = "model.ffn" if model.expert_ffn is None else "model.expert_ffn"
    kind = model.expert_kind if model.is_moe else model.ffn
    expect_key(kind == "swiglu", key, kind, "swiglu", NAME)
    windows = {model.window(layer) for layer in range(model.num_layers)}
    one = "one window for all layers"
    expect_key(len(windows) == 1, "model.sliding_window", model.sliding_window, one, NAME)
    top_k = model.top_k
    expect_key(top_k != 1, "model.top_k", top_k, "at least 2 (weights are renormalised)", NAME)
    raw: dict[str, Any] = {
        "dim": model.dim,
        "n_layers": model.num_layers,
        "head_dim": model.head_dim,
        "hidden_dim": model.expert_width if model.is_moe else model.hidden_dim,
        "n_heads": model.num_heads,
        "n_kv_heads": model.num_kv_heads,
        "norm_eps": model.norm_eps,
        "vocab_size": model.vocab_size,
        "rope_theta": model.rope_theta,
    }
    moe = {"num_experts": model.num_experts, "num_experts_per_tok": top_k} if model.is_moe else None
    optional = {"sliding_window": model.window(0), "tied_embeddings": model.tie_embeddings or None, "moe": moe}
    raw |= {key: value for key, value in optional.items() if value is not None}
    for message in differences(model, router, read_params(raw, Path(CONFIG)), NAME):
        raise ModelError(message)
    return raw
