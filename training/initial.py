"""`run.init_from=DIR`: a run that starts from the weights of a model directory, as its first step's parameters.

What the weights mean comes with them: the whole `model` section, and of `router` what decides which experts a token
gets and with what weight. Capacity, losses and jitter are the run's own.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from common.errors import ConfigError
from common.strict import to_dict

if TYPE_CHECKING:  # the command line does not wait for torch
    from training.formats.reader import ModelReader

FREE_MODEL_KEYS = ("expert_kernel", "init_std")
"""Keys of the model that say nothing about its weights."""
ROUTER_KEYS = ("kind", "normalize", "scale", "num_groups", "topk_groups")


def start_from(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The composed sections `raw` with those of the directory `run.init_from`, where it is given.

    `data.tokenizer=null` becomes the directory's tokenizer. Reads configurations and headers only.

    Args:
        overrides: what the user typed, `key=value` each: such a choice is held against the directory, while presets
            and experiments give way to it.

    Raises:
        ConfigError: a choice that contradicts the directory.
        ModelError: a directory that cannot be read.
    """
    directory = raw.get("run", {}).get("init_from")
    if not isinstance(directory, str):
        return raw
    from training.formats.reader import open_model_for_key

    source = open_model_for_key("run.init_from", directory, check=False)
    typed = {override.partition("=")[0].lstrip("+~") for override in overrides}
    model, router = to_dict(source.model), to_dict(source.router)
    inherited = {"model": {key: value for key, value in model.items() if key not in FREE_MODEL_KEYS}}
    if source.model.is_moe:
        inherited["router"] = {key: router[key] for key in ROUTER_KEYS}
    result = dict(raw)
    for section, values in inherited.items():
        for key, value in values.items():
            given = raw[section].get(key, value)
            if {section, f"{section}.{key}"} & typed and not _agrees(key, given, value, source):
                raise ConfigError(
                    f"{section}.{key}={_shown(given)}: expected {_shown(value)}, as in run.init_from={directory}"
                )
        result[section] = raw[section] | values
    if raw["data"].get("tokenizer") is None:
        if source.tokenizer is None:
            raise ConfigError(
                f"data.tokenizer=null: expected a sentencepiece model, since run.init_from={directory} has no "
                "tokenizer.model"
            )
        result["data"] = raw["data"] | {"tokenizer": str(source.tokenizer)}
    return result


def find_initial(directory: str | None, warn: Callable[[str], None]) -> str | None:
    """The path that `run.init_from` stands for: of a run, its newest whole checkpoint. One rank asks, for all.

    Raises:
        ModelError: nothing there is whole.
    """
    from training.formats.reader import open_model

    return None if directory is None else str(open_model(directory, warn=warn).path)


def _agrees(key: str, given: Any, inherited: Any, source: "ModelReader") -> bool:
    if key == "vocab_size" and given is None:
        return True  # null stands for whatever it is
    if key == "normalize":
        top_k = source.model.top_k or 1
        given, inherited = (top_k > 1 if value == "auto" else value for value in (given, inherited))
    if isinstance(inherited, float) and isinstance(given, int | float | str) and not isinstance(given, bool):
        try:
            return float(given) == inherited  # YAML reads 1e-5 as a string
        except ValueError:
            return False
    return bool(given == inherited)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_shown, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
