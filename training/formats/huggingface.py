"""`config.json` of Hugging Face's families, to and from Mixwright's configuration (`training.formats.families`).

Reading accepts the old and the new spelling of each key. A key that the family does not know raises an error, because
its value can change what the model computes. The families have different defaults for theta and epsilon, so writing
always gives both.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import ModelError, require
from moe.config import ModelConfig, RouterConfig
from training.formats.families import FAMILIES, Family
from training.formats.fields import shown
from training.formats.meaning import differences

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def family_of(raw: Mapping[str, Any], file: Path) -> Family:
    """Return the family of the model that `config.json` describes.

    Args:
        raw: the parsed content of the file.
        file: its path, for messages.

    Raises:
        ModelError: the architecture is unknown.
    """
    model_type, architectures = raw.get("model_type"), raw.get("architectures")
    remote = "; the code that auto_map names is never run" if raw.get("auto_map") else ""
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ModelError(f"{file}: model_type={shown(model_type)}: expected one of {', '.join(FAMILIES)}{remote}")
    if architectures not in (None, [], [family.architecture]):
        raise ModelError(f"{file}: architectures={shown(architectures)}: expected [{family.architecture}]{remote}")
    return family


def read_config(raw: Mapping[str, Any], file: Path) -> tuple[ModelConfig, RouterConfig]:
    """Convert `config.json` to Mixwright's configuration.

    Args:
        raw: the parsed content of the file.
        file: its path, for messages.

    Raises:
        ModelError: the architecture is unknown, or Mixwright cannot compute the model.
    """
    return family_of(raw, file).read(raw, file)


def write_config(model: ModelConfig, router: RouterConfig, dtype: str, positions: int) -> dict[str, Any]:
    """Return the `config.json` of the first family that computes what the model computes.

    Args:
        dtype: dtype of the weights, as torch names it, e.g. `bfloat16`.
        positions: `max_position_embeddings`. Servers read this limit. The weights have none.

    Raises:
        ModelError: no family computes the model. The message starts with a key that none supports: that of the family
            with the fewest such keys.
    """
    refusals: list[list[str]] = []
    families = [family for family in FAMILIES.values() if family.moe == model.is_moe]
    is_latent = model.kv_lora_rank is not None
    for family in [family for family in families if family.latent == is_latent] or families:
        raw, refused = _write(family, model, router)
        if not refused:
            return raw | {"max_position_embeddings": positions, "torch_dtype": dtype, "dtype": dtype}
        refusals.append(refused)
    raise ModelError(min(refusals, key=len)[0])


def check_family(name: str, model: ModelConfig, router: RouterConfig) -> None:
    """Check that the family with the `model_type` `name` computes what the model computes.

    Raises:
        ModelError: it does not, or there is no such family. The message starts with `family=`.
    """
    require(name in FAMILIES, ModelError, f"family={shown(name)}: expected one of {', '.join(FAMILIES)}")
    for message in _write(FAMILIES[name], model, router)[1]:
        raise ModelError(f"family={name}: {message}")


def _write(family: Family, model: ModelConfig, router: RouterConfig) -> tuple[dict[str, Any], list[str]]:
    """Return the keys of the family, and one message for each key in which they do not describe the model."""
    try:
        raw = family.write(model, router)
    except ModelError as error:
        return {}, [str(error)]
    return raw, differences(model, router, family.read(raw, Path(CONFIG)), family.architecture)
