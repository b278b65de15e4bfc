"""The keys of the rotary embedding in `config.json`: `rope_parameters`, and in earlier versions of transformers
`rope_theta` and `rope_scaling`.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

from common.errors import ModelError
from moe.config import ModelConfig, RopeScaling
from training.formats.fields import Fields

KEYS = ("rope_theta", "rope_parameters", "rope_scaling")
KINDS = ("linear", "llama3", "yarn")
"""Kinds of scaling that Mixwright computes. `default` is none."""
_NAMES = {"original_positions": "original_max_position_embeddings"}
"""Mixwright's key -> Hugging Face's, where they are different."""
_SCALING = {
    "linear": ("factor",),
    "llama3": ("factor", "original_positions", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        *("factor", "original_positions", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "attention_factor", "truncate"),
    ),
}
"""Kind of scaling -> its keys in `RopeScaling`."""


def read_rotary(fields: Fields, kinds: Collection[str] = KINDS) -> dict[str, Any]:
    """Return the keys of `ModelConfig` about the rotary embedding.

    As in transformers, `rope_scaling` can have the content of `rope_parameters`, and is then used in its place.

    Args:
        kinds: the kinds of scaling that the family has.
    """
    nested: Mapping[str, Any] = {}
    scaling = None
    for key in ("rope_parameters", "rope_scaling"):
        value = fields.raw.get(key)
        if value is not None:
            fields.expect(isinstance(value, Mapping), key, value, "an object")
        if value:
            nested, scaling = value, _read_scaling(fields, key, value, kinds)
    where = Fields(nested, fields.file) if "rope_theta" in nested else fields
    return {"rope_theta": where.number("rope_theta"), "rope_scaling": scaling}


def _read_scaling(fields: Fields, key: str, value: Mapping[str, Any], kinds: Collection[str]) -> RopeScaling | None:
    """Return the scaling in the object `value` at `key`."""
    kind = value.get("rope_type", value.get("type", "default"))
    fields.expect(kind in ("default", *kinds), key, dict(value), f"a rope_type of default, {', '.join(kinds)}")
    ours = _SCALING.get(kind, ())
    used = {_NAMES.get(name, name): name for name in ours}
    given = {name for name, entry in value.items() if entry is not None}
    expected = f"no keys beside {', '.join(used) or 'rope_theta'} with rope_type={kind}"
    allowed = used.keys() | {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    fields.expect(given <= allowed, key, dict(value), expected)
    fields.expect(value.get("partial_rotary_factor") in (None, 1), key, dict(value), "partial_rotary_factor 1")
    if kind == "default":
        return None
    inner = Fields({f"{key}.{name}": entry for name, entry in value.items()}, fields.file, {f"{key}.truncate": True})
    keys: dict[str, Any] = {"kind": kind}
    for theirs, name in used.items():
        place = f"{key}.{theirs}"
        if name == "truncate":
            keys[name] = inner.flag(place)
        elif name == "original_positions":
            keys[name] = inner.integer(place)
        elif name in ("factor", "low_freq_factor", "high_freq_factor") or inner.get(place) is not None:
            keys[name] = inner.number(place)
    try:
        return RopeScaling(**keys)
    except ValueError as error:
        raise ModelError(f"{fields.file}: {key}: {error}") from error


def write_rotary(model: ModelConfig) -> dict[str, Any]:
    """Return both spellings, because transformers before version 5 and vLLM read the old one."""
    scaling = {"rope_type": "default"}
    old = {}
    if model.rope_scaling is not None:
        keys = {name: value for name, value in asdict(model.rope_scaling).items() if value is not None}
        kind = keys.pop("kind")
        if keys.pop("truncate") is False:
            keys["truncate"] = False
        scaling = {"rope_type": kind} | {_NAMES.get(name, name): value for name, value in keys.items()}
        old = {"rope_scaling": scaling | {"type": kind}}
    return {"rope_theta": model.rope_theta, "rope_parameters": scaling | {"rope_theta": model.rope_theta}} | old
