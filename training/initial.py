"""`run.init_from=DIR`: the first step starts from the weights of a model directory.

The directory also determines what the weights mean: the section `model`, and the keys of `router` that decide which
experts a token gets and with what weight. The capacity, the losses and the jitter of the router are the run's choice.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from common.errors import ConfigError, require
from common.strict import from_dict, to_dict
from common.text import show_value
from moe.config import RopeScaling

FREE_MODEL_KEYS = ("expert_kernel", "init_std")
"""The keys of `model` that do not change what the weights mean. (`RouterConfig.MEANING` has the keys that do.)"""


def start_from(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return the composed configuration `raw`, with the sections that the directory `run.init_from` determines.

    Without `run.init_from`, `raw` is returned. If `data.tokenizer` is null, it becomes the directory's tokenizer. Only
    configuration files and the headers of weight files are read.

    Args:
        overrides: the user's `key=value` arguments. Such a value must agree with the directory. The directory replaces
            the values of presets and experiments.

    Raises:
        ConfigError: an override contradicts the directory.
        ModelError: the directory cannot be read.
    """
    directory = raw.get("run", {}).get("init_from")
    if not isinstance(directory, str):
        return raw
    from training.formats.merge import expect_no_adapters
    from training.formats.reader import open_model_for_key

    source = open_model_for_key("run.init_from", directory, check=False)
    expect_no_adapters(source, f"run.init_from={directory}")
    paths = [override.partition("=")[0].lstrip("+~").split(".") for override in overrides]
    typed = {".".join(path[:2]) for path in paths}
    model, router = to_dict(source.model), to_dict(source.router)
    inherited = {"model": {key: value for key, value in model.items() if key not in FREE_MODEL_KEYS}}
    if source.model.is_moe:
        inherited["router"] = {key: router[key] for key in type(source.router).MEANING}
    result = dict(raw)
    for section, values in inherited.items():
        for key, value in values.items():
            given = raw[section].get(key, value)
            require(
                not ({section, f"{section}.{key}"} & typed) or _agrees(key, given, value, source.model.top_k or 1),
                ConfigError,
                f"{section}.{key}={show_value(given)}: expected {show_value(value)}, as in run.init_from={directory}",
            )
        result[section] = raw[section] | values
    if raw["data"].get("tokenizer") is None:
        require(
            source.tokenizer is not None,
            ConfigError,
            f"data.tokenizer=null: expected a tokenizer, since run.init_from={directory} has no tokenizer.model and no "
            "tokenizer.json",
        )
        result["data"] = raw["data"] | {"tokenizer": str(source.directory)}
    return result


def _agrees(key: str, given: Any, inherited: Any, top_k: int) -> bool:
    if key == "vocab_size" and given is None:
        return True  # null stands for the size of the tokenizer.
    if key == "normalize":
        given, inherited = (top_k > 1 if value == "auto" else value for value in (given, inherited))
    if isinstance(inherited, Mapping) and isinstance(given, Mapping):
        return to_dict(from_dict(RopeScaling, given, "model.rope_scaling")) == inherited
    if isinstance(inherited, float) and isinstance(given, int | float | str) and not isinstance(given, bool):
        try:
            return float(given) == inherited  # YAML reads 1e-5 as a string.
        except ValueError:
            return False
    return bool(given == inherited)
