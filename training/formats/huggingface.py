"""Hugging Face's Llama, Mistral and Mixtral: `config.json` in its old and new spellings, and the names of the weights.

What a model computes must be known whole: a key that is not known here, and whose value may change the mathematics,
is refused rather than ignored. The defaults of the families differ, so that both theta and epsilon are always written.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import ModelError
from moe.config import ModelConfig, RouterConfig
from training.formats.huggingface_names import IGNORED, NEUTRAL, READ

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

ACTIVATIONS: dict[str, str] = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}
"""Their activation of the gate, and what we call the network."""


@dataclass(frozen=True)
class Family:
    """One architecture and the defaults it gives to keys that a file leaves out (transformers 5)."""

    architecture: str
    rope_theta: float
    norm_eps: float
    num_kv_heads: int | None
    """None: as many as query heads."""
    window: int | None
    windowed: bool
    """Whether it has `sliding_window` at all."""
    moe: bool


FAMILIES = {
    "llama": Family("LlamaForCausalLM", 1e4, 1e-6, None, None, windowed=False, moe=False),
    "mistral": Family("MistralForCausalLM", 1e4, 1e-6, 8, 4096, windowed=True, moe=False),
    "mixtral": Family("MixtralForCausalLM", 1e6, 1e-5, 8, None, windowed=True, moe=True),
}


def read_config(raw: Mapping[str, Any], file: Path) -> tuple[ModelConfig, RouterConfig]:
    """What `config.json`, parsed to `raw`, describes.

    Raises:
        ModelError: an unknown architecture, or a value that our model cannot compute; `file` is named in it.
    """
    kind = raw.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    named = raw.get("architectures") or []
    if family is None or (named and named != [family.architecture]):
        shown = f"model_type={_shown(kind)}" if family is None else f"architectures={_shown(named)}"
        raise ModelError(f"{file}: {shown}: expected one of {', '.join(f.architecture for f in FAMILIES.values())}")
    fields = Fields(raw, file)
    for key, value in raw.items():
        if key == "rope_scaling" and isinstance(value, Mapping) and "rope_theta" in value:
            continue  # transformers' own new spelling under the old name; `_rope_theta` checks it
        if key in NEUTRAL and value not in NEUTRAL[key]:
            raise ModelError(f"{file}: {key}={_shown(value)}: expected {_shown(NEUTRAL[key][0])}")
        if value and key not in READ | IGNORED | NEUTRAL.keys():
            raise ModelError(f"{file}: {key}={_shown(value)}: a key that may change what the model computes, unknown")
    activation = raw.get("hidden_act", "silu")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ModelError(f"{file}: hidden_act={_shown(activation)}: expected one of {', '.join(ACTIVATIONS)}")
    heads = fields.integer("num_attention_heads")
    dim = fields.integer("hidden_size")
    head_dim = fields.integer("head_dim", dim // max(heads, 1))
    experts: dict[str, Any] = {}
    if family.moe:
        experts = {"num_experts": fields.integer("num_local_experts"), "top_k": fields.integer("num_experts_per_tok")}
        if experts["top_k"] == 1:
            raise ModelError(f"{file}: num_experts_per_tok=1: expected at least 2 (weights are renormalised to sum 1)")
    try:
        model = ModelConfig(
            dim=dim,
            num_layers=fields.integer("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=fields.integer("num_key_value_heads", family.num_kv_heads or heads),
            head_dim=head_dim,
            hidden_dim=fields.integer("intermediate_size"),
            ffn=ACTIVATIONS[activation],
            vocab_size=fields.integer("vocab_size"),
            sliding_window=fields.window(family.window) if family.windowed else None,
            rope_theta=_rope_theta(fields, family),
            norm_eps=fields.number("rms_norm_eps", family.norm_eps),
            tie_embeddings=fields.flag("tie_word_embeddings", False),
            **experts,
        )
    except ModelError:
        raise
    except ValueError as error:
        raise ModelError(f"{file}: as our configuration: {error}") from error
    return model, RouterConfig(normalize=True) if family.moe else RouterConfig()


def write_config(model: ModelConfig, router: RouterConfig, dtype: str, positions: int) -> dict[str, Any]:
    """`config.json` of the family that computes what `model` does.

    Args:
        dtype: of the weights, as torch names it (`bfloat16`).
        positions: `max_position_embeddings`, a promise to servers; the weights know no limit.

    Raises:
        ModelError: no family does; the message starts with the key.
    """
    window = exportable(model, router)
    # transformers refuses a Llama whose heads do not divide its width; Mistral without a window is the same network.
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
        # Both spellings: transformers before 5, and vLLM's readers, know the old one.
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "tie_word_embeddings": model.tie_embeddings,
        "attention_dropout": 0.0,
        "use_cache": True,
        "torch_dtype": dtype,
        "dtype": dtype,
    }
    if family.windowed:
        raw["sliding_window"] = window
    if family.moe:
        raw |= {"num_local_experts": model.num_experts, "num_experts_per_tok": model.top_k}
        raw |= {"output_router_logits": False, "router_jitter_noise": 0.0}
    else:
        raw |= {"attention_bias": False, "mlp_bias": False} if name == "llama" else {}
    return raw


def exportable(model: ModelConfig, router: RouterConfig) -> int | None:
    """The window of all layers, if Llama, Mistral or Mixtral can compute what the model does.

    Capacity and jitter do not count: they act in training only.

    Raises:
        ModelError: they cannot; the message starts with the key.
    """
    windows = {model.window(layer) for layer in range(model.num_layers)}
    _expect(len(windows) == 1, "model.sliding_window", "one window for all layers", list(windows))
    kinds = ("swiglu", "geglu")
    if not model.is_moe:
        _expect(model.ffn in kinds, "model.ffn", "swiglu or geglu", model.ffn)
        return windows.pop()
    assert model.top_k is not None
    kind = "model.ffn" if model.expert_ffn is None else "model.expert_ffn"
    _expect(model.expert_kind in kinds, kind, "swiglu or geglu", model.expert_kind)
    _expect(model.num_shared_experts == 0, "model.num_shared_experts", "0", model.num_shared_experts)
    _expect(model.first_k_dense == 0, "model.first_k_dense", "0", model.first_k_dense)
    _expect(model.moe_every == 1, "model.moe_every", "1", model.moe_every)
    _expect(router.kind == "softmax_topk", "router.kind", "softmax_topk", router.kind)
    _expect(model.top_k > 1, "model.top_k", "at least 2 (Mixtral renormalises the weights)", model.top_k)
    _expect(router.normalizes(model.top_k), "router.normalize", "true", router.normalize)
    _expect(router.scale == 1, "router.scale", "1", router.scale)
    # As many groups allowed as there are is no limit.
    _expect(router.num_groups == router.topk_groups, "router.num_groups", "null", router.num_groups)
    return windows.pop()


class Fields:
    """Values of a JSON object, checked for their type on the way out; `file` goes into the messages."""

    def __init__(self, raw: Mapping[str, Any], file: Path) -> None:
        self.raw, self.file = raw, file

    def integer(self, key: str, default: int | None = None) -> int:
        """The positive integer at `key`; `default` where the key is missing or null, an error where there is none."""
        value = self.raw.get(key)
        value = default if value is None else value
        if type(value) is not int or not 1 <= value < 2**48:
            self.fail(key, self.raw.get(key), "an integer >= 1")
        return value  # type: ignore[return-value]

    def number(self, key: str, default: float | None = None) -> float:
        value = self.raw.get(key)
        value = default if value is None else value
        if type(value) not in (int, float) or not 0 < value < float("inf"):  # type: ignore[operator]
            self.fail(key, self.raw.get(key), "a number > 0")
        return float(value)  # type: ignore[arg-type]

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw.get(key, default)
        if not isinstance(value, bool):
            self.fail(key, value, "true or false")
        return bool(value)

    def window(self, default: int | None) -> int | None:
        """`sliding_window`: null means none, and a missing key the default."""
        return None if self.raw.get("sliding_window", default) is None else self.integer("sliding_window", default)

    def fail(self, key: str, value: Any, expected: str) -> None:
        raise ModelError(f"{self.file}: {key}={_shown(value)}: expected {expected}")


def _rope_theta(fields: Fields, family: Family) -> float:
    """From `rope_parameters` (transformers 5) or `rope_theta` (before)."""
    for key in ("rope_parameters", "rope_scaling"):
        nested = fields.raw.get(key)
        if nested is None:
            continue
        if not isinstance(nested, Mapping):
            fields.fail(key, nested, "an object")
        kind = nested.get("rope_type", nested.get("type", "default"))
        if kind != "default" or nested.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}:
            fields.fail(key, dict(nested), "rope_type default, without scaling")
        if nested.get("partial_rotary_factor") not in (None, 1):
            fields.fail(key, dict(nested), "partial_rotary_factor 1")
        if nested.get("rope_theta") is not None:
            return Fields(nested, fields.file).number("rope_theta")
    return fields.number("rope_theta", family.rope_theta)


def _expect(holds: bool, key: str, expected: str, value: object) -> None:
    if not holds:
        raise ModelError(f"{key}={_shown(value)}: expected {expected}: no Llama, Mistral or Mixtral has it")


def _shown(value: object) -> str:
    """`value` as JSON writes it, on one short line."""
    text = {None: "null", True: "true", False: "false"}.get(value) if value is None or isinstance(value, bool) else None
    text = re.sub(r"\s+", " ", str(value)) if text is None else text
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 80 else f"{text[:77]}..."
