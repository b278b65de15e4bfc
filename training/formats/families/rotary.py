"""The keys of the rotary embedding in `config.json`: `rope_parameters`, and in earlier versions of transformers
`rope_theta` and `rope_scaling`.
"""

from collections.abc import Mapping
from typing import Any

from moe.config import ModelConfig
from training.formats.fields import Fields

KEYS = ("rope_theta", "rope_parameters", "rope_scaling")


def read_rotary(fields: Fields) -> dict[str, Any]:
    """Return the keys of `ModelConfig` about the rotary embedding.

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
    return {"rope_theta": where.number("rope_theta")}


def write_rotary(model: ModelConfig) -> dict[str, Any]:
    """Return both spellings, because transformers before version 5 and vLLM read the old one."""
    return {
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
    }
